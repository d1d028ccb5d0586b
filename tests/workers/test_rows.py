"""Rows out of verl's ragged batch and back into one, for both layouts in which verl hands it over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack

from keytoken.workers.rows import Row, batch_of, one_object_each, rows_of


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


def test_answers_that_are_shown_the_same_have_it_in_one_object(
    mixed: dict[str, Any], as_batch: Callable[..., TensorDict]
) -> None:
    rows: list[Row | None] = list(rows_of(as_batch([mixed["video"], mixed["same video"], mixed["image"]])))
    rows = [replace(row, media={name: value.clone() for name, value in row.media.items()}) for row in rows]
    darker = replace(rows[0], media={**rows[0].media, "pixel_values_videos": torch.zeros(2, 2)})
    found = one_object_each([*rows, darker, None])
    assert found[1].media is found[0].media is rows[0].media
    assert found[2].media is rows[2].media and found[3].media is darker.media and found[4] is None
    assert [row.number for row in found[:3]] == [0, 1, 2]


class Reference(Mapping[str, torch.Tensor]):
    """Stands for media that are fetched when they are asked for, and must not be here."""

    prompt = "p0"

    def __getitem__(self, name: str) -> torch.Tensor:
        raise AssertionError("fetched")

    def __iter__(self) -> Iterator[str]:
        yield "pixel_values"

    def __len__(self) -> int:
        return 1


def test_references_to_one_prompt_become_one(
    mixed: dict[str, Any], as_batch: Callable[..., TensorDict]
) -> None:
    data = as_batch([mixed["video"], mixed["same video"], mixed["text"]])
    media = [Reference(), Reference(), {}]
    data["multi_modal_inputs"] = NonTensorStack(*map(NonTensorData, media))
    first, second, text = rows_of(data)
    assert first.media is second.media and text.media is not first.media
