"""The head with a gradient, whose backward pass touches only the rows that have one.

A policy loss that is masked by a token selection gives every other row an upstream gradient of exactly zero,
and such a row contributes nothing to ``d hidden`` and ``d weight``. The backward pass therefore reads which
rows have a non-zero gradient off the gradient itself, computes the logits of these again, chunk by chunk, and
multiplies nothing else. It is exact for every loss, masked or not: a loss with an unmasked term only costs
more. ``expected_rows`` turns that cost into an error.

With x = z / T, p = softmax(x), g the gradient of the log-prob, e that of the entropy H::

    dz_j = (1 / T) (g (1{j = y} - p_j) - e p_j (log p_j + H))
    d hidden = dz W,    d weight = dz^T hidden
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from keytoken_kernels.dispatch import Impl
from keytoken_kernels.head.chunked import ChunkedLogits, check_inputs, log_probs_in_chunks, product_dtype
from keytoken_kernels.logprob import LogProbs, token_log_probs_gradient


@dataclass(slots=True)
class BackwardRecord:
    """What backward passes did: rows they were asked about, and rows whose gradient was not zero."""

    rows: int = 0
    touched: int = 0

    @property
    def share(self) -> float:
        """Touched rows over all rows; 0 without any."""
        return self.touched / max(self.rows, 1)


def differentiable_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
    expected_rows: Tensor | None = None,
    record: BackwardRecord | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of ``labels`` and entropy, nats, with gradients for ``hidden`` and ``weight``.

    The backward pass waits for the device once, to learn how many rows have a gradient. What needs no
    gradient costs no product. A row without a gradient gets exact zeros, also where nothing has one: ranks
    that average gradients with each other must all have one.

    Args:
        hidden: ``[N, H]``, see :func:`keytoken_kernels.head.head_log_probs`.
        weight: ``[V, H]``.
        labels: ``[N]`` int64.
        temperature: divides the logits; must be positive.
        chunk_rows: rows of logits alive at a time; see :func:`keytoken_kernels.head.default_chunk_rows`.
        impl: see :func:`keytoken_kernels.dispatch.resolve`.
        expected_rows: ``[N]`` bool, the rows that may have a gradient (the selected tokens). A gradient in
            any other row is an error of the backward pass: some term of the loss is not masked.
        record: counts the rows of every backward pass.

    Returns:
        ``(log_prob, entropy)``, float32 ``[N]`` each.

    Raises:
        ValueError: as :func:`keytoken_kernels.head.head_log_probs`; in the backward pass, a gradient outside
            ``expected_rows``.
    """
    check_inputs(hidden, weight, labels, temperature, chunk_rows)
    if expected_rows is not None and (
        expected_rows.shape != labels.shape or expected_rows.dtype != torch.bool
    ):
        raise ValueError(
            f"expected_rows must be bool [N] = [{len(labels)}]; got {expected_rows.dtype} "
            f"{tuple(expected_rows.shape)}"
        )
    options = _Options(temperature, chunk_rows, impl, expected_rows, record)
    log_prob, entropy = _Head.apply(hidden, weight, labels, options)
    return log_prob, entropy


@dataclass(frozen=True, slots=True)
class _Options:
    temperature: float
    chunk_rows: int | None
    impl: Impl
    expected_rows: Tensor | None
    record: BackwardRecord | None


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        found = log_probs_in_chunks(
            hidden, weight, labels, options.temperature, options.chunk_rows, options.impl
        )
        ctx.save_for_backward(hidden, weight, labels, found.log_prob, found.entropy, found.log_sum_exp)
        ctx.options = options
        return found.log_prob, found.entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_prob: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, labels, *statistics = ctx.saved_tensors
        rows, entropy_counts = _touched_rows(grad_log_prob, grad_entropy, ctx.options.expected_rows)
        if ctx.options.record is not None:
            ctx.options.record.rows += len(labels)
            ctx.options.record.touched += len(rows)
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad[:2])
        if any(ctx.needs_input_grad[:2]) and len(rows):
            logits_of = ChunkedLogits(hidden, weight, len(rows), ctx.options.chunk_rows)
            d_logits = _gradient_buffer(logits_of, hidden.dtype)
            for chunk in rows.split(logits_of.chunk_rows):
                own_hidden = hidden.index_select(0, chunk)
                out = token_log_probs_gradient(
                    logits_of(own_hidden),
                    labels.index_select(0, chunk),
                    LogProbs(*(statistic.index_select(0, chunk) for statistic in statistics)),
                    grad_log_prob.index_select(0, chunk),
                    grad_entropy.index_select(0, chunk) if entropy_counts else None,
                    ctx.options.temperature,
                    out=d_logits[: len(chunk)],
                    impl=ctx.options.impl,
                )
                gradients.add(chunk, out, own_hidden, logits_of)
        return gradients.d_hidden, gradients.of_weight(), None, None


def _touched_rows(
    grad_log_prob: Tensor, grad_entropy: Tensor, expected: Tensor | None
) -> tuple[Tensor, bool]:
    """Ascending numbers of the rows with a gradient (NaN is one), and whether any is the entropy's."""
    by_entropy = grad_entropy != 0
    touched = (grad_log_prob != 0) | by_entropy
    outside = torch.zeros_like(touched) if expected is None else touched & ~expected
    # The one wait for the device: three counts at once, so that nothing below has to ask again.
    num_touched, num_entropy, num_outside = (
        torch.stack([touched.sum(), by_entropy.sum(), outside.sum()]).cpu().tolist()
    )
    if num_outside:
        raise ValueError(
            f"{num_outside} of {len(touched)} rows have a gradient but are not in expected_rows, first row "
            f"{int(outside.nonzero()[0])}: a term of the loss is not masked by the selection. Mask it, or "
            "leave expected_rows out, which is exact and costs a product for every such row."
        )
    order = touched.to(torch.uint8).argsort(descending=True, stable=True)
    return order[:num_touched], num_entropy > 0


def _gradient_buffer(logits_of: ChunkedLogits, dtype: torch.dtype) -> Tensor:
    """Where d logits goes: over the logits, or beside them in the operands' 16 bits for the tensor cores."""
    return torch.empty_like(logits_of.buffer, dtype=dtype) if logits_of.native else logits_of.buffer


class _Gradients:
    """The two results, filled chunk by chunk.

    ``d weight`` is summed in float32 also for a 16-bit weight: every chunk would round the running sum again.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> None:
        self.d_hidden = torch.zeros_like(hidden) if needed[0] else None
        self.d_weight = torch.zeros_like(weight, dtype=product_dtype(hidden, weight)) if needed[1] else None
        self.weight_dtype = weight.dtype

    def add(self, rows: Tensor, d_logits: Tensor, hidden: Tensor, logits_of: ChunkedLogits) -> None:
        """Add one chunk: ``d_logits`` ``[n, V]`` of ``rows`` ``[n]``, whose hidden states are ``[n, H]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            if self.d_hidden is not None:
                product = torch.mm(d_logits, logits_of.weight)
                self.d_hidden.index_copy_(0, rows, product.to(self.d_hidden.dtype))
            if self.d_weight is None:
                return
            if logits_of.native:
                torch.addmm(self.d_weight, d_logits.t(), hidden, out_dtype=torch.float32, out=self.d_weight)
            else:
                self.d_weight.addmm_(d_logits.t(), hidden.to(d_logits.dtype))

    def of_weight(self) -> Tensor | None:
        """``d weight`` in the dtype of the weight."""
        return None if self.d_weight is None else self.d_weight.to(self.weight_dtype)
