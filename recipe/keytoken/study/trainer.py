"""One run's training in one process: sample, score, weigh tokens, update; no Ray, no engine.

A step is that of the real stack with one update a batch, in plain torch on one model: the counterfactual
views, the methods, the loss, the advantages and the reward are the same functions. What is different: answers
come from the model's own KV-cache loop instead of vLLM, and because the policy that samples is the one that
trains, its log-probs are the old ones as well, so every ratio is 1 and no clipping acts.

Arms of one seed are paired: they see the same prompts in the same order, and the noise behind every answer is
the same (:func:`keytoken.study.policy.sample`).

Axes: B answers of a batch, T tokens of the longest one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.types import Outcomes, TokenWeights
from keytoken.attribution.views import ModelInput
from keytoken.attribution.views.frames import step_seed
from keytoken.errors import NonFiniteError
from keytoken.losses.advantage import group_advantages
from keytoken.losses.policy import PolicyLoss, policy_loss
from keytoken.rewards.length import overlong_penalty
from keytoken.rewards.score import compute_score
from keytoken.study import passes
from keytoken.study.policy import FORBIDDEN, Model, sample
from keytoken.study.prompts import Prompt, processor
from keytoken.study.settings import TrainSettings

_ORDER, _SAMPLING, _REFILL = 51, 52, 53  # keep a run's random streams apart
PROBLEM_TYPE = "multiple choice"


@dataclass(frozen=True, slots=True)
class Scored:
    """Answers with what they earned; answers to one prompt follow one another.

    Attributes:
        rows: [B] prompts with their answers.
        rewards: [B] float.
        accuracy: [B] float in [0, 1].
        well_formed: [B] float, 1 where the format is right.
        num_sampled: Tokens sampled to get them, those of dropped prompts included.
        num_prompts: Prompts answered to get them, dropped ones included.
    """

    rows: list[ModelInput]
    rewards: Tensor
    accuracy: Tensor
    well_formed: Tensor
    num_sampled: int
    num_prompts: int


class Trainer:
    """The updates of one run.

    Args:
        model: The policy; trained in place.
        prompts: What is trained on.
        settings: Method, rates, sizes.
        max_refills: With dynamic sampling, most further batches of prompts in one step.
    """

    def __init__(
        self, model: Model, prompts: Sequence[Prompt], settings: TrainSettings, max_refills: int = 3
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.settings = settings
        self.max_refills = max_refills
        self.context = passes.view_context(model, settings.method, settings.shuffle_seed)
        needs_reference = settings.method.loss.kl_coef > 0.0
        self.reference = copy.deepcopy(model).requires_grad_(False) if needs_reference else None
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        warm_up = settings.warm_up
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: step / warm_up if step < warm_up else 1.0
        )
        tokenizer = processor().tokenizer
        self.end = int(tokenizer.eos_token_id)
        self.forbidden = tokenizer.convert_tokens_to_ids(list(FORBIDDEN))
        self.seconds: dict[str, float] = {}

    def step(self, number: int) -> dict[str, float]:
        """One update; ``number`` counts from 1. Returns its metrics."""
        self.seconds = {}
        with self._timed("sample"):
            scored = self.collect(number)
        with self._timed("real_pass"):
            real = passes.real_pass(self.model, scored.rows, self.settings.temperature)
        views, num_view_tokens = {}, 0
        with self._timed("views"):
            for name in self.settings.method.views:
                *view, read = passes.view_pass(
                    self.model, scored.rows, name, self.context, self.settings.temperature
                )
                views[name] = (view[0], view[1])
                num_view_tokens += read
        with self._timed("select"):
            result, advantages = self._weigh(number, scored, real, views)
        with self._timed("reference"):
            reference = self._reference(scored.rows, real.mask)
        with self._timed("update"):
            loss = self._loss(real, result, advantages, reference, views)
            norm = self._update(number, loss)
        lengths = [row.input_ids.numel() for row in scored.rows]
        return {
            **_outcome_metrics(scored, real, result, advantages),
            **{key: value for key, value in result.metrics.items() if key.startswith("attribution/")},
            "loss": float(loss.loss.detach()),
            "kl": float(loss.kl_loss),
            "grad_norm": norm,
            "tokens/sampled": float(scored.num_sampled),
            "tokens/answers": float(real.mask.sum()),
            "tokens/trained": float(result.selected.sum()),
            "tokens/real_pass": float(sum(lengths)),
            "tokens/views": float(num_view_tokens),
            **{f"cpu_s/{name}": value for name, value in self.seconds.items()},
        }

    def collect(self, number: int) -> Scored:
        """The answers of a step; with dynamic sampling, groups whose answers all score alike are replaced.

        A replacement comes from the same prompts by a stream of its own, so that the first batch of a step is
        the same for all arms. After ``max_refills`` further batches the step goes on with what it has: with
        fewer prompts, or, if none is left, with the first ones, which then teach nothing.
        """
        size, count = self.settings.num_prompts, self.settings.num_answers
        first = self._answer(self._first_prompts(number), [self.settings.seed, _SAMPLING, number])
        if self.settings.filter_metric is None:
            return first
        batches = [_informative(first, count, self.settings.filter_metric)]
        sampled, asked = first.num_sampled, first.num_prompts
        for refill in range(self.max_refills):
            missing = size - sum(len(batch.rows) for batch in batches) // count
            if missing == 0:
                break
            stream = [self.settings.seed, _REFILL, number, refill]
            drawn = np.random.default_rng(stream).choice(len(self.prompts), missing, replace=False)
            more = self._answer([self.prompts[i] for i in drawn], [*stream, 1])
            sampled, asked = sampled + more.num_sampled, asked + more.num_prompts
            batches.append(_informative(more, count, self.settings.filter_metric))
        return _joined(batches if any(batch.rows for batch in batches) else [first], sampled, asked)

    def _first_prompts(self, number: int) -> list[Prompt]:
        """The prompts of a step: all of them in a seeded order, then all again in another one."""
        size = self.settings.num_prompts
        places = range((number - 1) * size, number * size)
        visits = [divmod(place, len(self.prompts)) for place in places]
        orders = {epoch: self._order(epoch) for epoch, _ in visits}
        return [self.prompts[orders[epoch][place]] for epoch, place in visits]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.settings.seed, _ORDER, epoch]).permutation(len(self.prompts))

    def _answer(self, prompts: Sequence[Prompt], stream: list[int]) -> Scored:
        """Sample and score; the noise of a prompt depends on the stream and its place in the batch."""
        count, limit = self.settings.num_answers, self.settings.max_tokens
        noise = np.random.default_rng(stream).random((len(prompts), count, limit))
        answers = sample(
            self.model,
            prompts,
            noise,
            temperature=self.settings.temperature,
            end=self.end,
            forbidden=self.forbidden,
        )
        pairs = [(prompt, ids) for prompt, group in zip(prompts, answers, strict=True) for ids in group]
        scores = [self.score(prompt, ids) for prompt, ids in pairs]
        return Scored(
            rows=[prompt.with_answer(ids) for prompt, ids in pairs],
            rewards=torch.tensor([score["score"] for score in scores]),
            accuracy=torch.tensor([score["acc"] for score in scores]),
            well_formed=torch.tensor([score["format"] for score in scores]),
            num_sampled=sum(ids.numel() for _, ids in pairs),
            num_prompts=len(prompts),
        )

    def score(self, prompt: Prompt, ids: Tensor) -> dict[str, float]:
        """The reward of one answer, with the penalty for overlong ones if the arm has it."""
        text = processor().tokenizer.decode(ids, skip_special_tokens=True)
        info = {"problem_type": PROBLEM_TYPE, "response_length": ids.numel()}
        weights = self.settings.reward_weights
        score = compute_score("keytoken_demo", text, prompt.letter, info, **weights)
        overlong = self.settings.overlong
        if overlong is not None:
            score["score"] += overlong_penalty(
                ids.numel(), overlong.max_tokens, overlong.buffer, overlong.factor
            )
        return score

    def _weigh(
        self,
        number: int,
        scored: Scored,
        real: passes.RealPass,
        views: dict[str, tuple[Tensor, Tensor]],
    ) -> tuple[TokenWeights, Tensor]:
        """Token weights [B, T] and advantages [B]."""
        settings = self.settings
        group = torch.arange(len(scored.rows)) // settings.num_answers
        outcomes = Outcomes(rewards=scored.rewards, divide_by_std=settings.divide_by_std)
        signals = passes.signals_of(
            real,
            views,
            settings.method,
            group=group,
            outcomes=outcomes,
            temperature=settings.temperature,
            seed=step_seed(settings.seed, number),
            step=number,
        )
        result = compute_token_weights(signals, settings.method)
        if result.advantages is not None:
            return result, result.advantages
        epsilon = settings.method.advantage_epsilon
        return result, group_advantages(scored.rewards, group, epsilon, settings.divide_by_std)

    def _reference(self, rows: Sequence[ModelInput], mask: Tensor) -> Tensor | None:
        """[B, T] log-probs of the policy that the run began with; None if the loss has no KL term."""
        if self.reference is None:
            return None
        return passes.padded(passes.log_probs(self.reference, rows, self.settings.temperature), mask)

    def _loss(
        self,
        real: passes.RealPass,
        result: TokenWeights,
        advantages: Tensor,
        reference: Tensor | None,
        views: dict[str, tuple[Tensor, Tensor]],
    ) -> PolicyLoss:
        config, old = self.settings.method.loss, real.log_prob.detach()
        masked = None
        if config.perception_coef > 0.0:
            log_prob, applies = views[self.settings.method.view.visual]
            masked = torch.where(applies[:, None], log_prob, old)
        return policy_loss(
            log_prob=real.log_prob,
            old_log_prob=old,
            advantages=advantages[:, None] * real.mask,
            weights=result.weights,
            mask=real.mask,
            config=config,
            ref_log_prob=reference,
            masked_log_prob=masked,
        )

    def _update(self, number: int, loss: PolicyLoss) -> float:
        """One step of AdamW; returns the norm of the gradient before it was clipped.

        Raises:
            NonFiniteError: The gradient holds NaN or infinity.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip))
        if not np.isfinite(norm):
            raise NonFiniteError(
                f"Step {number}: the gradient's norm is {norm}; lower study.lr, now {self.settings.lr:g}."
            )
        self.optimizer.step()
        self.schedule.step()
        return norm

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = time.process_time() - start


def _informative(scored: Scored, count: int, metric: str) -> Scored:
    """The groups of ``count`` answers that differ in a metric."""
    values = {"acc": scored.accuracy, "format": scored.well_formed, "reward": scored.rewards}[metric]
    values = values.view(-1, count)
    kept = (values.amax(dim=1) > values.amin(dim=1)).repeat_interleave(count)
    return Scored(
        rows=[row for row, keep in zip(scored.rows, kept.tolist(), strict=True) if keep],
        rewards=scored.rewards[kept],
        accuracy=scored.accuracy[kept],
        well_formed=scored.well_formed[kept],
        num_sampled=0,
        num_prompts=0,
    )


def _joined(batches: Sequence[Scored], num_sampled: int, num_prompts: int) -> Scored:
    return Scored(
        rows=[row for batch in batches for row in batch.rows],
        rewards=torch.cat([batch.rewards for batch in batches]),
        accuracy=torch.cat([batch.accuracy for batch in batches]),
        well_formed=torch.cat([batch.well_formed for batch in batches]),
        num_sampled=num_sampled,
        num_prompts=num_prompts,
    )


def _outcome_metrics(
    scored: Scored, real: passes.RealPass, result: TokenWeights, advantages: Tensor
) -> dict[str, float]:
    """What the answers of a step earned and how sure the policy was of them; entropy in nats a token."""
    lengths = real.mask.sum(dim=1).double()
    weight = (result.weights * real.mask).sum()
    return {
        "reward": float(scored.rewards.double().mean()),
        "accuracy": float(scored.accuracy.double().mean()),
        "format": float(scored.well_formed.double().mean()),
        "entropy": float(real.entropy.double().sum() / lengths.sum()),
        "length": float(lengths.mean()),
        "weight_per_token": float(weight / lengths.sum()),
        "answers_with_signal": float((advantages != 0).double().mean()),
        "prompts_asked": float(scored.num_prompts),
        "answers_trained": float(len(scored.rows)),
    }
