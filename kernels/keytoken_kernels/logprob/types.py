"""What the log-prob operator returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Per-token results, each ``[M]`` in nats; float32, or float64 where the logits are.

    Attributes:
        log_prob: Log-probability of the label, at most 0.
        entropy: Entropy of the whole distribution: at least 0, and at most log V up to rounding.
        log_sum_exp: Log of the sum of ``exp(logits / temperature)``, which the gradient needs.
    """

    log_prob: Tensor
    entropy: Tensor
    log_sum_exp: Tensor
