"""Sample logs of lmms-eval (``--log_samples``), one JSON object a line, matched to the questions of a
benchmark.

Read: EvolvingLMMs-Lab/lmms-eval, ``evaluator.py`` at 03cbb1f and ``loggers/evaluation_tracker.py`` at
0716c69 (0.5 and 0.6), both in the release 0.7.3, and the tasks named below.

A line has ``doc_id`` (the number of the row), ``target``, ``filtered_resps`` and, where they differ from
these, ``resps`` (what the model wrote, before reasoning was cut off), ``input`` (the prompt), hashes, and
what the task made of the answer, under the names of its metrics. The question itself is left out. A line
is matched to a question by the id that the task wrote, or by the number of its row; target and prompt have
to agree, and exactly one question has to be left. So logs of several tasks of a benchmark can stand in one
file.

What the task gave is the file's own score. Differences are to be expected: lmms-eval has rules of its own
for MVBench, MMVU and, since 0.7, for the numbers of VSI-Bench.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from keytoken.errors import DataError
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.files import Content, PredictionFile
from keytoken.scoring.items import Item, Prediction
from keytoken.scoring.rows import Row

OWN_METRIC = "keytoken_score"  # of the tasks that ``keytoken lmms-export`` writes
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Log:
    """How the tasks of a benchmark write their samples.

    Attributes:
        metrics: Names under which a sample has the task's record.
        key: Part of the record, or of the sample, that says which question it is.
        key_of: The same of a question and its number among the questions of its file.
        score: What the record says of the answer; None if it says nothing.
    """

    metrics: tuple[str, ...]
    key: Callable[[Row, Row], Any]
    key_of: Callable[[Item, int], Any]
    score: Callable[[Row], Any]


def is_log(content: Content) -> bool:
    """Whether the content is a sample log."""
    first = content.rows[0][1] if content.rows else {}
    return {"doc_id", "target"} <= set(first) and not {"resps", "filtered_resps"}.isdisjoint(first)


def read_log(content: Content, benchmark: Benchmark) -> PredictionFile:
    """The file of a log; its samples are matched once the questions are known.

    Raises:
        DataError: If the benchmark has no tasks that were read, or the log is of another benchmark.
    """
    if benchmark.name not in LOGS:
        raise DataError(
            f"{content.path}: logs of lmms-eval are known for {', '.join(LOGS)}, not for {benchmark.name}."
        )
    for place, sample in content.rows:
        _record(sample, LOGS[benchmark.name], benchmark.name, place)
    return PredictionFile(
        path=content.path, format="", predictions=[], match=partial(match, content, benchmark.name)
    )


def match(content: Content, benchmark: str, items: Sequence[Item]) -> list[Prediction]:
    """Match the samples of a log to questions.

    Args:
        content: Lines of one or more logs.
        benchmark: Whose questions they are.
        items: The questions.

    Raises:
        DataError: A sample that fits no question, or several. The message names the line.
    """
    log = LOGS[benchmark]
    by_key: dict[Any, list[Item]] = defaultdict(list)
    for number, item in enumerate(items):
        by_key[log.key_of(item, number)].append(item)
    by_id = {item.item_id: item for item in items}
    predictions: list[Prediction] = []
    used: set[str] = set()
    for place, sample in content.rows:
        record = _record(sample, log, benchmark, place)
        if OWN_METRIC in sample:
            fitting = [by_id[record["item_id"]]] if record.get("item_id") in by_id else []
            score = record.get("score")
        else:
            fitting = [item for item in by_key.get(log.key(sample, record), ()) if _fits(item, sample)]
            score = log.score(record)
        item = _one(fitting, used, sample, place)
        used.add(item.item_id)
        predictions += _predictions(item, sample, score, place)
    return predictions


def _record(sample: Row, log: Log, benchmark: str, place: str) -> Row:
    for metric in (OWN_METRIC, *log.metrics):
        if isinstance(record := sample.get(metric), Mapping):
            return record
    theirs = [
        name for name, one in LOGS.items() if any(isinstance(sample.get(m), Mapping) for m in one.metrics)
    ]
    what = f"a sample of {' or '.join(theirs)}" if theirs else f"no sample of {benchmark}"
    raise DataError(f"{place} is {what}; it lacks {' or '.join(log.metrics)}. Check benchmark={benchmark}.")


def _fits(item: Item, sample: Row) -> bool:
    """Whether target and prompt of a sample are those of a question."""
    target, letter = str(sample["target"]).strip(), item.answer.strip()
    right = {letter}
    if item.options:
        option = item.options["ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(letter)].strip()
        right |= {option, f"{letter}. {option}"}
    if target not in right:
        return False
    prompt = sample.get("input")
    if not isinstance(prompt, str):
        return True
    position = prompt.find(item.question.strip())
    for option in item.options:  # in their order: questions may differ by it alone
        position = -1 if position < 0 else prompt.find(option.strip(), position)
    return position >= 0


def _one(fitting: Sequence[Item], used: set[str], sample: Row, place: str) -> Item:
    """The question that fits; of several about one video that read the same, the first without a sample."""
    if not fitting:
        target = str(sample["target"])[:_SHOWN]
        raise DataError(
            f"{place}: sample {sample['doc_id']} with the target {target!r} fits none of the questions; give "
            "the question files that lmms-eval had."
        )
    if len({(item.video, item.question, item.options) for item in fitting}) > 1:
        ids = ", ".join(item.item_id for item in fitting)
        raise DataError(
            f"{place}: sample {sample['doc_id']} fits the questions {ids}; score their logs apart."
        )
    free = [item for item in fitting if item.item_id not in used]
    return (free or fitting)[0]


def _predictions(item: Item, sample: Row, score: Any, place: str) -> list[Prediction]:
    """One prediction for each response; several are numbered, and the file's score is of none of them."""
    texts = _flat(sample.get("resps", sample.get("filtered_resps")), place)
    if len(texts) == 1:
        return [Prediction(item_id=item.item_id, response=texts[0], published_score=_number(score, place))]
    return [
        Prediction(item_id=item.item_id, response=text, decoding="sampled", sample=number)
        for number, text in enumerate(texts)
    ]


def _flat(value: Any, place: str) -> list[str]:
    """Responses in whatever depth of lists: 0.5 and 0.6 write lists of lists, 0.7 takes single ones out."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        return [text for part in value for text in _flat(part, place)]
    raise DataError(f"{place}: resps is {str(value)[:_SHOWN]!r}; it must be a text, or a list of texts.")


def _number(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{place}: the task's own score is {value!r}; it must be a number.")
    return float(value)


def _same(left: str, right: str) -> Callable[[Row], Any]:
    return lambda record: float(record[left] == record[right]) if {left, right} <= set(record) else None


def _videomme_score(record: Row) -> Any:
    return record["score"] if "score" in record else _same("pred_answer", "answer")(record)


def _videommmu_score(record: Row) -> Any:
    """Letters only: for open answers the record has no verdict."""
    letters = record.get("question_type") == "multiple-choice"
    return _same("parsed_pred", "answer")(record) if letters else None


def _tempcompass_score(record: Row) -> Any:
    """-1 says that the judge of a caption gave nothing."""
    return None if record.get("rating") == -1 else record.get("rating")


def _part(number: int) -> Callable[[Item, int], Any]:
    return lambda item, _: item.item_id.split("/")[number]


def _by_id(name: str) -> Callable[[Row, Row], Any]:
    return lambda sample, record: str(record.get(name))


# By benchmark. Each entry names the tasks that were read.
LOGS: dict[str, Log] = {
    # tasks/videomme/utils.py at 0696573
    "videomme": Log(
        ("videomme_perception_score", "videomme_percetion_score"),
        _by_id("question_id"),
        lambda item, _: item.item_id,
        _videomme_score,
    ),
    # tasks/mvbench/utils.py at 1ab9504; no id, so the number of the row in its task
    "mvbench": Log(
        ("mvbench_accuracy",),
        lambda sample, _: str(sample["doc_id"]),
        _part(-1),
        lambda record: record.get("score"),
    ),
    # tasks/vsibench/utils.py at 0ae0b9f, and in 0.7.3
    "vsibench": Log(
        ("vsibench_score", "vsibench_overall"),
        _by_id("id"),
        lambda item, _: item.item_id,
        lambda record: record.get("accuracy", record.get("MRA:.5:.95:.05")),
    ),
    # tasks/mmvu/utils.py in 0.7.3
    "mmvu": Log(
        ("accuracy",),
        _by_id("question_id"),
        lambda item, _: item.item_id,
        lambda record: record.get("correct"),
    ),
    # tasks/videommmu/utils.py in 0.7.3; one id for the three tracks
    "videommmu": Log(("mmmu_acc",), _by_id("id"), _part(-1), _videommmu_score),
    # tasks/tempcompass/utils.py in 0.7.3
    "tempcompass": Log(
        ("avg_accuracy",),
        lambda _, record: (str(record.get("video_id")), str(record.get("dim"))),
        lambda item, _: (item.item_id.split("/")[0], item.categories["aspect"]),
        _tempcompass_score,
    ),
    # tasks/video_holmes/utils.py in 0.7.3; no id, so the number of the row
    "video_holmes": Log(
        ("video_holmes_accuracy",),
        lambda sample, _: sample["doc_id"],
        lambda _, number: number,
        lambda record: record.get("score"),
    ),
}
