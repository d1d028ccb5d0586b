"""What the device reaches at best in this run: copying, and the matrix products of the head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_bench import inputs
from kernel_bench.machine import Machine
from kernel_bench.sizes import Sizes
from kernel_bench.timing import percentile

SAMPLES = 5
CHUNK = 1024  # rows of logits that the head keeps at a time


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Best rates.

    Attributes:
        copy: GB/s of a copy, bytes read and bytes written.
        products: TFLOP/s by name of the product.
        by_tokens: TFLOP/s of hidden states times weight, by the number of rows.
    """

    copy: float
    products: dict[str, float]
    by_tokens: dict[int, float]

    def product(self, tokens: int) -> float:
        """TFLOP/s of hidden states times weight with about so many rows."""
        return self.by_tokens[min(self.by_tokens, key=lambda n: abs(math.log(n / tokens)))]


def measure_copy(machine: Machine, sizes: Sizes) -> float:
    """GB/s, read and written."""
    source = torch.randn(sizes.copied // 4, device=machine.device)
    target = torch.empty_like(source)
    return 2 * sizes.copied / _median_s(machine, lambda: target.copy_(source)) / 1e9


def measure_ceilings(
    machine: Machine, sizes: Sizes, weight: Tensor, announce: Callable[[str], None]
) -> Ceilings:
    """Medians of a few calls each, on random operands and the weight [V, H] of the head."""
    announce("ceilings: copy")
    copy = measure_copy(machine, sizes)
    generator = inputs.generator_of(machine.device, 40)
    shape = (sizes.hidden, sizes.dtype, generator)
    products, by_tokens = {}, {}
    for tokens in sorted({sizes.tokens[0], sizes.tokens[2], sizes.tokens[4]}):
        announce(f"ceilings: product of {tokens} rows")
        hidden = inputs.hidden_states(tokens, *shape)
        by_tokens[tokens] = _rate(machine, hidden, weight.t())
        products[f"logits of {tokens} rows"] = by_tokens[tokens]
    rows = min(CHUNK, sizes.tokens[2])
    hidden = inputs.hidden_states(rows, *shape)
    logits = inputs.random_logits(rows, sizes.vocabulary, sizes.dtype, generator)
    if machine.device.type == "cuda" and sizes.dtype != torch.float32:
        name = f"logits of {rows} rows, float32 output"
        products[name] = _rate(machine, hidden, weight.t(), out_dtype=torch.float32)
    products[f"gradient of hidden, {rows} rows"] = _rate(machine, logits, weight)
    products[f"gradient of weight, {rows} rows"] = _rate(machine, logits.t(), hidden)
    return Ceilings(copy, products, by_tokens)


def _rate(machine: Machine, left: Tensor, right: Tensor, **options: torch.dtype) -> float:
    """TFLOP/s of one product."""
    flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
    out = torch.empty(
        (left.shape[0], right.shape[1]), dtype=options.get("out_dtype", left.dtype), device=left.device
    )
    return flops / _median_s(machine, lambda: torch.mm(left, right, out=out, **options)) / 1e12


def _median_s(machine: Machine, call: Callable[[], object]) -> float:
    call()
    return percentile([machine.time_ms(call) for _ in range(SAMPLES)], 0.5) / 1000
