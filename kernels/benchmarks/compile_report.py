"""Compile every kernel ahead of time and report what the compiler made of it. Needs no GPU.

    python kernels/benchmarks/compile_report.py [--targets sm_80 sm_90 gfx942] [--only logprob] [--json FILE]

Registers, stack and spills come from the compiled binary; the width of global loads and stores from its
machine code (``cuobjdump`` is part of Triton's wheel). Exits with 1 if a kernel spills or exceeds its bound.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import keytoken_kernels
from keytoken_kernels.cases import CompiledCase

DEFAULT_TARGETS = ("sm_80", "sm_90", "gfx942")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """One kernel, compiled for one target."""

    name: str
    target: str
    num_warps: int
    registers: int  # per thread
    max_registers: int
    stack: int  # bytes per thread, 0 unless something was spilled or indexed dynamically
    spills: int  # machine instructions that access the stack (NVIDIA), vector registers kept there (AMD)
    shared: int  # bytes per program
    wide_loads: int  # 128-bit instructions
    wide_stores: int
    wants_wide_loads: bool

    def defects(self) -> list[str]:
        """What breaks the bounds of the case; the bound on registers holds for NVIDIA's targets."""
        found = []
        if self.stack or self.spills:
            found.append(f"{self.stack} bytes of stack, {self.spills} spills")
        if self.target.startswith("sm_") and self.registers > self.max_registers:
            found.append(f"{self.registers} registers, more than {self.max_registers}")
        if self.wants_wide_loads and not self.wide_loads:
            found.append("no 128-bit load")
        return [f"{self.name} on {self.target}: {defect}" for defect in found]


def collect_cases() -> Iterator[CompiledCase]:
    """The cases of every operator of the package that has kernels."""
    prefix = f"{keytoken_kernels.__name__}."
    for module in pkgutil.iter_modules(keytoken_kernels.__path__, prefix):
        if module.ispkg and importlib.util.find_spec(f"{module.name}.triton"):
            yield from importlib.import_module(f"{module.name}.triton").compiled_cases()


def compile_case(case: CompiledCase, target: str) -> Compiled:
    """Compile one case as a launch on ``target`` would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = case.kernel.arg_names
    if set(arguments) != {*case.signature, *case.constants}:
        raise ValueError(f"{case.name}: signature and constants must name the arguments {arguments}")
    source = ASTSource(
        case.kernel,
        {name: case.signature.get(name, "constexpr") for name in arguments},
        constexprs=dict(case.constants),
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    nvidia = target.startswith("sm_")
    machine = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    options = {"num_warps": case.num_warps, **(case.options if nvidia else {})}
    binary = triton.compile(source, target=machine, options=options)
    found = _read_cubin(binary.asm["cubin"]) if nvidia else _read_amdgcn(binary.asm["amdgcn"])
    return Compiled(
        name=case.name,
        target=target,
        num_warps=case.num_warps,
        max_registers=case.max_registers,
        shared=binary.metadata.shared,
        wants_wide_loads=case.wide_loads,
        **found,
    )


def _compile_named(name: str, target: str) -> Compiled:
    """For other processes: kernels do not travel, names do."""
    return compile_case(next(case for case in collect_cases() if case.name == name), target)


def _read_cubin(cubin: bytes) -> dict[str, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage, code = (
            subprocess.run([cuobjdump, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wide_loads": len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128\b", code)),
        "wide_stores": len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128\b", code)),
    }


def _read_amdgcn(code: str) -> dict[str, int]:
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", code),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", code),
        # Scalar registers are spilled to lanes of vector registers, not to memory.
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", code),
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
        "wide_stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", code)),
    }


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern!r} in the compiler's output; has its format changed?")
    return int(match.group(1))


def table(rows: list[Compiled]) -> str:
    """Markdown, one line per kernel and target."""
    lines = [
        "| kernel | target | warps | registers | stack | shared | 128-bit loads | 128-bit stores |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (row.name, row.target, row.num_warps, row.registers, row.stack, row.shared)
        lines.append(f"| {' | '.join(map(str, (*cells, row.wide_loads, row.wide_stores)))} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=DEFAULT_TARGETS, metavar="TARGET")
    parser.add_argument("--only", default="", help="compile the kernels with this in their name")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set, which leaves nothing to compile; unset it")
    names = [case.name for case in collect_cases() if options.only in case.name]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        tasks = [pool.submit(_compile_named, name, target) for target in options.targets for name in names]
        rows = [task.result() for task in tasks]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    defects = [defect for row in rows for defect in row.defects()]
    print("\n".join(defects), file=sys.stderr, end="\n" if defects else "")
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
