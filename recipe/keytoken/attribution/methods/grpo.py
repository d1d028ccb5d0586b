"""GRPO: every answer token counts the same, w_{i,t} = 1.

Source: DeepSeekMath (arXiv 2402.03300). Needs no counterfactual pass. The baseline of every other method,
and, with the ``grpo`` preset's loss, equal to verl's own GRPO.
"""

from __future__ import annotations

from keytoken.attribution.types import Signals, TokenWeights
from keytoken.attribution.weights import keep_all
from keytoken.errors import ConfigurationError
from keytoken.schema import MethodConfig
from keytoken_kernels.dispatch import Impl


def token_weights(signals: Signals, config: MethodConfig, impl: Impl) -> TokenWeights:
    """Weight 1 on the response mask; nothing is selected, so no kernel runs.

    Raises:
        ConfigurationError: If a selection is configured, which GRPO would ignore.
    """
    if config.selection is not None:
        raise ConfigurationError(
            "keytoken.method.name=grpo weighs all tokens alike but keytoken.method.selection is set; "
            "use keytoken.method.selection=null, or method=video_ktr."
        )
    return keep_all(signals.mask)
