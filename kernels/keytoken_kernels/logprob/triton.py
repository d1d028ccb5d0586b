"""Triton kernels of log-prob, entropy and their gradient, with their launches. README.md has the formulas.

Exponents are in base 2 (one multiplication by ``log2(e) / temperature``, then the hardware's ``exp2``) and
relative to the running maximum, so that nothing cancels however far from 0 the logits lie.
"""
# mypy: disallow-untyped-defs=False
# (kernels are written in Triton's language; a launch types their arguments)

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keytoken_kernels.cases import CompiledCase
from keytoken_kernels.logprob import nucleus
from keytoken_kernels.logprob.tiles import (
    LN_2,
    LOG2_E,
    NUM_WARPS,
    Tile,
    at_least_0,
    exponent,
    row_totals,
    source_row,
    tile_offsets,
)
from keytoken_kernels.logprob.types import LogProbs

NAN = tl.constexpr(float("nan"))


@triton.jit
def _forward_kernel(
    logits,
    labels,
    rows,
    log_prob,
    entropy,
    log_sum_exp,
    row_stride,
    num_rows,
    vocab,
    scale,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """One program per output row, one read of its logits."""
    item = tl.program_id(0)
    row, exists = source_row(rows, item, num_rows)
    start = logits + row * row_stride
    top, total, weighted = row_totals(start, vocab, scale, LANES, VEC)

    label = tl.load(labels + item)
    legal = exists & (label >= 0) & (label < vocab)
    of_label = tl.load(start + label, mask=legal, other=NAN).to(tl.float32)
    log_total = tl.log2(total)
    tl.store(log_prob + item, -at_least_0((log_total - tl.fma(of_label, scale, -top)) * LN_2))
    tl.store(entropy + item, tl.where(exists, at_least_0((log_total - weighted / total) * LN_2), NAN))
    tl.store(log_sum_exp + item, tl.where(exists, (top + log_total) * LN_2, NAN))


@triton.jit
def _gradient_kernel(
    logits,
    labels,
    rows,
    log_sum_exp,
    entropy,
    grad_log_prob,
    grad_entropy,
    out,
    row_stride,
    out_stride,
    num_rows,
    vocab,
    inverse_temperature,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """One program per tile of an output row, which it reads before it writes: ``out`` may be ``logits``."""
    tiles = tl.cdiv(vocab, LANES * VEC)
    item = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * (LANES * VEC) + tile_offsets(LANES, VEC)
    inside = columns < vocab
    target = out + item.to(tl.int64) * out_stride + columns

    of_log_prob = tl.load(grad_log_prob + item) * inverse_temperature
    active = of_log_prob != 0
    if grad_entropy is not None:
        of_entropy = tl.load(grad_entropy + item) * inverse_temperature
        active = active | (of_entropy != 0)
    if active:
        row, exists = source_row(rows, item, num_rows)
        x = tl.load(logits + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
        label = tl.load(labels + item)
        legal = exists & (label >= 0) & (label < vocab)
        of_log_prob = tl.where(legal, of_log_prob, NAN)
        label = label.to(tl.int32)  # half the instructions in the comparison with the columns
        log_p = exponent(x, inverse_temperature * LOG2_E, tl.load(log_sum_exp + item) * LOG2_E)
        p = tl.exp2(log_p)
        slope = of_log_prob
        if grad_entropy is not None:
            slope += of_entropy * (log_p * LN_2 + tl.load(entropy + item))
        gradient = tl.where(columns == label, of_log_prob, 0.0) - p * slope
        tl.store(target, gradient.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(target, tl.zeros([LANES, VEC], out.dtype.element_ty), mask=inside)


def token_log_probs(logits: Tensor, labels: Tensor, temperature: float, rows: Tensor | None) -> LogProbs:
    """See :func:`keytoken_kernels.logprob.token_log_probs`."""
    count = labels.shape[0]
    log_prob, entropy, log_sum_exp = (
        torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    if count:
        with torch.cuda.device_of(logits):
            _forward_kernel[(count,)](
                logits,
                labels,
                rows,
                log_prob,
                entropy,
                log_sum_exp,
                logits.stride(0),
                *logits.shape,
                math.log2(math.e) / temperature,
                *Tile.of(logits.dtype),
                num_warps=NUM_WARPS,
            )
    return LogProbs(log_prob, entropy, log_sum_exp)


def token_log_probs_gradient(
    logits: Tensor,
    labels: Tensor,
    found: LogProbs,
    grad_log_prob: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    rows: Tensor | None,
    out: Tensor,
) -> Tensor:
    """See :func:`keytoken_kernels.logprob.token_log_probs_gradient`."""
    tile = Tile.of(logits.dtype)
    programs = labels.shape[0] * triton.cdiv(logits.shape[1], tile.LANES * tile.VEC)
    if programs:
        with torch.cuda.device_of(logits):
            _gradient_kernel[(programs,)](
                logits,
                labels,
                rows,
                found.log_sum_exp,
                found.entropy,
                grad_log_prob,
                grad_entropy,
                out,
                logits.stride(0),
                out.stride(0),
                *logits.shape,
                1.0 / temperature,
                *tile,
                num_warps=NUM_WARPS,
            )
    return out


truncated_entropy = nucleus.truncated_entropy

_TYPES = {
    "labels": "*i64",
    "rows": "*i64",
    **dict.fromkeys(("log_prob", "entropy", "log_sum_exp", "grad_log_prob", "grad_entropy"), "*fp32"),
    **dict.fromkeys(("row_stride", "out_stride", "num_rows", "vocab"), "i32"),
    **dict.fromkeys(("scale", "inverse_temperature", "share", "widest"), "fp32"),
}
_MULTIPLES_OF_16 = ("row_stride", "out_stride", "vocab")


def compiled_cases() -> tuple[CompiledCase, ...]:
    """Every kernel of this operator as it is launched for a vocabulary that is a multiple of 16."""
    cases = []
    for dtype in ("fp32", "bf16"):
        cases += [
            _case("forward", _forward_kernel, dtype, max_registers=64, without=("rows",)),
            _case("gradient", _gradient_kernel, dtype, max_registers=64, without=("rows", "grad_entropy")),
            _case("gradient with entropy", _gradient_kernel, dtype, max_registers=64, without=("rows",)),
            _case("nucleus", nucleus.kernel, dtype, max_registers=80, without=("rows",), lanes=nucleus.LANES),
        ]
    cases += [
        _case("listed rows", _forward_kernel, "bf16", max_registers=64),
        _case("gradient to bf16", _gradient_kernel, "fp32", out="bf16", max_registers=64, without=("rows",)),
    ]
    return tuple(cases)


def _case(
    name: str,
    kernel: Any,
    dtype: str,
    *,
    max_registers: int,
    without: tuple[str, ...] = (),
    lanes: int | None = None,
    out: str | None = None,
) -> CompiledCase:
    """A case with the launch's tile; ``without`` names the tensors that are not given."""
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    constants = {**dict.fromkeys(without), **Tile.of(torch_dtype, lanes)._asdict()}
    types = {**_TYPES, "logits": f"*{dtype}", "out": f"*{out or dtype}"}
    signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
    aligned = (a for a, kind in signature.items() if kind.startswith("*") or a in _MULTIPLES_OF_16)
    return CompiledCase(
        name=f"logprob/{name}, {dtype}",
        kernel=kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(aligned),
        num_warps=NUM_WARPS,
        max_registers=max_registers,
        wide_loads=True,
    )
