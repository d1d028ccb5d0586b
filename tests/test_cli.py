"""The command line: a user's error is one message on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from keytoken.cli import main

WRONG = {
    "unknown key": (
        ["experiment=demo_cpu", "trainer.totl_training_steps=3"],
        "trainer.total_training_steps?",
    ),
    "unknown option": (["method=video_krt"], "'video_ktr'?"),
    "no override": (["a b"], "KEY=VALUE"),
    "keys that exclude each other": (
        ["experiment=demo_cpu", "actor_rollout_ref.rollout.n=1"],
        "actor_rollout_ref.rollout.n=8",
    ),
    "value out of range": (["experiment=demo_cpu", "keytoken.method.advantage_epsilon=0"], "such as 1e-6"),
    "missing files": (["experiment=demo_cpu"], "keytoken demo --prepare-only"),
}


@pytest.fixture(autouse=True)
def _demo_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", str(tmp_path / "demo"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("words", "remedy"), WRONG.values(), ids=WRONG)
def test_a_wrong_run_is_one_message(
    words: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("keytoken: ") and err.count("\n") == 1
    assert remedy in err


def test_the_help_of_train_shows_an_example_that_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    from keytoken.main import load_config

    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    words = [
        word for word in text.split() if "=" in word and word != "[KEY=VALUE" and "KEY=VALUE" not in word
    ]
    assert words == ["experiment=demo_cpu", "method=grpo", "trainer.total_training_steps=5;"]
    config = load_config([word.rstrip(";") for word in words])
    assert (config.keytoken.method.name, config.trainer.total_training_steps) == ("grpo", 5)


def test_wrong_package_versions_are_one_message(tmp_path: Path) -> None:
    """Another verl is found first, as metadata finds it; nothing of the stack is imported then."""
    found = tmp_path / "site" / "verl-0.8.0.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.8.0\n")
    for name in ("train.parquet", "heldout.parquet", "validation.parquet", "model/config.json"):
        (tmp_path / "demo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "demo" / name).touch()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "keytoken.cli",
            "train",
            "experiment=demo_cpu",
            f"keytoken.run_dir={tmp_path}/run",
        ],
        env={**os.environ, "PYTHONPATH": str(found.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("keytoken: package verl: found 0.8.0, KeyToken needs ==0.9.1; install")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trian", "experiment=demo_cpu"], "Unknown command 'trian'"),
        (["data", "prepar", "folder"], "Unknown verb 'prepar'"),
        (["data", "cache", "verfy"], "Unknown action 'verfy'"),
    ],
)
def test_a_misspelt_command_is_answered_with_the_closest_one(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    message = capsys.readouterr().err
    closest = {"trian": "train", "prepar": "prepare", "verfy": "verify"}[meant.split("'")[1]]
    assert stopped.value.code == 2
    assert meant in message and f"Did you mean '{closest}'?" in message


@pytest.mark.parametrize("words", ["explain method=grpo", "data cache stats cache=."])
def test_a_reader_that_goes_away_ends_the_command_without_a_traceback(words: str, tmp_path: Path) -> None:
    """As of other programs whose reader is ``head``; the pipe is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "keytoken.cli", *words.split()],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=120,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
