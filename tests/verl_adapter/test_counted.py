"""Rows that say how many vision tokens they have: opened without decoding, and compared with the truth."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from keytoken.data import quarantine
from keytoken.data.contract import SamplingContract
from keytoken.data.prepare.build import prepare
from keytoken.data.prepare.settings import PrepareSettings
from keytoken.demo.render import write_clip
from keytoken.errors import ConfigurationError
from keytoken.verl_adapter import counted as counted_module
from keytoken.verl_adapter.dataset import VideoDataset, sampling_contract

PRESET = "demo"
CONTRACT = SamplingContract.preset(PRESET)


@pytest.fixture(autouse=True)
def _not_warned_yet() -> Iterator[None]:
    counted_module._WARNED.clear()
    yield
    counted_module._WARNED.clear()


@pytest.fixture
def decoded_at_start(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the clips that a dataset decodes when it is opened."""
    names: list[str] = []
    decode = quarantine._decoded

    def record(clips: list[Any], *rest: Any) -> Any:
        names.extend(Path(clip).name for clip in clips)
        return decode(clips, *rest)

    monkeypatch.setattr(quarantine, "_decoded", record)
    return names


def draw(path: Path, num_frames: int = 8) -> None:
    frames = np.random.default_rng(num_frames).integers(0, 256, (num_frames, 56, 56, 3), dtype=np.uint8)
    write_clip(path, frames)


@pytest.fixture
def prepared(tmp_path: Path) -> Any:
    """Prepares two clips and a picture with a question each."""
    media = tmp_path / "media"
    media.mkdir()
    draw(media / "a.mp4")
    draw(media / "b.mp4", 4)
    Image.new("RGB", (112, 84)).save(media / "c.png")
    names = ("a.mp4", "b.mp4", "c.png")
    table = "".join(f"{name},which way ?,up\n" for name in names)
    (media / "rows.csv").write_text("path,question,answer\n" + table)

    def make(**changes: Any) -> Path:
        out = tmp_path / "data"
        words = {"source": str(media), "out": str(out), "sampling": PRESET, "style": "{question}", "jobs": 1}
        folder, _ = prepare(PrepareSettings(name=("folder",), overwrite=True, **{**words, **changes}))
        return folder / "train.parquet"

    return make


def open_dataset(processor: Any, path: Path, **changes: Any) -> VideoDataset:
    fields = {name: getattr(CONTRACT, name) for name in CONTRACT.__dataclass_fields__}
    settings = {
        "max_prompt_length": 512,
        "sampling_contract": fields,
        "quarantine_file": str(path.parent.parent / "quarantine.jsonl"),
        "cache_dir": str(path.parent.parent / "cache"),
        "clip_check_jobs": 1,
    }
    config = OmegaConf.create({**settings, **changes})
    return VideoDataset(str(path), processor.tokenizer, config, processor)


def lengths(dataset: VideoDataset, *, counted: bool) -> list[int]:
    """Prompt lengths with the counts of the rows, or from the frames."""
    contract = sampling_contract(dataset.config, 14)
    result = []
    for number in range(len(dataset)):
        (message,) = dataset[number]["raw_prompt"]
        count = next(item["num_vision_tokens"] for item in message["content"] if item["type"] != "text")
        result.append(dataset._prompt_length([message], contract, {}, count if counted else None))
    return result


def test_rows_that_were_decoded_are_not_decoded_again(
    processor: Any, prepared: Any, decoded_at_start: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = prepared(check="decode")
    with caplog.at_level(logging.INFO):
        dataset = open_dataset(processor, path)
    assert decoded_at_start == []
    assert "3 of 3 rows say how many vision tokens they have" in caplog.text
    assert lengths(dataset, counted=True) == lengths(dataset, counted=False)
    assert len(set(lengths(dataset, counted=True))) == 3


@pytest.mark.parametrize(
    ("check", "policy", "decoded"),
    [
        ("headers", "new", ["a.mp4", "b.mp4"]),
        ("headers", "none", []),
        ("decode", "all", ["a.mp4", "b.mp4"]),
        ("none", "none", ["a.mp4", "b.mp4"]),
    ],
)
def test_whose_clips_are_decoded(
    check: str, policy: str, decoded: list[str], processor: Any, prepared: Any, decoded_at_start: list[str]
) -> None:
    assert len(open_dataset(processor, prepared(check=check), clip_check=policy)) == 3
    assert decoded_at_start == decoded


def test_counts_of_another_contract_are_not_used(
    processor: Any, prepared: Any, decoded_at_start: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = prepared(check="decode", sampling="video_r1_16f")
    dataset = open_dataset(processor, path)
    assert decoded_at_start == ["a.mp4", "b.mp4"]
    assert "num_vision_tokens" not in str(dataset[0]["raw_prompt"])
    assert "vision tokens" not in caplog.text


def test_counts_decide_who_is_too_long(processor: Any, prepared: Any, decoded_at_start: list[str]) -> None:
    path = prepared(check="decode")
    longest = sorted(lengths(open_dataset(processor, path), counted=True))
    short = open_dataset(processor, path, max_prompt_length=longest[1])
    (refused,) = short.quarantined
    assert len(short) == 2 and f"the prompt has {longest[2]} tokens" in refused.reason
    assert decoded_at_start == []


def test_a_clip_that_is_gone_is_found_without_decoding(processor: Any, prepared: Any) -> None:
    path = prepared(check="decode")
    (path.parent.parent / "media" / "b.mp4").unlink()
    dataset = open_dataset(processor, path)
    (refused,) = dataset.quarantined
    assert len(dataset) == 2 and "b.mp4: no such file" in refused.reason


def test_a_wrong_count_is_named_once_when_the_clip_is_read(
    processor: Any, prepared: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = prepared(check="decode")
    for name in ("a.mp4", "b.mp4"):  # other clips under the old names
        draw(path.parent.parent / "media" / name, 6)
    dataset = open_dataset(processor, path)
    for number in (2, 0, 1, 0):
        VideoDataset._process_multi_modal_info(dataset[number]["raw_prompt"], 14, dataset.config)
    said = [record.getMessage() for record in caplog.records if "the row says" in record.getMessage()]
    assert len(said) == 1
    assert (
        said[0].startswith("row train-000000: ")
        and "a.mp4 has 12 vision tokens, and the row says 16" in said[0]
    )
    assert "check=decode" in said[0]


def test_right_counts_are_silent(processor: Any, prepared: Any, caplog: pytest.LogCaptureFixture) -> None:
    dataset = open_dataset(processor, prepared(check="decode"))
    for number in range(3):
        VideoDataset._process_multi_modal_info(dataset[number]["raw_prompt"], 14, dataset.config)
    assert "the row says" not in caplog.text


def test_an_unknown_policy_is_refused(processor: Any, prepared: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.clip_check=old"):
        open_dataset(processor, prepared(check="decode"), clip_check="old")
