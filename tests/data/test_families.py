"""The table of model families: what is told apart by it, and who is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keytoken.data.contract import SamplingContract, resized_shape
from keytoken.data.families import (
    FAMILIES,
    MODEL_TYPES,
    family_of,
    patch_size_of,
    require_one_look,
    words_of_video,
)
from keytoken.data.timestamps import stamp
from keytoken.demo.tokenizer import CONTRACTS, build_processor, build_tokenizer
from keytoken.errors import ConfigurationError


@pytest.fixture(scope="module", params=MODEL_TYPES)
def processor(request: pytest.FixtureRequest) -> Any:
    return build_processor(build_tokenizer(request.param), request.param)


def test_every_family_is_told_by_its_processor_and_by_its_config(processor: Any, tmp_path: Path) -> None:
    family = family_of(processor)
    assert family in FAMILIES and processor.image_processor.patch_size == family.patch_size
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family.model_type}))
    assert patch_size_of(tmp_path) == family.patch_size == CONTRACTS[family.model_type].patch_size


@pytest.mark.parametrize(
    "content", [None, "{", '{"model_type": "glm4v", "vision_config": {"patch_size": 9}}']
)
def test_no_patch_size_of_what_is_not_known(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert patch_size_of(tmp_path) is None


def test_another_processor_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"a SimpleNamespace.*Qwen2.5-VL or Qwen3-VL"):
        from types import SimpleNamespace

        family_of(SimpleNamespace())


def test_a_video_has_no_more_words_than_reckoned_with(processor: Any) -> None:
    """Up to a day; exact in blocks, and at most four tokens a time too many."""
    marks = (
        [processor.vision_start_token_id, processor.vision_end_token_id]
        if family_of(processor).timestamps
        else []
    )
    for seconds in (0.25, 9.5, 59.75, 3599.0, 86399.9):
        used = (len(stamp(seconds, processor.tokenizer)) + len(marks)) * 8 - 2 if marks else 0
        assert used <= words_of_video(processor, 8) <= used + 8 * 4 * bool(marks)


@pytest.mark.parametrize("size", [(56, 56), (360, 640), (1080, 1920), (90, 700)])
def test_the_processor_leaves_the_contracts_frames_alone(processor: Any, size: tuple[int, int]) -> None:
    """Their size is a multiple of patch x merge, and the processor does not resize them."""
    low, high = (2048, 70_000)
    contract = SamplingContract(min_pixels=low, max_pixels=high, patch_size=family_of(processor).patch_size)
    height, width = resized_shape(*size, contract)
    frames = torch.from_numpy(
        np.random.default_rng(0).integers(0, 255, (4, 3, height, width), dtype=np.uint8)
    )
    bounds = {"shortest_edge": 1, "longest_edge": 10 * high}
    made = processor.video_processor(
        videos=[frames], do_sample_frames=False, return_tensors="pt", size=bounds
    )
    patch = contract.patch_size
    assert made["video_grid_thw"].tolist() == [[2, height // patch, width // patch]]


@pytest.mark.parametrize("field", ["image_mean", "image_std"])
def test_images_and_videos_have_to_look_alike(
    processor: Any, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_one_look(processor)
    monkeypatch.setattr(processor.video_processor, field, [0.1, 0.2, 0.3])
    with pytest.raises(
        ConfigurationError, match=rf"{field}=.* for images and {field}=\[0.1, 0.2, 0.3\] for videos"
    ):
        require_one_look(processor)
