"""``keytoken score``: from files to a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from keytoken.errors import DataError
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.compare import Comparison, compare
from keytoken.scoring.files import PredictionFile
from keytoken.scoring.items import Item
from keytoken.scoring.predictions import read_predictions, shown
from keytoken.scoring.report import Report, markdown, write_report
from keytoken.scoring.score import Scores, align, rule_of, score_predictions

Say = Callable[[str], None]
_ABOUT = ("model", "sampling", "prompt", "style", "seed")  # of a header, for the head of a report


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreOptions:
    """What is scored.

    Attributes:
        benchmark: Name of the benchmark.
        predictions: File of predictions.
        questions: Official question files; needed where the predictions do not carry their questions.
        compare: A second file of predictions, which came before.
        variant: A named variant of the benchmark's rule; null for the official one.
        out: Folder of the report; null for ``outputs/scores/<benchmark>-<name of the file>``.
        allow_missing: Questions without a prediction are no failure.
    """

    benchmark: str
    predictions: str
    questions: tuple[str, ...] = ()
    compare: str | None = None
    variant: str | None = None
    out: str | None = None
    allow_missing: bool = False


def run_score(options: ScoreOptions, say: Say) -> int:
    """Score a file, print the report and write it.

    Returns:
        Exit code: 1 if questions without a prediction are not allowed and there are some, else 0.

    Raises:
        KeyTokenError: What the user can mend: names, files, rows.
    """
    benchmark = get_benchmark(options.benchmark)
    rule_of(benchmark, options.variant)  # a wrong name is said before files are read
    path = Path(options.predictions).expanduser()
    file = read_predictions(path, benchmark)
    items = questions(benchmark, file, options.questions)
    scores = score_predictions(benchmark, items, align(file, items), options.variant)
    comparisons: dict[str, Comparison] = {}
    notes: list[str] = []
    if options.compare is not None:
        earlier = read_predictions(Path(options.compare).expanduser(), benchmark)
        others = score_predictions(benchmark, items, align(earlier, items), options.variant)
        comparisons, notes = _compared(options.compare, others, scores)
    report = Report(scores=scores, about=about(file), comparisons=comparisons, notes=notes)
    folder = Path(options.out or Path("outputs") / "scores" / f"{benchmark.name}-{path.stem}").expanduser()
    target = write_report(folder, report)
    say(markdown(report))
    say(f"Report: {target}")
    missing = [item_id for entry in scores for item_id in entry.missing]
    if missing and not options.allow_missing:
        say(
            f"{len(missing)} questions have no prediction: {shown(missing)}. Allowed with allow_missing=true."
        )
        return 1
    return 0


def questions(benchmark: Benchmark, file: PredictionFile, paths: Sequence[str]) -> list[Item]:
    """The questions of official files, or those that the predictions carry.

    Raises:
        DataError: If there are neither, or the files cannot be read.
    """
    if paths:
        return benchmark.read([Path(path).expanduser() for path in paths])
    if file.items is None:
        raise DataError(
            f"{file.path} carries no questions; add questions=FILE with those of {benchmark.title}."
        )
    return list(file.items)


def about(file: PredictionFile) -> dict[str, str]:
    """Where predictions are from, in words for the head of a report."""
    said = {"Predictions": f"{file.path} ({file.format})"}
    for key in _ABOUT:
        if key in file.header:
            said[key.capitalize()] = str(file.header[key])
    return said


def _compared(
    name: str, others: Sequence[Scores], scores: Sequence[Scores]
) -> tuple[dict[str, Comparison], list[str]]:
    """Every run against the one of the other file with its control and decoding."""
    earlier = {(entry.control, entry.decoding): entry for entry in others}
    comparisons, notes = {}, []
    for entry in scores:
        before = earlier.get((entry.control, entry.decoding))
        if before is None:
            notes.append(f"{name} has no answers with control {entry.control}, {entry.decoding}.")
            continue
        label = name if len(scores) == 1 else f"{name} (control {entry.control}, {entry.decoding})"
        comparisons[label] = compare(before, entry)
        if entry.benchmark.compared is not None:
            pairs = {(row.category, row.name): (row.before, row.after) for row in comparisons[label].rows}
            notes += entry.benchmark.compared(pairs)
    if not comparisons:
        raise DataError(f"{name}: nothing to compare; {' '.join(notes)}")
    return comparisons, notes


def with_judge(scores: Scores, judge: str, decide: Callable[..., Sequence]) -> Scores:
    """Scores whose undecided answers a judge has decided.

    Args:
        scores: Verdicts by rule.
        judge: Name of the judge's model, for the report.
        decide: From (item, response) pairs to verdicts in their order.
    """
    undecided = [
        index
        for index, answer in enumerate(scores.answers)
        if answer.verdict.score is None and answer.prediction.response is not None
    ]
    pairs = [(scores.answers[index].item, scores.answers[index].prediction.response) for index in undecided]
    answers = list(scores.answers)
    for index, verdict in zip(undecided, decide(pairs), strict=True):
        answers[index] = dataclasses.replace(answers[index], verdict=verdict)
    return dataclasses.replace(scores, answers=answers, judge=judge)
