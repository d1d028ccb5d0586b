"""Turns the world's questions into model inputs, with the same processor and positions as the trainer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keytoken.data.clips import resize_frames
from keytoken.data.contract import resized_shape
from keytoken.data.families import family_of, positions_of
from keytoken.data.timestamps import expanded, times_of
from keytoken.demo.render import CLIP_FPS, draw_clip
from keytoken.demo.tokenizer import CONTRACTS
from keytoken.demo.world import Question

IGNORED = -100  # label of a position without loss, torch's convention


@dataclass(frozen=True)
class Example:
    """One supervised example: what the user says, what the model should answer, and the clip.

    Attributes:
        prompt: User text without the clip's placeholder.
        response: Answer text without the end token.
        frames: uint8 frames [T, H, W, 3], or None for a text-only example.
    """

    prompt: str
    response: str
    frames: np.ndarray | None = None


@dataclass(frozen=True)
class Batch:
    """Right-padded inputs of B examples; padding carries label ``IGNORED`` and needs no mask.

    Attributes:
        input_ids: [B, L].
        position_ids: M-RoPE positions [3, B, L].
        labels: Next tokens [B, L], ``IGNORED`` outside answers.
        vision: ``pixel_values_videos`` and ``video_grid_thw``, or empty.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    vision: dict[str, torch.Tensor]


def clip_example(question: Question, rng: np.random.Generator, response: str | None = None) -> Example:
    """The example of a question with its clip drawn (none for the text family)."""
    frames = draw_clip(question.bodies, rng) if question.bodies else None
    return Example(question.prompt, question.response if response is None else response, frames)


class Encoder:
    """Encodes examples with the demo's processor.

    Args:
        processor: The demo's processor, of either family.
        tokens_per_second: ``vision_config.tokens_per_second`` of the model; of no matter to Qwen3-VL.
    """

    def __init__(self, processor: Any, tokens_per_second: float) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.tokens_per_second = tokens_per_second
        self.family = family_of(processor)
        self.contract = CONTRACTS[self.family.model_type]

    def grid(self, example: Example) -> tuple[int, int, int] | None:
        """(t, h, w) of an example's clip in patches; None if it has none."""
        if example.frames is None:
            return None
        height, width = resized_shape(example.frames.shape[1], example.frames.shape[2], self.contract)
        patch = self.contract.patch_size
        return len(example.frames) // self.contract.temporal_patch_size, height // patch, width // patch

    def prompt_ids(self, example: Example, grid: Sequence[int] | None) -> list[int]:
        """Token ids of the prompt, with one placeholder for each vision token."""
        content: list[dict[str, str]] = [{"type": "text", "text": example.prompt}]
        if grid is not None:
            content.insert(0, {"type": "video"})
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if grid is not None and self.family.timestamps:
            count = grid[0] * self.contract.temporal_patch_size
            metadata = {"frames_indices": range(count), "fps": CLIP_FPS}
            times = times_of(metadata, self.contract.temporal_patch_size)
            return expanded(self.tokenizer(text)["input_ids"], [grid], [times], self.processor)
        if grid is not None:
            merged = int(np.prod(grid)) // self.processor.video_processor.merge_size**2
            text = text.replace("<|video_pad|>", "<|video_pad|>" * merged)
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def vision(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Pixel patches and grids of the examples that have clips; empty if none has."""
        clips = [resize_frames(e.frames, self.contract) for e in examples if e.frames is not None]
        if not clips:
            return {}
        pixels = self.processor.video_processor(videos=clips, do_sample_frames=False, return_tensors="pt")
        return {name: pixels[name] for name in ("pixel_values_videos", "video_grid_thw")}

    def positions(self, ids: list[int], grid: Sequence[int] | None) -> torch.Tensor:
        """M-RoPE positions [3, L] of a prompt with an answer or without."""
        seconds = self.processor.video_processor.temporal_patch_size / CLIP_FPS
        shown = {} if grid is None else {"video_grid_thw": [grid], "second_per_grid_ts": [seconds]}
        return positions_of(self.processor, ids, shown, self.tokens_per_second)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Encode examples with their answers for supervised training."""
        vision = self.vision(examples)
        grids = iter(vision["video_grid_thw"].tolist() if vision else ())
        rows = []
        for example in examples:
            grid = next(grids) if example.frames is not None else None
            prompt = self.prompt_ids(example, grid)
            answer = [*self.tokenizer(example.response)["input_ids"], self.tokenizer.eos_token_id]
            rows.append((prompt, answer, self.positions(prompt + answer, grid)))
        length = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        position_ids = torch.zeros((3, len(rows), length), dtype=torch.long)
        for index, (prompt, answer, positions) in enumerate(rows):
            size = len(prompt) + len(answer)
            input_ids[index, :size] = torch.tensor(prompt + answer)
            labels[index, len(prompt) - 1 : size - 1] = torch.tensor(answer)
            position_ids[:, index, :size] = positions
        return Batch(input_ids, position_ids, labels, vision)


def draw_batches(
    encoder: Encoder,
    draw: Callable[[np.random.Generator], Example],
    *,
    seed: int,
    stream: int,
    steps: int,
    size: int,
) -> Iterator[Batch]:
    """Batches of drawn examples; each has a generator of its own, so that none depends on another one.

    Args:
        encoder: Encodes them.
        draw: Draws an example.
        seed: Of the warm start.
        stream: Keeps the random streams of its stages apart.
        steps: Number of batches.
        size: Examples of each.
    """
    for step in range(steps):
        rng = np.random.default_rng([seed, stream, step])
        yield encoder.batch([draw(rng) for _ in range(size)])
