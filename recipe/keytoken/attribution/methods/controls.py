"""Controls: what a selection must be compared with before its choice of tokens can take the credit.

Source: the reviews of Video-KTR and ToR, which ask whether any mask of that size would do.

``random`` gives every answer the weights that the method gave it, at random tokens: as many tokens, as much
weight, no attribution. ``inverse`` gives 1 to the answer tokens that the method left out. The third control,
all tokens with the method's own loss, is the method with ``keytoken.method.selection=null``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from keytoken.attribution.types import Signals, TokenWeights
from keytoken.attribution.weights import share_metrics

_STREAM = 0x5A4D  # keeps these draws apart from others with the same seed


def unchanged(result: TokenWeights, signals: Signals) -> TokenWeights:
    """No control."""
    return result


def at_random(result: TokenWeights, signals: Signals) -> TokenWeights:
    """The weights of each answer, permuted among its tokens.

    The draw depends on ``signals.seed`` and on what the answer is known by, not on its place in the batch.
    """
    mask = signals.mask
    draws = _draws(signals).to(mask.device)
    in_order = (~mask).to(torch.int8).argsort(dim=1, stable=True)  # an answer's tokens first
    shuffled = draws.masked_fill(~mask, 2.0).argsort(dim=1)
    weights = torch.zeros_like(result.weights).scatter_(1, shuffled, result.weights.gather(1, in_order))
    return dataclasses.replace(result, weights=weights, selected=weights > 0)


def inverse(result: TokenWeights, signals: Signals) -> TokenWeights:
    """Weight 1 where the method has none."""
    weights = (signals.mask & ~result.selected).to(result.weights.dtype)
    metrics = {**result.metrics, **share_metrics(weights, signals.mask)}
    return dataclasses.replace(result, weights=weights, selected=weights > 0, metrics=metrics)


CONTROLS: dict[str, Callable[[TokenWeights, Signals], TokenWeights]] = {
    "none": unchanged,
    "random": at_random,
    "inverse": inverse,
}


def _draws(signals: Signals) -> torch.Tensor:
    """[B, T] float64 in [0, 1), one stream for each answer."""
    rows, width = signals.mask.shape
    keys = range(rows) if signals.row_keys is None else signals.row_keys.tolist()
    streams = [np.random.default_rng([_STREAM, signals.seed, key]).random(width) for key in keys]
    return torch.from_numpy(np.stack(streams)) if streams else torch.zeros(rows, width, dtype=torch.float64)
