"""Soft weights: every token learns, those that matter more, with a mean of 1 in each answer.

Source: none; the shape of PEPO's weights (a softmax over the answer, mixed in over the course of training) on
Video-KTR's signals::

    u_{i,t} = mean over the signals in use of (s_{i,t} - min_t s_i) / (max_t s_i - min_t s_i)
    w_{i,t} = (1 - p) + p |o_i| softmax_t( u_{i,t} / tau ),    p = min(step / anneal_steps, 1)

A signal whose scores are all equal in an answer, or that it does not have, says nothing of it: u = 0. The
hard selection that ``selection`` describes is made all the same and reported, so that the metrics compare;
its shares and its scope do not change the weights.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from keytoken.attribution.selection import select_tokens
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.attribution.weights import between_extremes, share_metrics
from keytoken.block import Block, require
from keytoken.schema import MethodConfig
from keytoken_kernels.dispatch import Impl


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options(Block):
    """Options of this method.

    Attributes:
        temperature: tau; the smaller, the closer to a hard choice.
        anneal_steps: Steps over which the weights go from uniform to their own; null for their own at once.
    """

    temperature: float = 0.5
    anneal_steps: int | None = None

    def __post_init__(self) -> None:
        where = "keytoken.method.options"
        require(
            0.0 < self.temperature < math.inf,
            f"{where}.temperature is {self.temperature}; use a number above 0, such as 0.5.",
        )
        require(
            self.anneal_steps is None or self.anneal_steps >= 1,
            f"{where}.anneal_steps is {self.anneal_steps}; use 1 or more, or null for none.",
        )


def token_weights(signals: Signals, config: MethodConfig, impl: Impl) -> TokenWeights:
    """Positive weights of mean 1 on every answer with tokens."""
    options = Options.from_mapping(config.options, "keytoken.method.options")
    result = select_tokens(signals, config, impl)
    if config.selection is None:
        return result
    mask = signals.mask
    u = torch.stack([between_extremes(score, mask) for score in result.scores.values()]).mean(dim=0)
    logits = (u / options.temperature).masked_fill(~mask, -math.inf)
    own = logits.softmax(dim=1).nan_to_num(0.0) * mask.sum(dim=1, keepdim=True)
    share = 1.0 if options.anneal_steps is None else min(signals.step / options.anneal_steps, 1.0)
    weights = ((1.0 - share) + share * own) * mask
    metrics = {
        **{name: value for name, value in result.metrics.items() if name.count("/") > 1},  # of the signals
        **share_metrics(weights, mask),
        "attribution/anneal_share": share,
        "attribution/largest_weight": float(weights.max()) if weights.numel() else 0.0,
        "kernels/impl": result.metrics["kernels/impl"],
    }
    return dataclasses.replace(result, weights=weights, selected=weights > 0, metrics=metrics)
