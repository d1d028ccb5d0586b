"""The language-model head for chosen rows: logits chunk by chunk in full precision, reduced at once.

For row ``n`` with logits ``z = W h_n / temperature``::

    log_prob[n] = z[y_n] - logsumexp(z)
    entropy[n]  = logsumexp(z) - sum_v softmax(z)_v z_v        (nats)

No ``[N, V]`` array exists: one chunk of rows at a time is multiplied into one buffer that all chunks share,
and reduced there by :mod:`keytoken_kernels.logprob`. Logits are float32 whatever the operands are, because
scores rank small differences of these log-probs and bfloat16 logits change which tokens are selected.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keytoken_kernels.dispatch import Impl
from keytoken_kernels.logprob import LogProbs, token_log_probs

# Bytes of one chunk of float32 logits: 1024 rows of a vocabulary of 152k on a GPU, where a product should
# have enough rows to be bound by arithmetic; 256 of them on a CPU, where a chunk should stay small.
_CHUNK_BYTES = {"cuda": 640 << 20, "cpu": 160 << 20}
_ROW_TILE = 128  # products of whole tiles waste no part of one


def default_chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of a chunk: whole tiles of 128, as many as fit the budget of the device; fewer if none fits."""
    budget = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cpu"])
    rows = max(budget // (4 * max(vocabulary, 1)), 1)
    return rows - rows % _ROW_TILE if rows > _ROW_TILE else rows


@torch.no_grad()
def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-prob of ``labels`` and entropy of the whole distribution, both in nats; no gradient.

    Args:
        hidden: ``[N, H]`` last hidden states, row ``n`` being the one that predicts ``labels[n]``.
        weight: ``[V, H]`` weight of the language-model head.
        labels: ``[N]`` int64 token ids. One outside the vocabulary is an error on a CPU; on a GPU, where the
            check would wait for the device, its log-prob is NaN.
        temperature: divides the logits; must be positive.
        chunk_rows: rows of logits alive at a time; see :func:`default_chunk_rows`.
        impl: see :func:`keytoken_kernels.dispatch.resolve`.

    Returns:
        ``(log_prob, entropy)``, float32 ``[N]`` each.

    Raises:
        ValueError: shapes or devices that do not fit, a label outside the vocabulary, a temperature <= 0.
    """
    check_inputs(hidden, weight, labels, temperature, chunk_rows)
    found = log_probs_in_chunks(hidden, weight, labels, temperature, chunk_rows, impl)
    return found.log_prob, found.entropy


def log_probs_in_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, chunk_rows: int | None, impl: Impl
) -> LogProbs:
    """All three statistics of every row, ``[N]`` each; call it without gradients and with checked inputs."""
    logits_of = ChunkedLogits(hidden, weight, len(hidden), chunk_rows)
    found = LogProbs(*(hidden.new_empty(len(hidden), dtype=logits_of.dtype) for _ in range(3)))
    for start in range(0, len(hidden), logits_of.chunk_rows):
        rows = slice(start, start + logits_of.chunk_rows)
        part = token_log_probs(logits_of(hidden[rows]), labels[rows], temperature, impl=impl)
        found.log_prob[rows] = part.log_prob
        found.entropy[rows] = part.entropy
        found.log_sum_exp[rows] = part.log_sum_exp
    return found


class ChunkedLogits:
    """Logits of up to ``chunk_rows`` rows a call, before the temperature, all calls in one buffer.

    Two 16-bit operands of one type on a GPU are multiplied as they are and accumulated into a float32
    output. Any other operands are converted to float32 first (float64 ones stay what they are, for tests
    of gradients), the weight once.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, num_rows: int, chunk_rows: int | None) -> None:
        self.native = multiplied_as_they_are(hidden, weight)
        self.dtype = product_dtype(hidden, weight)
        self.weight = weight if self.native else weight.to(self.dtype)
        wanted = default_chunk_rows(len(weight), weight.device) if chunk_rows is None else chunk_rows
        self.chunk_rows = max(min(wanted, num_rows), 1)
        self.buffer = weight.new_empty((self.chunk_rows, len(weight)), dtype=self.dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[n, H]`` to ``[n, V]``, valid until the next call."""
        out = self.buffer[: len(hidden)]
        # Autocast would convert float32 operands to 16 bits behind our back.
        with torch.autocast(hidden.device.type, enabled=False):
            if self.native:
                return torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=out)
            return torch.mm(hidden.to(self.dtype), self.weight.t(), out=out)


def multiplied_as_they_are(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the product of these operands has an overload with 16-bit operands and a float32 output."""
    return weight.is_cuda and hidden.dtype == weight.dtype and weight.dtype in (torch.bfloat16, torch.float16)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Type of logits and sums: float32, or float64 if an operand is."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def check_inputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, chunk_rows: int | None
) -> None:
    """Refuse what would give a wrong number or a message about something else."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, H] and weight [V, H]; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"hidden and weight must be floats; got {hidden.dtype} and {weight.dtype}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 [N] = [{hidden.shape[0]}]; got {labels.dtype} {tuple(labels.shape)}"
        )
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"hidden, weight and labels must be on one device; got {hidden.device}, {weight.device} and "
            f"{labels.device}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive; got {temperature}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, or None for the default; got {chunk_rows}")
    if labels.device.type == "cpu" and labels.numel():
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"labels must lie in [0, {weight.shape[0]}); got [{low}, {high}]")
