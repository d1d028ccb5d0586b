"""Random models of the Qwen2.5-VL architecture, and groups of random answers to a random video."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from keytoken.attribution.views import VIEWS, ModelInput, ViewContext, VisionFormat
from keytoken.data.positions import mrope_positions
from keytoken.prefix.layout import Cost

VIDEO_TOKEN, IMAGE_TOKEN, VISION_START, VISION_END = 1, 2, 3, 4
FIRST_WORD = 10
PATCH, MERGE, TUBELET = 14, 2, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model and of what it reads.

    Attributes:
        text: Of its text model, as in config.json.
        vision: Of its vision tower.
        grids: (t, h, w) of a video in patches, one for each prompt length.
        words: Text tokens of a prompt.
        answers: Shortest and longest answer in tokens.
        dtype: Of weights and activations.
        checkpointing: Whether the update recomputes activations.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    grids: tuple[tuple[int, int, int], ...]
    words: int
    answers: tuple[int, int]
    dtype: torch.dtype
    checkpointing: bool

    def prompt_tokens(self, grid: tuple[int, int, int]) -> int:
        """Tokens of a prompt with this video."""
        return grid[0] * grid[1] * grid[2] // MERGE**2 + self.words


MIDDLE = Shape(
    text={
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    vision={
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "fullatt_block_indexes": [1, 3],
    },
    grids=((4, 20, 20), (6, 24, 24), (8, 26, 26)),
    words=138,
    answers=(64, 128),
    dtype=torch.float32,
    checkpointing=False,
)
SEVEN_B = Shape(
    text={
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    vision={
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    grids=((8, 32, 32), (16, 32, 32), (32, 32, 32)),  # 2,048, 4,096 and 8,192 vision tokens
    words=128,
    answers=(512, 512),
    dtype=torch.bfloat16,
    checkpointing=True,
)
TINY = dataclasses.replace(
    MIDDLE,
    text={**MIDDLE.text, "num_hidden_layers": 2, "vocab_size": 64},
    vision={**MIDDLE.vision, "depth": 2, "fullatt_block_indexes": [1]},
    grids=((2, 4, 4),),
    words=6,
    answers=(2, 5),
)
SHAPES = {"middle": MIDDLE, "7b": SEVEN_B, "tiny": TINY}


def build_model(shape: Shape, device: torch.device, attention: str) -> Any:
    """A model with random weights."""
    config = Qwen2_5_VLConfig(
        text_config={
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": False,
            **shape.text,
        },
        vision_config={"out_hidden_size": shape.text["hidden_size"], "patch_size": PATCH, **shape.vision},
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with device:
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, attn_implementation=attention, dtype=shape.dtype
        )
    if shape.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def group(shape: Shape, grid: tuple[int, int, int], size: int, device: torch.device) -> list[ModelInput]:
    """``size`` answers to one prompt with a video, of lengths spread evenly over ``shape.answers``."""
    generator = torch.Generator().manual_seed(7)
    vocabulary = shape.text["vocab_size"]

    def words(count: int) -> list[int]:
        return torch.randint(FIRST_WORD, vocabulary, (count,), generator=generator).tolist()

    num_tokens = shape.prompt_tokens(grid) - shape.words
    before = shape.words // 2
    prompt = [*words(before - 1), VISION_START, *[VIDEO_TOKEN] * num_tokens, VISION_END]
    prompt += words(shape.words - before - 1)
    patches = torch.randn(grid[0] * grid[1] * grid[2], 3 * TUBELET * PATCH**2, generator=generator)
    media = {
        "pixel_values_videos": patches.to(device, shape.dtype),
        "video_grid_thw": torch.tensor([grid], device=device),
    }
    shortest, longest = shape.answers
    made = []
    for number in range(size):
        ids = [*prompt, *words(shortest + (longest - shortest) * number // max(size - 1, 1))]
        positions = mrope_positions(
            ids,
            image_token_id=IMAGE_TOKEN,
            video_token_id=VIDEO_TOKEN,
            video_grids=[grid],
            seconds_per_grid=[1.0],
            tokens_per_second=2.0,
        )
        made.append(
            ModelInput(
                input_ids=torch.tensor(ids, device=device),
                position_ids=positions.to(device),
                prompt_length=len(prompt),
                media=media,
                prompt="p",
            )
        )
    return made


def under(view: str, inputs: list[ModelInput]) -> list[ModelInput]:
    """A group under a view that is the same for all answers; its pixels are made once."""
    vision = VisionFormat((IMAGE_TOKEN, VIDEO_TOKEN), TUBELET)
    seen = [
        VIEWS[view].build(one, ViewContext(vision=vision))
        for one in inputs[: None if view == "masked" else 1]
    ]
    if view == "masked":
        return [one for one in seen if one is not None]
    assert seen[0] is not None
    return [dataclasses.replace(one, media=seen[0].media) for one in inputs]


def flops(model: Any, inputs: list[ModelInput], cost: Cost, hidden: bool = False) -> float:
    """Operations of a forward pass over a group: text model, head, and vision tower without its attention.

    ``hidden``: whether attention computes the pairs between answers and hides them.
    """
    text = model.config.get_text_config()
    layers = model.model.language_model.layers
    weights = sum(value.numel() for value in layers.parameters())
    width = text.hidden_size
    tower = sum(value.numel() for value in model.model.visual.blocks.parameters())
    patches = sum(int(grid.prod()) for grid in inputs[0].media.get("video_grid_thw", ()))
    answers = sum(len(one.input_ids) - one.prompt_length for one in inputs)
    head = 2 * answers * width * text.vocab_size
    return cost.flops(weights, len(layers), width, hidden) + cost.prompts * 2 * tower * patches + head
