"""What a correctness gate says, and how errors are measured."""

from __future__ import annotations

import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_bench.operators import Operators
from kernel_bench.sizes import Sizes


@dataclass(frozen=True, slots=True)
class Verdict:
    """One checked claim, with the figure that decided it."""

    name: str
    passed: bool
    detail: str


Gate = Callable[[Operators, Sizes, torch.device], Iterator[Verdict]]


def failures() -> tuple[type[Exception], ...]:
    """What running somebody's kernels may raise: torch's and Triton's errors, and refusals."""
    known = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return (*known, TypeError, ValueError)
    return (*known, TypeError, ValueError, TritonError)


def run_gates(
    gates: Mapping[str, Gate],
    operators: Operators,
    sizes: Sizes,
    device: torch.device,
    announce: Callable[[str], None],
) -> list[Verdict]:
    """All verdicts. A gate that raises has failed; its traceback goes to standard error."""
    verdicts: list[Verdict] = []
    for name, gate in gates.items():
        announce(f"gate: {name}")
        try:
            with poisoned_memory():
                verdicts.extend(gate(operators, sizes, device))
        except failures() as error:
            traceback.print_exc(file=sys.stderr)
            verdicts.append(Verdict(name, False, f"{type(error).__name__}: {error}".split("\n")[0]))
    return verdicts


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN (or the largest integer): what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    before_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operators that have no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=before_warned)


def within(name: str, error: float, allowed: float) -> Verdict:
    """Passes where ``error <= allowed``; a NaN does not."""
    return Verdict(name, error <= allowed, f"{error:.2g}, allowed {allowed:.2g}")


def holds(name: str, wrong: Tensor | int) -> Verdict:
    """Passes where no entry of ``wrong`` is true."""
    count = int(wrong) if isinstance(wrong, int) else int(wrong.sum())
    return Verdict(name, count == 0, "none wrong" if count == 0 else f"{count} wrong")


def same_bits(name: str, ones: list[Tensor], others: list[Tensor]) -> Verdict:
    """Passes where all tensors agree bit by bit."""
    return holds(name, sum(int((_bits(a) != _bits(b)).sum()) for a, b in zip(ones, others, strict=True)))


def largest_error(found: Tensor, truth: Tensor, allowed: Tensor | float = 1.0) -> float:
    """Largest absolute difference in units of ``allowed``; infinite where one of the two is NaN."""
    excess = (found.detach().double() - truth.detach().double()).abs() / allowed
    return float(excess.nan_to_num(nan=math.inf).max()) if excess.numel() else 0.0


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Difference over truth, both by the Frobenius norm."""
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).norm() / truth.norm())


def _bits(tensor: Tensor) -> Tensor:
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(width)
