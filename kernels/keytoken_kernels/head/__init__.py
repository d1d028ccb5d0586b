"""Language-model head for answer positions: hidden states to log-prob and entropy."""

from keytoken_kernels.head.reference import head_log_probs

__all__ = ["head_log_probs"]
