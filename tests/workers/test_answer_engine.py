"""``keytoken.kernels.head=fused`` in verl's real actor and reference workers, against verl's own head.

The claim is equality: log-probs, entropies, loss and the gradient of every parameter. What differs is what
the head computes: answers instead of everything, and, backwards, tokens with a gradient instead of answers.
"""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from keytoken import fields
from keytoken.demo.model import model_config
from keytoken.errors import ConfigurationError
from keytoken.losses.policy import loss_totals
from keytoken.schema import LossConfig

LOSS = LossConfig(
    normalizer="selected",
    level="response",
    mask_kl=True,
    kl_coef=0.04,
    kl_clamp="verl",
    clip_low=0.2,
    clip_high=0.2,
)
UNMASKED = dataclasses.replace(LOSS, mask_kl=False)
TEMPERATURE = 0.8
EXACT = {"atol": 1e-6, "rtol": 1e-6}
# A pack computes the same sums in another order; tests/prefix holds its log-probs to 1e-5 of the truth.
CLOSE = {False: EXACT, True: {"atol": 1e-5, "rtol": 1e-5}}
BOTH_WAYS = pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory, encoder: Any) -> Path:
    """The tiny model with one matrix for words in and words out."""
    config = model_config(encoder.processor.tokenizer)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration._from_config(config).save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    return folder


def role_worker(run_config: Any, role: str, model: Path | None = None, **settings: Any) -> Any:
    """A worker of the separate mode as verl builds it, with ``settings`` of its model."""
    from keytoken.workers.actors import SeparateActorWorker

    config = copy.deepcopy(OmegaConf.to_container(run_config.actor_rollout_ref, resolve=True))
    if model is not None:
        config["model"]["path"] = str(model)
    config["model"].update(settings)
    built = SeparateActorWorker(OmegaConf.create(config), role=role)
    built.init_model()
    return built


@pytest.fixture(scope="module")
def actor(worker: Any, run_config: Any) -> Any:
    """The process group is the attribution worker's."""
    return role_worker(run_config, "actor")


@pytest.fixture(scope="module", params=["untied", "tied"])
def any_actor(request: pytest.FixtureRequest, actor: Any, run_config: Any) -> Any:
    if request.param == "untied":
        return actor
    return role_worker(run_config, "actor", request.getfixturevalue("tied_model"))


def ragged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def padded(values: Tensor) -> Tensor:
    return values.to_padded_tensor(0.0)


@pytest.fixture(scope="session")
def update_batch(as_batch: Callable[..., TensorDict]) -> Callable[..., TensorDict]:
    """The batch of an update: everything the loss reads, random, with 40% of the tokens selected."""

    def build(examples: list[Any], *, share: float = 0.4, seed: int = 0) -> TensorDict:
        draw = torch.Generator().manual_seed(seed)
        sizes = [example.response_length for example in examples]

        def noise(scale: float) -> Tensor:
            return ragged([scale * torch.randn(size, generator=draw) for size in sizes])

        data = as_batch(examples)
        data["prompts"] = ragged([e.input_ids[: len(e.input_ids) - e.response_length] for e in examples])
        data["response_mask"] = ragged([torch.ones(size, dtype=torch.long) for size in sizes])
        data["loss_mask"] = data["response_mask"]
        data["advantages"] = noise(1.0)
        data["noise"], data["reference_noise"] = noise(0.2), noise(0.3)
        chosen = [(torch.rand(size, generator=draw) < share).float() for size in sizes]
        data[fields.TOKEN_WEIGHT] = ragged(chosen)
        return data

    return build


def prepared(data: TensorDict, *, packed: bool, size: int, **extra: Any) -> TensorDict:
    from keytoken.verl_adapter.compat import tensordict_utils

    data = data.copy()
    settings = {
        "temperature": TEMPERATURE,
        "use_remove_padding": packed,
        "use_fused_kernels": False,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": size,
        "calculate_entropy": True,
        **extra,
    }
    tensordict_utils.assign_non_tensor(data, **settings)
    return data


def select_head(worker: Any, **settings: Any) -> None:
    from keytoken.verl_adapter.answer_engine import HeadSettings, set_head

    set_head(worker.engine, HeadSettings(**settings))


def infer(actor: Any, data: TensorDict, *, packed: bool, size: int, **head: Any) -> dict[str, Tensor]:
    """Old log-probs and entropies of the answers, ragged [B, T], by verl's method."""
    from verl.workers.utils.padding import response_from_nested

    select_head(actor.actor, **head)
    output = actor.compute_log_prob(prepared(data, packed=packed, size=size, compute_loss=False))
    return {
        name: response_from_nested(output[name], data["response_mask"]) for name in ("log_probs", "entropy")
    }


def with_old_log_probs(data: TensorDict, log_probs: Tensor) -> TensorDict:
    """Old and reference log-probs near the current ones, so that ratios are clipped here and there."""
    data = data.copy()
    for name, noise in (("old_log_probs", "noise"), ("ref_log_prob", "reference_noise")):
        moved = log_probs.values() + data.pop(noise).values()
        data[name] = torch.nested.nested_tensor_from_jagged(moved, log_probs.offsets())
    totals = loss_totals(padded(data[fields.TOKEN_WEIGHT]), padded(data["response_mask"]).bool())
    counts = torch.tensor([totals.num_responses, totals.num_tokens, totals.num_selected])
    data[fields.LOSS_TOTALS] = counts.expand(len(data), 3).contiguous()
    return data


def update(
    actor: Any, data: TensorDict, loss: LossConfig, *, packed: bool, size: int, **head: Any
) -> tuple[Any, dict[str, Tensor]]:
    """verl's output of one update without its optimizer step, and the gradient of every parameter."""
    from keytoken.verl_adapter.loss import token_weighted_loss

    select_head(actor.actor, **head)
    engine = actor.actor.engine
    data = prepared(data, packed=packed, size=size, return_model_output=True)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, partial(token_weighted_loss, config=loss))
        gradients = {
            name: parameter.grad.full_tensor().clone()
            for name, parameter in engine.module.named_parameters()
            if parameter.grad is not None
        }
        engine.optimizer_zero_grad()
    return output, gradients


def assert_equal_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], shared: bool = False) -> None:
    """Sums of float32 in another order: verl's own differ by 3e-6 between sizes of micro-batches."""
    assert found.keys() == wanted.keys()
    bound = 1e-5 if shared else 4e-6
    for name, gradient in wanted.items():
        difference = float((found[name] - gradient).abs().max())
        assert difference <= bound * float(gradient.abs().max()) + 2e-7, f"{name}: {difference}"


@pytest.mark.parametrize(("packed", "size"), [(False, 10), (False, 5), (True, 10), (True, 2)])
@BOTH_WAYS
def test_log_probs_and_entropies_are_verls(
    any_actor: Any,
    mixed: dict[str, Any],
    update_batch: Callable[..., TensorDict],
    packed: bool,
    size: int,
    shared: bool,
) -> None:
    data = update_batch(list(mixed.values()))
    plain = infer(any_actor, data, packed=packed, size=size)
    fused = infer(any_actor, data, packed=packed, size=size, fused=True, shared=shared)
    for name, wanted in plain.items():
        torch.testing.assert_close(fused[name].values(), wanted.values(), **CLOSE[shared])
        assert wanted.values().abs().min() > 1e-3


@pytest.mark.parametrize(("packed", "size"), [(False, 10), (False, 5), (True, 10), (True, 2)])
@pytest.mark.parametrize("loss", [LOSS, UNMASKED], ids=["masked", "unmasked"])
@BOTH_WAYS
def test_loss_and_gradients_are_verls(
    any_actor: Any,
    mixed: dict[str, Any],
    update_batch: Callable[..., TensorDict],
    packed: bool,
    size: int,
    loss: LossConfig,
    shared: bool,
) -> None:
    data = update_batch(list(mixed.values()))
    data = with_old_log_probs(data, infer(any_actor, data, packed=packed, size=size)["log_probs"])
    plain, wanted = update(any_actor, data, loss, packed=packed, size=size)
    head = {"fused": True, "masked_loss": loss.mask_kl, "shared": shared}
    fused, found = update(any_actor, data, loss, packed=packed, size=size, **head)
    torch.testing.assert_close(fused["loss"], plain["loss"], **CLOSE[shared])
    assert_equal_gradients(found, wanted, shared)
    assert max(float(gradient.abs().max()) for gradient in wanted.values()) > 1e-2
    assert_metrics(plain["metrics"], fused["metrics"], data, loss)


@BOTH_WAYS
def test_recomputed_activations_give_verls_gradients(
    actor: Any, run_config: Any, mixed: dict[str, Any], update_batch: Callable[..., TensorDict], shared: bool
) -> None:
    """verl's own checkpointing, which wraps the layers that a plan has to reach a second time."""
    data = update_batch(list(mixed.values()))
    data = with_old_log_probs(data, infer(actor, data, packed=False, size=5)["log_probs"])
    plain, wanted = update(actor, data, LOSS, packed=False, size=5)
    recomputing = role_worker(run_config, "actor", enable_gradient_checkpointing=True)
    layer, calls = recomputing.actor.engine.module.model.language_model.layers[0].self_attn, list[int]()
    layer.register_forward_hook(lambda *_: calls.append(1))
    fused, found = update(recomputing, data, LOSS, packed=False, size=5, fused=True, shared=shared)
    assert len(calls) == 2 * 2, "two micro-batches, each of them forward and once more"
    torch.testing.assert_close(fused["loss"], plain["loss"], **CLOSE[shared])
    assert_equal_gradients(found, wanted, shared)


def assert_metrics(plain: Any, fused: Any, data: TensorDict, loss: LossConfig) -> None:
    assert plain["kernels/head_fused"].aggregate() == 0.0
    assert fused["kernels/head_fused"].aggregate() == 1.0
    assert "kernels/head_backward_share" not in plain
    share = fused["kernels/head_backward_share"].aggregate()
    weights = data[fields.TOKEN_WEIGHT].values()
    if loss.mask_kl:
        assert 0.0 < share <= float((weights > 0).float().mean())
    else:
        assert share > 0.9  # a KL over all tokens
    for name in ("policy_loss", "kl_loss", "clipped_share"):
        assert plain[name].aggregate() == pytest.approx(fused[name].aggregate(), abs=1e-5)


@BOTH_WAYS
def test_a_batch_that_selects_nothing(
    actor: Any, mixed: dict[str, Any], update_batch: Callable[..., TensorDict], shared: bool
) -> None:
    """Zeros wherever verl's own path has zeros, so that ranks agree on what they exchange."""
    data = update_batch(list(mixed.values()), share=0.0)
    data = with_old_log_probs(data, infer(actor, data, packed=False, size=5)["log_probs"])
    _, wanted = update(actor, data, LOSS, packed=False, size=5)
    head = {"fused": True, "masked_loss": True, "shared": shared}
    fused, found = update(actor, data, LOSS, packed=False, size=5, **head)
    assert found.keys() == wanted.keys()
    assert all((gradient == 0).all() for gradient in found.values())
    assert fused["metrics"]["kernels/head_backward_share"].aggregate() == 0.0


@BOTH_WAYS
def test_micro_batches_of_empty_answers_only(
    actor: Any, mixed: dict[str, Any], update_batch: Callable[..., TensorDict], shared: bool
) -> None:
    data = update_batch([mixed["empty answer"], mixed["text"]])
    data = with_old_log_probs(data, infer(actor, data, packed=False, size=2)["log_probs"])
    _, wanted = update(actor, data, LOSS, packed=False, size=1)
    head = {"fused": True, "masked_loss": True, "shared": shared}
    _, found = update(actor, data, LOSS, packed=False, size=1, **head)
    assert_equal_gradients(found, wanted, shared)


def test_a_term_that_is_not_masked_is_found(
    actor: Any, mixed: dict[str, Any], update_batch: Callable[..., TensorDict]
) -> None:
    data = update_batch(list(mixed.values()))
    data = with_old_log_probs(data, infer(actor, data, packed=False, size=10)["log_probs"])
    with pytest.raises(ValueError, match="not masked by the selection"):
        update(actor, data, UNMASKED, packed=False, size=10, fused=True, masked_loss=True)


def test_the_head_makes_no_logits(
    actor: Any, mixed: dict[str, Any], update_batch: Callable[..., TensorDict]
) -> None:
    data, shapes = update_batch(list(mixed.values())), []
    head = actor.actor.engine.module.get_output_embeddings()
    handle = head.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape)))
    infer(actor, data, packed=False, size=5)
    infer(actor, data, packed=False, size=5, fused=True)
    handle.remove()
    assert [shape[-1] for shape in shapes] == [head.out_features] * 2 + [2] * 2


def test_an_update_by_verls_method_reports_the_head(
    actor: Any, mixed: dict[str, Any], update_batch: Callable[..., TensorDict]
) -> None:
    """``update_actor`` as the trainer calls it, with mini-batches, optimizer and metrics over ranks."""
    from keytoken.verl_adapter.compat import tensordict_utils
    from keytoken.verl_adapter.loss import token_weighted_loss

    engine = actor.actor.engine
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    data = update_batch(list(mixed.values()))
    data = with_old_log_probs(data, infer(actor, data, packed=False, size=10)["log_probs"])
    select_head(actor.actor, fused=True, masked_loss=True)
    actor.set_loss_fn(partial(token_weighted_loss, config=LOSS))
    settings = {"mini_batch_size": 10, "epochs": 1, "seed": 0, "dataloader_kwargs": {"shuffle": False}}
    output = actor.update_actor(prepared(data, packed=False, size=5, **settings))
    metrics = tensordict_utils.get(output, "metrics")
    assert metrics["kernels/head_fused"] == [1.0]
    assert 0.0 < metrics["kernels/head_backward_share"][0] < 0.6
    assert metrics["grad_norm"][0] > 0
    engine.module.load_state_dict(before)


def test_keytokens_configuration_reaches_the_engines(run_config: Any, actor: Any) -> None:
    """``set_keytoken``, as the trainer calls it on the actor's and the reference's group."""
    from keytoken.schema import KeyTokenConfig
    from keytoken.verl_adapter.answer_engine import HeadSettings

    block = OmegaConf.to_container(run_config.keytoken, resolve=True)
    reference = role_worker(run_config, "ref")
    for head, mask_kl in (("fused", True), ("verl", False)):
        block["kernels"] = {"impl": "reference", "head": head}
        block["method"]["loss"].update(mask_kl=mask_kl, kl_coef=0.04)
        wanted = HeadSettings(
            fused=head == "fused", impl="reference", masked_loss=mask_kl, shared=head == "fused"
        )
        for group, engine in ((actor, actor.actor.engine), (reference, reference.ref.engine)):
            group.set_keytoken(KeyTokenConfig.from_mapping(block))
            assert engine.head_settings == wanted


def test_reference_log_probs_are_verls(
    worker: Any, run_config: Any, mixed: dict[str, Any], update_batch: Callable[..., TensorDict]
) -> None:
    reference, data = role_worker(run_config, "ref"), update_batch(list(mixed.values()))
    found = []
    for fused in (False, True):
        select_head(reference.ref, fused=fused)
        request = prepared(data, packed=False, size=5, compute_loss=False, calculate_entropy=False)
        found.append(reference.compute_ref_log_prob(request))
        assert "entropy" not in found[-1].keys()  # noqa: SIM118 - a TensorDict is no dict
    places = torch.cat([row != 0 for row in found[1]["log_probs"].unbind()])
    assert int(places.sum()) == sum(example.response_length for example in mixed.values())
    plain, fused_values = (output["log_probs"].values()[places] for output in found)
    torch.testing.assert_close(fused_values, plain, **EXACT)


def test_what_the_fused_head_cannot_do_is_refused(
    actor: Any, mixed: dict[str, Any], update_batch: Callable[..., TensorDict]
) -> None:
    data = update_batch(list(mixed.values()))
    without = data.copy()
    del without["responses"]
    with pytest.raises(ConfigurationError, match="the batch holds no 'responses'"):
        infer(actor, without, packed=False, size=10, fused=True)
    one_each = prepared(data, packed=False, size=10, compute_loss=False)
    one_each["temperature"] = torch.ones(len(data))
    with pytest.raises(ConfigurationError, match="one temperature for all answers"):
        actor.compute_log_prob(one_each)


def test_another_engine_cannot_have_the_fused_head() -> None:
    from keytoken.verl_adapter.answer_engine import HeadSettings, set_head

    set_head(object(), HeadSettings())
    with pytest.raises(ConfigurationError, match=r"this worker runs object.*strategy=fsdp2"):
        set_head(object(), HeadSettings(fused=True))


RANK_ROWS = (
    ("video", "two videos", "image and video", "same video"),  # by tokens two micro-batches, or more
    ("text", "static", "short text", "empty answer"),  # one, if it were for this rank
)
MAX_TOKENS = 130


@pytest.fixture(scope="module")
def two_ranks(
    run_config: Any,
    tied_model: Path,
    mixed: dict[str, Any],
    update_batch: Callable[..., TensorDict],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """Two processes with a shard of the actor each; the second rank has no selected token."""
    folder = tmp_path_factory.mktemp("two_ranks_head")
    config = OmegaConf.to_container(run_config.actor_rollout_ref, resolve=True)
    tied = {**config, "model": {**config["model"], "path": str(tied_model)}}
    shares = [
        update_batch([mixed[name] for name in names], share=0.5 - 0.5 * rank)
        for rank, names in enumerate(RANK_ROWS)
    ]
    recomputing = {**config, "model": {**config["model"], "enable_gradient_checkpointing": True}}
    configs = {"untied": config, "tied": tied, "recomputing": recomputing}
    inputs = {"configs": configs, "batches": shares, "loss": LOSS}
    inputs["max_tokens"] = MAX_TOKENS
    torch.save(inputs, folder / "inputs.pt")
    script = Path(__file__).with_name("two_ranks_head.py")
    subprocess.run([sys.executable, script, folder / "inputs.pt", folder], check=True, timeout=400)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("actor_of", ["untied", "tied", "recomputing"])
def test_two_ranks(two_ranks: list[dict[str, Any]], actor_of: str) -> None:
    results = [result[actor_of] for result in two_ranks]
    for result in results:
        for way in ("fused", "shared", "by_tokens"):
            found, wanted, close = result[way], result["verl"], CLOSE[way != "fused"]
            torch.testing.assert_close(found["log_probs"], wanted["log_probs"], **close)
            loss, wanted_loss = (sum(output["loss"]) for output in (found, wanted))
            assert loss == pytest.approx(wanted_loss, abs=1e-6)
            assert_equal_gradients(found["gradients"], wanted["gradients"], way != "fused")
    assert len({result["by_tokens"]["passes"] for result in results}) == 1
    first, second = (result["fused"] for result in results)
    assert 0.0 < first["share"] < 0.7
    assert second["share"] == 0.0
    assert max(float(gradient.abs().max()) for gradient in second["gradients"].values()) > 1e-2
    assert all(result["local_rows"] < result["full_rows"] for result in results)
