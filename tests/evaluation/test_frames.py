"""An evaluated checkpoint sees the frames that it was trained on, or says that it does not."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keytoken.data.contract import CONTRACT_FILE, SamplingContract
from keytoken.data.sampling_words import named_contract
from keytoken.errors import ConfigurationError, DataError
from keytoken.evaluation.frames import frames_of
from keytoken.evaluation.options import EvaluateOptions
from keytoken.evaluation.report import write_reports
from keytoken.evaluation.run import _header
from keytoken.evaluation.sources import Source
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.items import Item, Prediction
from keytoken.words import parse_words

TRAINED = SamplingContract.preset("video_r1_16f")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The joined model of a checkpoint, as :func:`keytoken.verl_adapter.merge.model_folder` leaves it."""
    step = tmp_path / "run" / "checkpoints" / "global_step_2"
    merged = step / "merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text("{}")
    TRAINED.write(step / CONTRACT_FILE)
    return merged


def options(model: Path, **changes: Any) -> EvaluateOptions:
    return EvaluateOptions(benchmark="mmvu", model=str(model), **changes)


def test_a_checkpoint_is_shown_what_it_was_trained_on(checkpoint: Path) -> None:
    frames = frames_of(options(checkpoint), "eval_64f", checkpoint)
    assert frames.contract == TRAINED and frames.differences == ()
    assert str(checkpoint.parent / CONTRACT_FILE) in frames.origin
    assert frames_of(options(checkpoint, sampling="video_r1_16f"), "eval_64f", checkpoint).contract == TRAINED


def test_other_frames_are_refused_naming_each_difference(checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        frames_of(options(checkpoint, sampling="eval_64f"), "eval_64f", checkpoint)
    message = str(caught.value)
    asked = SamplingContract.preset("eval_64f")
    differing = [
        field.name
        for field in dataclasses.fields(asked)
        if getattr(asked, field.name) != getattr(TRAINED, field.name)
    ]
    assert {"max_frames", "max_pixels"} <= set(differing)
    for name in differing:
        assert (
            f"{name} is {getattr(asked, name)} asked for and {getattr(TRAINED, name)} in training" in message
        )
    assert "sampling_mismatch=allow" in message and str(checkpoint.parent / CONTRACT_FILE) in message


def test_the_command_stops_there(checkpoint: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.json"
    row = {
        "id": "validation_0",
        "video": "a.mp4",
        "question": "Which?",
        "question_type": "multiple-choice",
        "choices": {"A": "a", "B": "b", "C": "c", "D": "d", "E": "e"},
        "answer": "A",
        "metadata": {"subject": "Art"},
    }
    questions.write_text(json.dumps([row]))
    words = [f"model={checkpoint}", f"questions={questions}", f"out={tmp_path / 'out'}", "control=text"]
    command = [
        sys.executable,
        "-m",
        "keytoken.cli",
        "evaluate",
        "benchmark=mmvu",
        *words,
        "sampling=eval_64f",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "max_frames is 64 asked for and 16 in training" in done.stderr
    assert done.stderr.count("\n") == 1  # and no warnings of what was imported
    assert not (tmp_path / "out").exists()


def test_allowed_other_frames_stand_in_the_header_and_the_report(checkpoint: Path, tmp_path: Path) -> None:
    allowed = options(checkpoint, sampling="eval_64f", sampling_mismatch="allow")
    frames = frames_of(allowed, "eval_64f", checkpoint)
    assert frames.contract == SamplingContract.preset("eval_64f")
    source = Source([], None, "direct", 8)
    header = _header(allowed, source, frames, checkpoint, {})
    assert header["sampling_mismatch"] == list(frames.differences) != []
    item = Item(
        benchmark="mmvu", item_id="a", question="q", answer="yes", kind="open", categories={"subject": "Art"}
    )
    answer = Prediction(item_id="a", response="yes")
    text = write_reports(tmp_path / "out", get_benchmark("mmvu"), [item], [answer], header)
    assert "Not the frames of training: " in text and "max_frames is 64 asked for and 16 in training" in text
    same = frames_of(options(checkpoint), "eval_64f", checkpoint)
    plain = _header(options(checkpoint), source, same, checkpoint, {})
    assert "sampling_mismatch" not in plain  # files of evaluations before this check go on


def test_a_model_from_elsewhere_has_the_benchmarks_frames(tmp_path: Path) -> None:
    model = tmp_path / "Qwen2.5-VL-7B-Instruct"
    model.mkdir()
    TRAINED.write(tmp_path / CONTRACT_FILE)  # of something else
    assert frames_of(options(model), "eval_64f", model).contract == SamplingContract.preset("eval_64f")
    TRAINED.write(model / CONTRACT_FILE)
    assert frames_of(options(model), "eval_64f", model).contract == TRAINED


def test_a_changed_contract_is_an_error(checkpoint: Path) -> None:
    file = checkpoint.parent / CONTRACT_FILE
    file.write_text(file.read_text().replace('"max_frames": 16', '"max_frames": 32'))
    with pytest.raises(DataError, match="digest"):
        frames_of(options(checkpoint), "eval_64f", checkpoint)


@pytest.mark.parametrize("folder", ["merged", "joined", "actor/huggingface"])
def test_any_folder_of_a_checkpoint_has_its_frames(checkpoint: Path, folder: str) -> None:
    model = checkpoint.parent / folder
    model.mkdir(parents=True, exist_ok=True)
    assert frames_of(options(model), "eval_64f", model).contract == TRAINED


def test_single_keys_change_what_would_be_shown(checkpoint: Path, tmp_path: Path) -> None:
    words = ["benchmark=mmvu", f"model={checkpoint}", "sampling.max_frames=8", "sampling_mismatch=allow"]
    asked = parse_words(words, EvaluateOptions, "evaluate")
    frames = frames_of(asked, "eval_64f", checkpoint)
    assert frames.contract == dataclasses.replace(TRAINED, max_frames=8)
    assert frames.differences == ("max_frames is 8 asked for and 16 in training",)
    with pytest.raises(ConfigurationError, match="max_frames is 8 asked for and 16 in training"):
        frames_of(dataclasses.replace(asked, sampling_mismatch="refuse"), "eval_64f", checkpoint)
    model = tmp_path / "elsewhere"
    model.mkdir()
    usual = dataclasses.replace(SamplingContract.preset("eval_64f"), max_frames=8)
    assert frames_of(asked, "eval_64f", model).contract == usual
    contract = dataclasses.replace(TRAINED, fps=1.0)
    contract.write(tmp_path / "saved.json")
    assert (
        frames_of(options(model, sampling=str(tmp_path / "saved.json")), "eval_64f", model).contract
        == contract
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param("demo,max_frame=8", "Did you mean 'max_frames'", id="unknown key"),
        pytest.param("demo,max_frames=few", "must be a positive whole number", id="words for a number"),
        pytest.param("demo,max_frames", "is no key", id="no value"),
        pytest.param("demo,max_frames=[", "give it a number", id="no YAML"),
        pytest.param("dmo,max_frames=8", "Did you mean 'demo'", id="unknown preset"),
    ],
)
def test_words_of_sampling_that_cannot_be(words: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        named_contract(words)


def prepared(path: Path, digest: str, **settings: Any) -> Path:
    videos = [{"video": "/a.mp4", **settings}]
    pq.write_table(
        pa.Table.from_pylist([{"videos": videos, "extra_info": {"sampling_digest": digest}}]), path
    )
    return path


def test_a_dataset_says_what_it_was_made_for(checkpoint: Path, tmp_path: Path) -> None:
    """Where neither the user nor a checkpoint says so."""
    demo = SamplingContract.preset("demo")
    files = [prepared(tmp_path / "a.parquet", demo.digest()), prepared(tmp_path / "b.parquet", demo.digest())]
    model = tmp_path / "elsewhere"
    model.mkdir()
    frames = frames_of(options(model), "eval_64f", model, files)
    assert frames.contract == demo and "prepared" in frames.origin
    assert frames_of(options(checkpoint), "eval_64f", checkpoint, files).contract == TRAINED
    other = [*files, prepared(tmp_path / "c.parquet", TRAINED.digest())]
    assert frames_of(options(model), "eval_64f", model, other).contract == SamplingContract.preset("eval_64f")


def test_rows_with_settings_of_their_own_are_held_to_them(checkpoint: Path, tmp_path: Path) -> None:
    files = [prepared(tmp_path / "a.parquet", TRAINED.digest(), max_frames=4, fps=TRAINED.fps)]
    with pytest.raises(ConfigurationError, match=r"clip /a\.mp4: its row says max_frames=4, .*max_frames=16"):
        frames_of(options(checkpoint), "eval_64f", checkpoint, files)
    frames = frames_of(options(checkpoint, sampling_mismatch="allow"), "eval_64f", checkpoint, files)
    assert frames.contract == TRAINED and "its row says max_frames=4" in frames.differences[0]


@pytest.mark.parametrize(("family", "patch_size"), [("qwen2_5_vl", 14), ("qwen3_vl", 16), ("other", 14)])
def test_presets_take_the_patches_of_the_model(tmp_path: Path, family: str, patch_size: int) -> None:
    """Also under changed keys; a size of patches that is asked for stays."""
    vision = {} if family == "qwen2_5_vl" else {"patch_size": patch_size}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "vision_config": vision}))
    usual = frames_of(options(tmp_path), "eval_64f", tmp_path).contract
    assert usual == dataclasses.replace(SamplingContract.preset("eval_64f"), patch_size=patch_size)
    for words in ("video_r1_16f", ",max_frames=8"):
        assert (
            frames_of(options(tmp_path, sampling=words), "eval_64f", tmp_path).contract.patch_size
            == patch_size
        )
    asked = frames_of(options(tmp_path, sampling=",patch_size=28"), "eval_64f", tmp_path)
    assert asked.contract.patch_size == 28
