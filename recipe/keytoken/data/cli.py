"""The group ``keytoken data``: what is done with clips and datasets before a run.

A verb is a subparser and a function from its words to an exit code (:mod:`keytoken.words` reads them).
What a verb needs is imported inside that function, so that ``--help`` stays quick.
"""

import argparse
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

Say = Callable[[str], None]  # prints a line for the user

_CACHE = {
    "build": (
        "decode the clips of datasets and store their frames",
        "keytoken data cache build DATASET.parquet|LIST.txt|FOLDER|CLIP ... cache=DIR "
        "sampling=PRESET|CONTRACT.json [sampling.KEY=VALUE] [jobs=N] [limit_s=60] [video_key=videos] "
        "[quarantine=FILE]. Clips that cannot be read are listed in the quarantine file (default: "
        "DIR/quarantine.jsonl), and the exit code is 1. Run it again to go on; what is there is not decoded "
        "again.",
    ),
    "verify": (
        "compare the frames of all entries with their checksums",
        "keytoken data cache verify cache=DIR. Broken entries are named and removed, and the exit code is 1.",
    ),
    "stats": (
        "entries and bytes by contract, and how much of a dataset is cached",
        "keytoken data cache stats [DATASET.parquet ... sampling=PRESET|CONTRACT.json] cache=DIR",
    ),
    "prune": (
        "remove entries: unused, over a size, of other contracts or versions",
        "keytoken data cache prune cache=DIR [unused_days=30] [max_gib=100] [keep=PRESET,CONTRACT.json] "
        "[dry_run=true]. Broken entries and those of other versions always go; max_gib removes the least "
        "recently used ones; keep removes those of all other contracts.",
    ),
}


def add_data(commands: Any, say: Say) -> None:
    """Add the group to the subparsers of the command line.

    Args:
        commands: What ``add_subparsers`` returned.
        say: Prints a line.
    """
    data = commands.add_parser("data", help="prepare datasets, cache the frames of clips")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    _add_cache(verbs, say)
    _add_prepare(verbs, say)


def _add_cache(verbs: Any, say: Say) -> None:
    cache = verbs.add_parser("cache", help="decode clips once: build, verify, look at or prune a frame cache")
    actions = cache.add_subparsers(required=True, metavar="ACTION")
    for name, (help_text, description) in _CACHE.items():
        action = actions.add_parser(name, help=help_text, description=description)
        action.add_argument("words", nargs="+", metavar="WORD")
        action.set_defaults(run=functools.partial(_cache, name, say))


def _cache(name: str, say: Say, arguments: argparse.Namespace) -> int:
    from keytoken.data.cache.cli import ACTIONS

    return ACTIONS[name](arguments.words, say)


def _add_prepare(verbs: Any, say: Say) -> None:
    prepare = verbs.add_parser(
        "prepare",
        help="turn questions on videos into a dataset to train on, with checks and a report",
        description="NAME is a converter: folder (a CSV or JSON Lines table beside your clips), video_r1, "
        "video_holmes or tinyllava_video_r1. Settings: source=PATH out=DIR, and if wanted media_root=DIR "
        "limit=N split=train against=BENCHMARK:FILE,OTHER.parquet overlap=stop|drop|keep "
        "check=headers|decode|none sampling=PRESET|CONTRACT.json sampling.KEY=VALUE style=reasoning|direct "
        "checksums=quick|full "
        "encoding=utf-8 jobs=N limit_s=60 overwrite=false. Rows that cannot be used are set aside with the "
        "reason and counted. Nothing is written to OUT unless all of it can be.",
    )
    prepare.add_argument("words", nargs="*", metavar="NAME|KEY=VALUE")

    def run(arguments: argparse.Namespace) -> int:
        from keytoken.data.prepare import get_converter
        from keytoken.data.prepare.build import prepare
        from keytoken.data.prepare.settings import PrepareSettings
        from keytoken.words import parse_words

        for name in [word for word in arguments.words if "=" not in word][:1]:
            get_converter(name)  # a misspelt one is worth more than the settings that are missing as well
        settings = parse_words(arguments.words, PrepareSettings, "data prepare", plain="name")
        folder, ledger = prepare(settings)
        say(f"{folder / settings.split}.parquet: {len(ledger.entries)} of {ledger.num_read} rows")
        if ledger.quarantined:
            say(f"set aside, see {folder / 'quarantine.jsonl'}: {len(ledger.quarantined)}")
            for reason, count in Counter(entry.reason for entry in ledger.quarantined).most_common():
                say(f"  {count:>6}  {reason}")
        if ledger.copies:
            say(f"dropped, for they say the same as an earlier row: {len(ledger.copies)}")
        if ledger.overlaps:
            what = "dropped, for" if ledger.num_overlapping else "kept, although"
            rows = len({each.number for each in ledger.overlaps})
            say(f"{what} a test set holds them as well, see {folder / 'overlap.jsonl'}: {rows}")
        for note, count in ledger.notes.most_common():
            say(f"note: {note}" + (f" (rows: {count})" if count else ""))
        say(f"Report: {folder / 'report.md'}")
        return 0

    prepare.set_defaults(run=run)
