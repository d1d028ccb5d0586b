"""From predictions to tables and reports, on a benchmark of four questions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from keytoken.cli import main
from keytoken.errors import ConfigurationError, DataError
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.compare import compare
from keytoken.scoring.items import Item, Prediction
from keytoken.scoring.predictions import read_predictions
from keytoken.scoring.report import MAX_LISTED, Report, markdown, results, write_report
from keytoken.scoring.score import Scores, align, rule_of, score_predictions, tables

HOLMES = get_benchmark("video_holmes")
TEMPCOMPASS = get_benchmark("tempcompass")


def items(count: int = 4) -> list[Item]:
    """Questions on clips of two questions each, right answer A, types SR and TA by turns."""
    return [
        Item(
            benchmark="video_holmes",
            item_id=f"q{number}",
            question="Which?",
            answer="A",
            kind="multiple choice",
            options=("red", "blue"),
            video=f"clip{number // 2}.mp4",
            categories={"type": "SR" if number % 2 == 0 else "TA"},
        )
        for number in range(count)
    ]


def answers(letters: str, **fields: object) -> list[Prediction]:
    """One answer a letter; "-" is a failed sample, "." a question without prediction."""
    return [
        Prediction(
            item_id=f"q{number}",
            response=None if letter == "-" else f"<answer>{letter}</answer>",
            error="no frames" if letter == "-" else "",
            **fields,  # type: ignore[arg-type]
        )
        for number, letter in enumerate(letters)
        if letter != "."
    ]


def only(predictions: list[Prediction], count: int = 4) -> Scores:
    (scores,) = score_predictions(HOLMES, items(count), predictions)
    return scores


def test_nothing_is_dropped_uncounted() -> None:
    scores = only(answers("AB-."))
    assert scores.missing == ["q3"]
    whole, by_type = tables(scores)
    row = whole.rows[0]
    assert row.score is not None
    assert (row.items, row.score.value, row.failed, row.unmatched) == (3, pytest.approx(1 / 3), 1, 0)
    assert [(row.name, row.items, row.failed) for row in by_type.rows] == [("SR", 2, 1), ("TA", 1, 0)]


def test_several_answers_count_by_their_mean() -> None:
    predictions = answers("AAAA") + answers("BBBA", sample=1)
    row = tables(only(predictions))[0].rows[0]
    assert row.score is not None
    assert (row.items, row.score.value) == (4, 0.625)


def test_controls_and_decodings_are_apart() -> None:
    predictions = answers("AAAA") + answers("BBBB", control="blank") + answers("AB..", decoding="sampled")
    runs = score_predictions(HOLMES, items(), predictions)
    assert [(run.control, run.decoding, len(run.answers), len(run.missing)) for run in runs] == [
        ("none", "greedy", 4, 0),
        ("blank", "greedy", 4, 0),
        ("none", "sampled", 2, 2),
    ]


def test_undecided_answers_are_beside_the_score() -> None:
    question = Item(
        benchmark="tempcompass",
        item_id="q0",
        question="Is it?",
        answer="yes",
        kind="yes/no",
        video="clip.mp4",
        task="yes_no",
        categories={"task": "yes_no", "aspect": "speed"},
    )
    other = Item(**{name: getattr(question, name) for name in question.__slots__} | {"item_id": "q1"})
    predictions = [Prediction(item_id="q0", response="Yes"), Prediction(item_id="q1", response="It is")]
    (scores,) = score_predictions(TEMPCOMPASS, [question, other], predictions)
    row = tables(scores)[0].rows[0]
    assert row.score is not None
    assert (row.score.value, row.if_wrong, row.undecided, row.unmatched) == (1.0, 0.5, 1, 1)
    text = markdown(Report(scores=[scores]))
    assert "| all | 2 | 100.00 | 20.7 to 100.0 | 1 | 1 | 0 | 50.00 |" in text
    assert "1 answer could not be decided by rule" in text
    assert "judge=URL judge_model=NAME lets a language model" in text  # the remedy
    (none,) = score_predictions(TEMPCOMPASS, [other], predictions[1:])
    assert tables(none)[0].rows[0].score is None
    assert "| all | 1 | - | - | 1 | 1 | 0 | 0.00 |" in markdown(Report(scores=[none]))


def test_weights_of_the_benchmark_decide_the_overall_score() -> None:
    heavy = dataclasses.replace(
        HOLMES, weights=lambda some: [3.0 if one.categories["type"] == "SR" else 1.0 for one in some]
    )
    (scores,) = score_predictions(heavy, items(), answers("ABAB"))
    row = tables(scores)[0].rows[0]
    assert row.score is not None
    assert (row.score.value, row.if_wrong) == (0.75, 0.75)
    (after,) = score_predictions(heavy, items(), answers("AAAA"))
    assert compare(scores, after).rows[0].before == 0.75


def test_differences_to_the_scores_of_the_file() -> None:
    predictions = [
        *answers("AA", published_score=1.0),
        Prediction(item_id="q2", response="<answer>A</answer>", published_score=0.0),
        Prediction(item_id="q3", response="<answer>B|`\n</answer>", published_score=1.0),
    ]
    scores = only(predictions)
    assert [answer.item.item_id for answer in scores.differing] == ["q2", "q3"]
    text = markdown(Report(scores=[scores]))
    assert "### Differs from the file's own scores: 2 of 4 answers" in text
    assert "| q2 | `<answer>A</answer>` | A | A | 1 | 0 |" in text
    assert "| q3 | `<answer>B/' </answer>` | B | A | 0 | 1 |" in text
    assert "Differs" not in markdown(Report(scores=[only(answers("AAAA"))]))
    agreeing = only(answers("AAAA", published_score=1.0))
    assert "own scores: 0 of 4 answers" in markdown(Report(scores=[agreeing]))


def test_compare() -> None:
    """One answer lost, two gained; one question is decided in one run only."""
    before, after = only(answers("ABBA.", sample=0), 5), only(answers("AAAB.", sample=0), 5)
    found = compare(before, after)
    row = found.rows[0]
    assert (row.items, row.before, row.after, row.difference.value) == (4, 0.5, 0.75, 0.25)
    assert row.test is not None
    assert (row.test.lost, row.test.gained, row.test.p_value) == (1, 2, 1.0)
    assert [(row.category, row.name, row.items) for row in found.rows[1:]] == [
        ("type", "SR", 2),
        ("type", "TA", 2),
    ]
    partial = compare(only(answers("AB..")), only(answers(".BA.")))
    assert (partial.only_before, partial.only_after) == (["q0"], ["q2"])
    with pytest.raises(DataError, match="in common"):
        compare(only(answers("A...")), only(answers("...A")))


def test_an_unknown_variant() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'named'"):
        rule_of(HOLMES, "name")
    with pytest.raises(ConfigurationError, match="has none"):
        rule_of(TEMPCOMPASS, "strict")


def test_long_lists_are_cut_in_the_report_and_whole_in_the_files(tmp_path: Path) -> None:
    count = MAX_LISTED + 3
    scores = only(answers("-" * count + "." * count), 2 * count)
    report = Report(scores=[scores], about={"Model": "x|y"})
    text = write_report(tmp_path / "new" / "folder", report).read_text()
    assert text.count("no frames") == MAX_LISTED
    assert text.count("- and 3 more, see items.jsonl") == 2
    assert "- Model: x/y" in text
    lines = [json.loads(line) for line in (tmp_path / "new/folder/items.jsonl").read_text().splitlines()]
    assert [line["rule"] for line in lines] == ["failed"] * count + ["missing"] * count
    assert len(results(report)["runs"][0]["missing"]) == count
    assert (tmp_path / "new/folder/results.csv").read_text().count("\n") == 4
    assert not list(tmp_path.rglob("*.partial"))


def test_a_report_where_there_can_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_report(tmp_path / "file", Report(scores=[only(answers("AAAA"))]))


def test_copies_of_questions_are_found_by_what_they_still_have(tmp_path: Path) -> None:
    """Another id, another encoding, "path" replaced inside words: still the same question."""
    mmvu = get_benchmark("mmvu")
    row = {
        "problem_id": 7,
        "problem": "The CO\u0432\u201a? videoway\u2019s name?",
        "problem_type": "multiple choice",
        "options": ["A. red", "B. a videoogenic"],
        "solution": "<answer>B</answer>",
        "video": "/MMVU/videos/Art/3.mp4",
    }
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({"question": row, "model_output": "B", "accuracy_score": 1.0}) + "\n")
    file = read_predictions(path, mmvu)
    official = Item(
        benchmark="mmvu",
        item_id="validation_9",
        question="The CO2 pathway's name?",
        answer="B",
        kind="multiple choice",
        options=("red", "a pathogenic"),
        video="Art/3.mp4",
    )
    changed = {"item_id": "validation_8", "video": "Art/4.mp4"}
    other = Item(**{name: getattr(official, name) for name in official.__slots__} | changed)
    assert [one.item_id for one in align(file, [other, official])] == ["validation_9"]
    with pytest.raises(DataError, match="1 of its 1 questions"):
        align(file, [other])


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions, two runs, a comparison and every exit code."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "video ID": "abc",
            "Question ID": number,
            "Question Type": "SR",
            "Question": "Which?",
            "Options": {"A": "red", "B": "blue"},
            "Answer": "A",
        }
        for number in range(4)
    ]
    Path("questions.json").write_text(json.dumps(rows))
    for name, letters in (("before", "BBBA"), ("after", "AAA")):
        head = {"keytoken": "predictions", "version": 1, "benchmark": "video_holmes", "model": f"runs/{name}"}
        lines = [head] + [
            {
                "item_id": f"abc/{number}",
                "response": f"<answer>{letter}</answer>",
                "benchmark": "video_holmes",
            }
            for number, letter in enumerate(letters)
        ]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["score", "benchmark=video_holmes", "questions=questions.json", "predictions=after.jsonl"]
    assert main([*words, "compare=before.jsonl"]) == 1
    shown = capsys.readouterr().out
    assert "| all | 3 | 0.00 | 100.00 | +100.00 |" in shown
    assert "1 question is decided in that run only" in shown
    assert "1 question has no prediction: abc/3" in shown
    assert "- Model: runs/after" in shown
    report = Path("outputs/scores/video_holmes-after/report.md")
    assert report.read_text() in shown
    assert main([*words, "allow_missing=true", "variant=named"]) == 0
    assert "- Rule: named;" in capsys.readouterr().out
    assert main([*words, "compre=before.jsonl"]) == 2
    assert "Did you mean 'compare'" in capsys.readouterr().err
