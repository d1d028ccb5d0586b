"""TW-GRPO: positions at which the answers to one prompt disagree count more.

Source: TW-GRPO (arXiv 2505.24718) and its code. With q_t the mean over the G answers to a prompt of their
next-token log-probs at position t (an answer that has ended counts as uniform) and D_t the disagreement::

    D_t     = 1/G sum_g sum_v ( e^d - d - 1 ),   d = clamp(q_t(v) - log p_g(v | o_g,<t), +-11)
    w_{g,t} = 1 + (alpha - 1) (D_t - min D) / (max D - min D)
    L       = sum w l / sum_i |o_i|

Answers are aligned by the index of their tokens, whatever they say there. D is measured in the pass over the
real input; no counterfactual view is needed.

Departures: only the weights are TW-GRPO's; its soft rewards for questions with several right answers are not
here. The weights multiply the policy term; in the code they multiply the KL term as well, whose coefficient
its script sets to 0. The code takes the mean of L over the answers to one prompt, on each GPU; here it is one
mean over the mini-batch, in which prompts with long answers count more. Where all positions disagree alike,
min D = max D, every weight is 1; the code adds 1e-8 to the difference instead.
"""

from __future__ import annotations

import dataclasses
import math

from keytoken.attribution.types import Signals, TokenWeights
from keytoken.attribution.weights import between_extremes, keep_all
from keytoken.block import Block, require
from keytoken.checks import require_finite
from keytoken.errors import ConfigurationError
from keytoken.schema import MethodConfig
from keytoken_kernels.dispatch import Impl


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options(Block):
    """Options of this method.

    Attributes:
        alpha: Weight of the position that is disagreed on most; that of the released model by default. The
            code has defaults of 1.4 and 1.5.
    """

    alpha: float = 1.7

    def __post_init__(self) -> None:
        require(
            1.0 <= self.alpha < math.inf,
            f"keytoken.method.options.alpha is {self.alpha}; use 1 (all alike) or more, such as 1.7.",
        )


def token_weights(signals: Signals, config: MethodConfig, impl: Impl) -> TokenWeights:
    """Weights from 1 to alpha, by position.

    Raises:
        ConfigurationError: If the disagreement was not measured.
        NonFiniteError: For a NaN or an infinity in it at an answer token.
    """
    options = Options.from_mapping(config.options, "keytoken.method.options")
    mask, disagreement = signals.mask, signals.disagreement
    if disagreement is None:
        raise ConfigurationError(
            "keytoken.method.name=tw_grpo needs the disagreement of the answers to a prompt, which was not "
            "measured; run the pass over the real input."
        )
    require_finite(disagreement, mask, "disagreement of the answers to a prompt")
    scores = disagreement.masked_fill(~mask, 0.0)
    position = between_extremes(scores, mask, signals.group)
    weights = (1.0 + (options.alpha - 1.0) * position) * mask
    every = keep_all(mask)
    mean = float(weights.sum()) / max(float(mask.sum()), 1.0)
    metrics = {**every.metrics, "attribution/weight_mean": mean}
    return dataclasses.replace(every, weights=weights, scores={"disagreement": scores}, metrics=metrics)
