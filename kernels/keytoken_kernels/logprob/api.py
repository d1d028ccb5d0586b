"""Log-prob and entropy of tokens from logits: the public functions, which check their input and dispatch.

For row ``z`` of the logits, label ``y`` and temperature ``T``, with ``x = z / T``::

    log_sum_exp = log sum_v exp(x_v)
    log_prob    = x_y - log_sum_exp
    entropy     = log_sum_exp - sum_v p_v x_v,      p = softmax(x)        (nats)

A logit of -inf (or any at or below -1e30) is a banned token: it has probability 0 and adds nothing. NaN and
+inf make the row's results NaN, and so does a row in which every token is banned.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from keytoken_kernels.dispatch import Impl, resolve
from keytoken_kernels.logprob import reference
from keytoken_kernels.logprob.types import LogProbs

OP = "logprob"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*KERNEL_DTYPES, torch.float64)


@torch.no_grad()
def token_log_probs(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    rows: Tensor | None = None,
    impl: Impl = "auto",
) -> LogProbs:
    """Log-prob of every label, entropy and log-sum-exp of every row, in one reading of the logits.

    Args:
        logits: ``[N, V]`` float32, bfloat16 or float16 (float64: reference only). The last dimension must be
            contiguous; rows may lie further apart than ``V``.
        labels: ``[M]`` int64 token ids.
        temperature: Divides the logits; must be positive.
        rows: ``[M]`` int64, the row of ``logits`` of every result; all rows in order if left out.
        impl: See :func:`keytoken_kernels.dispatch.resolve`.

    Returns:
        Float32 ``[M]`` each, in nats.

    Raises:
        ValueError: shapes, strides, types or devices that do not fit, or a temperature that is not positive.
            A label outside the vocabulary or a row outside the logits is an error in the reference; the
            kernels return NaN for it, because looking would stall the GPU.
    """
    _check_logits(logits, labels, rows, temperature)
    return _implementation(logits, impl).token_log_probs(
        logits, labels.contiguous(), float(temperature), _contiguous(rows)
    )


@torch.no_grad()
def token_log_probs_gradient(
    logits: Tensor,
    labels: Tensor,
    found: LogProbs,
    grad_log_prob: Tensor,
    grad_entropy: Tensor | None = None,
    temperature: float = 1.0,
    *,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Gradient with respect to the logits, in one reading and one writing.

    ::

        d logits_j = (g_log_prob (1{j = y} - p_j) - g_entropy p_j (log p_j + entropy)) / T

    A row whose upstream gradients are 0 is written as 0 without being read, whatever its label is.

    Args:
        logits: ``[N, V]`` as in :func:`token_log_probs`.
        labels: ``[M]`` int64 token ids.
        found: What :func:`token_log_probs` returned for the same arguments.
        grad_log_prob: ``[M]`` float32, upstream gradient of the log-probs.
        grad_entropy: ``[M]`` float32, upstream gradient of the entropies, if there is any.
        temperature: As in the forward.
        rows: ``[M]`` int64 as in the forward. The gradient has one row per entry.
        out: ``[M, V]`` to write to, of any of the dtypes. It may be ``logits`` itself, which is then gone,
            unless ``rows`` is given; it may not overlap with it otherwise.
        impl: See :func:`keytoken_kernels.dispatch.resolve`.

    Returns:
        ``out``, or a new ``[M, V]`` tensor of the logits' dtype.

    Raises:
        ValueError: as in :func:`token_log_probs`, and an ``out`` that cannot be written to as described.
    """
    _check_logits(logits, labels, rows, temperature)
    shape = (labels.shape[0], logits.shape[1])
    upstream = [grad_log_prob] if grad_entropy is None else [grad_log_prob, grad_entropy]
    for vector in (found.log_prob, found.entropy, found.log_sum_exp, *upstream):
        _check_vector(vector, "results of the forward and upstream gradients", found.log_prob.dtype, labels)
    if out is None:
        out = torch.empty(shape, dtype=logits.dtype, device=logits.device)
    else:
        _check_out(out, shape, logits, rows)
    return _implementation(logits, impl).token_log_probs_gradient(
        logits,
        labels.contiguous(),
        found,
        grad_log_prob.contiguous(),
        _contiguous(grad_entropy),
        float(temperature),
        _contiguous(rows),
        out,
    )


def differentiable_log_probs(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """``(log_prob, entropy)`` of :func:`token_log_probs` with gradients to the logits.

    Keeps the logits and three numbers per row for the backward, which makes one tensor of the logits' size.
    """
    log_prob, entropy = _DifferentiableLogProbs.apply(logits, labels, temperature, impl)
    return log_prob, entropy


@torch.no_grad()
def truncated_entropy(
    logits: Tensor,
    top_p: float,
    temperature: float = 1.0,
    *,
    rows: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Entropy of the nucleus: of the fewest most probable tokens that hold ``top_p``, renormalised to 1.

    ToR (token-level selection for visual reasoning) measures it at 0.95. The kernels do not sort, see
    nucleus.py; the reference does.

    Accuracy: within 2e-5 nats of a sort in float64, for the same nucleus. Both implementations count a set
    that misses ``top_p`` by less than 1e-6 of it as reaching it, so that 19 of 20 equal tokens hold 0.95
    whatever the rounding. Where the mass of the most probable tokens lies within the rounding of float32 sums
    (about 1e-6) of that limit, they may differ by the last token. ``top_p = 1`` is the entropy of the whole
    distribution.

    Args:
        logits: ``[N, V]`` as in :func:`token_log_probs`.
        top_p: In (0, 1].
        temperature: Divides the logits; must be positive.
        rows: ``[M]`` int64, the rows to work on; all if left out.
        impl: See :func:`keytoken_kernels.dispatch.resolve`.

    Returns:
        Float32 ``[M]`` in nats.

    Raises:
        ValueError: as in :func:`token_log_probs`, and a ``top_p`` outside (0, 1].
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p}")
    count = (logits if rows is None else rows).shape[0]
    labels = torch.zeros(count, dtype=torch.int64, device=logits.device)
    if top_p == 1:
        return token_log_probs(logits, labels, temperature, rows=rows, impl=impl).entropy
    _check_logits(logits, labels, rows, temperature)
    return _implementation(logits, impl).truncated_entropy(
        logits, float(top_p), float(temperature), _contiguous(rows)
    )


class _DifferentiableLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: float, impl: Impl
    ) -> tuple[Tensor, Tensor]:
        found = token_log_probs(logits, labels, temperature, impl=impl)
        ctx.save_for_backward(logits, labels, found.log_prob, found.entropy, found.log_sum_exp)
        ctx.temperature, ctx.impl = temperature, impl
        ctx.set_materialize_grads(False)
        return found.log_prob, found.entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        if grad_log_prob is None and grad_entropy is None:
            return None, None, None, None
        logits, labels, *found = ctx.saved_tensors
        if grad_log_prob is None:
            grad_log_prob = torch.zeros_like(found[0])
        gradient = token_log_probs_gradient(
            logits,
            labels,
            LogProbs(*found),
            grad_log_prob,
            grad_entropy,
            ctx.temperature,
            impl=ctx.impl,
        )
        return gradient, None, None, None


def _implementation(logits: Tensor, impl: Impl) -> ModuleType:
    """The module whose functions compute; Triton is imported only where its kernels are to run."""
    if resolve(OP, impl, logits.device) == "reference":
        return reference
    if logits.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"the kernels take float32, bfloat16 or float16 logits, not {logits.dtype}: use impl='reference'"
        )
    from keytoken_kernels.logprob import triton

    return triton


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _check_logits(logits: Tensor, labels: Tensor, rows: Tensor | None, temperature: float) -> None:
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits must be of a float type; got {logits.dtype}")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [N, V] with V > 0; got {tuple(logits.shape)}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"the last dimension of logits must be contiguous; got strides {logits.stride()}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive; got {temperature}")
    _check_vector(labels, "labels", torch.int64, logits[:, 0] if rows is None else rows)
    if rows is not None:
        _check_vector(rows, "rows", torch.int64, labels)
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device}, logits on {logits.device}")


def _check_vector(vector: Tensor, name: str, dtype: torch.dtype, like: Tensor) -> None:
    if vector.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}; got {vector.dtype}")
    if vector.ndim != 1 or vector.shape != like.shape:
        raise ValueError(f"{name} must be [{like.shape[0]}], one entry per row; got {tuple(vector.shape)}")
    if vector.device != like.device:
        raise ValueError(f"{name} must be on {like.device}; got {vector.device}")


def _check_out(out: Tensor, shape: tuple[int, int], logits: Tensor, rows: Tensor | None) -> None:
    if out.shape != shape or out.dtype not in DTYPES or out.device != logits.device:
        raise ValueError(
            f"out must be a float tensor of shape {list(shape)} on {logits.device}; "
            f"got {out.dtype} {list(out.shape)} on {out.device}"
        )
    if (out.stride(1) != 1 and shape[1] > 1) or out.stride(0) < shape[1]:
        raise ValueError(f"rows of out must be contiguous and not overlap; got strides {out.stride()}")
    same = (out.data_ptr(), out.stride(), out.dtype) == (logits.data_ptr(), logits.stride(), logits.dtype)
    if _overlap(out, logits) and not (same and rows is None):
        raise ValueError("out overlaps with logits: it must lie apart, or be logits itself and rows left out")


def _overlap(a: Tensor, b: Tensor) -> bool:
    (first, first_end), (second, second_end) = _extent(a), _extent(b)
    return first < second_end and second < first_end


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a matrix and of the one after its last."""
    if tensor.numel() == 0:
        return 0, 0
    elements = (tensor.shape[0] - 1) * tensor.stride(0) + tensor.shape[1]
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
