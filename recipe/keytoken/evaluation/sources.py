"""Where the questions of an evaluation come from, and what else follows from the benchmark."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from os import environ
from pathlib import Path

from keytoken.errors import ConfigurationError
from keytoken.evaluation.options import MAX_TOKENS, EvaluateOptions
from keytoken.scoring.benchmarks import demo, own
from keytoken.scoring.benchmarks.base import Benchmark, question_text
from keytoken.scoring.items import Item
from keytoken.scoring.prompts import OFFICIAL

DEMO = demo.NAME
DEMO_MAX_TOKENS = 40  # data.max_response_length of the demo
ASKED_AS_TRAINED = (demo.NAME, own.NAME)  # their wording is that of training rows
HELDOUT = "heldout.parquet"


@dataclass(frozen=True)
class Source:
    """The questions and how they are asked.

    Attributes:
        items: The questions.
        media_root: Folder of their media; None for questions without any, or that name it themselves.
        style: Style of the prompt.
        max_tokens: Longest answer.
        digest: What tells these questions from others, whatever ``limit`` leaves of them.
        prepared: The files, if they are datasets of ``keytoken data prepare``.
    """

    items: list[Item]
    media_root: Path | None
    style: str
    max_tokens: int
    digest: str = ""
    prepared: tuple[Path, ...] = ()


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
        what = f"the official question file of {benchmark.source}"
        if benchmark.name == own.NAME:
            what = "a .parquet file that `keytoken data prepare` wrote"
        raise ConfigurationError(f"benchmark={benchmark.name}: give questions=FILE, {what}")
    questions = benchmark.read(files)
    items = questions[: options.limit]
    homeless = any((item.video or item.images) and not item.root for item in items)
    if root is None and homeless and set(options.control) != {"text"}:
        raise ConfigurationError(
            f"benchmark={benchmark.name}: its questions are about videos; give media_root=FOLDER, where they "
            "lie, or control=text to ask without them"
        )
    if root is not None and not root.is_dir():
        raise ConfigurationError(f"media_root={root}: no such folder")
    style = options.style or (OFFICIAL if benchmark.name in ASKED_AS_TRAINED else "reasoning")
    if items:
        question_text(benchmark, items[0], style)  # refuses a style that does not exist
    return Source(
        items,
        root,
        style,
        options.max_tokens or (DEMO_MAX_TOKENS if is_demo else MAX_TOKENS),
        questions_digest(questions),
        tuple(files) if benchmark.name == own.NAME else (),
    )


def questions_digest(items: Sequence[Item]) -> str:
    """A digest of what answers depend on, which the key is not: it may be corrected, and they scored anew."""
    asked = [
        (i.item_id, i.question, i.options, i.kind, i.task, i.video, i.images, i.span)
        + ((i.prompt,) if i.prompt else ())
        for i in items
    ]
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]


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
