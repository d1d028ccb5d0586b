"""Which prompts the parity gate asks, what it calls them, and how far log-probs may be apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from keytoken.errors import ConfigurationError
from keytoken.parity import MEAN_GAPS
from keytoken.schema import ParityConfig
from keytoken.verl_adapter.parity_samples import choose_samples, gate_bounds, row_name


class Rows:
    """What is read of a dataset."""

    video_key, image_key = "videos", "images"

    def __init__(self, *rows: dict[str, Any]) -> None:
        self.dataframe = list(rows)

    def __len__(self) -> int:
        return len(self.dataframe)


def row(number: int, videos: int = 0, images: int = 0) -> dict[str, Any]:
    return {
        "videos": [{"video": f"{number}.mp4"}] * videos,
        "images": [{"image": f"{number}.png"}] * images,
        "extra_info": {"prompt_id": f"train-{number}"},
    }


TEXT, VIDEO, IMAGE, BOTH = {}, {"videos": 1}, {"images": 1}, {"videos": 1, "images": 1}


@pytest.mark.parametrize(
    ("kinds", "count", "chosen"),
    [
        ([TEXT, TEXT, VIDEO, VIDEO, IMAGE], 2, [2, 4]),
        ([TEXT, TEXT, VIDEO, VIDEO, IMAGE], 4, [2, 4, 0, 1]),
        ([BOTH, TEXT, VIDEO], 3, [2, 1, 0]),
        ([VIDEO, VIDEO, VIDEO], 2, [0, 1]),
        ([TEXT], 2, [0]),
        ([TEXT, VIDEO], 1, [1]),
    ],
)
def test_one_row_of_each_kind_comes_first(kinds: list[dict[str, int]], count: int, chosen: list[int]) -> None:
    rows = Rows(*(row(number, **kind) for number, kind in enumerate(kinds)))
    assert [sample.number for sample in choose_samples(rows, count, run_seed=1)] == chosen


def test_columns_that_a_dataset_lacks() -> None:
    (sample,) = choose_samples(Rows({"prompt": []}), 2, run_seed=1)
    assert sample.name == "row 0 of the training data"


def test_seeds_are_those_of_run_and_row() -> None:
    rows = Rows(*(row(number) for number in range(3)))
    first, again, other = (choose_samples(rows, 3, run_seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert len({sample.seed for sample in (*first, *other)}) == 6
    assert all(0 <= sample.seed < 2**63 for sample in first)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "row 7 of the training data [prompt train-7, clip 7.mp4]"),
        (
            {"videos": None, "images": [{"image": "7.png"}]},
            "row 7 of the training data [prompt train-7, image 7.png]",
        ),
        ({"images": [b"..."], "videos": []}, "row 7 of the training data [prompt train-7, image in the row]"),
        ({"extra_info": None}, "row 7 of the training data [clip 7.mp4]"),
        (
            {"videos": [{"video": "a.mp4", "video_start": 1.0, "video_end": 2.5}]},
            "row 7 of the training data [prompt train-7, clip a.mp4 (1 s to 2.5 s)]",
        ),
    ],
)
def test_a_row_is_called_by_what_identifies_it(changes: dict[str, Any], name: str) -> None:
    assert row_name(7, {**row(7, videos=1), **changes}, Rows()) == name


def config(rollout: str, actor: str | None, quantization: str | None = None) -> Any:
    mixed = None if actor is None else {"param_dtype": actor}
    return OmegaConf.create(
        {
            "actor_rollout_ref": {
                "rollout": {"dtype": rollout, "quantization": quantization},
                "actor": {"fsdp_config": {"mixed_precision": mixed}},
            }
        }
    )


@pytest.mark.parametrize(
    ("rollout", "actor", "precision"),
    [
        ("float32", "fp32", "float32"),
        ("bfloat16", "bf16", "bfloat16"),
        ("float32", None, "bfloat16"),  # verl's default
        ("auto", "fp32", "bfloat16"),
        ("half", "fp32", "float16"),
        ("half", "bf16", "bfloat16"),
    ],
)
def test_the_coarser_precision_decides(rollout: str, actor: str | None, precision: str) -> None:
    assert gate_bounds(config(rollout, actor), ParityConfig()).mean == MEAN_GAPS[precision]
    assert gate_bounds(config(rollout, actor), ParityConfig(log_prob_tolerance=0.3)).mean == 0.3


def test_a_precision_without_a_bound_needs_one() -> None:
    coarse = config("bfloat16", "bf16", quantization="fp8")
    with pytest.raises(ConfigurationError, match=r"rollout\.quantization=fp8.*log_prob_tolerance"):
        gate_bounds(coarse, ParityConfig())
    assert gate_bounds(coarse, ParityConfig(log_prob_tolerance=0.3)).mean == 0.3


def test_the_gate_is_due_behind_every_so_many_steps() -> None:
    settings = SimpleNamespace(often=ParityConfig(every_steps=3), once=ParityConfig(every_steps=None))
    assert [step for step in range(1, 10) if settings.often.due(step)] == [3, 6, 9]
    assert not any(settings.once.due(step) for step in range(1, 10))
    assert not ParityConfig(prompts=0, every_steps=3).due(3)
