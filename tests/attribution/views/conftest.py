"""Pictures, the real processor, and inputs made of them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from keytoken.attribution.views import ModelInput, VisionFormat

Frames = torch.Tensor  # uint8 [F, 3, H, W], H and W multiples of 28
Process = Callable[..., tuple[torch.Tensor, torch.Tensor]]
PADS = (5, 6)


def size() -> dict[str, int]:
    """Bounds that leave pictures of 28 x 28 to 112 x 112 pixels as they are."""
    return {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}


def processor_with(temporal_patch_size: int = 2, **options: Any) -> Any:
    """Image and video processor with these options."""
    transformers = pytest.importorskip("transformers")
    return types.SimpleNamespace(
        image_processor=transformers.Qwen2VLImageProcessor(size=size(), **options),
        video_processor=transformers.Qwen2VLVideoProcessor(
            temporal_patch_size=temporal_patch_size, size=size(), **options
        ),
    )


@pytest.fixture(scope="session")
def build_processor() -> Callable[..., Any]:
    return processor_with


@pytest.fixture(scope="session")
def process() -> Process:
    """Patches and grid of videos by the processor of Hugging Face."""

    def run(clips: list[Frames], temporal_patch_size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        processor = processor_with(temporal_patch_size).video_processor
        output = processor(videos=clips, do_sample_frames=False, return_tensors="pt")
        return output["pixel_values_videos"], output["video_grid_thw"]

    return run


@pytest.fixture(scope="session")
def vision() -> VisionFormat:
    """The format of Qwen2.5-VL with the processor's own black."""
    vision_config = types.SimpleNamespace(temporal_patch_size=2, spatial_merge_size=2)
    config = types.SimpleNamespace(
        image_token_id=PADS[0], video_token_id=PADS[1], vision_config=vision_config
    )
    return VisionFormat.of(config, processor_with())


@pytest.fixture(scope="session")
def media(process: Process) -> Callable[..., dict[str, torch.Tensor]]:
    """The pixel tensors of one prompt."""

    def run(clips: list[Frames] | None = None, images: list[Frames] | None = None) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        if clips:
            made["pixel_values_videos"], made["video_grid_thw"] = process(clips)
            made["second_per_grid_ts"] = torch.full((len(clips),), 0.5)
        if images:
            output = processor_with().image_processor(images=images, return_tensors="pt")
            made |= {name: output[name] for name in ("pixel_values", "image_grid_thw")}
        return made

    return run


@pytest.fixture(scope="session")
def prompt_with() -> Callable[..., ModelInput]:
    """An input with given pixels: as many placeholders as the model would have, and an answer."""

    def build(
        media: dict[str, torch.Tensor], prompt: str = "p", answer: tuple[int, ...] = (20, 21)
    ) -> ModelInput:
        grids = [media[name] for name in ("image_grid_thw", "video_grid_thw") if name in media]
        pads = [
            pad
            for pad, name in zip(PADS, ("image_grid_thw", "video_grid_thw"), strict=True)
            for grid in media.get(name, torch.zeros(0, 3, dtype=torch.int64)).prod(dim=1).tolist()
            for _ in range(grid // 4)
        ]
        assert bool(grids) == bool(pads)
        ids = torch.tensor([9, *pads, 10, *answer])
        return ModelInput(
            input_ids=ids,
            position_ids=torch.arange(len(ids)).expand(4, -1),
            prompt_length=len(ids) - len(answer),
            media=media,
            prompt=prompt,
        )

    return build
