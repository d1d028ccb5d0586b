"""What the study asks of the model: log-probs of given answers, and answers to given prompts.

Both run the model's own modules: a prompt is read once for all its answers, and the head runs at answer
positions only; neither changes a value.

Axes: B rows, L tokens of the longest row, P tokens of the longest prompt, N answer tokens of all rows, R
tokens of one answer, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from keytoken.attribution.views import ModelInput
from keytoken.study.prompts import Prompt

PIXELS, GRID = "pixel_values_videos", "video_grid_thw"
# Never sampled: there is no picture behind them. The real stack forbids the same tokens to its engine.
FORBIDDEN = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

Model = Qwen2_5_VLForConditionalGeneration


def load_policy(folder: Path) -> Model:
    """The model of a folder in float32, in evaluation mode."""
    logging.disable_progress_bar()  # a bar for each loading would break the bar of the runs
    model = Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    return model


def answer_logits(model: Model, rows: Sequence[ModelInput]) -> Tensor:
    """The logits that predict the answer tokens, row after row, [N, V]; differentiable.

    Rows that follow each other with equal prompts share one reading of it, gradient included.
    """
    prompts, prompt_of = _distinct_prompts(rows)
    read = _read_prompts(model, prompts).of(prompt_of)
    lengths = torch.tensor([row.input_ids.numel() - row.prompt_length for row in rows])
    longest = int(lengths.max())
    hidden = read.hidden[:, None]
    if longest > 1:
        input_ids = torch.zeros(len(rows), longest - 1, dtype=torch.int64)
        position_ids = torch.zeros(3, len(rows), longest - 1, dtype=torch.int64)
        for index, row in enumerate(rows):
            answer = slice(row.prompt_length, row.input_ids.numel() - 1)  # nothing follows the last token
            input_ids[index, : answer.stop - answer.start] = row.input_ids[answer]
            position_ids[:, index, : answer.stop - answer.start] = row.position_ids[:, answer]
        hidden = torch.cat([hidden, read.go_on(model, input_ids, position_ids)], dim=1)
    logits: Tensor = model.lm_head(hidden[torch.arange(longest) < lengths[:, None]])
    return logits


def answer_ids(rows: Iterable[ModelInput]) -> Tensor:
    """The answer tokens, row after row, [N]."""
    return torch.cat([row.input_ids[row.prompt_length :] for row in rows])


@torch.no_grad()
def sample(
    model: Model,
    prompts: Sequence[Prompt],
    noise: np.ndarray,
    *,
    temperature: float,
    end: int,
    forbidden: Sequence[int],
    greedy: bool = False,
) -> list[list[Tensor]]:
    """Answers to every prompt, each drawn with noise of its own.

    Token t of answer n to prompt b is the one in whose share of the unit interval ``noise[b, n, t]`` falls,
    all tokens laid out in the order of their ids. So an answer depends on nothing but its noise, its prompt
    and the model: two arms with the same noise differ where their models do.

    Args:
        model: The model.
        prompts: B prompts.
        noise: [B, n, R] in [0, 1); R is the most tokens an answer may have.
        temperature: Divides the logits.
        end: Id of the token that ends an answer; the answer holds it.
        forbidden: Ids that are never drawn.
        greedy: Whether one more answer of the likeliest tokens follows the n drawn ones.

    Returns:
        For each prompt its n (with ``greedy`` n + 1) answers, [R] int64 each.
    """
    answers, limit = noise.shape[1] + greedy, noise.shape[2]
    read = _read_prompts(model, prompts).of(torch.arange(len(prompts)).repeat_interleave(answers))
    drawn = torch.from_numpy(noise.astype(np.float64))
    hidden, position = read.hidden, read.position
    tokens: list[Tensor] = []
    done = torch.zeros(len(prompts) * answers, dtype=torch.bool)
    for step in range(limit):
        logits = model.lm_head(hidden)
        logits[:, list(forbidden)] = -torch.inf
        token = _draw(logits.view(len(prompts), answers, -1), drawn[:, :, step], temperature).flatten()
        tokens.append(token)
        done |= token == end
        if step + 1 == limit or bool(done.all()):
            break
        position = position + 1
        hidden = read.go_on(model, token[:, None], position.expand(3, -1)[..., None])[:, -1]
    ids = torch.stack(tokens, dim=1)
    cut = [row[: int((row == end).nonzero()[0]) + 1] if bool((row == end).any()) else row for row in ids]
    return [cut[first : first + answers] for first in range(0, len(cut), answers)]


def _draw(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """[B, answers] tokens from [B, answers, V] logits; answers beyond the noise [B, n] are greedy."""
    count = noise.shape[1]
    shares = (logits[:, :count].double() / temperature).softmax(-1).cumsum(-1)
    # right=True: the first token whose share ends beyond the noise, never one without a share.
    token = torch.searchsorted(shares, (noise * shares[..., -1])[..., None], right=True)[..., 0]
    return torch.cat([token, logits[:, count:].argmax(-1)], dim=1)


@dataclass(slots=True)
class _Read:
    """Prompts that the model has read, B of them.

    Attributes:
        cache: Their keys and values, with those of all tokens that came after.
        hidden: [B, H] hidden state behind each prompt.
        seen: [B, P] 1 for what is in the cache, 0 for the padding behind a prompt.
        position: [B] largest position of each prompt.
    """

    cache: DynamicCache
    hidden: Tensor
    seen: Tensor
    position: Tensor

    def of(self, prompts: Tensor) -> _Read:
        """The same for rows [B'], each with the number of its prompt."""
        self.cache.batch_select_indices(prompts)
        return _Read(self.cache, self.hidden[prompts], self.seen[prompts], self.position[prompts])

    def go_on(self, model: Model, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[B, R, H] hidden states of further tokens [B, R] at positions [3, B, R]."""
        self.seen = torch.cat([self.seen, torch.ones_like(input_ids)], dim=1)
        hidden: Tensor = model.model.language_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=self.seen,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden


def _read_prompts(model: Model, prompts: Sequence[Prompt | _PromptPart]) -> _Read:
    """Read prompts, padded on the right, where a causal model does not look."""
    lengths = torch.tensor([prompt.input_ids.numel() for prompt in prompts])
    input_ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    position_ids = torch.zeros(3, *input_ids.shape, dtype=torch.int64)
    for index, prompt in enumerate(prompts):
        input_ids[index, : lengths[index]] = prompt.input_ids
        position_ids[:, index, : lengths[index]] = prompt.position_ids
    cache = DynamicCache()
    hidden = model.model.language_model(
        inputs_embeds=_embed(model, input_ids, [prompt.media for prompt in prompts]),
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    seen = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    behind = hidden[torch.arange(len(prompts)), lengths - 1]
    return _Read(cache, behind, seen, position_ids.amax(dim=(0, 2)))


def _embed(model: Model, input_ids: Tensor, media: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """[B, P, H] embeddings of prompts, with the features of each clip in the place of its placeholders."""
    embeddings: Tensor = model.get_input_embeddings()(input_ids)
    clips = [clip for clip in media if clip]
    if not clips:
        return embeddings
    grids = torch.cat([clip[GRID] for clip in clips])
    found: Any = model.model.get_video_features(torch.cat([clip[PIXELS] for clip in clips]), grids)
    places = (input_ids == model.config.video_token_id)[..., None].expand_as(embeddings)
    return embeddings.masked_scatter(places, torch.cat(found.pooler_output))


@dataclass(frozen=True, slots=True)
class _PromptPart:
    """The prompt of a row: ids [P], positions [3, P] and pixels."""

    input_ids: Tensor
    position_ids: Tensor
    media: Mapping[str, Tensor]

    def same(self, other: _PromptPart) -> bool:
        """Whether the model reads the same in both."""
        return (
            torch.equal(self.input_ids, other.input_ids)
            and torch.equal(self.position_ids, other.position_ids)
            and self.media.keys() == other.media.keys()
            and all(
                value is other.media[name] or torch.equal(value, other.media[name])
                for name, value in self.media.items()
            )
        )


def _distinct_prompts(rows: Sequence[ModelInput]) -> tuple[list[_PromptPart], Tensor]:
    """The prompts of rows, equal ones that follow each other once, and the number [B] of each row's own."""
    prompts: list[_PromptPart] = []
    numbers = []
    for row in rows:
        length = row.prompt_length
        part = _PromptPart(row.input_ids[:length], row.position_ids[:, :length], row.media)
        if not (prompts and part.same(prompts[-1])):
            prompts.append(part)
        numbers.append(len(prompts) - 1)
    return prompts, torch.tensor(numbers)
