"""The command ``keytoken evaluate``."""

import argparse
from collections.abc import Callable
from typing import Any

from keytoken.scoring.cli import KNOWN


def add_evaluate(commands: Any, say: Callable[[str], None]) -> None:
    """Add the command to the subparsers of the command line.

    Args:
        commands: What ``add_subparsers`` returned.
        say: Prints a line.
    """
    parser = commands.add_parser(
        "evaluate",
        help="let a model answer a benchmark, and score it",
        description="Ask a model the questions of a benchmark on vLLM, with the prompts, frames and engine "
        "settings of training, and write a report with intervals. benchmark=NAME model=FOLDER questions=FILE "
        "media_root=FOLDER; benchmark=own takes a dataset of `keytoken data prepare` and needs no "
        "media_root, the demo no questions. A run or checkpoint folder of keytoken train is a model as well. "
        "Interrupt it whenever you like: the same command goes on. control=none,blank,"
        "shuffled,text asks whether the model still answers without seeing; decoding=greedy,sampled with "
        "samples=, temperature=, top_p=, seed= says how answers are drawn. "
        "A checkpoint is shown the frames that it was trained on, others by sampling=PRESET|CONTRACT.json "
        "sampling.KEY=VALUE sampling_mismatch=allow. Further: style=official|reasoning|direct|TEMPLATE, "
        "max_tokens=, limit=, jobs=, clip_limit_s=, concurrency=, out=, max_failures=, retry_failed=true, "
        f"frame_cache=, platform=cpu|gpu, tensor_parallel=, dtype=, max_model_len=. {KNOWN}",
    )
    parser.add_argument("words", nargs="+", metavar="KEY=VALUE")
    parser.set_defaults(run=lambda arguments: _evaluate(arguments, say))


def _evaluate(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from keytoken.evaluation.options import COMMAND, EvaluateOptions
    from keytoken.evaluation.run import evaluate
    from keytoken.words import parse_words

    evaluate(parse_words(arguments.words, EvaluateOptions, COMMAND), say)
    return 0
