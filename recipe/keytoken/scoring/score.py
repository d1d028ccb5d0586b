"""From questions and predictions to verdicts and tables. Nothing is dropped uncounted.

A failed sample is wrong and counted as failed. A question without a prediction is counted as missing and is
in no score. A prediction without a question is an error. What a rule cannot decide is undecided: the score
is that of the decided answers, and beside it stands the score with every undecided answer wrong.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from keytoken.block import unknown_name
from keytoken.errors import ConfigurationError, DataError
from keytoken.scoring.benchmarks.base import Benchmark, ScoreRule
from keytoken.scoring.files import PredictionFile
from keytoken.scoring.items import FAILED, UNMATCHED, Item, Prediction, Verdict
from keytoken.scoring.predictions import require_distinct, shown
from keytoken.scoring.statistics import Estimate, bootstrap_mean
from keytoken.words import number_of

ALL = "all"
MAX_EXTRACTED = 200  # characters of what was read that a verdict keeps
AGREES = 1e-9  # scores of a file are floats, written as text


@dataclass(frozen=True, slots=True)
class Answer:
    """One prediction with its question and its verdict."""

    item: Item
    prediction: Prediction
    verdict: Verdict

    @property
    def differs(self) -> bool:
        """Whether the file gives this answer another score; undecided answers differ from nothing."""
        published, score = self.prediction.published_score, self.verdict.score
        return published is not None and score is not None and abs(published - score) > AGREES


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table.

    Attributes:
        name: The group, or "all".
        items: Questions with an answer.
        score: Mean score of the decided ones with its 95 % interval; None if none is decided.
        if_wrong: Mean score with every undecided answer wrong.
        unmatched: Answers that no rule could read.
        undecided: Answers without a score.
        failed: Samples that failed.
    """

    name: str
    items: int
    score: Estimate | None
    if_wrong: float
    unmatched: int
    undecided: int
    failed: int


@dataclass(frozen=True, slots=True)
class Table:
    """The groups of one category, such as "type"; the table of "all" has one row."""

    category: str
    rows: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The verdicts on the answers of one control and one decoding.

    Attributes:
        benchmark: Whose rule it was.
        rule: "official", or the name of a variant.
        control: What was done to the videos.
        decoding: "greedy" or "sampled".
        answers: In the order of the questions.
        missing: Ids of the questions without an answer.
        judge: The model that judged; empty if none did.
    """

    benchmark: Benchmark
    rule: str
    control: str
    decoding: str
    answers: Sequence[Answer]
    missing: Sequence[str]
    judge: str = ""

    @property
    def differing(self) -> list[Answer]:
        """Answers whose score in the file is another one."""
        return [answer for answer in self.answers if answer.differs]


def rule_of(benchmark: Benchmark, variant: str | None) -> ScoreRule:
    """The official rule, or a named variant.

    Raises:
        ConfigurationError: If the benchmark has no such variant.
    """
    if variant is None:
        return benchmark.score
    if variant not in benchmark.variants:
        known = f"variant {variant!r} of {benchmark.name}"
        if not benchmark.variants:
            raise ConfigurationError(f"Unknown {known}, which has none; leave variant out.")
        raise ConfigurationError(unknown_name(known, variant, benchmark.variants, "variants"))
    return benchmark.variants[variant]


def score_predictions(
    benchmark: Benchmark, items: Sequence[Item], predictions: Iterable[Prediction], variant: str | None = None
) -> list[Scores]:
    """Verdicts on predictions, apart by control and decoding.

    Args:
        benchmark: Whose rule.
        items: All questions that should be answered.
        predictions: In any order; several of one question are numbered by ``sample``.
        variant: A named variant of the rule.

    Returns:
        One entry for each control and decoding, in the order of their first predictions.

    Raises:
        DataError: Predictions of questions that there are not.
        ConfigurationError: An unknown variant.
    """
    rule, by_id = rule_of(benchmark, variant), {item.item_id: item for item in items}
    groups: dict[tuple[str, str], dict[str, list[Prediction]]] = defaultdict(lambda: defaultdict(list))
    extra: dict[str, None] = {}
    for prediction in predictions:
        groups[prediction.control, prediction.decoding][prediction.item_id].append(prediction)
        if prediction.item_id not in by_id:
            extra[prediction.item_id] = None
    if extra:
        what = number_of(len(extra), "prediction is", "predictions are")
        raise DataError(
            f"{what} of questions that are not among the {len(by_id)} of {benchmark.name}: "
            f"{shown(list(extra))}. Give the questions they were made with."
        )
    return [
        Scores(
            benchmark=benchmark,
            rule=variant or "official",
            control=control,
            decoding=decoding,
            answers=[
                Answer(item, one, verdict(rule, item, one))
                for item in items
                for one in sorted(group.get(item.item_id, ()), key=lambda one: one.sample)
            ],
            missing=[item.item_id for item in items if item.item_id not in group],
        )
        for (control, decoding), group in groups.items()
    ]


def verdict(rule: ScoreRule, item: Item, prediction: Prediction) -> Verdict:
    """The rule's verdict; a failed sample is wrong."""
    if prediction.response is None:
        return Verdict(0.0, "", FAILED)
    found = rule(item, prediction.response)
    return dataclasses.replace(found, extracted=found.extracted[:MAX_EXTRACTED])


def item_scores(answers: Iterable[Answer]) -> dict[str, float]:
    """Mean score of the decided answers to each question that has one."""
    found: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        if answer.verdict.score is not None:
            found[answer.item.item_id].append(answer.verdict.score)
    return {item_id: sum(scores) / len(scores) for item_id, scores in found.items()}


def cluster(item: Item) -> str:
    """What the bootstrap draws together: the questions about one clip, or the same images."""
    return item.video or "|".join(item.images) or item.item_id


def weights_of(benchmark: Benchmark, items: Sequence[Item]) -> list[float] | None:
    """The benchmark's own weights of these questions, if it has any."""
    return None if benchmark.weights is None else benchmark.weights(items)


def tables(scores: Scores) -> list[Table]:
    """The overall row and a table for each category that the questions have."""
    result = [Table(ALL, [_row(ALL, scores.answers, scores.benchmark)])]
    for category in scores.benchmark.tables:
        groups: dict[str, list[Answer]] = defaultdict(list)
        for answer in scores.answers:
            if category in answer.item.categories:
                groups[answer.item.categories[category]].append(answer)
        if groups:
            rows = [_row(name, groups[name], scores.benchmark) for name in sorted(groups)]
            result.append(Table(category, rows))
    return result


def _row(name: str, answers: Sequence[Answer], benchmark: Benchmark) -> Row:
    items = {answer.item.item_id: answer.item for answer in answers}
    decided = item_scores(answers)
    scored = [item for item_id, item in items.items() if item_id in decided]
    score = None
    if scored:
        score = bootstrap_mean(
            [decided[item.item_id] for item in scored],
            [cluster(item) for item in scored],
            weights_of(benchmark, scored),
        )
    return Row(
        name=name,
        items=len(items),
        score=score,
        if_wrong=_mean_if_wrong(answers, list(items.values()), benchmark),
        unmatched=sum(answer.verdict.rule == UNMATCHED for answer in answers),
        undecided=sum(answer.verdict.score is None for answer in answers),
        failed=sum(answer.verdict.rule == FAILED for answer in answers),
    )


def _mean_if_wrong(answers: Sequence[Answer], items: Sequence[Item], benchmark: Benchmark) -> float:
    total: Mapping[str, list[float]] = defaultdict(list)
    for answer in answers:
        total[answer.item.item_id].append(answer.verdict.score or 0.0)
    weights = weights_of(benchmark, items) or [1.0] * len(items)
    means = [sum(total[item.item_id]) / len(total[item.item_id]) for item in items]
    whole = sum(weights)
    return sum(weight * mean for weight, mean in zip(weights, means, strict=True)) / whole if whole else 0.0


def align(file: PredictionFile, items: Sequence[Item]) -> list[Prediction]:
    """Predictions of a file by the ids of official questions, where it names none or carries its own.

    A question that it carries is found by its id and text, else by clip and text, else by clip, answer and
    options; texts are compared by their ASCII letters and digits, because copies of a benchmark differ in
    encodings.

    Raises:
        DataError: Questions that are not among the items.
    """
    if file.match is not None:
        predictions = list(file.match(items))
        require_distinct(file.path, predictions)
        return predictions
    if file.items is None:
        return list(file.predictions)
    known = _Index(items)
    names, unknown = {}, []
    for item in file.items:
        found = known.find(item)
        if found is None:
            unknown.append(item.item_id)
        else:
            names[item.item_id] = found
    if unknown:
        raise DataError(
            f"{file.path}: {len(unknown)} of its {len(file.items)} questions are not among the "
            f"{len(items)} given: {shown(unknown)}. Give the questions they were made with, or none."
        )
    return [dataclasses.replace(one, item_id=names[one.item_id]) for one in file.predictions]


class _Index:
    """Official questions by what a copy of them still has; each is found once."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._used: set[str] = set()
        self._by_id = {item.item_id: item for item in items}
        self._by_key: dict[tuple[str, ...], list[Item]] = defaultdict(list)
        for item in items:
            for key in _keys(item):
                self._by_key[key].append(item)

    def find(self, item: Item) -> str | None:
        same = self._by_id.get(item.item_id)
        ids = [same] if same is not None and _keys(same)[0] == _keys(item)[0] else []
        for one in [*ids, *(other for key in _keys(item) for other in self._by_key.get(key, ()))]:
            if one.item_id not in self._used:
                self._used.add(one.item_id)
                return one.item_id
        return None


def _keys(item: Item) -> tuple[tuple[str, ...], tuple[str, ...]]:
    clip, options = item.video or "", "|".join(map(_plain, item.options))
    whose = (clip, item.kind, item.task)
    return ("text", *whose, _plain(item.question)), ("options", *whose, item.answer, options)


def _plain(words: str) -> str:
    """ASCII letters and digits; "path" becomes "video", as it did inside words of one copy of MMVU."""
    letters = "".join(letter for letter in words.lower() if letter.isascii() and letter.isalnum())
    return letters.replace("path", "video")
