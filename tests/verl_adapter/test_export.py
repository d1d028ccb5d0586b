"""The per-token export, read back with pandas alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.types import Signals
from keytoken.demo.tokenizer import build_tokenizer
from keytoken.schema import ExportConfig, LossConfig, MethodConfig, SelectionConfig
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
    monkeypatch.setattr(batches, "read", lambda *_: made)
    return made


def trainer(run_dir: Path, step: int = 4, **export_keys: Any) -> Any:
    keytoken = SimpleNamespace(export=ExportConfig(every_steps=2, **export_keys), run_dir=str(run_dir))
    return SimpleNamespace(keytoken=keytoken, global_steps=step, tokenizer=build_tokenizer())


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
