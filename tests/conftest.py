"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from keytoken.attribution.types import Signals
from keytoken.verl_adapter.shims.torch_extensions import install

install()  # verl and the video processors of transformers import torchvision


def _interpret_triton() -> None:
    """Without a GPU, Triton interprets kernels: in this process only, not in those that tests start.

    Triton looks at the variable whenever it decorates a function, the first time during its own import. So
    this runs as this file is imported: before the conftest of any folder, and before any test.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    assert "triton" not in sys.modules, "Triton was imported before its interpreter could be chosen"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton

        patch.setattr(triton.knobs, "propagate_env", False)  # else the next line sets the variable as well
        triton.knobs.runtime.interpret = True


_interpret_triton()

_STOCK: dict[type, dict[str, Any]] = {}  # the methods of transformers' models, by class


def pytest_collection_finish() -> None:
    """Take down what transformers' models are before any test has verl replace their methods."""
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.qwen") and ".modeling_" in name:
            own = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == name]
            _STOCK.update({one: dict(vars(one)) for one in own})


@pytest.fixture(autouse=True, scope="module")
def stock_models() -> Iterator[None]:
    """verl replaces methods of transformers' models for a whole process: here until the end of a file."""
    yield
    for owner, methods in _STOCK.items():
        for name, method in methods.items():
            if callable(method) and vars(owner)[name] is not method:
                setattr(owner, name, method)


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    """Small tensors run fastest on one thread, and every test starts from the same random state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public reference data: KEYTOKEN_SHARED_DATA, or ``../shared/data`` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("KEYTOKEN_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"reference data not found at {folder}; set KEYTOKEN_SHARED_DATA")
    return folder


@pytest.fixture
def ragged_mask() -> Callable[[list[int], int], torch.Tensor]:
    """Builds a [B, T] bool mask from answer lengths."""
    return lambda lengths, width: torch.arange(width) < torch.tensor(lengths)[:, None]


@pytest.fixture
def ragged_signals(ragged_mask: Callable[[list[int], int], torch.Tensor]) -> Callable[..., Signals]:
    """Builds random signals; padding holds NaN, which must reach no result."""

    def build(
        lengths: list[int], group: list[int], seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Signals:
        generator = torch.Generator().manual_seed(seed)
        mask = ragged_mask(lengths, max(lengths) + 2)

        def draw() -> torch.Tensor:
            values = torch.randn(mask.shape, generator=generator, dtype=dtype)
            return values.masked_fill(~mask, torch.nan)

        logp = draw() - 2.0
        together = torch.randn(max(group) + 1, mask.shape[1], generator=generator, dtype=dtype).abs()
        return Signals(
            logp=logp,
            logp_masked=logp + 0.5 * draw(),
            logp_shuffled=logp + 0.3 * draw(),
            entropy=draw().abs(),
            mask=mask,
            group=torch.tensor(group),
            has_visual=torch.ones(len(lengths), dtype=torch.bool),
            has_temporal=torch.ones(len(lengths), dtype=torch.bool),
            truncated_entropy=(draw() - 0.5).clamp(min=0.0),  # most are exactly 0, as in real batches
            disagreement=together[torch.tensor(group)].masked_fill(~mask, torch.nan),
        )

    return build
