"""The head in two lines of torch: all logits at once, differentiated by autograd. The truth of the tests."""

from __future__ import annotations

from torch import Tensor


def dense_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What :func:`keytoken_kernels.head.differentiable_head` computes, with ``[N, V]`` arrays.

    In the dtype of its operands: pass float64 ones for a truth.
    """
    log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
    return log_p.gather(1, labels[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)
