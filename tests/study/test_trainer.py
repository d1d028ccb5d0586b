from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from keytoken.attribution.views import ModelInput
from keytoken.errors import NonFiniteError
from keytoken.schema import MethodConfig
from keytoken.study.policy import Model
from keytoken.study.prompts import Prompt
from keytoken.study.settings import Overlong, TrainSettings
from keytoken.study.trainer import Trainer

Settings = Callable[..., TrainSettings]
EPSILON = 1e-4  # of the method in conftest


class Graded(Trainer):
    """A trainer whose answers earn something: an untrained model has no format to be rewarded."""

    def score(self, prompt: Prompt, ids: Tensor) -> dict[str, float]:
        reward = float(int(ids.sum()) % 3)
        return {"score": reward, "acc": float(reward > 0), "format": 0.0}


def plain_log_prob(model: Model, row: ModelInput, keep: Tensor | None = None) -> Tensor:
    """[R, V] of one row, by the model's own forward."""
    keep = torch.ones_like(row.input_ids, dtype=torch.bool) if keep is None else keep
    media = row.media if bool(keep.all()) else {}
    length = row.input_ids.numel() - row.prompt_length
    hidden = model.model(
        input_ids=row.input_ids[None, keep],
        position_ids=row.position_ids[:, None, keep],
        use_cache=False,
        **media,
    ).last_hidden_state[0, -length - 1 : -1]
    return model.lm_head(hidden).log_softmax(-1)


def independent_gradient(
    model: Model,
    rows: Sequence[ModelInput],
    rewards: Tensor,
    weight: Callable[[ModelInput, Tensor], Tensor],
    reference: Model | None = None,
    beta: float = 0.0,
) -> dict[str, Tensor]:
    """-1/B sum_i 1/|o_i| sum_t (w A log p - beta k3), one row after the other; groups of four."""
    model.zero_grad()
    groups = rewards.view(-1, 4)
    std = groups.std(dim=1, keepdim=True)
    advantages = ((groups - groups.mean(dim=1, keepdim=True)) / (std + EPSILON)).flatten()
    loss = torch.zeros(())
    for row, advantage in zip(rows, advantages, strict=True):
        answer = row.input_ids[row.prompt_length :]
        log_p = plain_log_prob(model, row)
        chosen = log_p[torch.arange(len(answer)), answer]
        terms = -advantage * weight(row, log_p.detach()) * chosen
        if reference is not None:
            with torch.no_grad():
                other = plain_log_prob(reference, row)[torch.arange(len(answer)), answer]
            terms = terms + beta * ((other - chosen).exp() - (other - chosen) - 1)
        loss = loss + terms.mean() / len(rows)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Model, expected: dict[str, Tensor]) -> None:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=2e-5 * max(largest, 1.0)), name


def gradient_of_a_step(model: Model, trainer: Trainer, **independent: Any) -> None:
    """The gradient that a step leaves behind (rate 0, so the weights stay), against the one above."""
    scored = trainer.collect(1)
    trainer.step(1)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    expected = independent_gradient(model, scored.rows, scored.rewards, **independent)
    for name, parameter in model.named_parameters():
        parameter.grad = found.get(name)
    assert_same(model, expected)


def every(row: ModelInput, log_p: Tensor) -> Tensor:
    return torch.ones(len(log_p))


def test_gradient_of_all_tokens_with_a_reference(
    model: Model,
    prompts: tuple[Prompt, ...],
    settings: Settings,
    method: Callable[..., MethodConfig],
) -> None:
    trainer = Graded(model, prompts, settings(method=method({"kl_coef": 0.3}), warm_up=5))
    assert trainer.reference is not None
    with torch.no_grad():
        trainer.reference.lm_head.weight.mul_(1.2)
    gradient_of_a_step(model, trainer, weight=every, reference=trainer.reference, beta=0.3)


def test_gradient_of_selected_tokens(
    model: Model,
    prompts: tuple[Prompt, ...],
    settings: Settings,
    method: Callable[..., MethodConfig],
) -> None:
    """The top half by entropy, and the top half by what the clip does; text has its entropy only."""

    def union(row: ModelInput, log_p: Tensor) -> Tensor:
        answer = torch.arange(len(log_p)), row.input_ids[row.prompt_length :]
        entropy = -(log_p.exp() * log_p).sum(-1)
        kept = entropy >= torch.quantile(entropy, 0.5)
        if row.media:
            text = row.input_ids != model.config.video_token_id
            with torch.no_grad():
                score = (log_p[answer] - plain_log_prob(model, row, text)[answer]).abs()
            kept = kept | (score >= torch.quantile(score, 0.5))
        return kept.float()

    # Two with a clip, one without.
    chosen = (prompts[0], prompts[3], prompts[6])
    trainer = Graded(model, chosen, settings(method=method(visual_ratio=0.5, entropy_ratio=0.5), warm_up=5))
    gradient_of_a_step(model, trainer, weight=union)


def test_same_seed_same_numbers_and_another_seed_others(
    weights: dict[str, Tensor],
    model: Model,
    prompts: tuple[Prompt, ...],
    settings: Settings,
    method: Callable[..., MethodConfig],
) -> None:
    found = []
    for seed in (1, 1, 2):
        model.load_state_dict(weights)
        arm = settings(method=method(visual_ratio=0.2, temporal_ratio=0.2, entropy_ratio=0.2), seed=seed)
        trainer = Graded(model, prompts, arm)
        steps = [trainer.step(number) for number in (1, 2)]
        clean = [{k: v for k, v in step.items() if not k.startswith("cpu_s/")} for step in steps]
        found.append((clean, model.lm_head.weight.detach().clone()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert found[0][0] != found[2][0]
    assert not torch.equal(found[0][1], weights["lm_head.weight"])


def test_arms_are_paired(
    model: Model,
    prompts: tuple[Prompt, ...],
    settings: Settings,
    method: Callable[..., MethodConfig],
) -> None:
    """Whatever the method, a step asks the same prompts and, from the same weights, gets the same answers."""
    arms = (method(), method(entropy_ratio=0.2), method({"kl_coef": 0.1}))
    batches = [Graded(model, prompts, settings(method=arm)).collect(4) for arm in arms]
    filtered = Graded(model, prompts, settings(filter_metric="acc"), max_refills=0).collect(4)
    for batch in batches[1:]:
        for row, other in zip(batches[0].rows, batch.rows, strict=True):
            assert row.prompt == other.prompt and torch.equal(row.input_ids, other.input_ids)
    assert {row.prompt for row in filtered.rows} <= {row.prompt for row in batches[0].rows}


def test_prompts_come_in_whole_rounds(model: Model, prompts: tuple[Prompt, ...], settings: Settings) -> None:
    """Eight prompts, three a step: eight steps visit each three times, in another order each round."""
    trainer = Graded(model, prompts, settings())
    asked = [prompt.uid for step in range(1, 9) for prompt in trainer._first_prompts(step)]
    rounds = [asked[first : first + 8] for first in (0, 8, 16)]
    assert all(sorted(each) == sorted(prompt.uid for prompt in prompts) for each in rounds)
    assert rounds[0] != rounds[1]


class Uniform(Trainer):
    """Answers to all prompts but one score alike."""

    lucky = ""

    def score(self, prompt: Prompt, ids: Tensor) -> dict[str, float]:
        right = float(prompt.uid == self.lucky and int(ids[0]) % 2)
        return {"score": right, "acc": right, "format": 0.0}


def test_dynamic_sampling_replaces_what_teaches_nothing_up_to_its_bound(
    model: Model, prompts: tuple[Prompt, ...], settings: Settings
) -> None:
    trainer = Uniform(model, prompts, settings(filter_metric="acc"), max_refills=2)
    nothing = trainer.collect(1)
    assert len(nothing.rows) == 12 and nothing.num_prompts == 9, "the first batch, after two refills"
    metrics = trainer.step(1)
    assert metrics["answers_with_signal"] == 0 and metrics["grad_norm"] == 0
    trainer.lucky = nothing.rows[4].prompt
    some = trainer.collect(1)
    assert {row.prompt for row in some.rows} == {trainer.lucky}
    for first in range(0, len(some.rows), 4):
        assert len(set(some.accuracy[first : first + 4].tolist())) == 2
    assert some.num_sampled > sum(row.input_ids.numel() - row.prompt_length for row in some.rows)


def test_the_reward_is_the_recipes_own(model: Model, prompts: tuple[Prompt, ...], settings: Settings) -> None:
    from keytoken.study.prompts import processor

    overlong = Overlong(max_tokens=12, buffer=6, factor=1.0)
    trainer = Trainer(model, prompts, settings(overlong=overlong))
    prompt = prompts[0]
    text = f"<think> so . </think> <answer> {prompt.letter} </answer>"
    ids = torch.tensor([*processor().tokenizer(text)["input_ids"], trainer.end])
    score = trainer.score(prompt, ids)
    assert (score["acc"], score["format"]) == (1.0, 1.0)
    assert score["score"] == pytest.approx(2.0 - (ids.numel() - 6) / 6)
    wrong = trainer.score(prompt, ids[:-2])
    assert (wrong["acc"], wrong["format"]) == (0.0, 0.0)


def test_a_gradient_that_is_no_number_is_named(
    model: Model, prompts: tuple[Prompt, ...], settings: Settings
) -> None:
    trainer = Graded(model, prompts, settings())
    for parameter in model.lm_head.parameters():
        parameter.register_hook(lambda gradient: gradient * np.nan)
    with pytest.raises(NonFiniteError, match=r"Step 2.*study\.lr, now 0\.001"):
        trainer.step(2)
