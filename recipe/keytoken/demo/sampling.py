"""Answers of the demo's model in plain transformers, to measure the warm start without an engine."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from keytoken.demo.batches import Encoder, Example
from keytoken.demo.model import Model

MAX_NEW_TOKENS = 32


@torch.no_grad()
def sample_answers(
    model: Model,
    encoder: Encoder,
    examples: Sequence[Example],
    *,
    temperature: float,
    seed: int = 0,
    batch_size: int = 128,
) -> list[str]:
    """Sample one answer to each example's prompt.

    Prompts of equal length are answered together, so nothing is padded.

    Args:
        model: The model, in evaluation mode.
        encoder: Encoder of the model's processor.
        examples: Prompts; their responses are ignored.
        temperature: 0 for greedy answers.
        seed: Seed of the sampling.
        batch_size: Most prompts answered together.

    Returns:
        The answers' texts in the order of ``examples``, special tokens removed.
    """
    generator = torch.Generator().manual_seed(seed)
    groups: dict[int, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        grid = encoder.grid(example)
        groups[len(encoder.prompt_ids(example, grid)) + (0 if grid is None else 10_000)].append(index)
    answers: dict[int, str] = {}
    for key in sorted(groups):
        for first in range(0, len(groups[key]), batch_size):
            chosen = groups[key][first : first + batch_size]
            texts = _answer(model, encoder, [examples[i] for i in chosen], temperature, generator)
            answers.update(zip(chosen, texts, strict=True))
    return [answers[index] for index in range(len(examples))]


def _answer(
    model: Model,
    encoder: Encoder,
    examples: list[Example],
    temperature: float,
    generator: torch.Generator,
) -> list[str]:
    grids = [encoder.grid(example) for example in examples]
    prompts = [encoder.prompt_ids(e, grid) for e, grid in zip(examples, grids, strict=True)]
    rows = zip(prompts, grids, strict=True)
    positions = torch.stack([encoder.positions(ids, grid) for ids, grid in rows], dim=1)
    cache = DynamicCache()
    inputs: dict[str, Any] = {"input_ids": torch.tensor(prompts), **encoder.vision(examples)}
    eos = encoder.tokenizer.eos_token_id
    done = torch.zeros(len(examples), dtype=torch.bool)
    tokens: list[torch.Tensor] = []
    while len(tokens) < MAX_NEW_TOKENS and not bool(done.all()):
        hidden = model.model(
            **inputs, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = model.lm_head(hidden)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probabilities = torch.softmax(logits / temperature, dim=-1)
            token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        tokens.append(torch.where(done, eos, token))
        done |= token == eos
        inputs = {"input_ids": tokens[-1][:, None]}
        positions = positions.amax(dim=(0, 2))[None, :, None].expand(3, -1, 1) + 1
    texts: list[str] = encoder.tokenizer.batch_decode(torch.stack(tokens, dim=1), skip_special_tokens=True)
    return texts
