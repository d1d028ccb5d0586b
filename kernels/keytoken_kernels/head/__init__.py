"""Language-model head for answer positions: hidden states to log-prob and entropy, with a sparse backward."""

from keytoken_kernels.head.chunked import default_chunk_rows, head_log_probs
from keytoken_kernels.head.differentiable import BackwardRecord, differentiable_head
from keytoken_kernels.head.disagreement import Groups
from keytoken_kernels.head.measures import HeadMeasures, head_measures

__all__ = [
    "BackwardRecord",
    "Groups",
    "HeadMeasures",
    "default_chunk_rows",
    "differentiable_head",
    "head_log_probs",
    "head_measures",
]
