"""``keytoken score``: from files to a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from keytoken.errors import ConfigurationError, DataError
from keytoken.rewards.extract import final_text
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.chat import Endpoint
from keytoken.scoring.compare import Comparison, compare
from keytoken.scoring.files import PredictionFile
from keytoken.scoring.items import Item
from keytoken.scoring.judge import Judge
from keytoken.scoring.judge_prompts import asked
from keytoken.scoring.predictions import read_predictions, shown
from keytoken.scoring.report import Report, markdown, write_report
from keytoken.scoring.score import Scores, align, rule_of, score_predictions
from keytoken.words import number_of

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
        judge: Base of an OpenAI-compatible API, for what the rule cannot decide; null for none.
        judge_model: Name of the judge's model there.
        judge_key: Environment variable that holds the key.
        judge_replies: File that keeps the replies; null for ``judge.jsonl`` in the folder of the report.
    """

    benchmark: str
    predictions: str
    questions: tuple[str, ...] = ()
    compare: str | None = None
    variant: str | None = None
    out: str | None = None
    allow_missing: bool = False
    judge: str | None = None
    judge_model: str | None = None
    judge_key: str = "OPENAI_API_KEY"
    judge_replies: str | None = None


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
    folder = Path(options.out or Path("outputs") / "scores" / f"{benchmark.name}-{path.stem}").expanduser()
    judge = judge_of(options, folder)
    file = read_predictions(path, benchmark)
    items = questions(benchmark, file, options.questions)
    scores = _judged(score_predictions(benchmark, items, align(file, items), options.variant), judge, items)
    comparisons: dict[str, Comparison] = {}
    notes: list[str] = []
    if options.compare is not None:
        earlier = read_predictions(Path(options.compare).expanduser(), benchmark)
        others = score_predictions(benchmark, items, align(earlier, items), options.variant)
        others = _judged(others, judge, items)
        comparisons, notes = _compared(options.compare, others, scores)
    if judge is not None and judge.undecided:
        left = number_of(len(judge.undecided), "answer")
        notes.append(f"The judge left {left} undecided: {_reasons(judge)}.")
    report = Report(scores=scores, about=about(file), comparisons=comparisons, notes=notes)
    target = write_report(folder, report)
    say(markdown(report))
    say(f"Report: {target}")
    missing = [item_id for entry in scores for item_id in entry.missing]
    if missing and not options.allow_missing:
        say(
            f"{number_of(len(missing), 'question has', 'questions have')} no prediction: {shown(missing)}. "
            "Allowed with allow_missing=true."
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


def judge_of(options: ScoreOptions, folder: Path) -> Judge | None:
    """The judge of the options, if they name one; its replies are kept in the folder unless they say where.

    Raises:
        ConfigurationError: Half of the settings, or ones that cannot work.
    """
    if options.judge is None and options.judge_model is None:
        return None
    if options.judge is None or options.judge_model is None:
        lacking = "judge=URL" if options.judge is None else "judge_model=NAME"
        name = lacking.partition("=")[0]
        raise ConfigurationError(f"score: {name} is missing; add {lacking}, for a judge has both settings")
    endpoint = Endpoint(url=options.judge, model=options.judge_model, key_variable=options.judge_key)
    return Judge(endpoint, Path(options.judge_replies or folder / "judge.jsonl").expanduser())


def _judged(scores: Sequence[Scores], judge: Judge | None, items: Sequence[Item]) -> list[Scores]:
    return [entry if judge is None else with_judge(entry, judge, items) for entry in scores]


def with_judge(scores: Scores, judge: Judge, items: Sequence[Item]) -> Scores:
    """Scores whose undecided answers the judge has decided, as far as it could.

    Args:
        scores: Verdicts by rule.
        judge: It is asked, with a progress bar, what it was not asked before.
        items: All questions; those of captions are judged by multiple-choice questions among them.
    """
    by_id = {item.item_id: item for item in items}
    undecided = [
        (index, asked(answer.item, by_id), final_text(answer.prediction.response))
        for index, answer in enumerate(scores.answers)
        if answer.verdict.score is None and answer.prediction.response is not None
    ]
    answers = list(scores.answers)
    with tqdm(total=len(undecided), desc="judge", unit="answer", disable=not undecided) as bar:
        verdicts = judge.decide([(item, text) for _, item, text in undecided], lambda *_: bar.update())
    for (index, _, _), verdict in zip(undecided, verdicts, strict=True):
        answers[index] = dataclasses.replace(answers[index], verdict=verdict)
    return dataclasses.replace(scores, answers=answers, judge=judge.endpoint.model)


def _reasons(judge: Judge) -> str:
    first = list(judge.undecided.items())[:3]
    return "; ".join(f"{item_id}: {reason}" for item_id, reason in first)
