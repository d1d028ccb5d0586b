"""The gates of the benchmark on a GPU, at the sizes of Qwen2.5-VL-7B, one test for each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    from kernel_bench import command, inputs, machine, sizes
    from kernel_bench.gates import GATES
    from kernel_bench.operators import Operators
    from kernel_bench.verdicts import poisoned_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("size", [sizes.MEMCHECK, sizes.GPU], ids=["small", "full"])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_gate(gate, size):
    with poisoned_memory():
        verdicts = list(gate(Operators.of("triton"), size, torch.device("cuda")))
    wrong = [f"{verdict.name}: {verdict.detail}" for verdict in verdicts if not verdict.passed]
    assert verdicts and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("scope,launches", [("sequence", 1), ("group", 2), ("batch", 4)])
def test_launches_of_a_selection(scope, launches):
    gpu = machine.Gpu()
    given = inputs.selection_inputs(64, 1024, scope, inputs.generator_of(gpu.device, 0))

    def call():
        return Operators.of("triton").select(
            given.signals, given.mask, given.segments, rewards=given.rewards, groups=given.groups
        )

    call()
    assert gpu.launches(call) <= launches


def test_a_selection_does_not_wait_for_the_gpu():
    gpu = machine.Gpu()
    given = inputs.selection_inputs(64, 1024, "batch", inputs.generator_of(gpu.device, 0))
    operators = Operators.of("triton")
    operators.select(given.signals, given.mask, given.segments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        operators.select(given.signals, given.mask, given.segments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
def test_memcheck_finds_no_error(tmp_path):
    assert command.main(["--memcheck", "--out", str(tmp_path)]) == 0, (tmp_path / "memcheck.txt").read_text()
