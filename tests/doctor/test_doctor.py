"""The command, its JSON, its table, and the short form before a run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keytoken.cli import main
from keytoken.doctor import run
from keytoken.doctor.cli import subject_of
from keytoken.doctor.finding import Check, Finding, Subject, fail, of_error, ok, skip, warn
from keytoken.doctor.report import as_json, exit_code, summary, table_text
from keytoken.errors import ClusterError, DoctorError
from keytoken.main import load_config, train

SHORT_S = 2.0  # what the checks before a run may take on an idle machine
MIXED = [
    Finding("ok", "all there", name="a", seconds=0.5),
    Finding("warn", "a little odd", "Look at it.", name="b", seconds=0.25),
    Finding("skip", "not looked at", name="c"),
]


def test_a_healthy_machine_and_run_pass(
    subject: Callable[..., Subject], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the short form; the other checks have tests of their own."""
    assert main(["doctor", "--short", "experiment=demo_cpu"]) == 0
    out = capsys.readouterr().out
    assert "fail" not in out and "in order" in out and "reward" in out
    findings = {each.name: each for each in run.examine(subject(short=True))}
    assert findings["gpu"].status == "skip", "a machine without a GPU is none to mend"
    assert {name for name, each in findings.items() if each.status == "fail"} == set()


def test_without_words_only_the_machine_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--short", "--json"]) == 0
    names = {each["name"] for each in json.loads(capsys.readouterr().out)["findings"]}
    assert names == {check.name for check in run.CHECKS if check.short and not check.needs_run}


def test_the_json_for_scripts(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """These keys are documented: scripts read them."""
    (world / "model" / "tokenizer.json").unlink()
    assert main(["doctor", "--short", "--json", "experiment=demo_cpu"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert sorted(report) == ["counts", "exit_code", "findings", "version"]
    assert (report["version"], report["exit_code"]) == (1, 1)
    assert sorted(report["counts"]) == ["fail", "ok", "skip", "warn"]
    assert report["counts"]["fail"] == 1
    for each in report["findings"]:
        assert sorted(each) == ["found", "name", "remedy", "seconds", "status"]
        assert each["found"] and (each["remedy"] != "") == (each["status"] in ("warn", "fail"))
    assert [each["name"] for each in report["findings"] if each["status"] == "fail"] == ["model_files"]


def test_names_are_unique_and_documented() -> None:
    names = [check.name for check in run.CHECKS]
    page = (Path(__file__).parents[2] / "recipe" / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert len(set(names)) == len(names)
    assert [name for name in names if f"| `{name}` |" not in page] == []


def test_warnings_stop_nobody() -> None:
    assert exit_code(MIXED) == 0
    assert exit_code([*MIXED, Finding("fail", "broken", "Mend it.")]) == 1
    assert summary(MIXED) == "1 to look at, 1 in order, 1 not looked at (0.8 s)"
    assert as_json(MIXED)["counts"] == {"ok": 1, "warn": 1, "fail": 0, "skip": 1}


def test_a_warning_without_a_remedy_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a remedy"):
        Finding("fail", "broken")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_loses_nothing(width: int) -> None:
    long = "/a/path/" + "x" * 150
    text = table_text([fail(f"{long} is not there", "Copy it. " * 20), skip("not asked"), *MIXED], width)
    assert max(map(len, text.splitlines())) <= width
    squeezed = "".join(text.split())
    assert long in squeezed and "Copyit." * 20 in squeezed and "->" in text


def test_the_words_of_an_error_become_what_and_remedy() -> None:
    found = of_error(ClusterError("key=1: the port cannot be used (in use). Stop it, or choose. Then go on."))
    assert (found.found, found.remedy) == (
        "key=1: the port cannot be used (in use)",
        "Stop it, or choose. Then go on.",
    )
    found = of_error(ClusterError("/a.b/c.json is gone; copy it"))
    assert (found.found, found.remedy) == ("/a.b/c.json is gone", "Copy it")
    assert of_error(OSError(2, "no such file")).remedy != ""


def test_an_error_inside_a_check_is_a_finding() -> None:
    def broken(subject: Subject) -> Finding:
        raise PermissionError(13, "Permission denied", "/root/x")

    (found,) = run.examine(Subject(), [Check("broken", broken)])
    assert found.status == "fail" and "Permission denied" in found.found and found.name == "broken"


def test_the_short_form_is_quick(subject: Callable[..., Subject]) -> None:
    """By the processor's time of this process and its children, which other work leaves alone."""
    asked = subject(short=True)
    run.examine(asked)  # imports
    before = os.times()
    run.examine(asked)
    after = os.times()
    assert sum(after[:4]) - sum(before[:4]) < SHORT_S


def test_a_run_with_one_fault_is_told_in_one_line(world: Path, tmp_path: Path) -> None:
    (world / "model" / "tokenizer.json").unlink()
    with pytest.raises(DoctorError, match=r"^model_files: .*has no tokenizer.*\. Copy it from") as caught:
        train(["experiment=demo_cpu", "keytoken.run_dir=run"])
    assert "\n" not in str(caught.value)
    report = json.loads((tmp_path / "run" / "doctor.json").read_text())
    assert report["exit_code"] == 1
    assert not (tmp_path / "run" / "config.yaml").exists(), "the run has not begun"


def test_a_run_with_several_faults_gets_the_table(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "model" / "tokenizer.json").unlink()
    words = ["experiment=demo_cpu", "reward.custom_reward_function.path=/no/reward.py"]
    assert main(["train", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("keytoken: 2 things have to be mended") and "keytoken.doctor=off" in err
    assert "fail   model_files" in err and "fail   reward" in err and "-> " in err


def test_warnings_are_logged_and_the_run_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checks = (Check("fine", lambda _: ok("yes"), short=True), Check("odd", lambda _: warn("so", "Do."), True))
    monkeypatch.setattr(run, "CHECKS", checks)
    monkeypatch.setattr(run.examine, "__defaults__", (checks, lambda name: None))
    with caplog.at_level(logging.WARNING):
        run.require_healthy(load_config(["experiment=demo_cpu"]), tmp_path / "doctor.json")
    assert [record.getMessage() for record in caplog.records] == ["doctor: odd: so. Do."]
    assert json.loads((tmp_path / "doctor.json").read_text())["counts"]["warn"] == 1


def test_a_report_that_cannot_be_written_hides_no_verdict(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (world / "model" / "tokenizer.json").unlink()
    with pytest.raises(DoctorError, match="has no tokenizer"):
        run.require_healthy(load_config(["experiment=demo_cpu"]), tmp_path / "none" / "doctor.json")
    assert "doctor.json cannot be written" in caplog.text


def test_a_stack_that_does_not_import_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object')")
    done = subprocess.run(
        [sys.executable, "-m", "keytoken.cli", "doctor"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "libcudart.so.13" in done.stderr and "make setup" in done.stderr


def test_the_clip_of_a_home_folder() -> None:
    assert subject_of(["clip=~/a.mp4"], short=True).clip == Path.home() / "a.mp4"


def test_a_clip_that_is_named_is_decoded_in_the_short_form_too(tmp_path: Path) -> None:
    from keytoken.doctor import codecs

    checks = (Check("clip", codecs.clip),)
    assert run.examine(Subject(short=True), checks) == []
    (found,) = run.examine(Subject(clip=tmp_path / "none.mp4", short=True), checks)
    assert found.status == "fail" and "none.mp4" in found.found
