"""Log-prob, entropy and nucleus entropy of tokens from logits, with gradients."""

from keytoken_kernels.logprob.api import (
    differentiable_log_probs,
    token_log_probs,
    token_log_probs_gradient,
    truncated_entropy,
)
from keytoken_kernels.logprob.types import LogProbs

__all__ = [
    "LogProbs",
    "differentiable_log_probs",
    "token_log_probs",
    "token_log_probs_gradient",
    "truncated_entropy",
]
