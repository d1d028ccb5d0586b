"""Scores of single tokens: how much each one depended on the video, on the order of its frames, or on chance.

With p and q the probabilities of the sampled token under the real input and under a view, the comparisons are

    ===========  ==========================================  =====================================  ==========
    name         score                                       source                                 range
    ===========  ==========================================  =====================================  ==========
    difference   log p - log q                               Video-KTR (arXiv 2601.19686), ToR      any
    probability  p - q                                       an ablation of ToR, at second hand     [-1, 1]
    k3           q/p - log(q/p) - 1, log(q/p) within +-20    VPPO's code                            [0, 10]
    jsd          JSD of (p, 1 - p) and (q, 1 - q)            none; see :func:`jsd`                  [0, log 2]
    ===========  ==========================================  =====================================  ==========

The first two have a sign; whether a score is their magnitude is an option, in which Video-KTR's paper and
code differ. Plain differences are taken by :func:`keytoken_kernels.selection.select`, in float32 also for
half-precision log-probs; the others here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from keytoken.attribution.types import Signals
from keytoken.checks import require_finite
from keytoken.errors import ConfigurationError
from keytoken.schema import SelectionConfig
from keytoken_kernels.selection import Signal

# Of each signal, the tensors of Signals that it is made of, and what they are.
SOURCES = {
    "visual": {"logp": "log-probs of the real view", "logp_masked": "log-probs of the masked view"},
    "temporal": {"logp": "log-probs of the real view", "logp_shuffled": "log-probs of the shuffled view"},
    "entropy": {
        "entropy": "entropy of the real view",
        "truncated_entropy": "truncated entropy of the real view",
    },
}
MAX_LOG_RATIO = 20.0  # VPPO's bounds of k3
MAX_K3 = 10.0


def probability(logp: Tensor, logp_view: Tensor) -> Tensor:
    """p - q: a change between two negligible probabilities is negligible, whatever their ratio."""
    return logp.exp() - logp_view.exp()


def k3(logp: Tensor, logp_view: Tensor) -> Tensor:
    """exp(x) - x - 1 with x = log(q/p), nats: Schulman's estimate of KL(p || q) at one token."""
    x = (logp_view - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (x.exp() - x - 1.0).clamp(0.0, MAX_K3)


def jsd(logp: Tensor, logp_view: Tensor) -> Tensor:
    """Jensen-Shannon divergence between "this token" and "any other" under both inputs, nats.

    At most log 2, so that no single token can dominate. It is a lower bound of the divergence of the whole
    distributions (joining outcomes never raises it) and needs no more than the two log-probs.
    """
    p, q = logp.double().exp(), logp_view.double().exp()
    # 1 - p from the logarithm, which keeps the digits of a probability near 1.
    rest_p, rest_q = -torch.expm1(logp.double()), -torch.expm1(logp_view.double())

    def half(a: Tensor, b: Tensor) -> Tensor:
        return torch.xlogy(a, a) - torch.xlogy(a, (a + b) / 2)

    total = half(p, q) + half(q, p) + half(rest_p, rest_q) + half(rest_q, rest_p)
    return (total / 2).clamp(0.0, math.log(2.0)).to(logp.dtype)


# Add one: write a function (logp, logp_view) -> score above, name it here and in SelectionConfig.score.
COMPARISONS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "difference": None,  # by the kernel
    "probability": probability,
    "k3": k3,
    "jsd": jsd,
}


def dependence(name: Literal["visual", "temporal"], signals: Signals, selection: SelectionConfig) -> Signal:
    """How far a token's probability moves between the real input and a counterfactual view.

    A view that gives exactly the same log-probs scores 0: whether a view's *input* changed is checked where
    it is built (:mod:`keytoken.attribution.views`), not here. Images have no temporal score, text has
    neither: rows of a view that do not apply are never read.

    Args:
        name: "visual" for the view without vision tokens, "temporal" for the one with shuffled frames.
        signals: The log-probs.
        selection: Comparison, sign, share and weight.

    Raises:
        ConfigurationError: When the pass of the view did not run, and some prompt has that view.
    """
    visual = name == "visual"
    ratio = selection.visual_ratio if visual else selection.temporal_ratio
    applies = signals.has_visual if visual else signals.has_temporal
    logp, logp_view = signals.logp, signals.logp_masked if visual else signals.logp_shuffled
    if logp_view is None and bool(applies.any()):
        raise ConfigurationError(
            f"keytoken.method.selection.{name}_ratio is {ratio} but the {'masked' if visual else 'shuffled'} "
            f"pass did not run; run it, or set {name}_ratio=0."
        )
    signal = Signal(
        values=logp,
        baseline=logp_view,
        absolute=selection.score_sign == "absolute",
        applies=applies,
        ratio=ratio,
        weight=selection.visual_weight if visual else selection.temporal_weight,
    )
    if logp_view is None:
        return signal
    if selection.probability_floor > 0.0:
        least = math.log(selection.probability_floor)
        logp, logp_view = logp.clamp(min=least), logp_view.clamp(min=least)
        signal = dataclasses.replace(signal, values=logp, baseline=logp_view)
    compare = COMPARISONS[selection.score]
    if compare is None:
        return signal
    return dataclasses.replace(signal, values=compare(logp, logp_view), baseline=None)


def uncertainty(signals: Signals, selection: SelectionConfig) -> Signal:
    """The entropy of the policy at each answer token; exists for every modality.

    Raises:
        ConfigurationError: When the truncated entropy is wanted and was not measured.
    """
    values: Tensor | None = signals.entropy
    if selection.entropy_top_p is not None:
        values = signals.truncated_entropy
    if values is None:
        raise ConfigurationError(
            f"keytoken.method.selection.entropy_top_p is {selection.entropy_top_p} but the truncated entropy "
            "was not measured; run the pass over the real input, or set entropy_top_p=null."
        )
    return Signal(values=values, ratio=selection.entropy_ratio, weight=selection.entropy_weight)


def conditioned(signal: Signal, magnitudes: Tensor) -> Signal:
    """The same signal with every score multiplied by a magnitude of its answer, [B], such as ``|A_i|``.

    It changes the order of tokens between answers, not within one. An answer with the magnitude 0, which
    teaches nothing, has no such signal.
    """
    score = signal.values if signal.baseline is None else signal.values - signal.baseline
    score = score.abs() if signal.absolute else score
    values = score * magnitudes[:, None].to(score.dtype)
    applies = magnitudes > 0 if signal.applies is None else signal.applies & (magnitudes > 0)
    return dataclasses.replace(signal, values=values, baseline=None, absolute=False, applies=applies)


def refuse_non_finite(chosen: Mapping[str, Signal], signals: Signals) -> None:
    """Name the first value that is no number: among what the scores are made of, then among the scores.

    Raises:
        NonFiniteError: For a NaN or an infinity at an answer token that a signal exists for.
    """
    for name, signal in chosen.items():
        valid = signals.mask if signal.applies is None else signals.mask & signal.applies[:, None]
        for field, what in SOURCES.get(name, {}).items():
            tensor = getattr(signals, field)
            if tensor is not None:
                require_finite(tensor, valid, what)
        require_finite(signal.values, valid, f"scores of the signal {name!r}")
