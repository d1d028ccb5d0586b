"""The commands ``keytoken score`` and ``keytoken lmms-export``."""

import argparse
from collections.abc import Callable
from typing import Any

# Written out, since importing the benchmarks would slow down --help; a test compares.
NAMES = (
    *("video_holmes", "videommmu", "mmvu", "tempcompass", "videomme", "mvbench", "vsibench", "own", "demo"),
)
KNOWN = f"Benchmarks: {', '.join(NAMES)}."


def add_score(commands: Any, say: Callable[[str], None]) -> None:
    """Add the command to the subparsers of the command line.

    Args:
        commands: What ``add_subparsers`` returned.
        say: Prints a line.
    """
    score = commands.add_parser(
        "score",
        help="score model outputs on a benchmark by its official rule",
        description="Score a file of predictions: of `keytoken evaluate`, lmms-eval's sample logs, outputs "
        "of Video-R1, TW-GRPO or TempCompass, or rows with item_id and response. Settings: benchmark=NAME "
        "predictions=FILE, and if wanted questions=FILE,... (official question files, or those of `keytoken "
        "data prepare` for benchmark=own) compare=FILE (an earlier run on the same questions) variant=NAME "
        "out=DIR allow_missing=true, and for what no rule can decide judge=URL judge_model=NAME "
        "judge_key=VARIABLE (an OpenAI-compatible API). Prints and writes tables with 95 % intervals; ends "
        f"with 1 if questions have no prediction. {KNOWN}",
    )
    score.add_argument("words", nargs="+", metavar="KEY=VALUE")

    def run(arguments: argparse.Namespace) -> int:
        from keytoken.scoring.run import ScoreOptions, run_score
        from keytoken.words import parse_words

        return run_score(parse_words(arguments.words, ScoreOptions, "score"), say)

    score.set_defaults(run=run)


def add_lmms_export(commands: Any, say: Callable[[str], None]) -> None:
    """Add the command to the subparsers of the command line; arguments as for :func:`add_score`."""
    command = commands.add_parser(
        "lmms-export",
        help="write a benchmark as a task of lmms-eval, with our prompts and rules",
        description="Write a task folder for lmms-eval: a YAML file, utils.py and questions.jsonl. Settings: "
        "benchmark=NAME questions=FILE,... (official question files, or those of `keytoken data prepare` for "
        "benchmark=own) media_root=DIR (folder of the videos) out=DIR, and if wanted "
        f"style=official|reasoning|direct max_new_tokens=N overwrite=true. {KNOWN}",
    )
    command.add_argument("words", nargs="+", metavar="KEY=VALUE")

    def run(arguments: argparse.Namespace) -> int:
        from keytoken.scoring.lmms_export import ExportOptions, export
        from keytoken.words import parse_words

        return export(parse_words(arguments.words, ExportOptions, "lmms-export"), say)

    command.set_defaults(run=run)
