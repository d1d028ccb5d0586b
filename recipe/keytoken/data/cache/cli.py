"""``keytoken data cache build|verify|stats|prune``: settings, progress and what is printed."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from keytoken.data.cache import upkeep
from keytoken.data.cache.build import build, find_clips, write_failures
from keytoken.data.cache.store import frame_cache
from keytoken.data.contract import SamplingContract, preset_names
from keytoken.data.sampling_words import SAMPLING, named_contract
from keytoken.errors import ConfigurationError
from keytoken.words import parse_words

Say = Callable[[str], None]

COMMAND = "data cache"
QUARANTINE = "quarantine.jsonl"
_DAY_S = 86400.0
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSettings:
    """Words of ``build``."""

    sources: tuple[str, ...]
    cache: str
    sampling: str = field(metadata=SAMPLING)
    jobs: int = os.cpu_count() or 1
    limit_s: float = 60.0
    video_key: str = "videos"
    quarantine: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifySettings:
    """Words of ``verify``."""

    cache: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StatsSettings:
    """Words of ``stats``; with sources also which of their clips the cache has."""

    cache: str
    sources: tuple[str, ...] = ()
    sampling: str | None = field(default=None, metadata=SAMPLING)
    video_key: str = "videos"


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneSettings:
    """Words of ``prune``."""

    cache: str
    unused_days: float | None = None
    max_gib: float | None = None
    keep: tuple[str, ...] = ()
    dry_run: bool = False


def run_build(words: Sequence[str], say: Say) -> int:
    """Decode and store the clips of some sources; 1 if some cannot be read.

    Raises:
        KeyTokenError: A wrong word or source, or the cache cannot be written.
    """
    settings = parse_words(words, BuildSettings, f"{COMMAND} build", plain="sources")
    if settings.jobs < 1 or settings.limit_s <= 0:
        raise ConfigurationError(f"{COMMAND} build: jobs and limit_s must be positive")
    contract, root = named_contract(settings.sampling), Path(settings.cache).expanduser()
    clips = find_clips(settings.sources, settings.video_key)
    built = build(clips, contract, root, jobs=settings.jobs, limit_s=settings.limit_s)
    say(
        f"{len(clips)} clips: {built.num_stored} decoded and stored ({_size(built.num_bytes)}), "
        f"{built.num_present} present before, {len(built.failures)} cannot be read"
    )
    target = Path(settings.quarantine).expanduser() if settings.quarantine else root / QUARANTINE
    write_failures(target, built.failures)
    if built.failures:
        say(f"The reasons are in {target}")
    say(f"Use it: data.frame_cache={root.absolute()} (contract {contract.digest()})")
    return int(bool(built.failures))


def run_verify(words: Sequence[str], say: Say) -> int:
    """Compare all entries with their checksums; 1 if some are broken, which are removed.

    Raises:
        ConfigurationError: A wrong word, or no such folder.
    """
    settings = parse_words(words, VerifySettings, f"{COMMAND} verify")
    found = list(upkeep.entries(_existing(settings.cache)))
    num_bytes, bad = sum(entry.num_bytes for entry in found), 0
    with tqdm(total=num_bytes, desc="verifying", unit="B", unit_scale=True, mininterval=1.0) as bar:
        for entry, problem in upkeep.verify(found):
            bar.update(entry.num_bytes)
            if problem is not None:
                bad += 1
                say(problem)
    say(f"{len(found)} entries ({_size(num_bytes)}): {len(found) - bad} sound, {bad} not")
    return int(bad > 0)


def run_stats(words: Sequence[str], say: Say) -> int:
    """Print what a cache holds, contract by contract, and how much of some sources it has.

    Raises:
        KeyTokenError: A wrong word or source, or no such folder.
    """
    settings = parse_words(words, StatsSettings, f"{COMMAND} stats", plain="sources")
    if bool(settings.sources) != (settings.sampling is not None):
        raise ConfigurationError(f"{COMMAND} stats: give sources and sampling=NAME together, or none of them")
    root = _existing(settings.cache)
    by_contract: dict[str, list[upkeep.Entry]] = {}
    for entry in upkeep.entries(root):
        by_contract.setdefault(entry.contract, []).append(entry)
    presets = {SamplingContract.preset(name).digest(): name for name in preset_names()}
    for digest, found in by_contract.items():
        say(f"{presets.get(digest, 'contract')} {digest}: {_sum_of(found)}")
        fields = upkeep.contract_fields(found) or {"unreadable": "all entries"}
        say("    " + ", ".join(f"{name} {value}" for name, value in fields.items()))
    say(f"together: {_sum_of([entry for found in by_contract.values() for entry in found])}")
    if settings.sampling is not None:
        contract, cache = named_contract(settings.sampling), frame_cache(str(root))
        clips = find_clips(settings.sources, settings.video_key)
        looked = tqdm(clips, desc="looking up clips", unit="clip", mininterval=1.0)
        num_there = sum(cache.has(clip, contract) for clip in looked)
        say(f"of {len(clips)} clips {num_there} are in the cache and {len(clips) - num_there} are not")
    return 0


def run_prune(words: Sequence[str], say: Say) -> int:
    """Remove what can go.

    Raises:
        ConfigurationError: A wrong word, no such folder, or one that cannot be written.
    """
    settings = parse_words(words, PruneSettings, f"{COMMAND} prune")
    for name in ("unused_days", "max_gib"):
        value = getattr(settings, name)
        if value is not None and not value >= 0:
            raise ConfigurationError(f"{COMMAND} prune: {name}={value} is no amount; give 0 or more")
    root = _existing(settings.cache)
    try:
        removed = upkeep.prune(
            root,
            unused_s=None if settings.unused_days is None else settings.unused_days * _DAY_S,
            max_bytes=None if settings.max_gib is None else int(settings.max_gib * _GIB),
            keep={named_contract(name).digest() for name in settings.keep} if settings.keep else None,
            dry_run=settings.dry_run,
            each=_with_bar,
        )
        notes = upkeep.forget_lost(root, settings.dry_run)
    except OSError as problem:
        raise ConfigurationError(f"{COMMAND} prune: {problem}; see to the permissions of {root}") from problem
    verb = "would remove" if settings.dry_run else "removed"
    for reason, count in removed.files.items():
        say(f"{verb} {count} files ({_size(removed.num_bytes[reason])}): {reason}")
    say(f"{verb} {removed.files.total()} files, {_size(removed.num_bytes.total())}, {notes} notes on clips")
    return 0


ACTIONS = {"build": run_build, "verify": run_verify, "stats": run_stats, "prune": run_prune}


def _existing(cache: str) -> Path:
    root = Path(cache).expanduser()
    if not root.is_dir():
        raise ConfigurationError(f"cache={cache}: no such folder; name that of an existing frame cache")
    held = sorted(path.name for path in root.iterdir())
    if (
        held and not upkeep.is_cache(root) and set(held) != {QUARANTINE}
    ):  # an empty one may become a cache yet
        below = [name for name in held if upkeep.is_cache(root / name)]
        hint = f" Did you mean {root / below[0]}?" if below else ""
        raise ConfigurationError(
            f"cache={cache}: no frame cache, it holds {', '.join(held[:3])}{', ...' if held[3:] else ''}; "
            f"name the folder that `keytoken data cache build` or data.frame_cache wrote to.{hint}"
        )
    return root


def _with_bar(found: Iterable[upkeep.Entry]) -> Iterable[upkeep.Entry]:
    return tqdm(found, desc="looking at entries", unit="entry", mininterval=1.0)


def _sum_of(found: Sequence[upkeep.Entry]) -> str:
    return f"{len(found)} entries, {_size(sum(entry.num_bytes for entry in found))}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB / 10 else f"{num_bytes / (1 << 20):.1f} MiB"
