"""The command ``keytoken plan``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_plan(commands: Any, say: Callable[[str], None]) -> None:
    """Add the command to the subparsers of the command line.

    Args:
        commands: What ``add_subparsers`` returned.
        say: Prints a line.
    """
    parser = commands.add_parser(
        "plan",
        help="what a run would need: memory of each pool, bytes, operations and seconds of a step",
        description="Compute, from a run's configuration and its model's shape alone, what a GPU of each "
        "pool would hold, how many answers fit an engine, what a step would compute and move, how long its "
        "parts would take and which pool the others would wait for. Needs neither GPUs nor weights. Words "
        "are those of train; plan.KEY=VALUE changes an assumption, such as plan.device=h200.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="all figures, in bytes, operations and seconds")
    parser.add_argument("--row", action="store_true", help="one row of a Markdown table, to compare runs by")
    parser.add_argument(
        "--picture", metavar="FILE", help="draw memory and step as well, into a PNG or SVG file"
    )
    parser.set_defaults(run=lambda arguments: _plan(arguments, say))


def _plan(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    import json

    from keytoken.plan.picture import draw
    from keytoken.plan.report import report, row
    from keytoken.plan.run import as_json, plan_of

    plan = plan_of(arguments.overrides)
    if arguments.picture:
        draw(plan, Path(arguments.picture))
    if arguments.json:
        say(json.dumps(as_json(plan), indent=2))
    else:
        say(row(plan) if arguments.row else report(plan))
    return 0
