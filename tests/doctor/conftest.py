"""A small demo world that nobody has trained: real clips, a real model folder, real rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from keytoken.demo.model import build_model
from keytoken.demo.rows import write_split
from keytoken.demo.tokenizer import DEMO_CONTRACT, build_processor, build_tokenizer
from keytoken.demo.validation import write_validation
from keytoken.doctor.cli import subject_of
from keytoken.doctor.finding import Finding, Subject
from keytoken.doctor.run import CHECKS, examine


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that KEYTOKEN_DEMO_DIR names."""
    folder = tmp_path_factory.mktemp("world")
    write_split(folder, "train", 21, seed=1, contract=DEMO_CONTRACT)
    heldout = write_split(folder, "heldout", 7, seed=1, contract=DEMO_CONTRACT)
    write_validation(heldout, folder / "validation.parquet")
    tokenizer = build_tokenizer()
    for part in (build_model(tokenizer, seed=0), tokenizer, build_processor(tokenizer)):
        part.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def world(healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to sabotage; its rows name the clips of the healthy one."""
    copy = tmp_path / "world"
    shutil.copytree(healthy, copy, ignore=shutil.ignore_patterns("clips"))
    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", str(copy))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    return copy


@pytest.fixture
def subject(world: Path) -> Callable[..., Subject]:
    """The demo's run in that world, with further words of a command line."""
    return lambda *words, short=False: subject_of(["experiment=demo_cpu", *words], short=short)


@pytest.fixture
def finding(subject: Callable[..., Subject]) -> Callable[..., Finding]:
    """What one check says of such a run, asked through the registry."""

    def ask(name: str, *words: str, short: bool = False) -> Finding:
        checks = [check for check in CHECKS if check.name == name]
        asked = subject(*words, short=short)
        assert asked.problem is None, asked.problem
        (found,) = examine(asked, checks)
        return found

    return ask
