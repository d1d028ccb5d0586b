"""Questions of one's own: the datasets that ``keytoken data prepare`` writes.

A row is asked as training asks it: its prompt stands in the file, in the style that it was prepared with. The
rule is the accuracy in the reward that it is trained on (:mod:`keytoken.rewards.score`), by its problem type:
the letter, the number to two decimals, 1 - word error rate, ROUGE, 1 - relative error, of the content of the
first ``<answer>`` block and of nothing else.

Variant ``untagged``, for prompts that ask for no tags (``style=direct``): an answer without an ``<answer>``
block is what follows the thoughts, or the whole response, and of several options the one that it names.

Media lie where they lay when the dataset was prepared (``Item.root``), or below a media root that is given,
by the same names. The interval draws clips, however many questions and parts of it there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keytoken.errors import DataError
from keytoken.rewards.answers import ACCURACY_REWARDS, accuracy
from keytoken.rewards.extract import extract_answer, final_text, has_answer, read_letter
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.items import UNMATCHED, Item, Kind, Verdict
from keytoken.scoring.prompts import with_options
from keytoken.scoring.rows import Row, read_rows, require_unique, text

NAME = "own"
MULTIPLE_CHOICE = "multiple choice"
KINDS: Mapping[str, Kind] = {
    MULTIPLE_CHOICE: "multiple choice",
    "numerical": "numerical",
    "regression": "numerical",
    "free-form": "open",
    "OCR": "OCR",
}
_PLACEHOLDERS = {"video": "<video>", "image": "<image>"}
_PREPARED = "give a .parquet file that `keytoken data prepare` wrote"


def read(paths: Sequence[Path]) -> list[Item]:
    """Read prepared datasets.

    Raises:
        DataError: Names the file, the row and the remedy.
    """
    for path in paths:
        if path.suffix.lower() != ".parquet":
            raise DataError(f"{path}: is no prepared dataset; {_PREPARED}.")
    placed = [row for path in paths for row in read_rows(path)]
    items = [item(row, place) for place, row in placed]
    require_unique(
        ((place, one.item_id) for (place, _), one in zip(placed, items, strict=True)),
        "give every file once, and datasets of one name prepare again, one of them with another split=",
    )
    return items


def item(row: Row, place: str) -> Item:
    """One row.

    Raises:
        DataError: It is not as ``keytoken data prepare`` writes it, or has no answer key.
    """
    info, reward = row.get("extra_info"), row.get("reward_model")
    if not isinstance(info, Mapping) or not isinstance(reward, Mapping) or "media" not in info:
        raise DataError(f"{place} is no row of a prepared dataset; {_PREPARED}.")
    problem_type = text(info, place, "problem_type")
    if problem_type not in KINDS:
        known = ", ".join(ACCURACY_REWARDS)
        raise DataError(f"{place}: problem_type {problem_type!r} has no reward; use one of {known}.")
    found = {kind: _entries(row, kind, place) for kind in _PLACEHOLDERS}
    asked = _asked(row, place, found)
    root, video, images = _media(found, text(info, place, "media"), place)
    question, options = text(info, place, "question"), tuple(info.get("options") or ())
    if with_options(question, options) not in asked:
        options = ()  # the question lists them itself
    categories = {"problem type": problem_type, "category": str(info.get("category") or "")}
    return Item(
        benchmark=NAME,
        item_id=text(info, place, "prompt_id"),
        question=question,
        answer=_key(reward, place),
        kind=KINDS[problem_type],
        options=options if problem_type == MULTIPLE_CHOICE else (),
        video=video,
        span=_span(found["video"]),
        images=images,
        task=problem_type,
        categories={name: group for name, group in categories.items() if group},
        prompt=asked,
        root=root,
    )


def prompt(item: Item) -> str:
    """The prompt of the row, as training shows it."""
    return item.prompt


def score(item: Item, response: str) -> Verdict:
    """The accuracy in the training reward of the response."""
    answer = extract_answer(response)
    if not answer:
        return Verdict(0.0, "", UNMATCHED)
    return Verdict(accuracy(answer, item.answer, item.task), answer, "tag")


def score_untagged(item: Item, response: str) -> Verdict:
    """The same of a response without tags. See the module."""
    if has_answer(response):
        return score(item, response)
    answer, rule = final_text(response), "whole response"
    if item.task == MULTIPLE_CHOICE:
        found = read_letter(answer, options=item.options)
        answer, rule = (found.value, found.rule) if found else ("", "")
    if not answer:
        return Verdict(0.0, "", UNMATCHED)
    return Verdict(accuracy(answer, item.answer, item.task), answer, rule)


def _key(reward: Row, place: str) -> str:
    """The answer key, without tags, as the reward takes it."""
    given = reward.get("ground_truth")
    if not isinstance(given, str) or not given.strip():
        raise DataError(
            f"{place}: has no answer key (reward_model.ground_truth is {given!r}); prepare the dataset again "
            "from a source with answers."
        )
    return extract_answer(given) if "<answer>" in given else given.strip()


def _entries(row: Row, kind: str, place: str) -> list[Mapping[str, Any]]:
    """What the row shows: entries of ``videos`` or ``images`` with a path."""
    entries = row.get(f"{kind}s") or []
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get(kind), str):
            raise DataError(f"{place}: an entry of {kind}s is {str(entry)[:60]!r}; {_PREPARED}.")
    return list(entries)


def _asked(row: Row, place: str, found: Mapping[str, Sequence[object]]) -> str:
    """The text of the prompt behind the placeholder of its one clip or image."""
    messages = row.get("prompt") or []
    content = messages[0].get("content") if isinstance(messages[0] if messages else None, Mapping) else None
    if len(messages) != 1 or not isinstance(content, str) or messages[0].get("role") != "user":
        raise DataError(f"{place}: its prompt is not one message of a user; {_PREPARED}.")
    shown = [mark for kind, mark in _PLACEHOLDERS.items() for _ in found[kind]]
    if len(shown) != 1 or not content.startswith(shown[0]):
        raise DataError(
            f"{place}: has {len(found['video'])} videos and {len(found['image'])} images, and its prompt "
            f"begins with {content[:20]!r}; a prepared row shows one, at the start of its prompt."
        )
    return content.removeprefix(shown[0])


def _media(
    found: Mapping[str, Sequence[Mapping[str, Any]]], name: str, place: str
) -> tuple[str, str | None, tuple[str, ...]]:
    """Root, video and images; the root is what stands before the name of the file."""
    kind = "video" if found["video"] else "image"
    path = str(found[kind][0][kind]).removeprefix("file://")
    if not path.endswith(f"/{name}"):
        raise DataError(
            f"{place}: its {kind} is {path}, and extra_info.media is {name!r}, which is not its end; was the "
            "row changed? Prepare the dataset again; where data only moved, media_root=FOLDER is enough."
        )
    root = path.removesuffix(f"/{name}") or "/"
    return (root, name, ()) if kind == "video" else (root, None, (name,))


def _span(videos: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    start, end = ((videos[0] if videos else {}).get(key) for key in ("video_start", "video_end"))
    if start is None and end is None:
        return None
    return float(start or 0.0), math.inf if end is None else float(end)


BENCHMARK = Benchmark(
    name=NAME,
    title="Own questions",
    source="KeyToken's own; the accuracy in the training reward, by problem type",
    tables=("problem type", "category"),
    sampling="video_r1_16f",
    read=read,
    prompt=prompt,
    score=score,
    variants={"untagged": score_untagged},
)
