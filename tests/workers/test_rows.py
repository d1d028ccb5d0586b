"""Rows out of verl's ragged batch and back into one, for both layouts in which verl hands it over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from keytoken.workers.rows import Row, batch_of, rows_of


def assert_rows_are(rows: list[Row], examples: list[Any], first: int = 0) -> None:
    assert len(rows) == len(examples)
    for number, (row, example) in enumerate(zip(rows, examples, strict=True)):
        assert torch.equal(row.input_ids, example.input_ids)
        assert torch.equal(row.position_ids, example.position_ids)
        assert row.response_length == example.response_length
        assert torch.equal(row.answer_ids, example.labels)
        assert row.prompt_length == len(example.input_ids) - example.response_length
        assert (row.prompt, row.number) == (example.uid, number)
        assert row.media.keys() == example.media.keys()
        assert all(torch.equal(row.media[name], value) for name, value in example.media.items())


def test_rows_hold_what_went_in(mixed: dict[str, Any], as_batch: Callable[..., TensorDict]) -> None:
    assert_rows_are(rows_of(as_batch(list(mixed.values()))), list(mixed.values()))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_of_equal_length(mixed: dict[str, Any], as_batch: Callable[..., TensorDict], count: int) -> None:
    """torch records another ragged dimension when all rows are of one length."""
    examples = [mixed["video"]] * count
    assert_rows_are(rows_of(as_batch(examples)), examples)


def test_rows_after_verls_dispatch(mixed: dict[str, Any], as_batch: Callable[..., TensorDict]) -> None:
    """verl cuts a batch into one part for each rank with its own function."""
    from keytoken.verl_adapter.compat import tensordict_utils

    examples = list(mixed.values())
    parts = tensordict_utils.chunk_tensordict(as_batch(examples), 5)
    for number, part in enumerate(parts):
        assert_rows_are(rows_of(part), examples[2 * number : 2 * number + 2])


def test_a_text_batch_needs_no_media_field(
    mixed: dict[str, Any], as_batch: Callable[..., TensorDict]
) -> None:
    examples = [mixed["text"], mixed["short text"]]
    data = as_batch(examples)
    del data["multi_modal_inputs"]
    assert_rows_are(rows_of(data), examples)


def test_batch_of_is_the_inverse(mixed: dict[str, Any], as_batch: Callable[..., TensorDict]) -> None:
    examples = list(mixed.values())
    rows = rows_of(as_batch(examples))
    batch = batch_of(rows, temperature=0.5, use_remove_padding=False)
    batch["responses"] = torch.nested.as_nested_tensor([row.answer_ids for row in rows], layout=torch.jagged)
    batch["uid"] = as_batch(examples)["uid"]
    assert_rows_are(rows_of(batch), examples)
    assert batch["temperature"] == 0.5
    longest = max(map(len, rows))
    assert batch["input_ids"].to_padded_tensor(0).shape == (len(rows), longest)
