import dataclasses
import math

import numpy as np
import pytest

from keytoken.data.contract import SamplingContract, resized_shape, select_frames
from keytoken.errors import ConfigurationError, DataError


def test_digest_is_stable_and_sees_every_field() -> None:
    contract = SamplingContract()
    assert contract.digest() == SamplingContract(fps=2).digest()
    for field in dataclasses.fields(contract):
        changed = dataclasses.replace(contract, **{field.name: getattr(contract, field.name) * 2})
        assert changed.digest() != contract.digest(), field.name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fps": 0.0}, "fps"),
        ({"fps": math.nan}, "fps"),
        ({"min_frames": 8, "max_frames": 4}, "min_frames"),
        ({"min_pixels": 10, "max_pixels": 5}, "min_pixels"),
        ({"min_frames": 1, "max_frames": 1}, "max_frames"),
    ],
)
def test_contracts_that_cannot_work_are_refused(changes: dict, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        SamplingContract(**changes)


def test_documented_example() -> None:
    chosen = select_frames(300, 30.0, SamplingContract(fps=2, min_frames=4, max_frames=16))
    assert len(chosen) == 16 and chosen[0] == 0 and chosen[-1] == 299


def test_selection_is_even_ascending_and_within_the_clip() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        total, fps = int(rng.integers(1, 500)), float(rng.uniform(0.5, 60))
        low, high = sorted(int(n) for n in rng.integers(2, 40, 2))
        contract = SamplingContract(fps=float(rng.uniform(0.2, 8)), min_frames=low, max_frames=high)
        chosen = select_frames(total, fps, contract)
        assert len(chosen) % 2 == 0 and len(chosen) <= max(high, 2)
        assert all(0 <= index < total for index in chosen)
        assert chosen == sorted(chosen)
        if total >= 2:
            assert len(set(chosen)) == len(chosen)


def test_selection_agrees_with_qwen_vl_utils() -> None:
    """An independent truth: the rule the published Video-R1 and Video-KTR runs used."""
    pytest.importorskip("keytoken.demo")  # makes torchvision importable beside CPU torch
    import torch
    from qwen_vl_utils.vision_process import smart_nframes

    rng = np.random.default_rng(1)
    for _ in range(200):
        total, fps = int(rng.integers(4, 900)), float(rng.uniform(5, 60))
        contract = SamplingContract(fps=2.0, min_frames=4, max_frames=16)
        count = smart_nframes({"fps": 2.0, "min_frames": 4, "max_frames": 16}, total, fps)
        expected = torch.linspace(0, total - 1, count, dtype=torch.float64).round().long().tolist()
        assert select_frames(total, fps, contract) == expected


@pytest.mark.parametrize(("total", "expected"), [(1, [0, 0]), (2, [0, 1]), (3, [0, 2])])
def test_very_short_clips(total: int, expected: list[int]) -> None:
    assert select_frames(total, 25.0, SamplingContract()) == expected


@pytest.mark.parametrize(("total", "fps"), [(0, 25.0), (5, 0.0), (5, math.nan)])
def test_clips_without_frames_or_rate_are_refused(total: int, fps: float) -> None:
    with pytest.raises(DataError):
        select_frames(total, fps, SamplingContract())


def test_sizes_agree_with_transformers() -> None:
    pytest.importorskip("keytoken.demo")
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rng = np.random.default_rng(2)
    contract = SamplingContract(min_pixels=56 * 56, max_pixels=400 * 400)
    for _ in range(300):
        height, width = (int(n) for n in rng.integers(20, 1500, 2))
        expected = smart_resize(height, width, factor=28, min_pixels=56 * 56, max_pixels=400 * 400)
        assert resized_shape(height, width, contract) == expected


def test_too_elongated_frames_are_refused() -> None:
    with pytest.raises(DataError, match="elongated"):
        resized_shape(10, 2010, SamplingContract())
