"""The configuration of the run that is explained, and what in it the command line changed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf

from keytoken.compose import VARIABLES, choices, compose_config, groups, leaves
from keytoken.schema import KeyTokenConfig
from keytoken.validate import validate_run

DEFAULT_EXPERIMENT = "demo_cpu"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What ``keytoken train`` would run.

    Attributes:
        preset: The option of the group ``method``.
        experiment: The option of the group ``experiment``.
        config: The whole configuration, resolved.
        keytoken: KeyToken's own block of it.
        overridden: Keys that words of the command line changed, with the value that they had without those
            words; None for keys that were not there.
    """

    preset: str
    experiment: str | None
    config: DictConfig
    keytoken: KeyTokenConfig
    overridden: dict[str, Any]


def compose_run(overrides: Sequence[str]) -> Run:
    """Compose and check a run that needs no files: the demo's unless an experiment is given.

    Raises:
        ConfigurationError: an unknown key, option or name, or a rule that is broken.
    """
    words = list(overrides)
    if not any(_name(word) == "experiment" for word in words):
        words.insert(0, f"experiment={DEFAULT_EXPERIMENT}")
    known = groups()
    with _no_folder_needed():
        config = compose_config(words)
        keytoken = validate_run(config)
        preset = _last("method", words) or choices(words)["method"]
        options = [word for word in words if _name(word) in known]
        base = config if options == words else compose_config(options)
    before, after = values_of(base), values_of(config)
    return Run(
        preset=str(preset),
        experiment=_last("experiment", words),
        config=config,
        keytoken=keytoken,
        overridden={
            key: before.get(key) for key, value in after.items() if key not in before or before[key] != value
        },
    )


def values_of(config: DictConfig) -> dict[str, Any]:
    """Every value of a resolved configuration by its dotted key."""
    tree = OmegaConf.to_container(config, resolve=True)
    return dict(leaves(tree))


def _last(group: str, words: Sequence[str]) -> str | None:
    """The option of a group that the last word about it chooses; None if there is no such word."""
    chosen = [word.partition("=")[2].strip("'\"") for word in words if _name(word) == group]
    return chosen[-1] if chosen else None


def _name(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


@contextmanager
def _no_folder_needed() -> Iterator[None]:
    """Names for the folders that a configuration reads from the environment; nobody looks into them."""
    missing = {name: f"({name})" for name in VARIABLES if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
