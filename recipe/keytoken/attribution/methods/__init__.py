"""The methods: one small file each, and a plain dict that names them.

A method is a function ``(Signals, MethodConfig, Impl) -> TokenWeights``, where the last argument says which
implementation of the kernels to call. To add one:

1. write ``attribution/methods/<name>.py`` with a ``token_weights`` function whose docstring has the formula,
   its source and every departure from it;
2. add it to ``METHODS`` below;
3. add ``configs/keytoken_configs/method/<name>.yaml`` with its values, saying which are known;
4. add ``tests/attribution/methods/test_<name>.py`` with an independent truth.
"""

from __future__ import annotations

from collections.abc import Callable

from keytoken.attribution.methods import grpo, video_ktr
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.errors import ConfigurationError
from keytoken.schema import MethodConfig, unknown_name
from keytoken_kernels.dispatch import Impl

Method = Callable[[Signals, MethodConfig, Impl], TokenWeights]

METHODS: dict[str, Method] = {
    "grpo": grpo.token_weights,
    "video_ktr": video_ktr.token_weights,
    "video_ktr_official": video_ktr.token_weights,  # the same formula with the published code's options
}


def compute_token_weights(signals: Signals, config: MethodConfig, impl: Impl = "auto") -> TokenWeights:
    """Run the configured method on one batch, on the device that holds it.

    Raises:
        ConfigurationError: For an unknown method, or a signal whose pass did not run.
        NonFiniteError: For a NaN or an infinity at an answer token.
    """
    if config.name not in METHODS:
        what = f"method keytoken.method.name={config.name}"
        raise ConfigurationError(unknown_name(what, config.name, METHODS, "methods"))
    return METHODS[config.name](signals, config, impl)
