"""A whole sweep, small: the study ``smoke`` with its warm start of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keytoken.cli import main
from keytoken.study import runs, sweep
from keytoken.study.config import load_study

NAMES = {f"{arm}-s{seed}.json" for arm in ("start", "grpo", "video_ktr") for seed in (1, 2)}


def numbers_of(folder: Path) -> dict[str, Any]:
    """Everything a run's file holds but the time it took."""
    found = {}
    for path in (folder / "runs").rglob("*.json"):
        content = json.loads(path.read_text())
        content["steps"] = {k: v for k, v in content["steps"].items() if not k.startswith("cpu_s/")}
        del content["cost"]
        found[path.name] = content
    return found


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    assert main(["sweep", "study=smoke", f"folder={folder}", "--jobs", "1"]) == 0
    return folder


def test_files_and_report(finished: Path) -> None:
    numbers = numbers_of(finished)
    assert numbers.keys() == NAMES
    trained = numbers["video_ktr-s1.json"]
    assert "without Ray, vLLM or verl" in trained["backend"]
    assert len(trained["steps"]["accuracy"]) == 2 and numbers["start-s1.json"]["steps"] == {}
    assert 0 < trained["steps"]["attribution/selected_share"][0] < 1
    assert set(trained["evaluations"]["test"]["sampled"]) <= set("012")
    report = (finished / "report.md").read_text()
    for phrase in ("one process", "## What was found", "Video-KTR", "minus GRPO", "method=video_ktr"):
        assert phrase in report
    pictures = {line[line.index("(") + 1 : -1] for line in report.splitlines() if line.startswith("![")}
    assert len(pictures) == 3 and all((finished / name).stat().st_size > 5000 for name in pictures)
    results = json.loads((finished / "results.json").read_text())
    assert results["standard"]["arms"]["grpo"]["seeds"] == [1, 2]
    assert (finished / "results.csv").read_text().startswith("section,arm,quantity")


def test_a_sweep_goes_on_where_it_was_stopped_and_gives_the_same_numbers(
    finished: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed = []
    execute = runs.execute

    def stopping(folder: Path, plan: Any, settings: Any) -> Path:
        if len(executed) == 2:
            raise KeyboardInterrupt
        executed.append(plan.name)
        return execute(folder, plan, settings)

    monkeypatch.setattr(runs, "execute", stopping)
    words = ["sweep", "study=smoke", f"folder={tmp_path}", "--jobs", "1"]
    with pytest.raises(KeyboardInterrupt):
        main(words)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    assert len(kept) == 3, "a folder and two finished runs, nothing half written"
    monkeypatch.setattr(runs, "execute", lambda *job: executed.append(job[1].name) or execute(*job))
    assert main(words) == 0
    assert len(executed) == len(set(executed)) == 6
    files = {path.name: path for path in (tmp_path / "runs").rglob("*.json")}
    assert all(files[name].stat().st_mtime_ns == time for name, time in kept.items() if name in files)
    assert numbers_of(tmp_path) == numbers_of(finished)


def test_what_changed_is_run_again(finished: Path, cache: Path) -> None:
    def missing(*words: str) -> set[str]:
        study = load_study(["study=smoke", f"folder={finished}", *words])
        return {
            plan.name
            for plan in sweep.plans_of(study)
            if not runs.is_finished(finished, plan, sweep.load_settings(plan))
        }

    assert missing() == set()
    assert missing("arms.grpo.title=other") == set()
    assert missing("arms.video_ktr.overrides=[keytoken.method.loss.kl_coef=0.1]") == {
        "standard/video_ktr-s1",
        "standard/video_ktr-s2",
    }
    assert len(missing("warm_starts.tiny.clip_steps=5")) == 6
    assert missing("sections.standard.seeds=[1,3]") == {
        f"standard/{arm}-s3" for arm in ("start", "grpo", "video_ktr")
    }


def test_report_only_runs_nothing(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "study=smoke", f"folder={tmp_path}", "--report"]) == 0
    assert "No run is finished yet" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "runs").exists()
    assert "6 runs, none started." in capsys.readouterr().out


def test_wrong_words_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "study=smoke", "--jobs", "0"]) == 2
    assert main(["sweep", "study=smok"]) == 2
    err = capsys.readouterr().err
    assert "--jobs 0: use 1 or more" in err and "'smoke'" in err and "Traceback" not in err
