"""What the study asks of the model: log-probs of given answers, and answers to given prompts.

Both run the model's own modules. Pixels are encoded once for all rows that show the same clip, and the head
runs at answer positions only; neither changes a value.

Axes: B rows, L tokens of the longest row, P tokens of the longest prompt, N answer tokens of all rows, R
tokens of one answer, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

from keytoken.attribution.views import ModelInput
from keytoken.study.prompts import Prompt

PIXELS, GRID = "pixel_values_videos", "video_grid_thw"
# Never sampled: there is no picture behind them. The real stack forbids the same tokens to its engine.
FORBIDDEN = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

Model = Qwen2_5_VLForConditionalGeneration


def load_policy(folder: Path) -> Model:
    """The model of a folder in float32, in evaluation mode."""
    model = Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    return model


def answer_logits(model: Model, rows: Sequence[ModelInput]) -> Tensor:
    """The logits that predict the answer tokens, row after row, [N, V].

    Rows are padded on the right, where a causal model does not look.
    """
    lengths = [row.input_ids.numel() for row in rows]
    input_ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    position_ids = torch.zeros(3, len(rows), max(lengths), dtype=torch.int64)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[index, :length] = row.input_ids
        position_ids[:, index, :length] = row.position_ids
    embeddings = _embed(model, input_ids, [row.prompt_length for row in rows], [row.media for row in rows])
    hidden = model.model.language_model(
        inputs_embeds=embeddings, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    predicted_at = [
        torch.arange(row.prompt_length - 1, length - 1) + index * max(lengths)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]
    logits: Tensor = model.lm_head(hidden.flatten(0, 1)[torch.cat(predicted_at)])
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
    cache, hidden, padding, position = _read_prompts(model, prompts)
    cache.batch_repeat_interleave(answers)
    hidden, padding, position = (x.repeat_interleave(answers, 0) for x in (hidden, padding, position))
    drawn = torch.from_numpy(noise.astype(np.float64))
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
        padding = torch.nn.functional.pad(padding, (0, 1), value=1)
        hidden = model.model.language_model(
            input_ids=token[:, None],
            position_ids=position.expand(3, -1)[..., None],
            attention_mask=padding,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
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


def _read_prompts(model: Model, prompts: Sequence[Prompt]) -> tuple[DynamicCache, Tensor, Tensor, Tensor]:
    """Read prompts, padded on the left so that all end together.

    Returns:
        The cache, the hidden state [B, H] behind each prompt, which tokens are no padding [B, P], and the
        largest position [B] of each prompt.
    """
    longest = max(prompt.input_ids.numel() for prompt in prompts)
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    position_ids = torch.zeros(3, len(prompts), longest, dtype=torch.int64)
    padding = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for index, prompt in enumerate(prompts):
        length = prompt.input_ids.numel()
        input_ids[index, longest - length :] = prompt.input_ids
        position_ids[:, index, longest - length :] = prompt.position_ids
        padding[index, longest - length :] = 1
    cache = DynamicCache()
    embeddings = _embed(model, input_ids, [longest] * len(prompts), [prompt.media for prompt in prompts])
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        position_ids=position_ids,
        attention_mask=padding,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]
    return cache, hidden, padding, position_ids.amax(dim=(0, 2))


def _embed(
    model: Model, input_ids: Tensor, prompt_lengths: Sequence[int], media: Sequence[dict[str, Tensor]]
) -> Tensor:
    """[B, L, H] embeddings with the features of each row's clip in the place of its prompt's placeholders."""
    embeddings: Tensor = model.get_input_embeddings()(input_ids)
    clips, shown = _distinct(media)
    if not clips:
        return embeddings
    grids = torch.cat([clip[GRID] for clip in clips])
    found: Any = model.model.get_video_features(torch.cat([clip[PIXELS] for clip in clips]), grids)
    features = torch.cat([found.pooler_output[clip] for clip in shown if clip is not None])
    in_prompt = torch.arange(input_ids.shape[1]) < torch.tensor(prompt_lengths)[:, None]
    places = (input_ids == model.config.video_token_id) & in_prompt
    return embeddings.masked_scatter(places[..., None].expand_as(embeddings), features)


def _distinct(media: Sequence[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], list[int | None]]:
    """The clips that differ, and for each row the number of its own; None for text.

    Answers to one prompt follow each other, so a clip is compared with the one before it.
    """
    clips: list[dict[str, Tensor]] = []
    shown: list[int | None] = []
    for row in media:
        if row and not (clips and _same(clips[-1], row)):
            clips.append(row)
        shown.append(len(clips) - 1 if row else None)
    return clips, shown


def _same(clip: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return clip is other or (
        torch.equal(clip[GRID], other[GRID])
        and (clip[PIXELS] is other[PIXELS] or torch.equal(clip[PIXELS], other[PIXELS]))
    )
