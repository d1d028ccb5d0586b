"""One case of the benchmark: what it computes, how much work that is, and what was asked of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from kernel_bench.anchors import Anchor
from kernel_bench.ceilings import Ceilings
from kernel_bench.machine import Machine
from kernel_bench.operators import Operators
from kernel_bench.sizes import Sizes
from kernel_bench.timing import Call, Timing

OURS = "keytoken"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What the inputs of a case are made for; all cases of the head share one weight [V, H]."""

    operators: Operators
    sizes: Sizes
    machine: Machine
    anchors: tuple[Anchor, ...]
    weight: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What the task needs at least, whoever does it: bytes moved, or operations in products.

    Attributes:
        bytes: Read and written once.
        flops: In products of matrices.
        tokens: Rows of a product, which decide its ceiling.
    """

    bytes: float = 0.0
    flops: float = 0.0
    tokens: int = 1

    def rate(self, timing: Timing) -> tuple[float, str] | None:
        """GB/s or TFLOP/s; None where only the time counts."""
        seconds = timing.median_ms / 1000
        if self.flops:
            return self.flops / seconds / 1e12, "TFLOP/s"
        return (self.bytes / seconds / 1e9, "GB/s") if self.bytes else None

    def of_ceiling(self, timing: Timing, ceilings: Ceilings) -> float | None:
        """The rate over the best one of this run."""
        rate = self.rate(timing)
        if rate is None:
            return None
        return rate[0] / (ceilings.product(self.tokens) if self.flops else ceilings.copy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is asked of one provider on one case, exactly one of the three.

    Attributes:
        of_ceiling: At least this share of the ceiling.
        against: With ``times``: so many times faster than this provider.
        times: See ``against``.
        at_most_us: At most so many microseconds.
        provider: Whose target it is.
    """

    of_ceiling: float | None = None
    against: str | None = None
    times: float | None = None
    at_most_us: float | None = None
    provider: str = OURS

    def asked(self) -> str:
        """In words."""
        if self.of_ceiling is not None:
            return f">= {self.of_ceiling:.2f} of the ceiling"
        if self.against is not None:
            return f">= {self.times:g} times faster than {self.against}"
        return f"<= {self.at_most_us:g} us"

    def reached(
        self, work: Work, timings: Mapping[str, Timing], ceilings: Ceilings
    ) -> tuple[str, bool] | None:
        """The figure beside the target, and whether it is met; None where something was not measured."""
        own = timings.get(self.provider)
        if own is None:
            return None
        if self.of_ceiling is not None:
            share = work.of_ceiling(own, ceilings)
            return None if share is None else (f"{share:.2f}", share >= self.of_ceiling)
        if self.against is not None:
            if self.against not in timings or self.times is None:
                return None
            faster = timings[self.against].median_ms / own.median_ms
            return f"{faster:.2f} times", faster >= self.times
        assert self.at_most_us is not None
        spent = own.median_ms * 1000
        return f"{spent:.1f} us", spent <= self.at_most_us


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row of the matrix.

    Attributes:
        name: Unique.
        tokens: What the time per token is counted in.
        prepare: Makes the inputs and returns the providers.
        work: What the task needs.
        needs_bytes: Memory for inputs and our own results.
        targets: What is asked.
        seconds: How long to measure.
    """

    name: str
    tokens: int
    prepare: Callable[[Setting], dict[str, Call]]
    work: Work = Work()
    needs_bytes: float = 0.0
    targets: tuple[Target, ...] = ()
    seconds: float
