"""Diagnostics of a step: what is read of a batch, and the file that is left."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.demo.tokenizer import build_tokenizer
from keytoken.golden import load_preset
from keytoken.schema import DiagnosticsConfig, KeyTokenConfig
from keytoken.verl_adapter import diagnostics

METHOD = load_preset("tor_grpo")
TOKENIZER = build_tokenizer()
WORDS = {"color": ["red", "blue"], "number": ["two"]}
# Two answers to one prompt, one to another, and a row that fills the batch.
KEYS = ["q2_0_0", "q1_1_0", "q1_0_0", "padabc_0_0"]
TEXTS = ("the red square . </think>", "two B", "blue blue up")
ADVANTAGES = (1.0, -1.0, 0.5, 0.0)
LENGTHS = [*(len(TOKENIZER(text)["input_ids"]) for text in TEXTS), 0]


def ragged(rows: list[Any]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


def said(**info: Any) -> dict[str, Any]:
    return {"reward_extra_info": info}


@pytest.fixture
def signals() -> Signals:
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    generator = torch.Generator().manual_seed(0)
    real, masked, entropy = (torch.randn(mask.shape, generator=generator) - 3.0 for _ in range(3))
    return Signals(
        logp=real,
        logp_masked=masked,
        logp_shuffled=None,
        entropy=entropy.abs(),
        truncated_entropy=entropy.abs(),
        mask=mask,
        group=torch.tensor([2, 1, 1, 0]),
        has_visual=mask.any(dim=1),
        has_temporal=torch.zeros(4, dtype=torch.bool),
        collision=(2.0 * real).exp() + 0.1,
    )


@pytest.fixture
def result(signals: Signals) -> TokenWeights:
    return compute_token_weights(signals, METHOD)


@pytest.fixture
def data() -> TensorDict:
    answers = [TOKENIZER(text)["input_ids"] for text in TEXTS] + [[TOKENIZER.eos_token_id]]
    made = TensorDict(
        {
            "responses": ragged(answers),
            "advantages": ragged(
                [[value] * len(ids) for value, ids in zip(ADVANTAGES, answers, strict=True)]
            ),
        },
        batch_size=[4],
    )
    made["extra_fields"] = np.array([said(acc=1.0), said(acc=0.0), said(acc=1.0), {}], dtype=object)
    return made


def trainer(run_dir: Path, step: int, **keys: Any) -> Any:
    config = DiagnosticsConfig(every_steps=3, word_classes=WORDS, **keys)
    keytoken = KeyTokenConfig(method=METHOD, diagnostics=config, run_dir=str(run_dir))
    return SimpleNamespace(keytoken=keytoken, global_steps=step, tokenizer=TOKENIZER)


BATCH = KVBatchMeta(partition_id="train", keys=KEYS, tags=[{}] * 4)


def test_a_step_that_is_due_is_logged_and_written(
    tmp_path: Path, signals: Signals, result: TokenWeights, data: TensorDict
) -> None:
    metrics = diagnostics.maybe_write(trainer(tmp_path, 6), BATCH, signals, result, data)
    content = json.loads((tmp_path / "diagnostics" / "step_000006.json").read_text())
    seconds = metrics.pop("diagnostics/seconds")
    assert seconds > 0.0
    assert (content["step"], content["metrics"]) == (6, metrics)
    assert [path.name for path in (tmp_path / "diagnostics").iterdir()] == ["step_000006.json"]
    places = [("q1", 0, 2), ("q1", 1, 1), ("q2", 0, 0)]  # without the row that fills the batch
    for entry, (prompt, answer, row) in zip(content["answers"], places, strict=True):
        assert entry == {
            "prompt_id": prompt,
            "answer": answer,
            "tokens": LENGTHS[row],
            "selected": int((result.weights[row] > 0).sum()),
            "weight": float(result.weights[row].sum()),
            "right": row != 1,
        }


def test_every_part_of_the_batch_reaches_its_metrics(
    tmp_path: Path, signals: Signals, result: TokenWeights, data: TensorDict
) -> None:
    metrics = diagnostics.maybe_write(trainer(tmp_path, 3), BATCH, signals, result, data)
    total = sum(LENGTHS)
    wanted = {"color": 3, "number": 1, "letter": 1, "special": 1, "punctuation": 1, "word": total - 7}
    for name, count in wanted.items():
        assert metrics[f"diagnostics/words/{name}/token_share"] == pytest.approx(count / total)
    assert sum("words" in key and "token_share" in key for key in metrics) == len(wanted)
    assert metrics["diagnostics/overlap/entropy_visual"] < 1.0
    # ToR divides by all tokens and does not weigh its KL: unit weights have the factor 1 / total.
    p, collision = signals.logp.double().exp(), signals.collision
    assert collision is not None
    advantages = torch.tensor(ADVANTAGES).double()[:, None]
    norms = advantages * (1 - 2 * p + collision).sqrt() / total * signals.mask
    assert metrics["diagnostics/gradient/full/norm"] == pytest.approx(float(norms.norm()), rel=1e-6)
    right, wrong = (metrics[f"diagnostics/outcomes/selected/{side}"] for side in ("right", "wrong"))
    share = (result.weights > 0).sum(dim=1) / torch.tensor(LENGTHS)
    assert (right, wrong) == pytest.approx((float(share[[0, 2]].mean()), float(share[1])))


def test_other_steps_cost_nothing(tmp_path: Path, signals: Signals, result: TokenWeights) -> None:
    assert diagnostics.maybe_write(trainer(tmp_path, 4), BATCH, signals, result, TensorDict()) == {}
    assert not (tmp_path / "diagnostics").exists()


def test_right_and_unknown() -> None:
    real = torch.tensor([True, True, False])
    rows = [said(acc=np.float32(0.6)), said(acc=0.5), {}]
    found = diagnostics.rightness(rows, real)
    assert found is not None and found.tolist() == [True, False, False]
    for missing in (said(), said(acc=None), {}, said(acc=float("nan"))):
        assert diagnostics.rightness([said(acc=1.0), missing, {}], real) is None


def test_outcomes_are_left_out_where_rewards_say_nothing_of_accuracy(
    tmp_path: Path, signals: Signals, result: TokenWeights, data: TensorDict
) -> None:
    data["extra_fields"] = np.array([said(acc=1.0), said(score=2.0), said(acc=1.0), {}], dtype=object)
    metrics = diagnostics.maybe_write(trainer(tmp_path, 3), BATCH, signals, result, data)
    assert metrics and not any("outcomes" in key for key in metrics)
    answers = json.loads((tmp_path / "diagnostics" / "step_000003.json").read_text())["answers"]
    assert [entry["right"] for entry in answers] == [None] * 3


def test_special_tokens_of_the_tokenizer_are_special_whatever_they_look_like() -> None:
    tokenizer = SimpleNamespace(all_special_ids=[7], decode=lambda ids: {7: "[PAD]", 8: "dog"}[ids[0]])
    mask = torch.tensor([[True, True], [True, False]])
    found = diagnostics.token_classes([torch.tensor([7, 8]), torch.tensor([8, 7])], mask, tokenizer, {})
    assert found == [["special", "word"], ["word"]]
