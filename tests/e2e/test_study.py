"""A study by the real stack: the same files as in one process, and the same greedy answers of the start."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from keytoken.cli import main

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

ONE = ["study=smoke", "sections.standard.seeds=[1]", "sections.standard.arms=[grpo]"]


def test_one_arm_by_both_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYTOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Ray's sockets lie below this folder, and a socket's path may not exceed 107 characters.
    ray_dir = tempfile.mkdtemp(prefix="kt-", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", ray_dir)
    found = {}
    try:
        for backend in ("process", "stack"):
            folder = tmp_path / backend
            words = [*ONE, f"backend={backend}", f"folder={folder}"]
            assert main(["sweep", *words, "--jobs", "1"]) == 0
            files = sorted((folder / "runs").rglob("*.json"))
            assert [path.name for path in files] == ["grpo-s1.json", "start-s1.json"]
            found[backend] = [json.loads(path.read_text()) for path in files]
            assert "No run is finished" not in (folder / "report.md").read_text()
    finally:
        shutil.rmtree(ray_dir, ignore_errors=True)
    for process, stack in zip(found["process"], found["stack"], strict=True):
        assert "real stack" in stack["backend"] and stack["digest"] != process["digest"]
        assert stack["words"] == process["words"]
        mine, other = process["evaluations"]["test"], stack["evaluations"]["test"]
        assert mine["families"] == other["families"] and mine["samples"] == other["samples"]
    start = [found[backend][1]["evaluations"]["test"]["greedy"] for backend in ("process", "stack")]
    assert start[0] == start[1]
    trained = found["stack"][0]["steps"]
    assert len(trained["reward"]) == 2 and all(norm is not None for norm in trained["grad_norm"])
