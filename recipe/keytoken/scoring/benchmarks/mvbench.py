"""MVBench: twenty tasks of temporal understanding, 200 multiple-choice questions each.

Read: OpenGVLab/Ask-Anything, ``video_chat2/mvbench.ipynb`` at 4631cd6 (prompt, list of tasks, rule,
averages).

The rule. The first line of the response counts, and of it what stands before the first space. An answer is
right if this word, without full stops, occurs in "(x)", where x is the right letter, or if "(x)" occurs in
it; case does not matter. The notebook puts "Best option:(" in the model's mouth and a bracket before what
follows; here nothing is put there, and the word counts as it is and with a bracket before. So "B", "B.",
"b)", "(B" and "(B):red" all name B, but "B:" does not, nor does "Answer: B". Every task has its accuracy;
the overall score is that over all questions.

Departures: reasoning is not read, only an ``<answer>`` block or what follows ``</think>``, where there is
one (:func:`keytoken.rewards.extract.final_text`), without the whitespace around it. An answer without a
word, or whose word is a bracket alone, is wrong; by the letter of the notebook it occurs in "(x)" and
would be right whatever x is.

Parts. Questions of five tasks are about a part of the video, which alone is shown. The notebook takes the
frames from round(start x rate) to round(end x rate), here the rule of :mod:`keytoken.data.part` says which
ones, which is the same up to one frame at either end. Videos of "episodic_reasoning" are folders of images,
3 a second; write that into a file ``fps.txt`` in each of them, since seconds mean nothing without.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from keytoken.block import unknown_name
from keytoken.errors import DataError
from keytoken.rewards.extract import final_text, has_answer
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.items import UNMATCHED, Item, Verdict
from keytoken.scoring.rows import Row, read_rows, require_unique, text, texts
from keytoken.scoring.video_r1 import item_of

# Name of a task's file: the task's title and the folder of its videos. The order is that of the notebook.
TASKS: dict[str, tuple[str, str]] = {
    "action_sequence": ("Action Sequence", "star/Charades_v1_480"),
    "action_prediction": ("Action Prediction", "star/Charades_v1_480"),
    "action_antonym": ("Action Antonym", "ssv2_video"),
    "fine_grained_action": ("Fine-grained Action", "Moments_in_Time_Raw/videos"),
    "unexpected_action": ("Unexpected Action", "FunQA_test/test"),
    "object_existence": ("Object Existence", "clevrer/video_validation"),
    "object_interaction": ("Object Interaction", "star/Charades_v1_480"),
    "object_shuffle": ("Object Shuffle", "perception/videos"),
    "moving_direction": ("Moving Direction", "clevrer/video_validation"),
    "action_localization": ("Action Localization", "sta/sta_video"),
    "scene_transition": ("Scene Transition", "scene_qa/video"),
    "action_count": ("Action Count", "perception/videos"),
    "moving_count": ("Moving Count", "clevrer/video_validation"),
    "moving_attribute": ("Moving Attribute", "clevrer/video_validation"),
    "state_change": ("State Change", "perception/videos"),
    "fine_grained_pose": ("Fine-grained Pose", "nturgbd"),
    "character_order": ("Character Order", "perception/videos"),
    "egocentric_navigation": ("Egocentric Navigation", "vlnqa"),
    "episodic_reasoning": ("Episodic Reasoning", "tvqa/frames_fps3_hq"),
    "counterfactual_inference": ("Counterfactual Inference", "clevrer/video_validation"),
}
# Tasks whose questions are about a part of the video, from "start" to "end" in seconds.
BOUNDED = frozenset(
    {
        "action_sequence",
        "action_prediction",
        "object_interaction",
        "action_localization",
        "episodic_reasoning",
    }
)

# Wording of the notebook, kept as it is so that scores can be compared.
INSTRUCTION = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and "
    "movement of objects, and the action and pose of persons. Based on your observations, select the best "
    "option that accurately addresses the question."
)
ASK = "Only give the best option."


def read(paths: Sequence[Path]) -> list[Item]:
    """Read task files, such as ``action_sequence.json``; a file's name says which task it is.

    Raises:
        DataError: Names the file and the row.
    """
    items, places = [], []
    for path in paths:
        if path.stem not in TASKS:
            raise DataError(f"{path}: " + unknown_name(f"task {path.stem!r}", path.stem, TASKS, "tasks"))
        for number, (place, row) in enumerate(read_rows(path)):
            items.append(_item(row, place, path.stem, number))
            places.append(place)
    require_unique((place, item.item_id) for place, item in zip(places, items, strict=True))
    return items


def prompt(item: Item) -> str:
    """Instruction, question and options in the wording of the notebook."""
    options = [f"({letter}) {option}" for letter, option in zip("ABCDEFGH", item.options, strict=False)]
    return "\n".join((INSTRUCTION, f"Question: {item.question}", "Options:", *options, ASK))


def score(item: Item, response: str) -> Verdict:
    """The verdict by the official rule; see the module."""
    answer = final_text(response)
    word = answer.partition("\n")[0].partition(" ")[0].lower()
    named = [letter for letter in "abcdefgh"[: len(item.options)] if _names(word, letter)]
    if not named:
        return Verdict(0.0, "", UNMATCHED)
    right = item.answer.lower() in named
    extracted = item.answer if right else named[0].upper()
    return Verdict(float(right), extracted, "tag" if has_answer(response) else "letter")


def _names(word: str, letter: str) -> bool:
    bare = word.replace(".", "")
    return (letter in bare and bare in f"({letter})") or f"({letter})" in f"({word}"


def _item(row: Row, place: str, task: str, number: int) -> Item:
    options = texts(row, place, "candidates")
    answer = text(row, place, "answer")
    if answer not in options:
        raise DataError(f"{place}: the answer {answer!r} is none of the candidates {list(options)}.")
    if len(options) > 8:
        raise DataError(f"{place}: {len(options)} candidates; there are letters for 8.")
    last = max(index for index, option in enumerate(options) if option == answer)  # as officially
    title, folder = TASKS[task]
    return Item(
        benchmark="mvbench",
        item_id=f"{task}/{number}",
        question=text(row, place, "question"),
        answer="ABCDEFGH"[last],
        kind="multiple choice",
        options=options,
        video=f"{folder}/{text(row, place, 'video')}",
        span=_span(row, place) if task in BOUNDED else None,
        task=task,
        categories={"task": title},
    )


def _span(row: Row, place: str) -> tuple[float, float]:
    start, end = row.get("start"), row.get("end")
    if not isinstance(start, (int, float)) or not isinstance(end, (int, float)) or not 0 <= start < end:
        raise DataError(f"{place}: from start {start!r} to end {end!r}; both must be seconds, in this order.")
    return float(start), float(end)


BENCHMARK = Benchmark(
    name="mvbench",
    title="MVBench",
    source="OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb at 4631cd6",
    tables=("task",),
    sampling="eval_64f",
    read=read,
    prompt=prompt,
    score=score,
    item=partial(item_of, benchmark="mvbench"),
)
