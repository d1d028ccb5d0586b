import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from keytoken.data.contract import SamplingContract, preset_names, resized_shape, select_frames
from keytoken.demo.tokenizer import DEMO_CONTRACT, QWEN3_CONTRACT
from keytoken.errors import ConfigurationError, DataError


def changed(contract: SamplingContract, name: str) -> SamplingContract:
    """The contract with another value of one field."""
    value = getattr(contract, name)
    return dataclasses.replace(contract, **{name: "pyav" if name == "decoder" else value * 2})


FIELDS = [field.name for field in dataclasses.fields(SamplingContract)]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_in_the_digest_and_in_the_words_of_a_difference(name: str) -> None:
    contract = SamplingContract()
    other = changed(contract, name)
    assert contract.digest() == SamplingContract(fps=2).digest() != other.digest()
    assert contract.differences(SamplingContract(fps=2)) == []
    values = f"{getattr(contract, name)} in this run and {getattr(other, name)} in the checkpoint"
    assert contract.differences(other, "in this run", "in the checkpoint") == [f"{name} is {values}"]


def test_a_contract_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "sampling_contract.json"
    contract = SamplingContract(fps=0.1, max_frames=7, decoder="pyav")
    contract.write(path)
    assert SamplingContract.read(path) == contract
    assert list(tmp_path.iterdir()) == [path]


WRONG_FILES = {
    "missing": (None, "FileNotFoundError"),
    "cut short": ('{"digest": "0", "fie', "JSONDecodeError"),
    "a list": ("[]", "TypeError"),
    "not text": ("\udcff", "UnicodeDecodeError"),
    "without fields": ('{"digest": "0"}', "fields"),
    "unknown field": ('{"digest": "0", "fields": {"frames": 3}}', "frames"),
    "changed by hand": ('{"digest": "0", "fields": {"fps": 3.0}}', "digest"),
}


@pytest.mark.parametrize(("text", "named"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_files_that_are_no_contract_are_named(tmp_path: Path, text: str | None, named: str) -> None:
    path = tmp_path / "sampling_contract.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=rf"sampling_contract\.json.*{named}"):
        SamplingContract.read(path)


def test_presets_are_the_options_of_the_group() -> None:
    """Values typed from the published scripts and papers, and from the demo's world."""
    assert preset_names() == ["demo", "demo_qwen3_vl", "eval_64f", "video_r1_16f"]
    training = SamplingContract.preset("video_r1_16f")
    assert (training.fps, training.min_frames, training.max_frames) == (2.0, 4, 16)
    assert (training.min_pixels, training.max_pixels) == (128 * 28 * 28, int(1.05 * 128 * 28 * 28))
    evaluation = SamplingContract.preset("eval_64f")
    assert (evaluation.max_frames, evaluation.max_pixels) == (64, 256 * 28 * 28)
    assert SamplingContract.preset("demo") == DEMO_CONTRACT
    assert DEMO_CONTRACT.digest() == "2e130472be9fa10a"  # of every checkpoint of the demo so far
    assert SamplingContract.preset("demo_qwen3_vl") == QWEN3_CONTRACT
    with pytest.raises(ConfigurationError, match=r"sampling=eval_32f.*mean 'eval_64f'"):
        SamplingContract.preset("eval_32f")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fps": 0.0}, "fps"),
        ({"fps": math.nan}, "fps"),
        ({"min_frames": 8, "max_frames": 4}, "min_frames"),
        ({"min_pixels": 10, "max_pixels": 5}, "min_pixels"),
        ({"min_frames": 1, "max_frames": 1}, "max_frames"),
        ({"max_frames": 16.5}, "max_frames is 16.5.*whole number"),
        ({"max_frames": True}, "max_frames is True"),
        ({"fps": "2"}, "fps is '2'.*number"),
        ({"decoder": "decrod"}, "decoder 'decrod'.*mean 'decord'"),
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
