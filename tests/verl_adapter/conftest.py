"""Fixtures for the tests against the real verl, vLLM and transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from keytoken.demo.model import build_model
from keytoken.demo.tokenizer import build_processor, build_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Qwen2.5-VL with random weights, its tokenizer and its processor."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processor(tiny_model: Path) -> Any:
    """The tiny model's processor as verl loads it, with verl's methods bound to it."""
    from keytoken.verl_adapter import register  # noqa: F401

    # isort: split
    from verl.utils.tokenizer import hf_processor

    return hf_processor(str(tiny_model))


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, made by verl's own function."""
    from keytoken.verl_adapter.compat import initialize_global_process_group_ray

    store = tmp_path_factory.mktemp("group") / "store"
    os.environ["DIST_INIT_METHOD"] = f"file://{store}"
    initialize_global_process_group_ray()
    yield
    torch.distributed.destroy_process_group()
    del os.environ["DIST_INIT_METHOD"]


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a snippet in a fresh interpreter, where no shim has been applied yet."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if name != "VERL_USE_EXTERNAL_MODULES"}
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**env, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=180,
        )

    return run
