"""The prompts of a split, encoded once: token ids, positions and pixels as the model reads them.

Axes: P tokens of a prompt, L of prompt and answer, N patches, D values of a patch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from keytoken.attribution.views import ModelInput
from keytoken.demo import model
from keytoken.demo.batches import Encoder, clip_example
from keytoken.demo.tokenizer import build_processor, build_tokenizer
from keytoken.demo.world import Question
from keytoken.study.worlds import WORLDS

# Keeps the splits' random streams apart, and the seed of all of them: every run of a world sees the same
# clips.
_STREAMS = {"train": 41, "test": 42, "familiar": 43, "tuning": 44}
_SEED = 0
KEPT_FOR = "test"
_CHUNK = 64  # clips that the processor takes at once


@dataclass(frozen=True, slots=True)
class Prompt:
    """One encoded prompt.

    Attributes:
        uid: Names it within the study.
        family: Its family of questions.
        letter: The right answer.
        input_ids: [P] int64.
        position_ids: [3, P] int64, M-RoPE.
        media: ``pixel_values_videos`` [N, D] and ``video_grid_thw`` [1, 3]; empty for text.
    """

    uid: str
    family: str
    letter: str
    input_ids: Tensor
    position_ids: Tensor
    media: dict[str, Tensor]

    def with_answer(self, answer: Tensor) -> ModelInput:
        """The prompt followed by an answer [R] of tokens, as the model and the views read it.

        Answers are text: their positions go on behind the largest one of the prompt, in all rows alike.
        """
        steps = torch.arange(1, answer.numel() + 1)
        behind = (self.position_ids.max() + steps).expand(3, -1)
        return ModelInput(
            input_ids=torch.cat([self.input_ids, answer]),
            position_ids=torch.cat([self.position_ids, behind], dim=1),
            prompt_length=self.input_ids.numel(),
            media=self.media,
            prompt=self.uid,
        )


def split_question(world: str, split: str, index: int) -> tuple[Question, np.random.Generator]:
    """Question ``index`` of a split, and the generator to draw its clip with; families take turns."""
    known = WORLDS[world]
    rng = np.random.default_rng([_SEED, _STREAMS[split], index])
    family = known.families[index % len(known.families)]
    return known.question(family, rng, kept=split == KEPT_FOR), rng


@functools.cache
def processor() -> Any:
    """The demo's processor; the worlds of studies have its words."""
    return build_processor(build_tokenizer())


@functools.cache
def load_split(world: str, split: str, count: int) -> tuple[Prompt, ...]:
    """The first ``count`` prompts of a split, with their clips drawn and processed; kept in memory."""
    encoder = Encoder(processor(), model.TOKENS_PER_SECOND)
    prompts: list[Prompt] = []
    starts = range(0, count, _CHUNK)
    for first in tqdm(starts, desc=f"clips: {world} {split}", unit="chunk", mininterval=1.0, leave=False):
        indices = range(first, min(first + _CHUNK, count))
        prompts.extend(_encoded(encoder, world, split, indices))
    return tuple(prompts)


def _encoded(encoder: Encoder, world: str, split: str, indices: Sequence[int]) -> list[Prompt]:
    questions = [split_question(world, split, index) for index in indices]
    examples = [clip_example(question, rng) for question, rng in questions]
    vision = encoder.vision(examples)
    grids = vision["video_grid_thw"].tolist() if vision else []
    counts = [int(np.prod(grid)) for grid in grids]
    pixels = iter(vision["pixel_values_videos"].split(counts) if vision else ())
    shapes = iter(grids)
    prompts = []
    for index, (question, _), example in zip(indices, questions, examples, strict=True):
        grid = next(shapes) if example.frames is not None else None
        ids = encoder.prompt_ids(example, grid)
        media = {}
        if grid is not None:
            media = {"pixel_values_videos": next(pixels), "video_grid_thw": torch.tensor([grid])}
        uid = f"{world}/{split}-{index:05d}"
        positions = encoder.positions(ids, grid)
        prompts.append(Prompt(uid, question.family, question.letter, torch.tensor(ids), positions, media))
    return prompts
