"""The demo's benchmark against the demo: the same questions, and the reward that it trains on."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keytoken.data.contract import SamplingContract
from keytoken.demo.rows import _SCHEMA, question_row, split_question
from keytoken.errors import DataError
from keytoken.rewards.score import compute_score
from keytoken.scoring.benchmarks import demo
from keytoken.scoring.items import Item


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    contract = SamplingContract()
    rows = []
    for index in range(14):
        question, _ = split_question("heldout", index, 0)
        clip = tmp_path / "clips" / f"{index}.mp4" if question.bodies else None
        rows.append(question_row(question, split="heldout", index=index, clip=clip, contract=contract))
    path = tmp_path / "heldout.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path)
    return path


@pytest.fixture
def items(heldout: Path) -> list[Item]:
    return demo.read([heldout])


def test_the_questions_are_those_of_the_demo(items: list[Item]) -> None:
    for index, item in enumerate(items):
        question, _ = split_question("heldout", index, 0)
        assert demo.prompt(item) == question.prompt
        assert (item.question, item.options) == (question.question, question.options)
        assert item.answer == question.letter
        assert item.categories == {"family": question.family}
        assert item.video == (f"clips/{index}.mp4" if question.bodies else None)


@pytest.mark.parametrize(
    "answer",
    [
        "<answer> {} </answer>",
        "<answer>{}.</answer>",
        "{}",
        "<answer></answer>",
        "<answer>{}</answer><answer>A</answer>",
    ],
)
def test_the_score_is_the_reward(items: list[Item], answer: str) -> None:
    for item in items:
        for letter in "ABCD":
            response = answer.format(letter)
            reward = compute_score("demo", response, item.answer, {"problem_type": "multiple choice"})
            assert demo.score(item, response).score == reward["acc"]


def test_a_file_that_is_not_the_demos(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": "Which?"}]), path)
    with pytest.raises(DataError, match=r"heldout\.parquet"):
        demo.read([path])
