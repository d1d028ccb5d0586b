"""Reports on scores: ``report.md`` to read, ``results.json``, ``results.csv``, ``items.jsonl`` to go on with.

Scores are percentages in the report and shares in the other files. Every answer is in ``items.jsonl``; the
report lists what a reader has to know of one by one: failed samples, missing questions, and answers to which
the file of predictions gives another score.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keytoken.errors import DataError
from keytoken.scoring.compare import Comparison
from keytoken.scoring.items import JUDGE
from keytoken.scoring.score import ALL, Answer, Scores, Table, tables
from keytoken.scoring.statistics import RESAMPLES, Estimate
from keytoken.words import number_of

MAX_LISTED = 50  # failed samples and missing questions; all of them are in items.jsonl and results.json
_SHOWN = 80  # characters of a response
_COLUMNS = (
    *("control", "decoding", "category", "name", "items", "score", "low", "high", "if_wrong"),
    *("unmatched", "undecided", "failed"),
)
_TEST = (
    " Lost and gained: answers that were right only before, only after; p: McNemar's exact test on them, "
    "two-sided, for questions that are independent. Neither p nor intervals are corrected for the number of "
    "groups."
)
JUDGE_REMEDY = (
    "`keytoken score` with judge=URL judge_model=NAME lets a language model behind an OpenAI-compatible API "
    "decide them"
)
REPORT, RESULTS, ITEMS, CSV = "report.md", "results.json", "items.jsonl", "results.csv"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report is about.

    Attributes:
        scores: One entry for each control and decoding.
        about: Lines for its head: where the predictions are from, the model, the sampling.
        comparisons: What a run is compared with, by a name for the heading.
        notes: Sentences below the tables.
    """

    scores: Sequence[Scores]
    about: Mapping[str, str] = field(default_factory=dict)
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    notes: Sequence[str] = ()


def write_report(folder: Path, report: Report) -> Path:
    """Write all files of a report, each in one step.

    Args:
        folder: Where to; made if needed.
        report: What to write.

    Returns:
        Path of ``report.md``.

    Raises:
        DataError: If the folder cannot be written.
    """
    contents = {
        ITEMS: "".join(_lines(report.scores)),
        RESULTS: json.dumps(results(report), indent=2, allow_nan=False) + "\n",
        CSV: _csv(report.scores),
        REPORT: markdown(report),
    }
    for name, content in contents.items():
        target, partial = folder / name, folder / f".{name}.{os.getpid()}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content.encode("utf-8"))
            partial.replace(target)
        except OSError as problem:
            reason = os.strerror(problem.errno or 0)
            raise DataError(f"{target} cannot be written ({reason}); mend that or give out=DIR.") from problem
    return folder / REPORT


def markdown(report: Report) -> str:
    """The report as Markdown."""
    benchmark = report.scores[0].benchmark
    parts = [f"# {benchmark.title}", *(f"- {key}: {_cell(value)}" for key, value in report.about.items())]
    parts += [f"- Rule: {report.scores[0].rule}; {benchmark.source}", ""]
    for scores in report.scores:
        if len(report.scores) > 1:
            parts += [f"## Control {scores.control}, {scores.decoding}", ""]
        for table in tables(scores):
            parts += [*_table(table), ""]
        parts += [*_sentences(scores), *_missing(scores), *_failed(scores), *_differing(scores)]
    for name, comparison in report.comparisons.items():
        parts += [f"## Compared with {_cell(name)}", "", *_comparison(comparison), ""]
    parts += [f"{note}\n" for note in report.notes]
    parts += [
        f"Intervals: 95 %, percentiles of {RESAMPLES} seeded resamples of the clips, each with all its "
        "questions; Wilson's where all answers are right or all are wrong."
        + (_TEST if report.comparisons else ""),
        "",
    ]
    return "\n".join(parts)


def results(report: Report) -> dict[str, Any]:
    """The tables as plain data; an end of an interval that is infinite is null."""
    benchmark = report.scores[0].benchmark
    return {
        "benchmark": benchmark.name,
        "source": benchmark.source,
        "about": dict(report.about),
        "runs": [
            {
                "control": scores.control,
                "decoding": scores.decoding,
                "rule": scores.rule,
                "judge": scores.judge,
                "answers": len(scores.answers),
                "missing": list(scores.missing),
                "differing": [answer.item.item_id for answer in scores.differing],
                "tables": {
                    table.category: [_finite(dataclasses.asdict(row)) for row in table.rows]
                    for table in tables(scores)
                },
            }
            for scores in report.scores
        ],
        "comparisons": {
            name: _finite(dataclasses.asdict(comparison)) for name, comparison in report.comparisons.items()
        },
        "notes": list(report.notes),
    }


def _lines(runs: Iterable[Scores]) -> Iterator[str]:
    for scores in runs:
        for answer in scores.answers:
            line = {
                **dataclasses.asdict(answer.prediction),
                "answer": answer.item.answer,
                "categories": dict(answer.item.categories),
                **dataclasses.asdict(answer.verdict),
            }
            yield json.dumps(_finite(line)) + "\n"
        for item_id in scores.missing:
            line = {"item_id": item_id, "control": scores.control, "decoding": scores.decoding}
            yield json.dumps({**line, "rule": "missing", "score": None}) + "\n"


def _csv(runs: Iterable[Scores]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for scores in runs:
        for table in tables(scores):
            for row in table.rows:
                ends = ("", "", "") if row.score is None else dataclasses.astuple(row.score)
                head = (scores.control, scores.decoding, table.category, row.name, row.items)
                writer.writerow((*head, *ends, row.if_wrong, row.unmatched, row.undecided, row.failed))
    return text.getvalue()


def _table(table: Table) -> Iterator[str]:
    undecided = any(row.undecided for row in table.rows)
    more = " if undecided are wrong % |" if undecided else ""
    yield f"| {table.category} | items | score % | 95 % | unmatched | undecided | failed |{more}"
    yield "| --- | ---: | ---: | :---: | ---: | ---: | ---: |" + (" ---: |" if undecided else "")
    for row in table.rows:
        score, ends = ("-", "-") if row.score is None else (_percent(row.score.value), _interval(row.score))
        last = f" {_percent(row.if_wrong)} |" if undecided else ""
        yield (
            f"| {_cell(row.name)} | {row.items} | {score} | {ends} | {row.unmatched} | {row.undecided} "
            f"| {row.failed} |{last}"
        )


def _sentences(scores: Scores) -> Iterator[str]:
    """What the columns do not say by themselves."""
    undecided = sum(answer.verdict.score is None for answer in scores.answers)
    if undecided:
        remedy = "" if scores.judge else f"; {JUDGE_REMEDY}"
        left = number_of(undecided, "answer")
        yield f"{left} could not be decided by rule, in no score{remedy}.\n"
    judged = sum(answer.verdict.rule == JUDGE for answer in scores.answers)
    if judged:
        decided = number_of(judged, "answer was", "answers were")
        yield f"{decided} judged by the language model {_cell(scores.judge)}.\n"
    several = len({answer.item.item_id for answer in scores.answers})
    if several != len(scores.answers):
        asked = number_of(several, "question")
        yield f"{len(scores.answers)} answers to {asked}; a question counts by their mean.\n"


def _missing(scores: Scores) -> Iterator[str]:
    if scores.missing:
        count, whole = (
            len(scores.missing),
            len(scores.missing) + len({a.item.item_id for a in scores.answers}),
        )
        of = number_of(whole, "question has", "questions have")
        yield f"### Missing: {count} of {of} no prediction and are in no score\n"
        yield from _listed([f"`{_cell(item_id)}`" for item_id in scores.missing])


def _failed(scores: Scores) -> Iterator[str]:
    failed = [answer for answer in scores.answers if answer.prediction.response is None]
    if failed:
        yield f"### Failed: {number_of(len(failed), 'sample')}, counted as wrong\n"
        yield from _listed([f"`{_cell(a.item.item_id)}`: {_cell(a.prediction.error)}" for a in failed])


def _differing(scores: Scores) -> Iterator[str]:
    if not any(answer.prediction.published_score is not None for answer in scores.answers):
        return
    differing, whole = scores.differing, number_of(len(scores.answers), "answer")
    yield f"### Differs from the file's own scores: {len(differing)} of {whole}\n"
    if differing:
        yield "| item | response ends in | read | right | score | in the file |"
        yield "| --- | --- | --- | --- | ---: | ---: |"
        yield from (_difference(answer) for answer in differing)
        yield ""
    only = sum(a.verdict.score is None and a.prediction.published_score is not None for a in scores.answers)
    if only:
        more = number_of(only, "more answer has", "more answers have")
        yield f"{more} a score in the file and none by rule.\n"


def _difference(answer: Answer) -> str:
    end = (answer.prediction.response or "")[-_SHOWN:]
    return (
        f"| {_cell(answer.item.item_id)} | `{_cell(end)}` | {_cell(answer.verdict.extracted)} | "
        f"{_cell(answer.item.answer)} | {answer.verdict.score:g} | {answer.prediction.published_score:g} |"
    )


def _comparison(comparison: Comparison) -> Iterator[str]:
    yield "| | items | before % | after % | difference | 95 % | lost | gained | p |"
    yield "| --- | ---: | ---: | ---: | ---: | :---: | ---: | ---: | ---: |"
    for row in comparison.rows:
        name = ALL if row.category == ALL else f"{row.category}: {row.name}"
        test = ("-", "-", "-") if row.test is None else (row.test.lost, row.test.gained, _p(row.test.p_value))
        yield (
            f"| {_cell(name)} | {row.items} | {_percent(row.before)} | {_percent(row.after)} "
            f"| {100 * row.difference.value:+.2f} | {_interval(row.difference, '+')} | "
            + " | ".join(map(str, test))
            + " |"
        )
    for ids, run in ((comparison.only_before, "that run"), (comparison.only_after, "this run")):
        if ids:
            asked = number_of(len(ids), "question is", "questions are")
            yield f"\n{asked} decided in {run} only and not compared."


def _listed(entries: Sequence[str]) -> Iterator[str]:
    yield from (f"- {entry}" for entry in entries[:MAX_LISTED])
    if len(entries) > MAX_LISTED:
        yield f"- and {len(entries) - MAX_LISTED} more, see {ITEMS}"
    yield ""


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _interval(estimate: Estimate, sign: str = "") -> str:
    if math.isinf(estimate.low) or math.isinf(estimate.high):
        return "-"
    return f"{100 * estimate.low:{sign}.1f} to {100 * estimate.high:{sign}.1f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _cell(text: str) -> str:
    """Text that cannot break a table: one line, no bars, no more than some characters."""
    line = " ".join(str(text).split()).replace("|", "/").replace("`", "'")
    line = line.encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate pair cannot be printed
    return line if len(line) <= 4 * _SHOWN else f"{line[: 4 * _SHOWN]}..."


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
