"""The engine's log-probs of a step against the actor's: what counts, and when a run ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from keytoken.errors import ParityError
from keytoken.schema import ParityConfig
from keytoken.verl_adapter import drift
from keytoken.verl_adapter.drift import check_drift

SAMPLED = [[-1.0, -2.0, -3.0], [-0.5, -0.25], [-4.0, -4.0]]
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()  # the second answer was cut


def actor(by: float = 0.0, row: int = 0) -> torch.Tensor:
    padded = torch.nested.nested_tensor(list(map(torch.tensor, SAMPLED))).to_padded_tensor(0.0)
    padded[row, 0] += by
    padded[1, 1] = 7.0  # outside the mask
    return padded


def tags(*versions: tuple[int, int], **extra: Any) -> list[dict[str, Any]]:
    return [{"min_global_steps": first, "max_global_steps": last, **extra} for first, last in versions]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    values = torch.nested.as_nested_tensor(list(map(torch.tensor, SAMPLED)), layout=torch.jagged)
    monkeypatch.setattr(
        drift, "read", lambda batch, names: TensorDict({names[0]: values}, batch_size=len(batch))
    )

    def run(
        old: torch.Tensor, marks: list[dict[str, Any]], parity: ParityConfig | None = None, **rollout: Any
    ) -> dict[str, float]:
        settings = {"top_p": 1.0, "top_k": -1, "calculate_log_probs": True, "dtype": "float32", **rollout}
        fsdp = {"fsdp_config": {"mixed_precision": {"param_dtype": "fp32"}}}
        trainer = SimpleNamespace(
            keytoken=SimpleNamespace(parity=parity or ParityConfig()),
            config=OmegaConf.create({"actor_rollout_ref": {"rollout": settings, "actor": fsdp}}),
            global_steps=5,
        )
        batch = KVBatchMeta(partition_id="train", keys=["a_0_0", "a_1_0", "b_0_0"], tags=marks)
        return check_drift(trainer, batch, old, MASK)

    return run


CURRENT = tags((4, 4), (4, 4), (4, 4))


def test_mean_and_max_are_over_the_tokens_that_count(check: Any) -> None:
    found = check(actor(by=0.003), CURRENT)
    assert found["parity/rollout_gap_max"] == pytest.approx(0.003, rel=1e-3)
    assert found["parity/rollout_gap_mean"] == pytest.approx(0.003 / 6, rel=1e-3)


def test_drift_ends_the_run_and_names_the_worst_token(check: Any) -> None:
    words = r"Step 5.*0\.0333 nats.*0\.005.*token 0 of answer b_0_0: -4 \(vLLM engine\), -3\.8 \(actor\)"
    with pytest.raises(ParityError, match=words):
        check(actor(by=0.2, row=2), CURRENT)
    assert check(actor(by=0.2, row=2), CURRENT, ParityConfig(log_prob_tolerance=0.1))


def test_not_a_number_ends_the_run(check: Any) -> None:
    with pytest.raises(ParityError, match="nan"):
        check(actor(by=float("nan")), CURRENT)


@pytest.mark.parametrize("stale", [(3, 3), (3, 4), (None, None)])
def test_answers_of_earlier_weights_do_not_count(check: Any, stale: tuple[int, int]) -> None:
    assert check(actor(by=5.0, row=2), tags((4, 4), (4, 4), stale))["parity/rollout_gap_max"] == 0.0
    assert check(actor(by=5.0), tags(stale, stale, stale)) == {}


def test_padding_does_not_count(check: Any) -> None:
    marks = [*CURRENT[:2], *tags((4, 4), is_padding=True)]
    assert check(actor(by=5.0, row=2), marks)["parity/rollout_gap_max"] == 0.0


@pytest.mark.parametrize("rollout", [{"top_p": 0.9}, {"top_k": 20}, {"calculate_log_probs": False}])
def test_log_probs_of_another_distribution_are_not_compared(check: Any, rollout: dict[str, Any]) -> None:
    assert check(actor(by=5.0), CURRENT, **rollout) == {}


def test_without_the_gate_there_is_no_bound(check: Any) -> None:
    assert check(actor(by=5.0), CURRENT, ParityConfig(prompts=0)) == {}
