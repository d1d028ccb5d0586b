"""Import hooks run at the right time, and only once."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keytoken.verl_adapter.shims.hooks import before_import, on_cpu, when_imported


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of an importable module that nobody has imported yet."""
    name = f"hooked_{request.node.name}"
    (tmp_path / f"{name}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_hook_runs_after_the_module_and_before_its_importer(module: str) -> None:
    when_imported(module, lambda loaded: setattr(loaded, "value", loaded.value + 1))
    assert importlib.import_module(module).value == 2
    assert importlib.import_module(module).value == 2


def test_hook_runs_at_once_on_a_loaded_module(module: str) -> None:
    loaded = importlib.import_module(module)
    when_imported(module, lambda loaded: setattr(loaded, "value", 5))
    assert loaded.value == 5


def test_error_of_a_hook_is_the_error_of_the_import(module: str) -> None:
    def refuse() -> None:
        raise ImportError("not here")

    before_import(module, refuse)
    with pytest.raises(ImportError, match="not here"):
        importlib.import_module(module)
    assert module not in sys.modules


def test_hook_of_a_missing_module_leaves_its_error_alone() -> None:
    when_imported("no_such_module_anywhere", lambda loaded: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_anywhere")


@pytest.mark.parametrize("first", ["hooks", "torch_extensions"])
def test_any_module_can_be_the_first_to_import_torch(
    python: Callable[..., subprocess.CompletedProcess[str]], first: str
) -> None:
    """torch calls the entry point at the end of its own import, and so needs these modules complete."""
    entry_point = "from keytoken.verl_adapter.shims.torch_extensions import install; install()"
    code = f"import keytoken.verl_adapter.shims.{first} as module; import sys; print('torch' in sys.modules)"
    result = python(f"{code}; import torch; {entry_point}")
    assert result.stdout.split() == ["False"], result.stderr


def test_platform_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert on_cpu()
    monkeypatch.setenv("VERL_PLATFORM", "nvidia")
    assert not on_cpu()


def test_vllms_server_leaves_warnings_to_be_seen() -> None:
    code = (
        "import logging, keytoken.verl_adapter.register\n"
        "from verl.workers.rollout.vllm_rollout import vllm_async_server\n"
        "assert 'model_hosting_container_standards' in __import__('sys').modules\n"
        "assert logging.getLogger('keytoken').isEnabledFor(logging.WARNING), logging.root.level\n"
    )
    environment = {name: value for name, value in os.environ.items() if "LOG_LEVEL" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
