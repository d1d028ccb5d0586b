"""A run of a study by the real stack: the same file as in one process, the same answers before training."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from keytoken.demo.validation import read_answers
from keytoken.study import sweep
from keytoken.study.config import load_study
from keytoken.study.settings import load_settings, plans_of
from keytoken.study.stack import evaluation_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

ONE = ["study=smoke", "sections.standard.seeds=[1]", "sections.standard.arms=[grpo]"]


def test_one_run_by_both_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYTOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Ray's sockets lie below this folder, and a socket's path may not exceed 107 characters.
    ray_dir = tempfile.mkdtemp(prefix="kt-", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", ray_dir)
    process = {plan.arm: plan for plan in plans_of(load_study([*ONE, "backend=process"]))}
    stack = {plan.arm: plan for plan in plans_of(load_study([*ONE, "backend=stack"]))}
    assert process.keys() == stack.keys() == {"start", "grpo"}
    jobs = [process["start"], process["grpo"], stack["grpo"]]
    try:
        files = [sweep.execute(tmp_path / plan.backend, plan, load_settings(plan)) for plan in jobs]
    finally:
        shutil.rmtree(ray_dir, ignore_errors=True)
    start, mine, other = (json.loads(path.read_text()) for path in files)
    assert "real stack" in other["backend"] and other["digest"] != mine["digest"]
    assert other["words"] == mine["words"]
    evaluated = [run["evaluations"]["test"] for run in (mine, other)]
    assert evaluated[0]["families"] == evaluated[1]["families"]
    assert evaluated[0]["samples"] == evaluated[1]["samples"]
    before = read_answers(tmp_path / "stack" / "stack" / stack["grpo"].name / "validation" / "0.jsonl")
    greedy = "".join(map(str, evaluation_of(before).greedy))
    assert greedy == start["evaluations"]["test"]["greedy"]
    trained = other["steps"]
    assert len(trained["reward"]) == 2 and all(norm is not None for norm in trained["grad_norm"])
