"""What an operator's kernels are compiled with ahead of time, so that a machine without a GPU can check them.

Every ``<operator>/triton.py`` defines ``compiled_cases() -> tuple[CompiledCase, ...]``: the configurations
that its launches really use, built from the same constants. ``kernels/benchmarks/compile_report.py`` compiles
them and reports registers, spills, shared memory and the width of the loads; the tests hold the bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledCase:
    """One kernel with one configuration.

    Attributes:
        name: ``operator/kernel dtype variant``, unique, as the table shows it.
        kernel: The function decorated with ``triton.jit``.
        signature: Triton type of every run-time argument (``"*bf16"``, ``"i32"``, ``"fp32"``), in order.
        constants: Value of every other argument: the ``tl.constexpr`` ones, and pointers that are ``None``.
        aligned: Arguments divisible by 16, as the just-in-time compiler finds them at a launch: pointers of
            whole tensors, and strides and widths that are multiples of 16. Without it no load is widened.
        num_warps: Warps of one program, as the launch sets it.
        options: Further options of the launch, for NVIDIA targets.
        max_registers: The most registers per thread on NVIDIA targets that the tests accept.
        wide_loads: Whether 128-bit global loads must appear on NVIDIA targets.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    max_registers: int = 255
    wide_loads: bool = False
