"""The group ``keytoken data``: what is done with clips and datasets before a run.

A verb is a subparser and a function from its words to an exit code (:mod:`keytoken.words` reads them).
What a verb needs is imported inside that function, so that ``--help`` stays quick.
"""

from collections.abc import Callable
from typing import Any

Say = Callable[[str], None]  # prints a line for the user


def add_data(commands: Any, say: Say) -> None:
    """Add the group to the subparsers of the command line.

    Args:
        commands: What ``add_subparsers`` returned.
        say: Prints a line.
    """
    data = commands.add_parser("data", help="prepare datasets, cache the frames of clips")
    data.add_subparsers(required=True, metavar="VERB")
