"""What a check says, and what it is asked about."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from keytoken.data.contract import SamplingContract
from keytoken.data.families import patch_size_of
from keytoken.errors import KeyTokenError
from keytoken.resources import runs_here
from keytoken.verl_adapter.shims.hooks import on_cpu

Status = Literal["ok", "warn", "fail", "skip"]
STATUSES: tuple[Status, ...] = ("ok", "warn", "fail", "skip")
GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer of one check.

    Attributes:
        status: ``ok``; ``warn``: a run may work and may not be what was meant; ``fail``: a run cannot work;
            ``skip``: not looked at, ``found`` says why.
        found: What is there, with figures.
        remedy: What to do about it; a warning and a failure have one.
        name: Of the check; the one who calls it fills it in.
        seconds: That the check took, likewise.
    """

    status: Status
    found: str
    remedy: str = ""
    name: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.status in ("warn", "fail") and not self.remedy:
            raise ValueError(f"a finding of status {self.status} needs a remedy: {self.found}")


def ok(found: str) -> Finding:
    """Everything is as a run needs it."""
    return Finding("ok", found)


def warn(found: str, remedy: str) -> Finding:
    """A run may work, and may not be what was meant."""
    return Finding("warn", found, remedy)


def fail(found: str, remedy: str) -> Finding:
    """A run cannot work."""
    return Finding("fail", found, remedy)


def skip(why: str) -> Finding:
    """Not looked at."""
    return Finding("skip", why)


def of_error(problem: BaseException) -> Finding:
    """A failure in an error's words: its first sentence, and the rest, which is the remedy."""
    text = " ".join(str(problem).split())
    end = re.search(r"[.;] (?=\w|`|\()", text)
    if end is None or not isinstance(problem, KeyTokenError):
        return fail(f"{type(problem).__name__}: {text}", "Correct what the message names.")
    remedy = text[end.end() :]
    return fail(text[: end.start()], remedy[:1].upper() + remedy[1:])


@dataclass(frozen=True)
class Subject:
    """What is examined: this machine, and a run if one is configured.

    Attributes:
        config: The run's resolved configuration; None to look at the machine only, or if it cannot be made.
        problem: Why the configuration cannot be made.
        clip: A clip of the user's that should be decoded as well.
        short: Whether only the checks that a run makes before it starts are asked for.
        rows: Rows of data files that a check has read, for the next one.
    """

    config: DictConfig | None = None
    problem: KeyTokenError | None = None
    clip: Path | None = None
    short: bool = False
    rows: dict[Path, list[Mapping[str, Any]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def run(self) -> DictConfig:
        """The run's configuration, for checks that are made with one only."""
        assert self.config is not None, "this check needs a run and was called without one"
        return self.config

    @property
    def cpu(self) -> bool:
        """Whether the run, or without one this installation, computes on the CPU."""
        return on_cpu() if self.config is None else self.config.trainer.device == "cpu"

    @property
    def here(self) -> bool:
        """Whether the run starts on this machine and joins no cluster; without a run, yes."""
        return self.config is None or runs_here(self.config)

    @cached_property
    def contract(self) -> SamplingContract:
        """The run's sampling contract, with its model's patches if known; without a run the default."""
        if self.config is None:
            return SamplingContract()
        patch_size = patch_size_of(Path(self.config.actor_rollout_ref.model.path).expanduser())
        known = {} if patch_size is None else {"patch_size": patch_size}
        return SamplingContract.from_mapping(
            {**known, **self.config.keytoken.sampling}, where="keytoken.sampling"
        )


@dataclass(frozen=True, slots=True)
class Check:
    """An entry of the registry.

    Attributes:
        name: Stable; scripts read it.
        ask: The check.
        short: Whether it is quick enough to be made before every run.
        needs_run: Whether it is about a run and left out without one.
        needs_here: Whether it is about the machine that starts the run's processes.
        about_files: Whether it is about files that a cluster's nodes may have and this machine not.
    """

    name: str
    ask: Callable[[Subject], Finding]
    short: bool = False
    needs_run: bool = False
    needs_here: bool = False
    about_files: bool = False


def several(names: list[str], shown: int = 3) -> str:
    """``a, b, c and 4 more``."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def size(num_bytes: float) -> str:
    """``1.5 GiB`` or ``12 MiB``."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
