"""The parser of the command line: a misspelt command is answered with the closest one there is."""

import argparse
from typing import Any

from keytoken.block import unknown_name


class Parser(argparse.ArgumentParser):
    """argparse's; the parsers of its commands are of this class too."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = str(action.metavar or action.dest).lower()
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                None, unknown_name(f"{what} {value!r}", str(value), known, f"{what}s")
            )
