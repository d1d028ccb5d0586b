"""GRPO: every answer token counts the same, w_{i,t} = 1.

Source: DeepSeekMath (arXiv 2402.03300). Needs no counterfactual pass. The baseline of every other method,
and, with the ``grpo`` preset's loss, equal to verl's own GRPO. The presets ``dapo``, ``dr_grpo``, ``gspo``
and ``cispo`` differ from it in the loss, ``papo_grpo`` and ``papo_dapo`` in a term of the loss that looks at
a masked picture, ``t_grpo`` in the reward.
"""

from __future__ import annotations

from keytoken.attribution.types import Signals, TokenWeights
from keytoken.attribution.weights import keep_all
from keytoken.schema import MethodConfig
from keytoken_kernels.dispatch import Impl


def token_weights(signals: Signals, config: MethodConfig, impl: Impl) -> TokenWeights:
    """Weight 1 on the response mask; nothing is selected, so no kernel runs."""
    return keep_all(signals.mask)
