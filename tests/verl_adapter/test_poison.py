"""NaN and infinity: named before anything is made of them, or left out and counted."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from keytoken.errors import NonFiniteError
from keytoken.verl_adapter.poison import SkippedUpdates, require_finite_batch

KEYS = ["0000003-00000_0_0", "0000003-00000_1_0", "0000003-00001_0_0"]
FIELDS = ("old_log_probs", "entropy", "advantages", "rm_scores")


def ragged(*rows: list[float]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_poisoned_batch_names_step_prompt_answer_and_token(name: str, value: float) -> None:
    batch = KVBatchMeta(partition_id="train", keys=KEYS, tags=[{}] * 3)
    good = {field: ragged([1.0, 2.0], [0.5], [0.0, 1.0, -3.0]) for field in FIELDS}
    require_finite_batch(batch, TensorDict(good, batch_size=3), step=3)
    data = TensorDict({**good, name: ragged([1.0, 2.0], [0.5], [0.0, value, value])}, batch_size=3)
    with pytest.raises(NonFiniteError) as refused:
        require_finite_batch(batch, data, step=3)
    expected = f"Step 3: {name} of prompt 0000003-00001, answer 0, is {value} at token 1 (2 such values"
    assert str(refused.value).startswith(expected)
    assert ("reward function" in str(refused.value)) == (name in ("advantages", "rm_scores"))


def test_updates_that_were_left_out_are_counted_and_three_in_a_row_are_too_many() -> None:
    updates = SkippedUpdates()
    for step, norm in enumerate((math.nan, math.inf, 1.0, math.nan, math.inf), start=1):
        metrics = {"actor/grad_norm": norm}
        updates.note(step, metrics)
        assert metrics["actor/update_skipped"] == float(not math.isfinite(norm))
    with pytest.raises(NonFiniteError, match=r"Step 6: the gradient is nan, as in the 2 steps before"):
        updates.note(6, {"actor/grad_norm": math.nan})
