"""The methods: one small file each, and a plain dict that names them.

A method is a function ``(Signals, MethodConfig, Impl) -> TokenWeights``, where the last argument says which
implementation of the kernels to call. To add one (CONTRIBUTING.md has an example of thirty lines):

1. write ``attribution/methods/<name>.py`` with a ``token_weights`` function, and a docstring with the
   formula, its source and every departure from it;
2. add it to ``METHODS`` below;
3. add ``configs/keytoken_configs/method/<name>.yaml`` with its values, saying which are known;
4. add ``tests/attribution/methods/test_<name>.py`` with an independent truth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from keytoken.attribution.methods import grpo, high_entropy, soft, tor, tw_grpo, video_ktr, vppo
from keytoken.attribution.methods.controls import CONTROLS
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.block import Block
from keytoken.errors import ConfigurationError
from keytoken.schema import MethodConfig, unknown_name
from keytoken_kernels.dispatch import Impl


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """One method as the registry knows it.

    Attributes:
        token_weights: The formula.
        options: The block that ``keytoken.method.options`` is parsed into; None for a method without any.
        selects: Whether it reads ``keytoken.method.selection``.
        needs: Signals that its selection must switch on.
        measures: What the pass over the real input measures for it besides log-probs: "disagreement".
    """

    token_weights: Callable[[Signals, MethodConfig, Impl], TokenWeights]
    options: type[Block] | None = None
    selects: bool = True
    needs: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "grpo": Method(grpo.token_weights, selects=False),
    "video_ktr": Method(video_ktr.token_weights),
    "video_ktr_official": Method(
        video_ktr.token_weights
    ),  # the same formula with the published code's options
    "tor": Method(tor.token_weights),
    "high_entropy": Method(high_entropy.token_weights),
    "vppo": Method(vppo.token_weights, options=vppo.Options, needs=("visual",)),
    "tw_grpo": Method(
        tw_grpo.token_weights, options=tw_grpo.Options, selects=False, measures=("disagreement",)
    ),
    "soft": Method(soft.token_weights, options=soft.Options),
}


def compute_token_weights(signals: Signals, config: MethodConfig, impl: Impl = "auto") -> TokenWeights:
    """Run the configured method on one batch, on the device that holds it, and its control if it has one.

    Raises:
        ConfigurationError: For an unknown method, options that are not its own, or a signal whose pass did
            not run.
        NonFiniteError: For a NaN or an infinity at an answer token.
    """
    result = method_of(config).token_weights(signals, config, impl)
    return CONTROLS[config.control](result, signals)


def method_of(config: MethodConfig) -> Method:
    """The method that a configuration names, after a check of what only this method can check.

    Raises:
        ConfigurationError: An unknown name, an option that the method does not have, a selection that it
            would ignore, or a control of nothing.
    """
    name, where = config.name, "keytoken.method"
    if name not in METHODS:
        raise ConfigurationError(unknown_name(f"method {where}.name={name}", name, METHODS, "methods"))
    method = METHODS[name]
    if method.options is not None:
        method.options.from_mapping(config.options, f"{where}.options")
    elif config.options:
        raise ConfigurationError(
            f"{where}.name={name} has no options, and {where}.options sets {', '.join(config.options)}; "
            f"remove {'it' if len(config.options) == 1 else 'them'}."
        )
    if not method.selects and config.selection is not None:
        raise ConfigurationError(
            f"{where}.name={name} weighs tokens without a selection, but {where}.selection is set; use "
            f"{where}.selection=null, or a method that selects, such as method=video_ktr."
        )
    for signal in method.needs if config.selection is not None else ():
        if getattr(config.selection, f"{signal}_ratio") == 0.0:
            raise ConfigurationError(
                f"{where}.name={name} is about the {signal} signal, and {where}.selection.{signal}_ratio=0 "
                f"switches it off; set a share such as 0.4, or {where}.selection=null for all tokens."
            )
    if config.control != "none" and config.selection is None:
        raise ConfigurationError(
            f"{where}.control={config.control} is the control of a selection, and {where}.selection is null; "
            f"choose a method that selects, or {where}.control=none."
        )
    return method


def measures_of(config: MethodConfig) -> tuple[str, ...]:
    """What the pass over the real input measures besides log-probs, names of fields of :class:`Signals`."""
    selection = config.selection
    truncated = (
        selection is not None and selection.entropy_ratio > 0.0 and selection.entropy_top_p is not None
    )
    return (*(("truncated_entropy",) if truncated else ()), *method_of(config).measures)


def needs_passes(config: MethodConfig) -> bool:
    """Whether an attribution pass runs at all."""
    return bool(config.views or measures_of(config))
