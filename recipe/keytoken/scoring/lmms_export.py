"""``keytoken lmms-export``: a benchmark as a task folder of lmms-eval, to cross-check results there.

The folder has ``keytoken_<benchmark>.yaml``, ``utils.py`` and ``questions.jsonl``, and is used by ``python
-m lmms_eval --include_path FOLDER --tasks keytoken_<benchmark> --log_samples ...`` in an environment where
both packages are installed. Keys of the YAML: those of ``TaskConfig`` in lmms-eval 0.7.3
(``api/task.py``); a task with four questions was run there with its dummy model, and its sample log scored
here gave the same. The folder holds absolute paths; export again instead of moving it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from keytoken.errors import ConfigurationError, DataError
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.benchmarks.base import question_text
from keytoken.scoring.items import Item
from keytoken.scoring.lmms_task import SCORE, UNDECIDED, document
from keytoken.scoring.prompts import OFFICIAL
from keytoken.words import number_of

_YAML = """\
# Written by keytoken lmms-export: {title}, prompts in the style "{style}".
task: keytoken_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
  until: []
metric_list:
  - metric: {score}
    aggregation: !function utils.aggregate
    higher_is_better: true
  - metric: {undecided}
    aggregation: !function utils.undecided
    higher_is_better: false
metadata:
  - version: 1.0
"""
_UTILS = '''\
"""Written by keytoken lmms-export. What lmms-eval asks for is answered by keytoken.scoring.lmms_task."""

from keytoken.scoring import lmms_task

BENCHMARK = {name}
MEDIA = {media}


def doc_to_visual(doc):
    return lmms_task.visual(doc, MEDIA)


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]


def process_results(doc, results):
    return lmms_task.process(BENCHMARK, doc, results)


def aggregate(results):
    return lmms_task.aggregate(BENCHMARK, results)


def undecided(results):
    return lmms_task.undecided(results)
'''


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What is exported.

    Attributes:
        benchmark: Name of the benchmark.
        questions: Its official question files.
        out: Folder of the task.
        media_root: Folder of the videos; null for where a prepared dataset says that they lie.
        media: The same by its earlier name.
        overwrite: Write into a folder that holds a task already.
        style: Style of the prompts: "official", or one of :mod:`keytoken.scoring.prompts`.
        max_new_tokens: Length of an answer.
    """

    benchmark: str
    questions: tuple[str, ...]
    out: str
    media_root: str | None = None
    media: str | None = None
    style: str = OFFICIAL
    max_new_tokens: int = 1024
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.media is not None and self.media_root is not None:
            raise ConfigurationError(
                "lmms-export: media and media_root are two names of one thing; give media_root"
            )


def export(options: ExportOptions, say: Callable[[str], None]) -> int:
    """Write the folder of a task.

    Returns:
        Exit code 0.

    Raises:
        KeyTokenError: An unknown benchmark or style, no media root, a folder that holds a task already,
            questions that cannot be read, or that lmms-eval could not ask: about a part of a video, or with
            images.
    """
    benchmark = get_benchmark(options.benchmark)
    items = benchmark.read([Path(path).expanduser() for path in options.questions])
    _require_whole_videos(items)
    root = _media_root(options, items)
    folder = Path(options.out).expanduser().resolve()
    questions = folder / "questions.jsonl"
    rows = [document(item, question_text(benchmark, item, options.style), root) for item in items]
    files = {
        questions: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        folder / f"keytoken_{benchmark.name}.yaml": _YAML.format(
            title=benchmark.title,
            style=" ".join(options.style.split()),
            name=benchmark.name,
            questions=json.dumps(str(questions), ensure_ascii=False),  # a JSON text is YAML
            max_new_tokens=options.max_new_tokens,
            score=SCORE,
            undecided=UNDECIDED,
        ),
        folder / "utils.py": _UTILS.format(name=repr(benchmark.name), media=repr(str(root or ""))),
    }
    there = [path for path in files if path.exists()]
    if there and not options.overwrite:
        raise ConfigurationError(
            f"{there[0]} exists; give another out=, or overwrite=true to replace the task in that folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        path.write_text(content, encoding="utf-8", newline="\n")
    say(f"{number_of(len(items), 'question')} of {benchmark.title}: {folder}")
    say(f"python -m lmms_eval --include_path {folder} --tasks keytoken_{benchmark.name} --log_samples ...")
    return 0


def _media_root(options: ExportOptions, items: Sequence[Item]) -> Path | None:
    """The media root that is given; None if the questions name their own."""
    given = options.media_root or options.media
    if given is not None:
        return Path(given).expanduser().resolve()
    if any(item.video and not item.root for item in items):
        raise ConfigurationError("lmms-export: media_root is missing; add media_root=FOLDER with the videos")
    return None


def _require_whole_videos(items: Sequence[Item]) -> None:
    for item in items:
        if item.span is not None:
            raise DataError(
                f"{item.item_id} is about seconds {item.span[0]:g} to {item.span[1]:g} of its video, and "
                "lmms-eval gives models whole files; leave out the question files of such questions."
            )
        if item.images:
            raise DataError(
                f"{item.item_id} has images, which the exported task does not pass on; leave out the "
                "question files with images."
            )
