"""Published outputs of real models against their published scores; official question files read in full."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.benchmarks.tempcompass import walk
from keytoken.scoring.compare import compare
from keytoken.scoring.predictions import read_predictions
from keytoken.scoring.run import ScoreOptions, run_score
from keytoken.scoring.score import Scores, align, score_predictions, tables

MMVU = {"videochat-r1": (401, 64.16, 64.16), "qwen2.5-vl-7b_zeroshot": (411, 65.76, 65.44)}


def scored(shared_data: Path, benchmark: str, name: str, variant: str | None = None) -> Scores:
    rule = get_benchmark(benchmark)
    file = read_predictions(shared_data / "predictions" / name, rule)
    assert file.items is not None
    (scores,) = score_predictions(rule, file.items, file.predictions, variant)
    return scores


def percent(scores: Scores) -> float:
    score = tables(scores)[0].rows[0].score
    assert score is not None
    return 100.0 * score.value


@pytest.mark.parametrize("variant", [None, "exact"])
@pytest.mark.parametrize("model", list(MMVU))
def test_mmvu(shared_data: Path, model: str, variant: str | None) -> None:
    """As published, but for two answers in tags that the published script did not read."""
    right, score, published = MMVU[model]
    scores = scored(shared_data, "mmvu", f"mmvu_{model}.jsonl", variant)
    assert len(scores.answers) == 625
    assert sum(answer.verdict.score or 0.0 for answer in scores.answers) == right
    assert percent(scores) == pytest.approx(score, abs=1e-9)
    metrics = json.loads((shared_data / "predictions" / f"mmvu_{model}_metrics.json").read_text())
    assert metrics["strict_accuracy"] == published
    own = [answer.prediction.published_score for answer in scores.answers]
    assert sum(value or 0.0 for value in own) / 6.25 == pytest.approx(published, abs=1e-9)


def test_the_two_answers_that_were_not_read(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    differing = scored(shared_data, "mmvu", "mmvu_qwen2.5-vl-7b_zeroshot.jsonl").differing
    assert [answer.prediction.response for answer in differing] == [
        "<answer>C</answer>",
        "<answer>B</answer>",
    ]
    assert scored(shared_data, "mmvu", "mmvu_videochat-r1.jsonl").differing == []

    path = shared_data / "predictions" / "mmvu_qwen2.5-vl-7b_zeroshot.jsonl"
    options = ScoreOptions(benchmark="mmvu", predictions=str(path), out=str(tmp_path))
    assert run_score(options, say=print) == 0
    report = (tmp_path / "report.md").read_text()
    section = report.partition("### Differs from the file's own scores: 2 of 625 answers\n")[2]
    rows = [line for line in section.split("\n") if line.startswith("| ") and "answer>" in line]
    assert [row.split("|")[2].strip() for row in rows] == ["`<answer>C</answer>`", "`<answer>B</answer>`"]
    assert "| all | 625 | 65.76 |" in report
    assert report in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["runs"][0]["tables"]["all"][0]["score"]["value"] == pytest.approx(411 / 625)
    lines = (tmp_path / "items.jsonl").read_text().splitlines()
    assert len(lines) == 625
    assert sum(json.loads(line)["score"] for line in lines) == 411


def test_mmvu_with_the_official_questions(shared_data: Path, tmp_path: Path) -> None:
    """The outputs carry a copy of the questions, 32 of them in another encoding; every one is found."""
    rule = get_benchmark("mmvu")
    items = rule.read([shared_data / "benchmarks" / "mmvu_validation_official.json"])
    file = read_predictions(shared_data / "predictions" / "mmvu_videochat-r1.jsonl", rule)
    found = align(file, items)
    assert [one.item_id for one in found] == [item.item_id for item in items if item.options]
    (scores,) = score_predictions(rule, items, found)
    assert percent(scores) == pytest.approx(64.16, abs=1e-9)
    assert len(scores.missing) == 375

    questions = str(shared_data / "benchmarks" / "mmvu_validation_official.json")
    options = {"benchmark": "mmvu", "predictions": str(file.path), "questions": (questions,)}
    assert run_score(ScoreOptions(**options, out=str(tmp_path)), say=lambda line: None) == 1
    assert "Missing: 375 of 1000 questions" in (tmp_path / "report.md").read_text()
    allowed = ScoreOptions(**options, out=str(tmp_path), allow_missing=True)
    assert run_score(allowed, say=lambda line: None) == 0


def test_two_published_runs_compared(shared_data: Path) -> None:
    before = scored(shared_data, "mmvu", "mmvu_videochat-r1.jsonl")
    after = scored(shared_data, "mmvu", "mmvu_qwen2.5-vl-7b_zeroshot.jsonl")
    row = compare(before, after).rows[0]
    assert (row.items, row.category) == (625, "all")
    assert row.difference.value == pytest.approx(10 / 625)
    assert row.difference.low < 0.0 < row.difference.high
    assert row.test is not None
    assert row.test.gained - row.test.lost == 10


def test_tempcompass_agrees_with_the_official_evaluation(shared_data: Path) -> None:
    """Item by item wherever the official rule decided; what it did not decide is unmatched here as well."""
    name = "tempcompass_gemini_multi-choice"
    path = shared_data / "predictions" / f"{name}_official_eval.json"
    official = {
        f"{clip}/multi-choice/{aspect}/{number}": row
        for _, (clip, aspect, number), row in walk(json.loads(path.read_text()), "official")
    }
    scores = scored(shared_data, "tempcompass", f"{name}.json")
    assert {answer.item.item_id for answer in scores.answers} == set(official)
    counts: Counter[str] = Counter()
    for answer in scores.answers:
        row = official[answer.item.item_id]
        if row["match_success"]:
            assert answer.verdict.score == row["rating"], answer
            counts["by rule"] += 1
        elif row["video-llm-prediction"] is None:
            assert (answer.verdict.score, answer.verdict.rule) == (0.0, "failed")
            counts["failed"] += 1
        else:
            assert (answer.verdict.score, answer.verdict.rule) == (None, "unmatched")
            counts["unmatched"] += 1
    assert counts == {"by rule": 1458, "unmatched": 110, "failed": 12}
    row = tables(scores)[0].rows[0]
    assert (row.items, row.unmatched, row.undecided, row.failed) == (1580, 110, 110, 12)
    assert row.if_wrong == pytest.approx(940 / 1580)  # what --disable_llm gives


def test_the_official_evaluation_is_read_as_predictions_too(shared_data: Path) -> None:
    scores = scored(shared_data, "tempcompass", "tempcompass_gemini_multi-choice_official_eval.json")
    assert scores.differing == []
    assert sum(answer.prediction.published_score or 0.0 for answer in scores.answers) == 1010


COUNTS = [
    ("mmvu", ["mmvu_validation_official"], 1000, {"multiple choice": 625, "open": 375}),
    ("mmvu", ["mmvu_mc_video_r1_format"], 625, {"multiple choice": 625}),
    ("videommmu", ["videommmu_perception"], 300, {"multiple choice": 300}),
    ("videommmu", ["videommmu_comprehension"], 300, {"multiple choice": 300}),
    ("videommmu", ["videommmu_adaptation"], 300, {"multiple choice": 280, "open": 20}),
    ("tempcompass", ["tempcompass_multi-choice"], 1580, {"multiple choice": 1580}),
    ("tempcompass", ["tempcompass_yes_no"], 2453, {"yes/no": 2453}),
    ("tempcompass", ["tempcompass_caption_matching"], 1503, {"caption matching": 1503}),
    ("video_holmes", ["video_holmes_example_RSmjqss0XKQ"], 8, {"multiple choice": 8}),
    ("video_holmes", ["video_holmes_example_dGS48Kcax5k"], 8, {"multiple choice": 8}),
]


@pytest.mark.parametrize(("benchmark", "names", "count", "kinds"), COUNTS, ids=lambda value: str(value)[:40])
def test_official_questions_are_read_in_full(
    shared_data: Path, benchmark: str, names: list[str], count: int, kinds: dict[str, int]
) -> None:
    rule = get_benchmark(benchmark)
    items = rule.read([shared_data / "benchmarks" / f"{name}.json" for name in names])
    assert len(items) == len({item.item_id for item in items}) == count
    assert Counter(item.kind for item in items) == kinds
    for item in items:
        assert item.benchmark == benchmark
        assert item.question in rule.prompt(item)
        assert all(option in rule.prompt(item) for option in item.options)


def test_every_right_answer_is_right_and_every_wrong_letter_is_wrong(shared_data: Path) -> None:
    """Through tags, on all official questions that a rule decides."""
    for benchmark, names, _, _ in COUNTS:
        rule = get_benchmark(benchmark)
        for item in rule.read([shared_data / "benchmarks" / f"{name}.json" for name in names]):
            verdict = rule.score(item, f"<think>Why?</think><answer>{item.answer}</answer>")
            undecided = item.kind == "open" and benchmark == "mmvu"
            assert verdict.score == (None if undecided else 1.0), (item, verdict)
            if item.kind == "multiple choice":
                wrong = "A" if item.answer != "A" else "B"
                assert rule.score(item, f"<answer>{wrong}</answer>").score == 0.0


def test_all_tasks_of_tempcompass_at_once(shared_data: Path) -> None:
    rule = get_benchmark("tempcompass")
    names = ("multi-choice", "yes_no", "caption_matching", "meta_info")
    items = rule.read([shared_data / "benchmarks" / f"tempcompass_{name}.json" for name in names])
    assert len(items) == 1580 + 2453 + 1503
    assert all(item.categories.get("type") for item in items)
    assert len({item.video for item in items}) == 410
