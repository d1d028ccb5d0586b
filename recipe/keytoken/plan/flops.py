"""Floating point operations of a forward or backward pass: products of matrices and attention, two for each.

Norms, activations and rotations are not counted; they are below one percent of a model of this kind.

``pairs`` are the (query, key) pairs of attention in one layer: ``L (L + 1) / 2`` where a kernel skips what is
above the diagonal, ``L * L`` where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from keytoken.data.positions import Grid
from keytoken.plan.architecture import Architecture, Text, Vision


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of one pass.

    Attributes:
        linear: Matrix products of the layers that activation checkpointing computes anew.
        ends: Those that it does not: the last one of each layer, whose result nobody reads again, patch
            embedding and mergers.
        attention: Scores and their sums.
        head: Logits.
    """

    linear: float = 0.0
    ends: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.ends + self.attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, name) + getattr(other, name) for name in Flops.__slots__))

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(getattr(self, name) * factor for name in Flops.__slots__))


def causal_pairs(length: int, prefix: int = 0) -> float:
    """Pairs of ``length`` tokens that see each other causally, and the ``prefix`` tokens before them."""
    return length * prefix + length * (length + 1) / 2


def text_flops(text: Text, tokens: float, pairs: float, head_rows: float) -> Flops:
    """Forward over ``tokens``, with the head at ``head_rows`` of them."""
    width = text.heads * text.head_dim
    attention = 2 * width + 2 * text.kv_heads * text.head_dim
    per_token = text.layers * text.hidden
    return Flops(
        linear=2.0 * tokens * per_token * (attention + 2 * text.intermediate),
        ends=2.0 * tokens * per_token * text.intermediate,
        attention=4.0 * pairs * width * text.layers,
        head=2.0 * head_rows * text.hidden * text.vocabulary,
    )


def vision_flops(vision: Vision, grid: Grid) -> Flops:
    """Forward of the vision tower over a clip of ``grid`` = (temporal patches, height, width), in patches."""
    frames, height, width = grid
    patches = frames * height * width
    product = vision.hidden * vision.intermediate
    block = 4 * vision.hidden**2 + (1 if vision.positions else 2) * product
    ends = patches * (vision.patch_values * vision.hidden + vision.depth * product)
    ends += patches // vision.merge**2 * vision.merger_products * (1 + vision.deepstack)
    whole = float(frames * (height * width) ** 2)
    pairs = vision.full_blocks * whole
    if vision.window:
        pairs += (vision.depth - vision.full_blocks) * frames * _window_pairs(vision, height, width)
    return Flops(
        linear=2.0 * patches * vision.depth * block, ends=2.0 * ends, attention=4.0 * pairs * vision.hidden
    )


def _window_pairs(vision: Vision, height: int, width: int) -> float:
    """Pairs within the windows of one frame; those at its right and lower edge are smaller."""
    assert vision.window is not None
    edge = vision.window // vision.patch
    rows, columns = ([min(edge, size - at) for at in range(0, size, edge)] for size in (height, width))
    return float(sum((row * column) ** 2 for row in rows for column in columns))


def forward(
    model: Architecture, tokens: float, pairs: float, head_rows: float, grids: tuple[Grid, ...] = ()
) -> Flops:
    """Forward over texts and the clips in them."""
    found = text_flops(model.text, tokens, pairs, head_rows)
    for grid in grids:
        found = found + vision_flops(model.vision, grid)
    return found


def training(forward_pass: Flops, recompute: bool, chunked_head: bool) -> Flops:
    """Forward and backward.

    The backward pass of a product is two products. That of attention is five products for the forward's two,
    because fused kernels compute the scores anew.

    Args:
        forward_pass: What the forward pass takes.
        recompute: Activation checkpointing: the layers, not the head, run forward once more.
        chunked_head: The head keeps no logits and computes them anew.
    """
    once_more = 1.0 if recompute else 0.0
    return Flops(
        linear=forward_pass.linear * (3.0 + once_more),
        ends=forward_pass.ends * 3.0,
        attention=forward_pass.attention * (3.5 + once_more),
        head=forward_pass.head * (4.0 if chunked_head else 3.0),
    )
