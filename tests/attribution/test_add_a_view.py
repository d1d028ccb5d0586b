"""CONTRIBUTING.md says how to add a view; here that is done to the letter, in a copy of the source."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = "recipe/keytoken/attribution/views/__init__.py"
TESTS = "tests/attribution/views"

# Validates a run that uses the view and says where the code was.
USE = """
import keytoken
from keytoken.main import load_config
from keytoken.validate import validate_run

method = validate_run(load_config(["experiment=demo_cpu", "keytoken.method.view.temporal=stepped"])).method
print(keytoken.__file__, *method.views)
"""


def blocks_of_the_page() -> dict[str, str]:
    """Code by file: every block of the section, under the path that the line before it names."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.split("**A view.**")[1].split("**A reward.**")[0]
    return dict(re.findall(r"^`([\w/.]+)`.*\n\n```python\n((?:.*\n)*?)```", section, re.MULTILINE))


def insert(text: str, after: str, new: str) -> str:
    assert text.count(after) == 1
    return text.replace(after, after + new)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The source and the tests of views, and the example added as the page says."""
    shutil.copytree(ROOT / "recipe/keytoken", tmp_path / "recipe/keytoken")
    shutil.copytree(ROOT / TESTS, tmp_path / TESTS)
    blocks = blocks_of_the_page()
    assert len(blocks) == 3
    registry = (ROOT / REGISTRY).read_text(encoding="utf-8")
    registry = insert(registry, " reversed, shuffled, ", "stepped, ")
    blocks[REGISTRY] = insert(registry, "VIEWS: dict[str, View] = {\n", blocks[REGISTRY])
    for path, code in blocks.items():
        assert path == REGISTRY or not (tmp_path / path).exists()
        (tmp_path / path).write_text(code, encoding="utf-8")
    return tmp_path


def run(copy: Path, *words: str) -> str:
    """Output of a Python that imports the copy and not the installed source."""
    environment = {**os.environ, "PYTHONPATH": str(copy / "recipe"), "KEYTOKEN_DEMO_DIR": "/somewhere/demo"}
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_of_the_page_works(copy: Path) -> None:
    """Its own test passes, and so do those of all views, which the new one joins by its line alone."""
    passed = run(copy, "-m", "pytest", "-v", "--import-mode=importlib", "-p", "no:cacheprovider", TESTS)
    assert passed.count("test_stepped.py::") == 2
    for name in ("changes_pixels_only", "depends_on_prompt_and_seed_only"):
        assert re.search(rf"{name}\[stepped\] PASSED", passed)
    assert run(copy, "-c", USE).split() == [
        str(copy / "recipe/keytoken/__init__.py"),
        *("masked", "stepped"),
    ]


def test_the_example_is_written_as_all_code_is(copy: Path) -> None:
    settings = str(ROOT / "pyproject.toml")
    for path in blocks_of_the_page():
        run(copy, "-m", "ruff", "check", "--config", settings, path)
        run(copy, "-m", "ruff", "format", "--check", "--config", settings, path)
