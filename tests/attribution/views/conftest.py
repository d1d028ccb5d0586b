"""Pictures, the real processor, and inputs made of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

Process = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def run_video_processor(
    clips: list[torch.Tensor], temporal_patch_size: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and grid by the processor of Hugging Face; frames are multiples of 28 already."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.Qwen2VLVideoProcessor(
        temporal_patch_size=temporal_patch_size, min_pixels=28 * 28, max_pixels=56 * 84
    )
    output = processor(videos=clips, do_sample_frames=False, return_tensors="pt")
    return output["pixel_values_videos"], output["video_grid_thw"]


@pytest.fixture(scope="session")
def process() -> Process:
    return run_video_processor
