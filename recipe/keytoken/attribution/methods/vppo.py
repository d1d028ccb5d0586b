"""VPPO: the tokens of each answer that depend most on the picture, and more of the answers that do.

Source: VPPO (arXiv 2510.09285) and its code, over DAPO without KL. With s the k3 estimate between the real
input and one with blackened patches::

    m_{i,t} = 1[ s_{i,t} among the ceil(0.4 |o_i|) largest of answer i ]                 (token filter)
    n_i     = (s_i - min_j s_j) / (max_j s_j - min_j s_j),   s_i the mean of s over all tokens of answer i
    a_i     = b + n_i (B - b),   b = 0.9,   B = b + (1 - b) / mean_j n_j                  (trajectory shaping)
    L       = sum_{i,t} m_{i,t} l_{i,t}(a_i A_i) / sum_i |o_i|  -  0.06 mean_{i,t} log p(o_t)

so that the mean of a_i is 1. l is PPO's clipped loss, which is proportional to the advantage where a_i > 0,
so a_i is part of the token weight here: w_{i,t} = a_i m_{i,t}.

Departures: minimum, maximum and mean run over the whole batch; the code takes the first two over one GPU's
part of a mini-batch and the mean over a micro-batch, so that a_i depends on how a batch is cut. It also adds
1e-8 to that mean, which is never 0. Ties are broken by a seeded draw. Prompts without a picture, which VPPO
never saw, keep all their tokens and a_i = 1. The score is the code's; the paper has the KL of the whole
distributions.
"""

from __future__ import annotations

import dataclasses

import torch

from keytoken.attribution.selection import select_tokens
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.attribution.weights import share_metrics
from keytoken.block import Block, require
from keytoken.schema import MethodConfig
from keytoken_kernels.dispatch import Impl

SMALLEST_RANGE = 1e-6  # of s_i, below which the answers count as equal; the code's


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options(Block):
    """Options of this method.

    Attributes:
        least_factor: b, the factor of the answer that depends least on the picture; 1 for no shaping.
    """

    least_factor: float = 0.9

    def __post_init__(self) -> None:
        require(
            0.0 < self.least_factor <= 1.0,
            f"keytoken.method.options.least_factor is {self.least_factor}; use above 0 to 1, such as 0.9.",
        )


def token_weights(signals: Signals, config: MethodConfig, impl: Impl) -> TokenWeights:
    """The filter times the factor of the answer."""
    options = Options.from_mapping(config.options, "keytoken.method.options")
    result = select_tokens(signals, config, impl)
    if config.selection is None:
        return result
    pictured, scores = signals.has_visual, result.scores["visual"]
    kept = torch.where(pictured[:, None], result.weights, signals.mask.to(result.weights.dtype))
    factors = torch.ones_like(scores[:, 0])
    shaped = pictured & signals.mask.any(dim=1)
    if bool(shaped.any()):
        dependence = scores[shaped].sum(dim=1) / signals.mask[shaped].sum(dim=1)
        factors[shaped] = trajectory_factors(dependence, options.least_factor)
    weights = kept * factors[:, None]
    metrics = {
        **result.metrics,
        **share_metrics(weights, signals.mask),
        "attribution/largest_answer_factor": float(factors.max()) if len(factors) else 1.0,
    }
    return dataclasses.replace(result, weights=weights, selected=weights > 0, metrics=metrics)


def trajectory_factors(dependence: torch.Tensor, least: float) -> torch.Tensor:
    """a_i of the formula, [n] with mean 1.

    Args:
        dependence: [n] s_i of each answer, in nats.
        least: b of the formula.
    """
    spread = dependence.max() - dependence.min()
    if float(spread) <= SMALLEST_RANGE:
        return torch.ones_like(dependence)
    position = (dependence - dependence.min()) / spread
    return least + position * (1.0 - least) / position.mean()
