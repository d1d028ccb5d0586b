"""Where questions come from, how they are worded, and what is refused before an engine starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keytoken.demo.rows import question_row, split_question
from keytoken.demo.tokenizer import DEMO_CONTRACT
from keytoken.errors import ConfigurationError, DataError
from keytoken.evaluation.options import EvaluateOptions
from keytoken.evaluation.sources import HELDOUT, demo_world, question_text, questions_digest, read_source
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.items import Item

DEMO = get_benchmark("demo")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A demo world without clips and without weights."""
    monkeypatch.setenv("KEYTOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KEYTOKEN_DEMO_DIR", raising=False)
    folder = tmp_path / "world"
    (folder / "model").mkdir(parents=True)
    rows = []
    for index in range(14):
        question, _ = split_question("heldout", index, 0)
        clip = folder / "clips" / f"{index}.mp4" if question.bodies else None
        rows.append(question_row(question, split="heldout", index=index, clip=clip, contract=DEMO_CONTRACT))
    pq.write_table(pa.Table.from_pylist(rows), folder / HELDOUT)
    return folder


def test_demo_brings_its_own_questions(world: Path) -> None:
    """Asked as they are trained on, with the longest answer of training."""
    source = read_source(DEMO, EvaluateOptions(benchmark="demo", model=str(world / "model")))
    assert len(source.items) == 14
    assert (source.media_root, source.style, source.max_tokens) == (world, "official", 40)
    question, _ = split_question("heldout", 3, 0)
    assert question_text(DEMO, source.items[3], source.style) == question.prompt
    assert source.items[3].video == "clips/3.mp4"
    assert source.items[6].video is None
    options = EvaluateOptions(benchmark="demo", model=str(world / "model"), limit=5, max_tokens=7)
    assert [item.item_id for item in read_source(DEMO, options).items] == [
        f"heldout-{index:05d}" for index in range(5)
    ]
    assert read_source(DEMO, options).max_tokens == 7


def test_demo_world_is_named_or_beside_the_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="keytoken demo --prepare-only"):
        demo_world(tmp_path / "elsewhere" / "model")
    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", str(world))
    assert demo_world(tmp_path / "elsewhere" / "model") == world


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        pytest.param({}, ConfigurationError, "give questions=FILE", id="no question file"),
        pytest.param({"questions": ("gone.json",)}, DataError, "gone.json does not exist", id="lost file"),
        pytest.param({"questions": ("q.json",)}, ConfigurationError, "give media_root", id="no media root"),
        pytest.param(
            {"questions": ("q.json",), "media_root": "gone"},
            ConfigurationError,
            "no such folder",
            id="lost root",
        ),
    ],
)
def test_what_is_missing_is_said_before_the_engine_starts(
    words: dict[str, object],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    row = (
        '{"id": "v", "video": "https://x/videos/Art/0.mp4", "question_type": "multiple-choice", '
        '"metadata": {"subject": "Art"}, "question": "Which?", "answer": "A", '
        '"choices": {"A": "red", "B": "blue", "C": "green", "D": "grey", "E": "pink"}}'
    )
    (tmp_path / "q.json").write_text(f"[{row}]")
    options = EvaluateOptions(benchmark="mmvu", model="m", **words)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        read_source(get_benchmark("mmvu"), options)


def test_styles_of_a_question() -> None:
    item = Item(
        benchmark="mmvu",
        item_id="v",
        question="Which?",
        answer="A",
        kind="multiple choice",
        options=("red", "blue"),
    )
    texts = {
        style: question_text(get_benchmark("mmvu"), item, style)
        for style in ("reasoning", "direct", "official")
    }
    assert all("Which?" in text and "red" in text for text in texts.values())
    assert "<think>" in texts["reasoning"] and "<think>" not in texts["direct"]
    assert texts["official"] == get_benchmark("mmvu").prompt(item)
    assert len(set(texts.values())) == 3
    assert (
        question_text(DEMO, item, "Q: {question} <answer>") == "Q: Which?\nOptions:\nA. red\nB. blue <answer>"
    )
    with pytest.raises(ConfigurationError, match="Did you mean 'reasoning'"):
        question_text(DEMO, item, "reasonin")


def test_questions_are_told_from_others() -> None:
    """By what is asked, in full; neither by the key nor by how many of them are."""
    item = Item(benchmark="mmvu", item_id="1", question="Which?", answer="A", kind="multiple choice")
    asked = dataclasses.replace(item, options=("a", "b"), video="1.mp4")
    digest = questions_digest([asked])
    changes = ({"question": "What?"}, {"options": ("a", "c")}, {"video": "2.mp4"}, {"span": (0.0, 1.0)})
    others = {questions_digest([dataclasses.replace(asked, **change)]) for change in changes}
    assert len(others | {digest}) == 1 + len(changes)
    assert questions_digest([dataclasses.replace(asked, answer="B")]) == digest
    worded = dataclasses.replace(asked, prompt="Which? Think.")
    assert len({digest, questions_digest([worded])}) == 2
    assert questions_digest([dataclasses.replace(worded, root="/moved")]) == questions_digest([worded])


def test_a_limit_asks_less_of_the_same_questions(world: Path) -> None:
    sources = [
        read_source(DEMO, EvaluateOptions(benchmark="demo", model=str(world / "model"), limit=limit))
        for limit in (None, 3)
    ]
    assert [len(source.items) for source in sources] == [14, 3]
    assert sources[0].digest == sources[1].digest != ""
