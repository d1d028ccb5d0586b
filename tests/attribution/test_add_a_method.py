"""CONTRIBUTING.md says how to add a method; here that is done to the letter, in a copy of the source."""

from __future__ import annotations

import re
from typing import Any

# Validates a run that uses the method and says where the code was.
USE = """
import keytoken
from keytoken.main import load_config
from keytoken.validate import validate_run

method = validate_run(load_config(["experiment=demo_cpu", "method=grounded"])).method
print(keytoken.__file__, method.name, *method.views, method.selection.visual_ratio)
"""


def test_the_example_of_the_page_works(method_example: Any) -> None:
    """Its own test passes, and so do those of all methods, which the new one joins by its line alone."""
    assert len(method_example.blocks) == 4
    passed = method_example.run_tests()
    assert len(re.findall(r"test_grounded.py::\w+ PASSED", passed)) == 1
    assert re.search(r"test_every_method_keeps_padding_out\[grounded\] PASSED", passed)
    assert method_example.run("-c", USE).split() == [
        str(method_example.folder / "recipe/keytoken/__init__.py"),
        *("grounded", "masked", "0.2"),
    ]
    method_example.lint()


def test_it_takes_about_thirty_lines(method_example: Any) -> None:
    """Lines with code of method, registry and configuration; blank lines, comments and docstrings aside."""
    written = [
        line
        for path, text in method_example.blocks.items()
        if not path.startswith("tests/")
        for line in re.sub(r'"""(.|\n)*?"""', "", text).splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    assert 20 <= len(written) <= 30
