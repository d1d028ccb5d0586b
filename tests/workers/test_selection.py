"""The selection of a step in a real worker: the same as in this process, with the time it took."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.types import Outcomes, Signals
from keytoken.errors import NonFiniteError
from keytoken.golden import load_preset
from keytoken.verl_adapter.compat import Dispatch, Execute
from keytoken.workers.actors import AttributionWorker, SeparateActorWorker, SyncActorWorker
from keytoken.workers.selection import select_on

# isort: split
from verl.single_controller.base.decorator import MAGIC_ATTR, get_predefined_dispatch_fn

CPU = torch.device("cpu")


@pytest.fixture
def signals(ragged_signals: Callable[..., Signals]) -> Signals:
    made = ragged_signals([9, 3, 14, 1], [0, 0, 1, 1])
    return dataclasses.replace(made, outcomes=Outcomes(rewards=torch.tensor([1.0, 0.0, 2.0, 2.0])))


def test_a_worker_selects_what_its_configuration_says(worker: Any, signals: Signals) -> None:
    found = worker.select_tokens(signals)
    expected = compute_token_weights(signals, worker.keytoken.method, "reference")
    assert worker.keytoken.method.name == "video_ktr"
    assert torch.equal(found.weights, expected.weights)
    assert {name: mask.tolist() for name, mask in found.masks.items()} == {
        name: mask.tolist() for name, mask in expected.masks.items()
    }
    assert torch.equal(found.advantages, expected.advantages)
    assert found.metrics.pop("kernels/select_s") > 0.0
    assert found.metrics == expected.metrics
    assert found.metrics["kernels/impl"] == 0.0  # there is no GPU here


@pytest.mark.parametrize("kind", [AttributionWorker, SeparateActorWorker, SyncActorWorker])
def test_rank_zero_of_every_group_can_be_asked(kind: type) -> None:
    """verl hands the signals over as they are, to one worker, and does not wait for it."""
    registered = getattr(kind.select_tokens, MAGIC_ATTR)
    assert registered == {
        "dispatch_mode": Dispatch.ALL_TO_ALL,
        "execute_mode": Execute.RANK_ZERO,
        "blocking": False,
    }
    functions = get_predefined_dispatch_fn(Dispatch.ALL_TO_ALL)
    assert functions["dispatch_fn"](None, "signals") == (("signals",), {})
    assert functions["collect_fn"](None, "future") == "future"


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_both_implementations_select_the_same(signals: Signals, impl: str) -> None:
    pytest.importorskip("triton")
    method = load_preset("video_ktr_official")
    found = select_on(CPU, signals, method, impl)  # type: ignore[arg-type]
    expected = compute_token_weights(signals, method, "reference")
    assert torch.equal(found.weights, expected.weights)
    assert found.metrics["kernels/impl"] == float(impl == "triton")
    assert found.advantages is not None and expected.advantages is not None
    torch.testing.assert_close(found.advantages, expected.advantages, rtol=1e-6, atol=1e-6)


def test_a_method_without_a_selection_needs_no_kernel(signals: Signals) -> None:
    found = select_on(CPU, signals, load_preset("grpo"), "auto")
    assert torch.equal(found.selected, signals.mask)
    assert found.advantages is None  # verl's stay
    assert set(found.metrics) == {"attribution/selected_share", "kernels/select_s"}


def test_the_error_of_a_bad_value_crosses_processes(signals: Signals) -> None:
    signals.entropy[2, 5] = torch.inf
    with pytest.raises(NonFiniteError) as caught:
        select_on(CPU, signals, load_preset("video_ktr"), "auto")
    assert "response 2, token 5" in str(pickle.loads(pickle.dumps(caught.value)))


def test_signals_and_weights_cross_processes(signals: Signals) -> None:
    copy = pickle.loads(pickle.dumps(signals))
    assert torch.equal(copy.mask, signals.mask) and torch.equal(copy.group, signals.group)
    result = select_on(CPU, copy, load_preset("video_ktr"), "auto")
    assert torch.equal(pickle.loads(pickle.dumps(result)).weights, result.weights)
