"""The examples of CONTRIBUTING.md, carried out to the letter in a copy of the source."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("recipe/keytoken", "kernels/keytoken_kernels", "configs/keytoken_configs")


class Example:
    """One example of the page: files to write and a line for the registry, in a copy of the source.

    Attributes:
        blocks: Code by file: every block of the section, under the path that the line before it names.
        folder: Where the copy lies.
    """

    def __init__(self, section: str, registry: str, tests: str, folder: Path) -> None:
        page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
        text = page.split(f"**{section}.**")[1].split("\n**A")[0]
        found = re.findall(r"^`([\w/.]+)`.*\n\n```\w+\n((?:.*\n)*?)```", text, re.MULTILINE)
        self.blocks: dict[str, str] = dict(found)
        self.registry, self.tests, self.folder = registry, tests, folder

    def carry_out(self, *insertions: tuple[str, str | None]) -> None:
        """Write the files; put texts (None: the registry's block) behind the places in the registry."""
        for source in (*SOURCES, self.tests):
            shutil.copytree(ROOT / source, self.folder / source)
        shutil.copy(ROOT / "tests/conftest.py", self.folder / "tests/conftest.py")
        registry = (ROOT / self.registry).read_text(encoding="utf-8")
        for after, new in insertions:
            assert registry.count(after) == 1
            registry = registry.replace(after, after + (self.blocks[self.registry] if new is None else new))
        for path, code in self.blocks.items():
            assert path == self.registry or not (self.folder / path).exists()
            (self.folder / path).write_text(registry if path == self.registry else code, encoding="utf-8")

    def run(self, *words: str) -> str:
        """Output of a Python that imports the copy and not the installed source."""
        paths = os.pathsep.join(str(self.folder / source.split("/")[0]) for source in SOURCES)
        environment = {**os.environ, "PYTHONPATH": paths, "KEYTOKEN_DEMO_DIR": "/somewhere/demo"}
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run_tests(self) -> str:
        """The report of the copied tests, the example's own among them."""
        return self.run("-m", "pytest", "-v", "--import-mode=importlib", "-p", "no:cacheprovider", self.tests)

    def lint(self) -> None:
        """The example is written as all code is."""
        settings = str(ROOT / "pyproject.toml")
        for path in (path for path in self.blocks if path.endswith(".py")):
            self.run("-m", "ruff", "check", "--config", settings, path)
            self.run("-m", "ruff", "format", "--check", "--config", settings, path)


@pytest.fixture
def view_example(tmp_path: Path) -> Example:
    registry = "recipe/keytoken/attribution/views/__init__.py"
    example = Example("A view", registry, "tests/attribution/views", tmp_path)
    example.carry_out((" reversed, shuffled, ", "stepped, "), ("VIEWS: dict[str, View] = {\n", None))
    return example


@pytest.fixture
def method_example(tmp_path: Path) -> Example:
    registry = "recipe/keytoken/attribution/methods/__init__.py"
    example = Example("A method", registry, "tests/attribution/methods", tmp_path)
    example.carry_out(
        ("attribution.methods import ", "grounded, "), ("METHODS: dict[str, Method] = {\n", None)
    )
    return example
