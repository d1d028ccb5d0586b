"""Fixtures for the tests against the real verl, vLLM and transformers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from keytoken.demo.model import build_model
from keytoken.demo.tokenizer import build_processor, build_tokenizer


@pytest.fixture(scope="session")
def started_ray() -> Callable[..., AbstractContextManager[None]]:
    """Starts a Ray of its own in this process, for as long as a ``with`` lasts."""
    import ray

    @contextmanager
    def started(**options: Any) -> Iterator[None]:
        folder = tempfile.mkdtemp(prefix="kt-", dir="/tmp")  # a socket's path may not exceed 107 characters
        ray.init(include_dashboard=False, log_to_driver=False, _temp_dir=folder, **options)
        try:
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)

    return started


@pytest.fixture(scope="session")
def started_queue(
    started_ray: Callable[..., AbstractContextManager[None]],
) -> Callable[..., AbstractContextManager[None]]:
    """Starts TransferQueue on such a Ray, with its controller and a storage process, as verl starts it."""
    import transfer_queue as tq
    from omegaconf import OmegaConf

    @contextmanager
    def started(num_cpus: int) -> Iterator[None]:
        storage = {"num_data_storage_units": 1, "total_storage_size": 1000}
        with started_ray(num_cpus=num_cpus):
            tq.init(OmegaConf.create({"backend": {"SimpleStorage": storage}}))
            try:
                yield
            finally:
                tq.close()

    return started


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
