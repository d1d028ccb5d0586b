"""The masked view: the vision tokens are dropped from the sequence, the M-RoPE positions of the others kept.

No query can attend to a dropped token, so the result equals a forward pass whose attention mask hides them,
at the price of the text alone.

Source: Video-KTR (arXiv 2601.19686), and ToR (arXiv 2603.25077) for images. Departure from Video-KTR's
published code: positions may be kept (that code renumbers the remaining text).

Only placeholders are dropped. Of a Qwen3-VL video the times stay, ``<0.5 seconds>`` for each temporal patch,
as do the tokens around each block: they are text, and what the view takes away is what was seen, not when. So
the view still tells how long a clip is. Nothing is added to deeper layers either (deepstack), for want of
pixels.

Axes: L tokens of one unpadded sequence, R position rows. verl carries R = 4 rows, the text position and then
the three of M-RoPE; Hugging Face's own R = 3 works as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal

import torch

from keytoken.attribution.views.base import ModelInput, View, ViewContext
from keytoken.errors import InertViewError

TEXT_ROW_COUNT = 4  # position rows when the first one numbers the tokens as plain text


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MaskedView:
    """One sequence without its vision tokens.

    Attributes:
        input_ids: [L'] remaining ids.
        position_ids: [R, L'] their positions.
        kept: [L'] index of each remaining token in the original sequence.

    Example:
        ``<start> <pad> <pad> <end> q a`` with two ``<pad>`` dropped: ``kept = tensor([0, 3, 4, 5])``.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    kept: torch.Tensor


def drop_vision_tokens(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    vision_token_ids: Collection[int],
    prompt_length: int,
    positions: Literal["kept", "compressed"] = "kept",
) -> MaskedView:
    """Build the masked view of one sequence.

    Args:
        input_ids: [L] prompt and answer without padding.
        position_ids: [R, L] positions of the real pass.
        vision_token_ids: Ids of the image and video placeholders. The tokens around them
            (``<|vision_start|>``, ``<|vision_end|>``) are text and stay.
        prompt_length: Only tokens before this index are dropped: a placeholder that the policy sampled
            into its answer is an ordinary answer token and must keep its log-prob.
        positions: ``kept`` leaves the M-RoPE rows of the remaining tokens as they are and renumbers only the
            text row; ``compressed`` numbers all rows 0 to L'-1.

    Raises:
        InertViewError: If the prompt has no vision token; such a prompt has no masked view.
    """
    is_vision = torch.isin(input_ids, input_ids.new_tensor(sorted(vision_token_ids)))
    is_vision[prompt_length:] = False
    kept = (~is_vision).nonzero().squeeze(1)
    if kept.numel() == input_ids.numel():
        raise InertViewError(
            f"The masked view dropped nothing: none of the vision tokens {sorted(vision_token_ids)} is among "
            f"the {prompt_length} prompt tokens. Mark text-only prompts with has_visual=False, or correct "
            "the ids."
        )
    order = torch.arange(kept.numel(), dtype=position_ids.dtype, device=position_ids.device)
    new_positions = position_ids[:, kept].clone()
    if positions == "compressed":
        new_positions[:] = order
    elif position_ids.shape[0] == TEXT_ROW_COUNT:
        new_positions[0] = order
    return MaskedView(input_ids=input_ids[kept], position_ids=new_positions, kept=kept)


def masked_views(
    input_ids: Sequence[torch.Tensor],
    position_ids: Sequence[torch.Tensor],
    vision_token_ids: Collection[int],
    prompt_lengths: Sequence[int],
    has_visual: Sequence[bool],
    positions: Literal["kept", "compressed"] = "kept",
) -> list[MaskedView | None]:
    """The masked views of a batch; None for text-only prompts, which have none.

    Raises:
        InertViewError: If a prompt with ``has_visual`` has no vision token.
    """
    rows = zip(input_ids, position_ids, prompt_lengths, has_visual, strict=True)
    return [
        drop_vision_tokens(ids, pos, vision_token_ids, length, positions) if visual else None
        for ids, pos, length, visual in rows
    ]


def masked(inputs: ModelInput, context: ViewContext) -> ModelInput | None:
    """The input without its vision tokens and pixels; None for text.

    Raises:
        InertViewError: If there are pixels but no vision token that stands for them.
    """
    if not inputs.media:
        return None
    view = drop_vision_tokens(
        inputs.input_ids,
        inputs.position_ids,
        context.vision.token_ids,
        inputs.prompt_length,
        context.positions,
    )
    return dataclasses.replace(
        inputs,
        input_ids=view.input_ids,
        position_ids=view.position_ids,
        prompt_length=inputs.prompt_length - (inputs.input_ids.numel() - view.kept.numel()),
        media={},
    )


VIEW = View(kind="visual", build=masked)
