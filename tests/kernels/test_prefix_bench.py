"""The benchmark of shared prompts on a CPU, in tiny sizes: its gate, its figures and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keytoken.prefix.layout import Tree, cost_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    from prefix_bench import cases, passes
    from prefix_bench.command import main

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--shape", "tiny", "--sizes", "3", "--rounds", "2"]


def read(folder: Path) -> tuple[dict[str, Any], str]:
    (figures,), (table,) = folder.glob("*.json"), folder.glob("*.md")
    return json.loads(figures.read_text(encoding="utf-8")), table.read_text(encoding="utf-8")


def test_one_call_writes_a_table(tmp_path: Path) -> None:
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    report, table = read(tmp_path)
    (case,) = report["cases"]
    assert case["gap_nats"] < 1e-5 and case["gap_gradient"] < 1e-5
    ratio = case["seconds"]["score_separate"] / case["seconds"]["score_shared"]
    assert f"**{ratio:.2f}**" in table
    assert all(len(samples) == 2 for samples in case["samples"].values())
    assert next(tmp_path.glob("*.png")).stat().st_size > 5000
    (row,) = [line for line in table.splitlines() if line.startswith("| 14 | 3 |")]
    assert row.count("|") == table.splitlines()[-2].count("|")


def test_what_disagrees_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = passes.Plan
    monkeypatch.setattr(
        passes, "Plan", lambda trees, device: plan([Tree(0, (sum(map(len, trees)),))], device)
    )
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    report, table = read(tmp_path)
    assert "seconds" not in report["cases"][0]
    assert "the two ways disagree" in table


def test_no_case_is_begun_after_the_limit(tmp_path: Path) -> None:
    assert main([*TINY, "--out", str(tmp_path), "--limit", "-1"]) == 0
    assert not list(tmp_path.iterdir())


def test_peak_memory_counts_what_is_alive_at_a_time() -> None:
    def call() -> None:
        for _ in range(3):
            one = torch.empty(1 << 20)
            other = torch.empty(1 << 20)
            del one, other

    assert passes.peak_bytes(call, CPU) == pytest.approx(2 * 4 * (1 << 20), rel=0.01)


@pytest.mark.parametrize("name", sorted(cases.SHAPES))
def test_prompts_are_as_long_as_they_say(name: str) -> None:
    shape = cases.SHAPES[name]
    grid = shape.grids[0]
    shortest, longest = shape.answers
    inputs = cases.group(shape, grid, 3, CPU)
    assert {one.prompt_length for one in inputs} == {shape.prompt_tokens(grid)}
    assert [len(one.input_ids) - one.prompt_length for one in inputs][::2] == [shortest, longest]
    (pack,) = passes.packs_of(inputs)
    assert cost_of(pack.trees).prompts == 1
    (masked,) = passes.packs_of(cases.under("masked", inputs))
    assert len(pack) - len(masked) == shape.prompt_tokens(grid) - shape.words
