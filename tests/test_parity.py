"""Comparing readings: every field, its place and both values; ragged and empty samples; NaN; bounds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from keytoken.errors import ParityError
from keytoken.parity import (
    MEAN_GAPS,
    SPREAD,
    Bounds,
    Gap,
    Reading,
    bounds_for,
    compare,
    pixel_figures,
    require_positions_of_any_answer,
    with_answer,
)

BOUNDS = Bounds(mean=1e-3, largest=2e-2)


def reading(party: str = "vLLM engine", **changes: Any) -> Reading:
    """Four tokens of prompt, three of an answer, one video."""
    whole = Reading(
        party=party,
        sample="row 3 of the training data (prompt train-3, clip a.mp4)",
        ids=torch.tensor([5, 9, 9, 6, 1, 2, 3]),
        prompt_length=4,
        positions=torch.tensor([[0, 1, 2, 3, 4, 5, 6]] * 3),
        grids=torch.tensor([[4, 4, 4]]),
        seconds=torch.tensor([1.0]),
        pixels=torch.tensor([[0.1, 0.9]]),
        log_probs=torch.tensor([-0.5, -1.0, -2.0]),
    )
    return dataclasses.replace(whole, **changes)


def changed(values: torch.Tensor | None, place: tuple[int, ...], by: float) -> torch.Tensor:
    assert values is not None
    values = values.clone()
    values[place] += by
    return values


def test_equal_readings_agree() -> None:
    assert compare(reading(), reading("actor"), BOUNDS) == Gap(0.0, 0.0)


def test_the_gap_is_that_of_the_log_probs() -> None:
    other = reading("actor", log_probs=torch.tensor([-0.5, -1.0, -2.0015]))
    gap = compare(reading(), other, BOUNDS)
    assert gap.mean == pytest.approx(0.0005, rel=1e-3)
    assert gap.largest == pytest.approx(0.0015, rel=1e-3)


whole = reading()
DIFFERENT = {
    "an id": (
        {"ids": changed(whole.ids, (1,), 1)},
        ["ids of row 3", "token 1 of the prompt", "9 (vLLM", "10 (actor"],
    ),
    "an answer's id": (
        {"ids": changed(whole.ids, (5,), 1)},
        ["token 1 of the answer", "2 (vLLM", "3 (actor"],
    ),
    "a longer prompt": (
        {"ids": torch.tensor([5, 9, 9, 9, 6, 1, 2, 3]), "prompt_length": 5},
        ["token 3 of the prompt", "6 (vLLM", "9 (actor", "4 and 5 tokens", "placeholders"],
    ),
    "fewer ids": ({"ids": whole.ids[:-1]}, ["token 2 of the answer", "3 (vLLM", "no more (actor"]),
    "another cut": ({"prompt_length": 3}, ["length of the prompt", "4 (vLLM", "3 (actor"]),
    "a grid": ({"grids": torch.tensor([[4, 8, 4]])}, ["grids of", "video 0", "(4, 4, 4)", "(4, 8, 4)"]),
    "one video more": (
        {"grids": torch.tensor([[4, 4, 4]] * 2)},
        ["number of images and videos", "1 (vLLM", "2 (actor"],
    ),
    "seconds": (
        {"seconds": torch.tensor([2 / 24])},
        ["seconds of", "1 (vLLM", "0.0833333 (actor", "24 a second"],
    ),
    "pixels": (
        {"pixels": torch.tensor([[0.1, 1.6]])},
        ["pixels of", "(0.1, 0.9)", "(0.1, 1.6)", "image_mean"],
    ),
    "NaN pixels": ({"pixels": torch.tensor([[0.1, float("nan")]])}, ["pixels of", "nan"]),
    "a time": (
        {"positions": changed(whole.positions, (0, 3), 1)},
        ["positions of", "time of token 3 of the prompt", "3 (vLLM", "4 (actor", "1 of 7 tokens", "M-RoPE"],
    ),
    "a width of the answer": (
        {"positions": changed(whole.positions, (2, 6), -1)},
        ["width of token 2 of the answer", "6 (vLLM", "5 (actor"],
    ),
    "one token far off": (
        {"log_probs": changed(whole.log_probs, (1,), 0.5)},
        [
            "log-probs of",
            "token 1 of the answer",
            "-1 (vLLM",
            "-0.5 (actor",
            "0.167",
            "0.5 (bound 0.02)",
            "caches",
        ],
    ),
    "all tokens a little off": ({"log_probs": whole.log_probs - 0.005}, ["log-probs of", "bound 0.001"]),
    "NaN": (
        {"log_probs": torch.tensor([-0.5, float("nan"), -2.0])},
        ["log-probs of", "token 1 of the answer", "nan (actor"],
    ),
    "infinity": (
        {"log_probs": torch.tensor([-0.5, -1.0, -torch.inf])},
        ["token 2 of the answer", "-inf (actor"],
    ),
    "fewer log-probs": ({"log_probs": torch.tensor([-0.5])}, ["number for an answer of 3 tokens", "3 (vLLM"]),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_difference_names_field_sample_place_values_and_cause(what: str) -> None:
    changes, words = DIFFERENT[what]
    with pytest.raises(ParityError) as problem:
        compare(reading(), reading("actor", **changes), BOUNDS)
    message = str(problem.value)
    assert "prompt train-3, clip a.mp4" in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("sign", [1, -1])
def test_differences_of_one_sign_are_called_a_mask(sign: int) -> None:
    """Tokens that one side masks make all others likelier there, by log(1 - p) with the p of each place."""
    differences = torch.tensor([0.02, 1e-6, 0.03, 0.01, 0.02, 0.05, 0.01, 0.02], dtype=torch.float64)
    ids, log_probs = torch.arange(12), torch.linspace(-3, -1, 8, dtype=torch.float64)
    places = torch.arange(12).expand(3, -1)
    one = reading(ids=ids, positions=places, log_probs=log_probs)

    def said(by: torch.Tensor) -> str:
        with pytest.raises(ParityError) as problem:
            compare(one, reading("actor", ids=ids, positions=places, log_probs=log_probs + by), BOUNDS)
        return str(problem.value)

    party = "vLLM engine" if sign < 0 else "actor"
    assert f"likelier to the {party}" in said(sign * differences)
    differences[2] *= -1
    assert "likelier" not in said(sign * differences)


def test_the_first_field_decides() -> None:
    """Wrong seconds make wrong positions and wrong log-probs; the seconds are what has to be mended."""
    other = reading(
        "actor",
        seconds=torch.tensor([0.5]),
        positions=changed(whole.positions, (0, 2), 1),
        log_probs=whole.log_probs - 3,
    )
    with pytest.raises(ParityError, match=r"^Parity: seconds"):
        compare(reading(), other, BOUNDS)


def test_what_a_party_cannot_tell_is_not_compared() -> None:
    silent = reading("actor", positions=None, grids=None, seconds=None, pixels=None, log_probs=None)
    assert compare(silent, reading(), BOUNDS) == Gap() == compare(reading(), silent, BOUNDS)


def test_text_without_an_answer() -> None:
    empty = {
        "ids": torch.tensor([5, 6]),
        "prompt_length": 2,
        "positions": torch.arange(2).expand(3, 2),
        "grids": torch.zeros(0, 3),
        "seconds": torch.zeros(0),
        "pixels": torch.zeros(0, 2),
        "log_probs": torch.zeros(0),
    }
    assert compare(reading(**empty), reading("actor", **empty), BOUNDS) == Gap()


def test_hints_come_before_the_usual_cause() -> None:
    other = reading("actor", log_probs=whole.log_probs - 1)
    with pytest.raises(ParityError, match=r"The head is longer\. Ids, positions and pixels agree"):
        compare(reading(), other, BOUNDS, ["The head is longer."])


@pytest.mark.parametrize("precision", MEAN_GAPS)
def test_bounds(precision: str) -> None:
    mean = MEAN_GAPS[precision]
    assert bounds_for(precision) == Bounds(mean=mean, largest=SPREAD * mean)
    assert bounds_for(precision, 0.25) == Bounds(mean=0.25, largest=5.0)
    # A wrong video position costs more than a nat, a padded vocabulary a tenth of one.
    assert mean < 0.1


def test_a_reading_from_plain_numbers() -> None:
    note = {
        "ids": [5, 9, 9, 6],
        "positions": [[0, 1, 1, 3]] * 3,
        "delta": 2,
        "grids": [[2, 2, 2]],
        "seconds": [1.0],
        "pixels": [[0.1, 0.9]],
    }
    found = Reading.of("engine", "row 3", with_answer(note, [7, 8], [-1.0, -2.0]))
    assert found.ids.tolist() == [5, 9, 9, 6, 7, 8] and found.prompt_length == 4
    assert found.positions is not None and found.positions.tolist() == [[0, 1, 1, 3, 6, 7]] * 3
    assert found.log_probs is not None and found.log_probs.tolist() == [-1.0, -2.0]
    assert compare(found, found, BOUNDS) == Gap()
    text = Reading.of(
        "engine", "row 3", with_answer({"ids": [5], "positions": None, "grids": []}, [7], [-1.0])
    )
    assert text.positions is None and text.grids is not None and text.grids.shape == (0, 3)
    assert compare(text, text, BOUNDS) == Gap()


def test_pixel_figures_are_of_each_video() -> None:
    grids = torch.tensor([[1, 2, 2], [2, 2, 4]])
    pixels = torch.cat(
        [torch.full((4, 3), 2.0), torch.randn(16, 3, generator=torch.Generator().manual_seed(0))]
    )
    first, second = pixel_figures(pixels, grids)
    assert first.tolist() == [2.0, 2.0]
    assert second[0] == pytest.approx(float(pixels[4:].mean()), abs=1e-6)
    assert second[1] == pytest.approx(float(pixels[4:].norm() / 48**0.5), rel=1e-5)


def counted(ids: list[int]) -> torch.Tensor:
    return torch.arange(len(ids))


def test_positions_of_an_answer_that_ends_in_a_picture() -> None:
    require_positions_of_any_answer(counted, [5, 6], [1, 2], start=9)


def test_positions_that_cannot_be_computed() -> None:
    def looks_behind(ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids[place + 1] for place, token in enumerate(ids) if token == 9])

    with pytest.raises(ParityError, match=r"ends in token 9.*IndexError"):
        require_positions_of_any_answer(looks_behind, [5, 6], [1, 2], start=9)


def test_positions_that_change_with_the_last_token() -> None:
    with pytest.raises(ParityError, match="positions of an answer change when its last token is 9"):
        require_positions_of_any_answer(torch.tensor, [5, 6], [1, 2], start=9)
