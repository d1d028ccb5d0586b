"""The pages in recipe/docs say what the tests say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from keytoken.scoring.cli import NAMES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "recipe" / "docs"
MATRIX = (
    "tests/data/test_bad_clips.py",
    "tests/data/prepare/test_bad_rows.py",
    "tests/scoring/test_bad_input.py",
    "tests/scoring/benchmarks/test_own.py::test_rows_that_are_not_as_they_were_written",
    "tests/scoring/benchmarks/test_own.py::test_a_file_that_is_no_prepared_dataset",
    "tests/lens/test_read.py::test_broken_exports_are_named",
)
NO_FAULT = {"everything in order"}


def test_the_table_of_broken_input_has_every_row_of_the_tests() -> None:
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", *MATRIX]
    found = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout
    cases = set(re.findall(r"^\S+::\w+\[(.*)\]$", found, re.MULTILINE)) - NO_FAULT
    page = (DOCS / "bad_input.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| (.*) \|$", page, re.MULTILINE))
    assert len(cases) > 100
    assert sorted(cases - rows) == []


def test_the_table_of_benchmarks_has_every_one() -> None:
    page = (DOCS / "data_and_evaluation.md").read_text(encoding="utf-8")
    assert {name for name in NAMES if f"\n| `{name}` |" not in page} == set()


def test_links_of_the_pages_lead_somewhere() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "recipe" / "studies" / "README.md",
        *DOCS.glob("*.md"),
    ]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []
