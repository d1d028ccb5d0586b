"""Does it still answer? What a model's score owes to the picture, to the order of its frames, to neither.

The same questions are asked with the video, with blank frames, with shuffled frames and with the text alone.
Compared are questions that show something, each by the mean of its answers, each with itself.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from keytoken.scoring.compare import compare
from keytoken.scoring.items import CONTROLS
from keytoken.scoring.score import Scores, item_scores, tables
from keytoken.scoring.statistics import Estimate
from keytoken.words import number_of

TITLES = {
    "none": "with the video",
    "blank": "blank frames",
    "shuffled": "shuffled frames",
    "text": "text alone",
}


@dataclass(frozen=True, slots=True)
class ControlResult:
    """The score under one control.

    Attributes:
        decoding: Kind of the answers.
        control: What was done to the picture.
        num_questions: Questions with an answer that show something.
        num_failed: Their answers that failed, counted as wrong.
        score: Score of these questions; None if a judge would have to decide all of them.
        difference: The score under the control minus that with the video, question by question; None for the
            video itself, and where no question was decided both ways.
        p_value: McNemar's exact test of that difference; None where it does not apply.
    """

    decoding: str
    control: str
    num_questions: int
    num_failed: int
    score: Estimate | None
    difference: Estimate | None = None
    p_value: float | None = None


def compare_controls(scores: Sequence[Scores]) -> list[ControlResult]:
    """Scores under every control that was asked, compared with those of the questions as they are."""
    shown = {(each.decoding, each.control): _showing(each) for each in scores}
    results = []
    for decoding in sorted({decoding for decoding, _ in shown}):
        base = shown.get((decoding, "none"))
        for control in CONTROLS:
            here = shown.get((decoding, control))
            if here is None or not here.answers:
                continue
            row = tables(here)[0].rows[0]
            result = ControlResult(decoding, control, row.items, row.failed, row.score)
            if base is not None and control != "none" and _both(base, here):
                found = compare(base, here).rows[0]
                p_value = found.test.p_value if found.test else None
                result = dataclasses.replace(result, difference=found.difference, p_value=p_value)
            results.append(result)
    return results


def control_section(results: Sequence[ControlResult], num_items: int) -> str:
    """The section of a report: a table, and how to read it."""
    lines = [
        "## Does it still answer?",
        "",
        "| answers | shown | questions | failed | score | minus the score with the video | p |",
        "|---|---|--:|--:|---|---|--:|",
    ]
    for result in results:
        cells = [result.decoding, TITLES[result.control], str(result.num_questions), str(result.num_failed)]
        cells.append("undecided" if result.score is None else _interval(result.score))
        cells.append("" if result.difference is None else _interval(result.difference, "+"))
        cells.append("" if result.p_value is None else f"{result.p_value:.3g}")
        lines.append(f"| {' | '.join(cells)} |")
    asked = max((result.num_questions for result in results), default=0)
    lines += [
        "",
        "Brackets: 95 % intervals (bootstrap over clips; differences paired by question). p: McNemar's exact "
        "test. A score that stays without the picture, or with its frames in another order, is none of "
        "watching. Failed answers count as wrong.",
    ]
    if asked < num_items:
        left = number_of(num_items - asked, "question shows", "questions show")
        lines.append(f"{left} nothing, of {num_items}, and left out here.")
    return "\n".join([*lines, ""])


def as_json(results: Sequence[ControlResult]) -> list[dict[str, Any]]:
    """The results as plain values; an end of an interval that is infinite is null."""
    return [_finite(asdict(result)) for result in results]


def _showing(scores: Scores) -> Scores:
    """Only the questions that a control could change."""
    answers = [answer for answer in scores.answers if answer.item.video or answer.item.images]
    return dataclasses.replace(scores, answers=answers)


def _both(base: Scores, here: Scores) -> bool:
    return bool(item_scores(base.answers).keys() & item_scores(here.answers).keys())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval(estimate: Estimate, sign: str = "") -> str:
    if math.isinf(estimate.low):
        return f"{estimate.value:{sign}.3f}"  # all differences are equal: nothing to tell an interval from
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
