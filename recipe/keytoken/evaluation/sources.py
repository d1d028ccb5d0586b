"""Where the questions of an evaluation come from, and what else follows from the benchmark."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from os import environ
from pathlib import Path

from keytoken.errors import ConfigurationError
from keytoken.evaluation.options import MAX_TOKENS, EvaluateOptions
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.items import Item
from keytoken.scoring.prompts import render, with_options

DEMO = "demo"
DEMO_MAX_TOKENS = 40  # data.max_response_length of the demo
OFFICIAL = "official"  # the benchmark's own wording
HELDOUT = "heldout.parquet"


@dataclass(frozen=True)
class Source:
    """The questions and how they are asked.

    Attributes:
        items: The questions.
        media_root: Folder of their media; None for questions without any.
        style: Style of the prompt.
        max_tokens: Longest answer.
        digest: What tells these questions from others, whatever ``limit`` leaves of them.
    """

    items: list[Item]
    media_root: Path | None
    style: str
    max_tokens: int
    digest: str = ""


def read_source(benchmark: Benchmark, options: EvaluateOptions) -> Source:
    """Read the questions that the options ask for.

    Raises:
        ConfigurationError: no question files, or questions about media without a media root.
        DataError: a question file that cannot be read.
    """
    files = [Path(name).expanduser() for name in options.questions]
    root = Path(options.media_root).expanduser() if options.media_root else None
    is_demo = benchmark.name == DEMO
    if is_demo and not files:
        world = demo_world(Path(options.model))
        files, root = [world / HELDOUT], root or world
    if not files:
        raise ConfigurationError(
            f"benchmark={benchmark.name}: give questions=FILE, the official question file of "
            f"{benchmark.source}"
        )
    questions = benchmark.read(files)
    items = questions[: options.limit]
    if root is None and any(item.video or item.images for item in items) and set(options.control) != {"text"}:
        raise ConfigurationError(
            f"benchmark={benchmark.name}: its questions are about videos; give media_root=FOLDER, where they "
            "lie, or control=text to ask without them"
        )
    if root is not None and not root.is_dir():
        raise ConfigurationError(f"media_root={root}: no such folder")
    style = options.style or (OFFICIAL if is_demo else "reasoning")
    if items:
        question_text(benchmark, items[0], style)  # refuses a style that does not exist
    return Source(
        items,
        root,
        style,
        options.max_tokens or (DEMO_MAX_TOKENS if is_demo else MAX_TOKENS),
        questions_digest(questions),
    )


def questions_digest(items: Sequence[Item]) -> str:
    """A digest of what answers depend on, which the key is not: it may be corrected, and they scored anew."""
    asked = [(i.item_id, i.question, i.options, i.kind, i.task, i.video, i.images, i.span) for i in items]
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]


def question_text(benchmark: Benchmark, item: Item, style: str) -> str:
    """The text of a question in a style; "official" is the benchmark's own wording."""
    if style == OFFICIAL:
        return benchmark.prompt(item)
    return render(with_options(item.question, item.options), item.kind, style)


def demo_world(model: Path) -> Path:
    """The folder of the demo's held-out questions: beside the model, the one named, or the prepared one.

    Raises:
        ConfigurationError: there is none.
    """
    from keytoken.demo.prepare import DemoConfig, cache_root  # slow: imports transformers
    from keytoken.demo.run import DEMO_VARIABLE

    named = environ.get(DEMO_VARIABLE)
    candidates = [
        model.parent,
        *([Path(named)] if named else []),
        cache_root() / f"demo-{DemoConfig().digest()}",
    ]
    for folder in candidates:
        if (folder / HELDOUT).is_file():
            return folder
    raise ConfigurationError(
        f"benchmark={DEMO}: no prepared demo world (looked at {', '.join(map(str, candidates))}); run "
        f"`keytoken demo --prepare-only`, or set {DEMO_VARIABLE} to a prepared folder"
    )
