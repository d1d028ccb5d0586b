"""The attribution worker's weights: a broadcast arrives whole, in the right slices, or is refused."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from keytoken import fields
from keytoken.demo.model import build_model
from keytoken.errors import WeightSyncError
from keytoken.workers.actors import SeparateActorWorker

RANK_ROWS = (
    # Pixels of both kinds in one micro-batch, and more rows with a view than the other rank has ...
    ("video", "image and video", "two videos", "same video", "empty answer"),
    # ... which has two, one and none of them for the real, the masked and the shuffled pass.
    ("text", "static"),
)


@pytest.fixture(scope="module")
def new_weights(encoder: Any) -> dict[str, torch.Tensor]:
    """Full tensors of the same model from another seed."""
    return dict(build_model(encoder.processor.tokenizer, seed=1).state_dict())


class Feed:
    """Stands where a checkpoint engine does, and yields what it was given."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    async def receive_weights(self, global_steps: int) -> AsyncIterator[tuple[str, torch.Tensor]]:
        for name, weight in self.weights.items():
            yield name, weight


@pytest.fixture
def receive(worker: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, torch.Tensor], int], None]:
    def run(weights: dict[str, torch.Tensor], step: int) -> None:
        monkeypatch.setattr(worker, "checkpoint_engine", Feed(weights))
        asyncio.run(worker.update_weights(global_steps=step))

    return run


@pytest.mark.usefixtures("engine")
def test_received_weights_replace_the_own(
    worker: Any, receive: Callable[..., None], new_weights: dict[str, torch.Tensor]
) -> None:
    receive(new_weights, 6)
    own = worker._parameters_by_name()
    assert own.keys() == new_weights.keys()
    assert all(torch.equal(own[name].full_tensor(), value) for name, value in new_weights.items())
    assert worker.version == 6


@pytest.mark.usefixtures("engine")
def test_received_weights_take_the_dtype_of_the_own(
    worker: Any, receive: Callable[..., None], new_weights: dict[str, torch.Tensor]
) -> None:
    halves = {name: value.bfloat16() for name, value in new_weights.items()}
    receive(halves, 1)
    own = worker._parameters_by_name()
    assert all(torch.equal(own[name].full_tensor(), value.float()) for name, value in halves.items())


@pytest.mark.usefixtures("engine")
def test_weights_that_do_not_fit_are_refused(
    worker: Any, receive: Callable[..., None], new_weights: dict[str, torch.Tensor]
) -> None:
    worker.version = 2
    partial = {name: value for name, value in new_weights.items() if name != "lm_head.weight"}
    with pytest.raises(WeightSyncError, match=r"step 3 lacked 1 tensors .* first 'lm_head.weight'"):
        receive(partial, 3)
    with pytest.raises(WeightSyncError, match=r"step 3 held 'model.no.such', which .* does not have"):
        receive({**new_weights, "model.no.such": torch.zeros(2)}, 3)
    assert worker.version == 2  # the trainer's version check then refuses the scores


@pytest.fixture(scope="module")
def two_ranks(
    run_config: Any,
    mixed: dict[str, Any],
    as_batch: Callable[..., TensorDict],
    new_weights: dict[str, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """What two processes with a shard each made of unequal shares of the mixed batch."""
    folder = tmp_path_factory.mktemp("two_ranks")
    inputs = {
        "config": OmegaConf.create(OmegaConf.to_container(run_config)),
        "batches": [as_batch([mixed[name] for name in names]) for names in RANK_ROWS],
        "micro_batch_size": 2,
        "weights": new_weights,
    }
    torch.save(inputs, folder / "inputs.pt")
    script = Path(__file__).with_name("two_ranks.py")
    subprocess.run([sys.executable, script, folder / "inputs.pt", folder], check=True, timeout=240)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_same_scores(worker: Any, data: TensorDict, found: dict[str, list[Any]], *names: str) -> None:
    alone = worker.compute_attribution(data)
    for name in names:
        for index, values in enumerate(found[name]):
            torch.testing.assert_close(torch.tensor(values), alone[name][index], atol=1e-5, rtol=0)


@pytest.mark.usefixtures("engine")
def test_two_ranks_with_unequal_shares_score_as_one_does(
    worker: Any,
    two_ranks: list[dict[str, Any]],
    mixed: dict[str, Any],
    as_batch: Callable[..., TensorDict],
    receive: Callable[..., None],
    new_weights: dict[str, torch.Tensor],
) -> None:
    names = (fields.REAL_LOG_PROB, fields.MASKED_LOG_PROB, fields.SHUFFLED_LOG_PROB, fields.HAS_TEMPORAL)
    shares = [as_batch([mixed[name] for name in rows]) for rows in RANK_ROWS]
    for result, share in zip(two_ranks, shares, strict=True):
        assert_same_scores(worker, share, result["before"], *names)
    receive(new_weights, 3)
    for result, share in zip(two_ranks, shares, strict=True):
        assert_same_scores(worker, share, result["after"], *names)
        assert result["after"][fields.VERSION] == [3] * len(share)
        before, after = (result[when][fields.REAL_LOG_PROB][0] for when in ("before", "after"))
        assert (torch.tensor(before) - torch.tensor(after)).abs().max() > 1e-3


def test_every_rank_takes_its_slice(
    two_ranks: list[dict[str, Any]], new_weights: dict[str, torch.Tensor]
) -> None:
    for result in two_ranks:
        assert all(torch.equal(result["full"][name], value) for name, value in new_weights.items())
    for name, value in new_weights.items():
        first, second = (result["local"][name] for result in two_ranks)
        assert first[0] + second[0] == value.shape[0]  # FSDP2 cuts along the first axis
        assert first[1:] == second[1:] == tuple(value.shape[1:])


def test_every_rank_refuses_what_does_not_fit(two_ranks: list[dict[str, Any]]) -> None:
    for result in two_ranks:
        assert "lacked 1 tensors" in result["missing"]
        assert "held 'no.such.weight'" in result["unknown"]
        assert result["version"] == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    worker = SimpleNamespace(actor=SimpleNamespace(engine=SimpleNamespace(module=module)))
    assert SeparateActorWorker.non_finite_weight(worker) is None
    with torch.no_grad():
        module[1].weight[1, 2] = value
    assert SeparateActorWorker.non_finite_weight(worker) == "1.weight"
