"""Language-model head for answer positions: hidden states to log-prob and entropy, with a sparse backward."""

from keytoken_kernels.head.chunked import default_chunk_rows, head_log_probs
from keytoken_kernels.head.differentiable import BackwardRecord, differentiable_head

__all__ = ["BackwardRecord", "default_chunk_rows", "differentiable_head", "head_log_probs"]
