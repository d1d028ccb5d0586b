"""Scores of single tokens: how much each one depended on the video and on the order of its frames.

Source: Video-KTR (arXiv 2601.19686), definitions of the visual and temporal dependence. The paper takes
absolute differences, the published code signed ones; here the sign is an option. The differences themselves
are taken by :func:`keytoken_kernels.selection.select`, in float32 also for half-precision log-probs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from keytoken.attribution.types import Signals
from keytoken.checks import require_finite
from keytoken.errors import ConfigurationError
from keytoken_kernels.selection import Signal

# Name of each signal: what its values are, and what they are compared with.
SOURCES = {
    "visual": ("log-probs of the real view", "log-probs of the masked view"),
    "temporal": ("log-probs of the real view", "log-probs of the shuffled view"),
    "entropy": ("entropy of the real view", None),
}


def dependence(
    signals: Signals,
    name: Literal["visual", "temporal"],
    ratio: float,
    sign: Literal["signed", "absolute"],
    weight: float = 1.0,
) -> Signal:
    """Difference of log-probs between the real input and a counterfactual view.

    A view that gives exactly the same log-probs scores 0: whether a view's *input* changed is checked where
    it is built (:mod:`keytoken.attribution.views`), not here. Images have no temporal score, text has
    neither: rows of a view that do not apply are never read.

    Args:
        signals: The log-probs.
        name: "visual" for the view without vision tokens, "temporal" for the one with shuffled frames.
        ratio: Share of tokens to select, above 0.
        sign: "signed" for log p(real) - log p(view), "absolute" for its magnitude.
        weight: Of the tokens that this signal is the first to select.

    Raises:
        ConfigurationError: When the pass of the view did not run, and some prompt has that view.
    """
    visual = name == "visual"
    applies = signals.has_visual if visual else signals.has_temporal
    logp_view = signals.logp_masked if visual else signals.logp_shuffled
    if logp_view is None and bool(applies.any()):
        raise ConfigurationError(
            f"keytoken.method.selection.{name}_ratio is {ratio} but the {'masked' if visual else 'shuffled'} "
            f"pass did not run; run it, or set {name}_ratio=0."
        )
    return Signal(
        values=signals.logp,
        baseline=logp_view,
        absolute=sign == "absolute",
        applies=applies,
        ratio=ratio,
        weight=weight,
    )


def uncertainty(signals: Signals, ratio: float, weight: float = 1.0) -> Signal:
    """The entropy of the policy at each answer token; exists for every modality. Arguments as above."""
    return Signal(values=signals.entropy, ratio=ratio, weight=weight)


def refuse_non_finite(chosen: Mapping[str, Signal], mask: torch.Tensor) -> None:
    """Name the first value that is no number, of all that were looked at.

    Raises:
        NonFiniteError: For a NaN or an infinity at an answer token that a signal exists for.
    """
    for name, signal in chosen.items():
        valid = mask if signal.applies is None else mask & signal.applies[:, None]
        for tensor, what in zip((signal.values, signal.baseline), SOURCES[name], strict=True):
            if tensor is not None and what is not None:
                require_finite(tensor, valid, what)
