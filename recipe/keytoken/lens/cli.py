"""The command ``keytoken lens``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_lens(commands: Any, say: Callable[[str], None]) -> None:
    """Add the command to the subparsers of the command line.

    Args:
        commands: What ``add_subparsers`` returned.
        say: Prints a line.
    """
    parser = commands.add_parser(
        "lens",
        help="show which tokens of the answers a method looked at, in a page to open from disk",
        description="Write one HTML file with the exported answers of a run (tokens/step_*.parquet): tokens "
        "coloured by what they depend on, the clip's frames, the selection with sliders, words and "
        "histograms. It asks nothing of any network. RUN is a run folder, its folder tokens, or one file.",
    )
    parser.add_argument("source", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, help="the file to write (default: lens.html in the run folder)")
    parser.add_argument("--step", type=int, help="show this step only")
    parser.add_argument(
        "--compare", metavar="RUN2[/STEP]|STEP", help="show another run or step beside it, prompt by prompt"
    )
    parser.add_argument("--image", action="store_true", help="draw one answer as a PNG instead")
    parser.add_argument("--answer", metavar="PROMPT/NUMBER", help="of --image (default: the first answer)")
    parser.set_defaults(run=lambda arguments: _lens(arguments, say))


def _lens(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from keytoken.errors import ConfigurationError

    if arguments.answer is not None and not arguments.image:
        raise ConfigurationError("keytoken lens: --answer is of --image; add --image, or leave --answer out")
    if arguments.image and arguments.compare is not None:
        raise ConfigurationError("keytoken lens: --image draws one answer; leave --compare out")
    if arguments.image:
        say(str(_image(arguments, say)))
        return 0
    from keytoken.lens.write import write_lens

    options = {"out": arguments.out, "step": arguments.step, "compare": arguments.compare}
    say(str(write_lens(arguments.source, **options, say=say)))
    return 0


def _image(arguments: argparse.Namespace, say: Callable[[str], None]) -> Path:
    from keytoken.lens.image import find_answer, write_image
    from keytoken.lens.write import folder_of, read_source

    *others, export = read_source(arguments.source, arguments.step, say)
    answer = find_answer(export, arguments.answer, others)
    name = f"lens_{export.step}_{answer.prompt_id}_{answer.number}.png".replace("/", "_")
    return write_image(export, answer, arguments.out or folder_of(export.file) / name)
