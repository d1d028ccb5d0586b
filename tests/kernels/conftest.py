"""Fixtures of the kernels' tests. tests/conftest.py turns Triton's interpreter on where there is no GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one; otherwise the kernels are interpreted on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["reference", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation in turn."""
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every ``torch.empty`` holds NaN: what a kernel leaves unwritten shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
