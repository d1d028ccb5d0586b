"""How the selection kernels are compiled, and the configurations in which that is checked ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from keytoken_kernels.cases import CompiledCase

POINTERS = {
    **dict.fromkeys(("values", "baseline", "scores", "weights", "advantages", "rewards"), "*fp32"),
    **dict.fromkeys(("thresholds", "response_advantages"), "*fp32"),
    **dict.fromkeys(("applies", "mask", "valid", "selected"), "*i8"),
    **dict.fromkeys(("rows", "starts", "row_keys", "group_rows", "group_starts", "group_number"), "*i32"),
    **dict.fromkeys(("cuts", "hash_cuts", "histograms", "minima", "states", "counts", "totals"), "*i32"),
}
NUMBERS = {
    **dict.fromkeys(("width", "rows_per_chunk", "seed", "plane", "group_widest", "share"), "i32"),
    **dict.fromkeys(("q", "weight", "floor", "notable", "epsilon"), "fp32"),
}


def warps(number: int) -> dict[str, int]:
    """Warps of a program, and on NVIDIA all registers that they can have.

    ptxas would rather spill a few of them and let more programs share a processor.
    """
    return {"num_warps": number, **({} if torch.version.hip else {"maxnreg": max_registers(number)})}


def max_registers(num_warps: int) -> int:
    """Registers of a thread of NVIDIA's if all of a processor's go to one program."""
    return min(255, 65536 // (32 * num_warps))


def case(kernel: Any, name: str, *, num_warps: int, **constants: Any) -> CompiledCase:
    """A case whose types follow from the names of the arguments; ``constants`` are all the others.

    Three signals, each with a baseline and rows in which it does not exist; widths that are multiples of 16.
    """
    constants = {"ABSOLUTE": 3, "FLOAT_RANKS": 2**24, "NUM": 3, "PADDED": 4, "DIVIDE": True} | constants
    if not constants["COUNT"]:
        constants["row_keys"] = None
    known = POINTERS | NUMBERS
    signature = {
        argument: known[argument if argument in known else argument.rstrip("012")]
        for argument in kernel.arg_names
        if argument not in constants
    }
    return CompiledCase(
        name=f"selection/{name}",
        kernel=kernel,
        signature=signature,
        constants={key: value for key, value in constants.items() if key in kernel.arg_names},
        aligned=tuple(key for key, kind in signature.items() if kind[0] == "*" or key in ("width", "plane")),
        num_warps=num_warps,
        options={"maxnreg": max_registers(num_warps)},
        max_registers=max_registers(num_warps),
    )


def cases(fused: Any, threshold: Any, digit: Any, apply: Any) -> Iterator[CompiledCase]:
    """The kernels in the largest sizes of the launches, with every branch in one of them."""
    tile: dict[str, Any] = {"ROWS": 2, "COLUMNS": 1024, "num_warps": 8}
    yield case(fused, "fused quantile 8 x 512", ROWS=8, COLUMNS=512, COUNT=False, num_warps=16)
    yield case(fused, "fused count 1 x 4096", ROWS=1, COLUMNS=4096, COUNT=True, num_warps=16)
    yield case(fused, "fused count 1 x 1024", ROWS=1, COLUMNS=1024, COUNT=True, num_warps=4)
    for rule, is_count in (("quantile", False), ("count", True)):
        name, shape = f"threshold {rule} 8 x 2048", {"ROWS": 8, "COLUMNS": 2048, "COUNT": is_count}
        yield case(threshold, name, **shape, num_warps=16)
        for number in (4,) if is_count else (1, 2):
            name = f"digits {rule}, pass {number}"
            yield case(digit, name, **tile, COUNT=is_count, PASS=number)
    no_cuts: dict[str, Any] = dict.fromkeys(("cuts", "hash_cuts"))
    yield case(apply, "apply quantile, many chunks", **tile, **no_cuts, RADIX=True, COUNT=False)
    no_search: dict[str, Any] = dict.fromkeys(("histograms", "minima", "states"))
    yield case(apply, "apply count", **tile, **no_search, RADIX=False, COUNT=True)
    plain: dict[str, Any] = {name: None for i in range(3) for name in (f"baseline{i}", f"applies{i}")}
    plain |= dict.fromkeys(("rewards", "group_rows", "group_starts", "group_number"))
    plain |= {"advantages": None, "response_advantages": None, "NUM": 1, "PADDED": 1, "ABSOLUTE": 0}
    plain |= {"ROWS": 8, "COLUMNS": 64, "COUNT": False}
    yield case(fused, "fused entropy 8 x 64", **plain, num_warps=4)
