"""What goes into scoring and what comes out: a question, a model's answer to it, and the verdict.

A worked example, one question of Video-Holmes and one answer::

    Item(benchmark="video_holmes", item_id="RSmjqss0XKQ/1", question="What is ...?", answer="A",
         kind="multiple choice", options=("Cleaners", "Siblings"), categories={"type": "SR"})
    Prediction(item_id="RSmjqss0XKQ/1", response="<think>...</think><answer>A</answer>")
    Verdict(score=1.0, extracted="A", rule="tag")
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["multiple choice", "open", "numerical", "OCR", "yes/no", "caption matching", "captioning"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)

Control = Literal["none", "blank", "shuffled", "text"]
CONTROLS: tuple[Control, ...] = typing.get_args(Control)

# Rules that are not a benchmark's own: an answer that no rule could read, a sample that failed before it
# had an answer, a question without any prediction, and an answer that a language model judged.
UNMATCHED = "unmatched"
FAILED = "failed"
MISSING = "missing"
JUDGE = "judge"


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question of a benchmark.

    Attributes:
        benchmark: Name of the benchmark, a key of the registry.
        item_id: Unique in the benchmark, stable between reads.
        question: The question alone, without options and without instructions.
        answer: The right answer: a letter for multiple choice, else text or a number.
        kind: What is asked for; decides the instruction of a prompt.
        options: Texts of the options without letters, in the order A, B, ...; empty if there are none.
        video: Path below the media root, or an id; None for a question without a video.
        span: From and to in seconds, if the question is about a part of the video; None for all of it.
        images: Paths below the media root.
        task: Part of the benchmark with a rule of its own, such as "multi-choice" or "Perception".
        categories: What the tables group by, such as {"type": "SR"}.
        prompt: The whole text that is asked, where the question file brings one; else empty.
        root: Folder of the media by the question file itself, unless a media root is given; else empty.
    """

    benchmark: str
    item_id: str
    question: str
    answer: str
    kind: Kind
    options: tuple[str, ...] = ()
    video: str | None = None
    span: tuple[float, float] | None = None
    images: tuple[str, ...] = ()
    task: str = ""
    categories: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    root: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule says of one response.

    Attributes:
        score: In [0, 1]; None if the official rule cannot decide and a judge is needed.
        extracted: What the rule read from the response; empty if nothing.
        rule: How it was read: "tag", "letter", "option text", "unmatched", "judge", "failed", ...
    """

    score: float | None
    extracted: str
    rule: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One answer of a model.

    Attributes:
        item_id: Which :class:`Item`.
        response: The whole text; None if this sample failed.
        error: Why it failed; empty if it did not.
        decoding: "greedy" or "sampled".
        sample: Number of the sample among those of one item.
        control: What was done to the video; "none" if nothing.
        published_score: The score that the file itself gives this answer, if any.
    """

    item_id: str
    response: str | None
    error: str = ""
    decoding: str = "greedy"
    sample: int = 0
    control: str = "none"
    published_score: float | None = None
