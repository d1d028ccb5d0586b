"""CONTRIBUTING.md says how to add a view; here that is done to the letter, in a copy of the source."""

from __future__ import annotations

import re
from typing import Any

# Validates a run that uses the view and says where the code was.
USE = """
import keytoken
from keytoken.main import load_config
from keytoken.validate import validate_run

method = validate_run(load_config(["experiment=demo_cpu", "keytoken.method.view.temporal=stepped"])).method
print(keytoken.__file__, *method.views)
"""


def test_the_example_of_the_page_works(view_example: Any) -> None:
    """Its own test passes, and so do those of all views, which the new one joins by its line alone."""
    assert len(view_example.blocks) == 3
    passed = view_example.run_tests()
    assert passed.count("test_stepped.py::") == 2
    for name in ("changes_pixels_only", "depends_on_prompt_and_seed_only"):
        assert re.search(rf"{name}\[stepped\] PASSED", passed)
    assert view_example.run("-c", USE).split() == [
        str(view_example.folder / "recipe/keytoken/__init__.py"),
        *("masked", "stepped"),
    ]
    view_example.lint()
