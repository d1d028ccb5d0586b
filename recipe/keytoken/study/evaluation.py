"""Held-out accuracy: every prompt of a split answered a few times at temperature 1, and once greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keytoken.rewards.extract import extract_answer, has_format
from keytoken.study.policy import FORBIDDEN, Model, sample
from keytoken.study.prompts import Prompt, processor

_EVALUATION = 61  # keeps these draws apart from those of the training
_CHUNK = 80  # prompts answered together


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The answers to a split, prompt by prompt.

    Attributes:
        families: Family of each prompt.
        sampled: Right answers among the sampled ones, of each prompt.
        greedy: Whether the greedy answer is right, 0 or 1, of each prompt.
        samples: Sampled answers to each prompt.
        well_formed: Share of all answers in the right format.
        mean_length: Tokens of an answer, mean over all.
    """

    families: list[str]
    sampled: list[int]
    greedy: list[int]
    samples: int
    well_formed: float
    mean_length: float


def evaluate(
    model: Model, prompts: Sequence[Prompt], *, samples: int, max_tokens: int, seed: int
) -> Evaluation:
    """Answer and score a split.

    The noise of the samples depends on the seed and the prompt's place only: all arms of a seed, and the warm
    start itself, are compared on the same noise.
    """
    tokenizer = processor().tokenizer
    forbidden = tokenizer.convert_tokens_to_ids(list(FORBIDDEN))
    # Prompts of like length together: little padding.
    order = sorted(range(len(prompts)), key=lambda index: prompts[index].input_ids.numel())
    sampled, greedy = [0] * len(prompts), [0] * len(prompts)
    formed = tokens = 0
    for first in range(0, len(order), _CHUNK):
        chosen = order[first : first + _CHUNK]
        noise = np.stack(
            [np.random.default_rng([seed, _EVALUATION, i]).random((samples, max_tokens)) for i in chosen]
        )
        answers = sample(
            model,
            [prompts[index] for index in chosen],
            noise,
            temperature=1.0,
            end=int(tokenizer.eos_token_id),
            forbidden=forbidden,
            greedy=True,
        )
        for index, group in zip(chosen, answers, strict=True):
            texts = tokenizer.batch_decode(group, skip_special_tokens=True)
            hits = [int(extract_answer(text) == prompts[index].letter) for text in texts]
            sampled[index], greedy[index] = sum(hits[:-1]), hits[-1]
            formed += sum(has_format(text) for text in texts)
            tokens += sum(ids.numel() for ids in group)
    count = len(prompts) * (samples + 1)
    families = [prompt.family for prompt in prompts]
    return Evaluation(families, sampled, greedy, samples, formed / count, tokens / count)
