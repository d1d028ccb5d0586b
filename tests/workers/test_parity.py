"""What the attribution group tells the parity gate of its rows, against what the rows are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from keytoken.workers.parity import READING, REAL, read_rows

pytestmark = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True, scope="session")


def readings(worker: Any, data: TensorDict, run: str, **changes: Any) -> list[dict[str, Any]]:
    settings = dataclasses.replace(worker.settings, micro_batch_size=3)
    attribution = dataclasses.replace(worker.keytoken.attribution, **changes)
    output = read_rows(worker.engine, data, worker.keytoken.method, attribution, settings, version=4, run=run)
    return [dict(getattr(value, "data", value)) for value in output[READING]]


@pytest.mark.usefixtures("engine")
def test_the_real_pass_tells_what_it_saw_and_scored(
    worker: Any,
    mixed: dict[str, Any],
    as_batch: Callable[..., TensorDict],
    truth: dict[str, dict[str, torch.Tensor]],
) -> None:
    """Also in a step in which training would not score, and without the comparison of training."""
    found = readings(worker, as_batch(list(mixed.values())), REAL, every_steps=3, check_base=False)
    for reading, (name, example) in zip(found, mixed.items(), strict=True):
        assert reading["ids"] == example.input_ids.tolist()
        assert reading["positions"] == example.positions.tolist()
        assert reading["prompt_length"] == len(example.input_ids) - example.response_length
        grids = [example.media[key] for key in ("image_grid_thw", "video_grid_thw") if key in example.media]
        assert reading["grids"] == (torch.cat(grids).tolist() if grids else [])
        times = example.media.get("second_per_grid_ts")
        assert reading.get("seconds") == (None if times is None else pytest.approx(list(times)))
        assert len(reading["pixels"]) == len(reading["grids"])
        logits = truth["real"][name].double().log_softmax(-1)
        wanted = logits.gather(1, example.labels[:, None]).squeeze(1)
        assert reading["log_probs"] == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.usefixtures("engine")
def test_figures_of_one_video_are_those_of_its_pixels(
    worker: Any, mixed: dict[str, Any], as_batch: Callable[..., TensorDict]
) -> None:
    ((mean, size),) = readings(worker, as_batch([mixed["video"]]), REAL)[0]["pixels"]
    pixels = mixed["video"].media["pixel_values_videos"].double()
    assert mean == pytest.approx(float(pixels.mean()), abs=1e-6)
    assert size == pytest.approx(float((pixels**2).mean() ** 0.5), abs=1e-6)


@pytest.mark.parametrize("view", ["masked", "shuffled"])
@pytest.mark.usefixtures("engine")
def test_a_view_is_only_run(
    worker: Any, mixed: dict[str, Any], as_batch: Callable[..., TensorDict], view: str
) -> None:
    found = readings(worker, as_batch(list(mixed.values())), view)
    assert len(found) == len(mixed)
    assert not any("log_probs" in reading for reading in found)
