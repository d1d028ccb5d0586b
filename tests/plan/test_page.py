"""The page on scale says what plans say today."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from keytoken.plan.report import COLUMNS, report
from keytoken.plan.run import plan_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "recipe" / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def said() -> ModuleType:
    spec = importlib.util.spec_from_file_location("page_of_plans", Path(__file__).with_name("page.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example(page: str, said: ModuleType) -> None:
    assert report(plan_of(said.EXAMPLE), with_assumptions=False) in page


def test_the_tables(page: str, said: ModuleType) -> None:
    rows = [line for line in page.splitlines() if re.match(r"\| video_ktr_\w+ \|", line)]
    assert rows == said.tables()
    assert page.count(COLUMNS) == 4


def test_the_figures_in_its_sentences(page: str, said: ModuleType) -> None:
    missing = [figure for figure in (*said.figures(), *said.micro_batches()) if figure not in page]
    assert missing == []
    assert " ".join(said.LARGE) in page.replace(" \\\n ", "")
