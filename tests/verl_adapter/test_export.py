"""The per-token export, read back with pandas alone."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest
import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.types import Signals
from keytoken.data.contract import SamplingContract
from keytoken.demo.tokenizer import build_tokenizer
from keytoken.schema import (
    DiagnosticsConfig,
    ExportConfig,
    KeyTokenConfig,
    LossConfig,
    MethodConfig,
    SelectionConfig,
)
from keytoken.verl_adapter import batch as batches
from keytoken.verl_adapter import export

LENGTHS = (3, 1, 2)
KEYS = ["q2_0_0", "q1_1_0", "q1_0_0"]
LOSS = LossConfig(
    normalizer="all",
    level="response",
    mask_kl=False,
    kl_coef=0.0,
    kl_clamp="verl",
    clip_low=None,
    clip_high=None,
)


def ragged(rows: list[Any]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


@pytest.fixture
def signals() -> Signals:
    mask = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
    generator = torch.Generator().manual_seed(0)
    real, masked, entropy = (torch.randn(3, 3, generator=generator) - 3.0 for _ in range(3))
    everywhere = torch.ones(3, dtype=torch.bool)
    return Signals(
        logp=real,
        logp_masked=masked,
        logp_shuffled=None,  # this method has no temporal signal
        entropy=entropy.abs(),
        mask=mask,
        group=torch.tensor([1, 0, 0]),
        has_visual=everywhere,
        has_temporal=everywhere,
    )


@pytest.fixture
def method() -> MethodConfig:
    selection = SelectionConfig(
        score_sign="signed", scope="batch", visual_ratio=0.5, temporal_ratio=0.0, entropy_ratio=0.2
    )
    return MethodConfig(name="video_ktr", selection=selection, loss=LOSS)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> TensorDict:
    tokenizer = build_tokenizer()
    answers = [tokenizer("<answer> A </answer>")["input_ids"][:3], [5], [6, 7]]
    made = TensorDict(
        {
            "prompts": ragged([tokenizer(f"color {word}")["input_ids"] for word in ("red", "blue", "blue")]),
            "responses": ragged(answers),
            "rm_scores": ragged([[0.0, 0.0, 2.0], [1.0], [0.0, 0.0]]),
            "advantages": ragged([[1.5] * 3, [-1.0], [0.5] * 2]),
        },
        batch_size=[3],
    )
    video = {"type": "video", "video": "/clips/a.mp4", "video_end": 2.5}
    clip = [{"role": "user", "content": [video, {"type": "text"}]}]
    others = {
        "raw_prompt": [[{"role": "user", "content": "without a clip"}], clip, clip],
        "extra_fields": [{"reward_extra_info": {"acc": 1.0}}, {"reward_extra_info": {"acc": 0}}, {}],
    }

    def read(batch: KVBatchMeta, names: list[str]) -> dict[str, Any]:
        rows = [KEYS.index(key) for key in batch.keys]
        return {name: [(others if name in others else made)[name][row] for row in rows] for name in names}

    monkeypatch.setattr(batches, "read", read)
    return made


def trainer(run_dir: Path, step: int = 4, **export_keys: Any) -> Any:
    selection = SelectionConfig(
        score_sign="signed", scope="batch", visual_ratio=0.5, temporal_ratio=0.0, entropy_ratio=0.2
    )
    keytoken = KeyTokenConfig(
        method=MethodConfig(name="video_ktr", selection=selection, loss=LOSS),
        export=ExportConfig(every_steps=2, **export_keys),
        diagnostics=DiagnosticsConfig(word_classes={"order": ["first"]}),
        run_dir=str(run_dir),
    )
    return SimpleNamespace(
        keytoken=keytoken, global_steps=step, tokenizer=build_tokenizer(), contract=SamplingContract(fps=3.0)
    )


def test_it_reads_back_in_one_line(
    tmp_path: Path, signals: Signals, method: MethodConfig, data: TensorDict
) -> None:
    result = compute_token_weights(signals, method)
    batch = KVBatchMeta(partition_id="train", keys=KEYS, tags=[{}] * 3)
    target = export.maybe_write(trainer(tmp_path), batch, signals, result)
    assert target == tmp_path / "tokens" / "step_000004.parquet"
    table = pandas.read_parquet(tmp_path / "tokens")
    assert list(table.columns) == export.SCHEMA.names
    assert table["prompt_id"].tolist() == ["q1", "q1", "q2"]  # whole groups, in order
    assert table["answer"].tolist() == [0, 1, 0]
    assert table["reward"].tolist() == [0.0, 1.0, 2.0]
    for row, index in zip(table.itertuples(), (2, 1, 0), strict=True):
        length = LENGTHS[index]
        assert row.token_ids.tolist() == data["responses"][index].tolist()
        assert len(row.tokens) == length
        for name, tensor in (
            ("log_prob", signals.logp),
            ("log_prob_masked", signals.logp_masked),
            ("entropy", signals.entropy),
            ("visual", signals.logp - signals.logp_masked),
            ("weight", result.weights),
        ):
            torch.testing.assert_close(torch.tensor(getattr(row, name)), tensor[index, :length])
        assert row.selected_visual.tolist() == result.masks["visual"][index, :length].tolist()
        assert row.selected_entropy.tolist() == result.masks["entropy"][index, :length].tolist()
        assert row.advantage.tolist() == data["advantages"][index].tolist()
        # What did not run is absent, not zero.
        assert row.log_prob_shuffled is None and row.temporal is None and row.selected_temporal is None
    assert table["tokens"][2][0].strip() == "<answer>"
    assert "red" in table["prompt"][2]


@pytest.mark.usefixtures("data")
def test_a_disk_that_refuses_the_file_does_not_end_the_run(
    tmp_path: Path,
    signals: Signals,
    method: MethodConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(table: Any, target: Path) -> None:
        target.write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export.pq, "write_table", full)
    batch = KVBatchMeta(partition_id="train", keys=KEYS, tags=[{}] * 3)
    assert (
        export.maybe_write(trainer(tmp_path), batch, signals, compute_token_weights(signals, method)) is None
    )
    assert list((tmp_path / "tokens").iterdir()) == []  # and its part takes no room
    assert "step_000004.parquet" in caplog.text and "No space left" in caplog.text


@pytest.mark.parametrize(("step", "keys"), [(3, {}), (4, {"enabled": False})])
@pytest.mark.usefixtures("data")
def test_it_is_written_when_due(
    tmp_path: Path, signals: Signals, method: MethodConfig, step: int, keys: dict[str, Any]
) -> None:
    batch = KVBatchMeta(partition_id="train", keys=KEYS, tags=[{}] * 3)
    result = compute_token_weights(signals, method)
    assert export.maybe_write(trainer(tmp_path, step, **keys), batch, signals, result) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("data")
def test_it_is_cut_at_a_number_of_answers(tmp_path: Path, signals: Signals, method: MethodConfig) -> None:
    batch = KVBatchMeta(partition_id="train", keys=KEYS, tags=[{}] * 3)
    export.maybe_write(
        trainer(tmp_path, max_responses=2), batch, signals, compute_token_weights(signals, method)
    )
    assert pandas.read_parquet(tmp_path / "tokens")["prompt_id"].tolist() == ["q1", "q1"]
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["step_000004.parquet"]


def test_it_carries_what_a_look_at_it_needs(
    tmp_path: Path, signals: Signals, method: MethodConfig, data: TensorDict
) -> None:
    """Clips, accuracies, what decides ties, and the settings; rows that only fill the batch are left out."""
    result = compute_token_weights(signals, method)
    batch = KVBatchMeta(partition_id="train", keys=KEYS, tags=[{}, {"is_padding": True}, {}])
    target = export.maybe_write(trainer(tmp_path), batch, signals, result)
    assert target is not None
    table = pandas.read_parquet(target)
    assert table["prompt_id"].tolist() == ["q1", "q2"] and table["answer"].tolist() == [0, 0]
    part = {"video": "/clips/a.mp4", "video_start": None, "video_end": 2.5}
    assert [clips.tolist() for clips in table["clips"]] == [[part], []]
    assert table["accuracy"].isna().tolist() == [True, False] and table["accuracy"][1] == 1.0
    assert table["group_size"].tolist() == [1, 1]
    assert table["row_key"].tolist() == [2, 0]
    assert [counted.tolist() for counted in table["counted"]] == [[True] * 2, [True] * 3]
    about = json.loads(pq.read_schema(target).metadata[export.METADATA_KEY])
    assert about["version"] == export.VERSION and about["step"] == 4
    assert about["method"]["selection"]["visual_ratio"] == 0.5
    assert about["sampling"]["fps"] == 3.0
    assert about["batch_answers"] == 2
    assert about["word_classes"] == {"order": ["first"]}


def test_broken_characters_are_whole_in_their_bytes() -> None:
    """Byte-level tokens hold parts of characters; an added token stands for its text."""
    tokenizer = build_tokenizer()
    text = "<think> \u00fc \u6f22 \U0001f600 red</think>"
    ids = tokenizer(text)["input_ids"]
    decode = export._Decoder(tokenizer)
    assert any("\ufffd" in decode.token(token) for token in ids)
    assert b"".join(decode.raw(token) for token in ids).decode() == text
