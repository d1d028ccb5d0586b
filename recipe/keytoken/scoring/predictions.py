"""Model outputs from elsewhere and our own, told apart by what they hold, as one list of predictions.

Formats:

- ``keytoken``: JSON Lines; a header, then the fields of :class:`keytoken.scoring.items.Prediction`.
- ``lmms-eval``: the sample logs of ``--log_samples`` (:mod:`keytoken.scoring.lmms`).
- ``tw-grpo``: JSON Lines with ``question`` (in Video-R1's form), ``model_output``, ``accuracy_score``.
- ``video-r1``: ``{"results": [...]}`` or a list, with ``problem``, ``output``, ``reward``. Its script writes
  ``<answer>error</answer>`` for every answer of a batch that failed: those are failed samples.
- ``tempcompass``: clips, aspects and lists of questions with ``prediction``; also the official evaluation.
- ``video-mme``: the template of outputs of Video-MME: videos with ``questions`` that have a ``response``.
- ``plain``: rows with ``item_id`` (``id``, ``question_id``) and ``response`` (``prediction``, ``output``).

Add one: a function that tells it, a function that reads it, one line in ``FORMATS``; the first match reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keytoken.errors import DataError
from keytoken.scoring.benchmarks import tempcompass, videomme
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.files import Content, PredictionFile, read_content
from keytoken.scoring.items import CONTROLS, Item, Prediction
from keytoken.scoring.lmms import is_log, read_log
from keytoken.scoring.rows import Row, text
from keytoken.scoring.video_r1 import is_video_r1
from keytoken.words import number_of

VERSION = 1
BATCH_FAILED = "<answer>error</answer>"
NULL = "the file has no response"
_FIELDS = {field.name for field in dataclasses.fields(Prediction)}
_IDS = ("item_id", "id", "question_id")
_RESPONSES = ("response", "prediction", "output")
_TEMPCOMPASS_RESPONSES = ("prediction", "response", "video-llm-prediction")
_SHOWN = 5  # ids in a message


@dataclass(frozen=True, slots=True)
class Format:
    """A format of files.

    Attributes:
        matches: Whether a file's content has it.
        read: Makes predictions of it.
    """

    matches: Callable[[Content], bool]
    read: Callable[[Content, Benchmark], PredictionFile]


def read_predictions(path: Path, benchmark: Benchmark) -> PredictionFile:
    """Read a file of any known format.

    Args:
        path: The file.
        benchmark: What its questions are of.

    Raises:
        DataError: A file that cannot be read, of no known format, of another benchmark, or with two answers
            where there can be one. The message names the file and the line.
    """
    content = read_content(path)
    for name, known in FORMATS.items():
        if known.matches(content):
            found = dataclasses.replace(known.read(content, benchmark), format=name)
            require_distinct(found.path, found.predictions)
            return found
    keys = list(content.document if content.document is not None else content.rows[0][1])
    raise DataError(
        f"{path} has none of the known formats ({', '.join(FORMATS)}); its first object has the keys "
        f"{', '.join(map(str, keys[:8]))}. Give rows with item_id and response."
    )


def _read_ours(content: Content, benchmark: Benchmark) -> PredictionFile:
    place, found = content.rows[0]
    if found.get("keytoken") != "predictions" or found.get("version") != VERSION:
        raise DataError(
            f"{place}: {found.get('keytoken')!r} of version {found.get('version')!r}; this release reads "
            f"'predictions' of version {VERSION}. Use the release that wrote the file."
        )
    _require_benchmark(found.get("benchmark"), benchmark, place)
    predictions = []
    for place, row in content.rows[1:]:
        _require_benchmark(row.get("benchmark", benchmark.name), benchmark, place)
        if row.get("keytoken") == "predictions":
            raise DataError(
                f"{place}: a second header; files of two evaluations were joined. Score them one by one."
            )
        unknown = sorted(set(row) - _FIELDS - {"benchmark"})
        if unknown or "response" not in row:
            raise DataError(
                f"{place}: unknown fields {unknown}, or no response; was the file edited by hand?"
            )
        predictions.append(_prediction(row, place))
    if not predictions:
        raise DataError(f"{content.path} has a header and no predictions; finish the run that writes it.")
    return PredictionFile(path=content.path, format="", predictions=predictions, header=found)


def _prediction(row: Row, place: str) -> Prediction:
    control, sample = row.get("control", "none"), row.get("sample", 0)
    if control not in CONTROLS:
        raise DataError(f"{place}: the control {control!r} is none of {', '.join(CONTROLS)}.")
    if not isinstance(sample, int) or isinstance(sample, bool) or sample < 0:
        raise DataError(f"{place}: the sample is {sample!r}; it must be a count from 0.")
    response = _response(row, place, ("response",))
    return Prediction(
        item_id=text(row, place, "item_id"),
        response=response,
        error=str(row.get("error", "")) or (NULL if response is None else ""),
        decoding=str(row.get("decoding", "greedy")),
        sample=sample,
        control=control,
        published_score=_score(row, place, "published_score"),
    )


def _read_tw_grpo(content: Content, benchmark: Benchmark) -> PredictionFile:
    pairs = []
    for place, row in content.rows:
        question = row.get("question")
        if not isinstance(question, Mapping):
            raise DataError(f"{place}: question is {str(question)[:60]!r}; it must be an object.")
        item = _carried(question, place, benchmark)
        response = _response(row, place, ("model_output",))
        score = _score(row, place, "accuracy_score")
        pairs.append((item, _answer(item.item_id, response, score)))
    return _with_items(content, pairs)


def _read_video_r1(content: Content, benchmark: Benchmark) -> PredictionFile:
    rows = content.rows
    if content.document is not None and "results" in content.document:
        results = content.document["results"]
        rows = [(f"{content.path}, result {number}", row) for number, row in enumerate(results)]
    pairs = []
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"{place} is {str(row)[:60]!r}; every result must be an object.")
        item = _carried(row, place, benchmark)
        response = _response(row, place, ("output",))
        pairs.append((item, _answer(item.item_id, response, _score(row, place, "reward"))))
    return _with_items(content, pairs)


def _read_tempcompass(content: Content, benchmark: Benchmark) -> PredictionFile:
    if benchmark.name != tempcompass.NAME:
        raise DataError(f"{content.path} is a file of TempCompass; give benchmark={tempcompass.NAME}.")
    pairs = []
    for place, key, row in tempcompass.walk(content.document, str(content.path)):
        item = tempcompass.item_of(row, place, key, {})
        response = _response(row, place, _TEMPCOMPASS_RESPONSES)
        pairs.append((item, _answer(item.item_id, response, _score(row, place, "rating"))))
    return _with_items(content, pairs)


def _read_video_mme(content: Content, benchmark: Benchmark) -> PredictionFile:
    if benchmark.name != videomme.BENCHMARK.name:
        raise DataError(f"{content.path} is a file of Video-MME; give benchmark={videomme.BENCHMARK.name}.")
    pairs = []
    for place, row in (one for video in content.rows for one in videomme.questions(*video)):
        item = videomme.official_item(row, place)
        pairs.append((item, _answer(item.item_id, _response(row, place, ("response",)), None)))
    return _with_items(content, pairs)


def _read_plain(content: Content, benchmark: Benchmark) -> PredictionFile:
    predictions = [
        _answer(text(row, place, *_IDS), _response(row, place, _RESPONSES), None)
        for place, row in content.rows
    ]
    return PredictionFile(path=content.path, format="", predictions=predictions)


def _answer(item_id: str, response: str | None, score: float | None) -> Prediction:
    error = "" if response is not None else NULL
    if response == BATCH_FAILED:
        response, error = None, "its batch failed where it was generated"
    return Prediction(item_id=item_id, response=response, error=error, published_score=score)


def _carried(row: Row, place: str, benchmark: Benchmark) -> Item:
    if benchmark.item is None:
        raise DataError(
            f"{place}: questions in Video-R1's form are not known for benchmark={benchmark.name}."
        )
    return benchmark.item(row, place)


def _with_items(content: Content, pairs: Sequence[tuple[Item, Prediction]]) -> PredictionFile:
    return PredictionFile(
        path=content.path,
        format="",
        predictions=[prediction for _, prediction in pairs],
        items=[item for item, _ in pairs],
    )


def _response(row: Row, place: str, names: Sequence[str]) -> str | None:
    """The response, which may be null (a failed sample), but not missing and not of another type."""
    for name in names:
        if name in row:
            value = row[name]
            if value is not None and not isinstance(value, str):
                raise DataError(f"{place}: {name} is {str(value)[:60]!r}; it must be a text, or null.")
            return value
    raise DataError(
        f"{place} has no field {' or '.join(names)}; it has {', '.join(map(str, row)) or 'none'}."
    )


def _score(row: Row, place: str, name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{place}: {name} is {value!r}; it must be a number. Remove the field or mend it.")
    return float(value)


def _require_benchmark(found: Any, benchmark: Benchmark, place: str) -> None:
    if found != benchmark.name:
        raise DataError(f"{place}: predictions of {found!r}; give benchmark={found} or another file.")


def require_distinct(path: Path, predictions: Sequence[Prediction]) -> None:
    """Raise DataError where two predictions have the same question, control, decoding and number."""
    seen: set[tuple[Any, ...]] = set()
    twice: dict[str, None] = {}
    for one in predictions:
        key = (one.item_id, one.control, one.decoding, one.sample)
        if key in seen:
            twice[one.item_id] = None
        seen.add(key)
    if twice:
        asked = number_of(len(twice), "question is", "questions are")
        raise DataError(
            f"{path}: {asked} answered twice: {shown(list(twice))}. Keep one answer of each, or number them "
            "with sample."
        )


def shown(ids: Sequence[str]) -> str:
    """The first few ids for a message."""
    more = f", and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(ids[:_SHOWN]) + more


def _every_row(content: Content, *names: str) -> bool:
    return bool(content.rows) and all(name in content.rows[0][1] for name in names)


def _is_tempcompass(content: Content) -> bool:
    """Whether some clip has an aspect with a list."""
    entries = content.document.values() if content.document is not None else ()
    return any(
        isinstance(aspects, Mapping) and any(isinstance(rows, list) for rows in aspects.values())
        for aspects in entries
    )


def _is_video_r1(content: Content) -> bool:
    if content.document is not None and isinstance(content.document.get("results"), list):
        return True
    return is_video_r1(content.rows[0][1]) and "output" in content.rows[0][1]


FORMATS: dict[str, Format] = {
    "keytoken": Format(lambda content: _every_row(content, "keytoken"), _read_ours),
    "lmms-eval": Format(is_log, read_log),
    "tw-grpo": Format(lambda content: _every_row(content, "question", "model_output"), _read_tw_grpo),
    "video-r1": Format(_is_video_r1, _read_video_r1),
    "tempcompass": Format(_is_tempcompass, _read_tempcompass),
    "video-mme": Format(
        lambda content: isinstance(content.rows[0][1].get("questions"), list), _read_video_mme
    ),
    "plain": Format(
        lambda content: (
            bool(content.rows)
            and any(name in content.rows[0][1] for name in _IDS)
            and any(name in content.rows[0][1] for name in _RESPONSES)
        ),
        _read_plain,
    ),
}
