"""The demo's world: seven families of questions about rendered clips, four options each.

The rule is the training reward for multiple choice, Video-R1's: the content of the first ``<answer>`` block
has to be the letter and nothing else. The questions are those of ``heldout.parquet``, which the demo writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from keytoken.errors import DataError
from keytoken.rewards.answers import multiple_choice
from keytoken.rewards.extract import extract_answer
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.items import UNMATCHED, Item, Verdict
from keytoken.scoring.rows import Row, read_rows, require_unique, text

NAME = "demo"
LETTERS = ("A", "B", "C", "D")


def read(paths: Sequence[Path]) -> list[Item]:
    """Read prompts that the demo has written; clips are named relative to the file's folder.

    Raises:
        DataError: Names the file and the row.
    """
    placed = [(path, *row) for path in paths for row in read_rows(path)]
    items = [_item(row, place, path.parent) for path, place, row in placed]
    require_unique((place, item.item_id) for (_, place, _), item in zip(placed, items, strict=True))
    return items


def prompt(item: Item) -> str:
    """The question as the demo trains on it."""
    listed = " ".join(f"{letter} {word}" for letter, word in zip(LETTERS, item.options, strict=True))
    return f"{item.question} {listed}"


def score(item: Item, response: str) -> Verdict:
    """The training reward of the answer."""
    answer = extract_answer(response)
    if not answer:
        return Verdict(0.0, "", UNMATCHED)
    return Verdict(multiple_choice(answer, item.answer), answer, "tag")


def _item(row: Row, place: str, folder: Path) -> Item:
    info, reward = row.get("extra_info"), row.get("reward_model")
    if not isinstance(info, Mapping) or not isinstance(reward, Mapping):
        raise DataError(f"{place} has no extra_info and reward_model; give heldout.parquet of the demo.")
    words = text(info, place, "question").split(" ")
    # "which way does the shape move ? A left B right C up D down"
    if tuple(words[-8::2]) != LETTERS:
        raise DataError(f"{place}: the question {' '.join(words)!r} does not end in four options.")
    answer = text(reward, place, "ground_truth").strip()
    if answer not in LETTERS:
        raise DataError(f"{place}: the answer {answer!r} is none of {', '.join(LETTERS)}.")
    videos = row.get("videos")
    video = None
    if videos is not None and len(videos):
        path = PurePath(text(videos[0], place, "video"))
        video = str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
    family = text(info, place, "family")
    return Item(
        benchmark=NAME,
        item_id=text(info, place, "prompt_id"),
        question=" ".join(words[:-8]),
        answer=answer,
        kind="multiple choice",
        options=tuple(words[-7::2]),
        video=video,
        categories={"family": family},
    )


BENCHMARK = Benchmark(
    name=NAME,
    title="Demo world",
    source="KeyToken's own; the training reward for multiple choice",
    tables=("family",),
    sampling="demo",
    read=read,
    prompt=prompt,
    score=score,
)
