"""The typed configuration of a study: which arms, which worlds and warm starts, how many seeds.

A study is one YAML file in ``keytoken_configs/study``. Overrides of the command line reach every key of it by
its dotted name (``steps=10``, ``sections.noisy.seeds=[1,2]``). What one arm trains with stands nowhere here:
an arm names a preset and hydra overrides, which are composed exactly as ``keytoken train`` would compose them
(:mod:`keytoken.study.settings`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from keytoken.block import Block, check_choices, require, unknown_name
from keytoken.compose import CONFIG_MODULE, STUDIES
from keytoken.demo.warm_start import WarmStartConfig
from keytoken.errors import ConfigurationError
from keytoken.study.worlds import WORLDS

ROOT = "study"
# The arm without training: what the warm start itself answers, once for every seed.
START = "start"
MAX_SAMPLES = 9  # the files of runs have one digit for the right ones
SPLITS = ("test", "familiar", "tuning")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]*")  # becomes part of a file name


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArmConfig(Block):
    """One arm: a method and what is changed of it.

    Attributes:
        method: Option of the group ``method``.
        overrides: Further hydra overrides, such as ``keytoken.method.loss.kl_coef=0.0``.
        title: What the report calls the arm.
        note: One sentence for the report: what sets the arm apart.
    """

    method: str
    overrides: list = dataclasses.field(default_factory=list)
    title: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SectionConfig(Block):
    """Arms by seeds from one warm start, compared with each other and with nothing outside the section.

    Attributes:
        world: A key of :data:`keytoken.study.worlds.WORLDS`.
        warm_start: A key of the study's ``warm_starts``.
        warm_seed: Seed of that warm start.
        seeds: One run of every arm each: order of prompts, sampling, evaluation.
        arms: Names of the study's arms.
        splits: What is evaluated, of "test" (held-out parameters), "familiar" (parameters of the training,
            other clips) and "tuning" (the same, a third time); the first one is compared.
        lr: Learning rate of every arm of the section; null for that of the study.
        title: What the report calls the section.
    """

    world: str
    warm_start: str
    seeds: list
    arms: list
    warm_seed: int = 0
    splits: list = dataclasses.field(default_factory=lambda: ["test"])
    lr: float | None = None
    title: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig(Block):
    """A whole study.

    Attributes:
        name: Name of its file.
        description: What it asks, for the report.
        arms: :class:`ArmConfig` by name.
        warm_starts: :class:`keytoken.demo.warm_start.WarmStartConfig` by name.
        sections: :class:`SectionConfig` by name, in the order in which they are run.
        lr: Learning rate of every arm, but in sections that set another one for all of theirs.
        steps: Updates of every run.
        overrides: hydra overrides of every arm, before its own.
        baseline: The arm that all others are compared with; a section without it makes no such comparison.
        control: The arm of random tokens that they are also compared with.
        train_prompts: Prompts to train on, the same for all arms and seeds.
        eval_prompts: Prompts of every evaluated split.
        eval_samples: Answers at temperature 1 to each of them, besides the greedy one.
        max_refills: With dynamic sampling, most batches of prompts drawn to replace those without a signal.
        folder: Where runs and report go; null for ``outputs/studies/<name>``.
        backend: ``process`` for the pure core, in one process for each run; ``stack`` for ``keytoken train``.
    """

    name: str
    arms: dict
    warm_starts: dict
    sections: dict
    lr: float
    steps: int
    description: str = ""
    overrides: list = dataclasses.field(default_factory=list)
    baseline: str = "grpo"
    control: str = "random"
    train_prompts: int = 840
    eval_prompts: int = 560
    eval_samples: int = 4
    max_refills: int = 3
    folder: str | None = None
    backend: Literal["process", "stack"] = "process"

    def __post_init__(self) -> None:
        check_choices(self, ROOT)
        require(self.lr > 0.0, f"{ROOT}.lr is {self.lr}; use a number above 0, such as 3.0e-4.")
        for key in ("steps", "train_prompts", "eval_prompts", "eval_samples"):
            value = getattr(self, key)
            require(value >= 1, f"{ROOT}.{key} is {value}; use a count of 1 or more.")
        require(
            self.eval_samples <= MAX_SAMPLES,
            f"{ROOT}.eval_samples is {self.eval_samples}; use {MAX_SAMPLES} at most.",
        )
        require(self.max_refills >= 0, f"{ROOT}.max_refills is {self.max_refills}; use a count of 0 or more.")
        for name in [*self.arms, *self.sections]:
            require(
                _NAME.fullmatch(name) is not None and name != START,
                f"{name!r} cannot be the name of an arm or a section: use letters, digits and _+.-, and not "
                f"{START!r}, which is the arm without training.",
            )
        for name, section in self.sections.items():
            self._check_section(f"{ROOT}.sections.{name}", section)

    def _check_section(self, where: str, section: SectionConfig) -> None:
        require(
            section.lr is None or section.lr > 0.0,
            f"{where}.lr is {section.lr}; use a number above 0, or null for {ROOT}.lr.",
        )
        for arm in section.arms:
            require(arm in self.arms, unknown_name(f"arm {arm} in {where}.arms", str(arm), self.arms, "arms"))
        require(
            section.world in WORLDS,
            unknown_name(f"world {where}.world={section.world}", section.world, WORLDS, "worlds"),
        )
        require(
            section.warm_start in self.warm_starts,
            unknown_name(
                f"warm start {where}.warm_start={section.warm_start}",
                section.warm_start,
                self.warm_starts,
                "warm starts",
            ),
        )
        for split in section.splits:
            require(
                split in SPLITS,
                unknown_name(f"split {split} in {where}.splits", str(split), SPLITS, "splits"),
            )
        for key in ("arms", "seeds", "splits"):
            values = getattr(section, key)
            require(
                len(values) > 0 and len(set(values)) == len(values),
                f"{where}.{key} is {values}; list one or more, each once.",
            )
        require(
            all(isinstance(seed, int) and not isinstance(seed, bool) for seed in section.seeds),
            f"{where}.seeds is {section.seeds}; list whole numbers, such as [1,2,3].",
        )


def load_study(words: Sequence[str]) -> StudyConfig:
    """Read a study and apply the words of a command line.

    Args:
        words: ``study=<name>`` and overrides of the study's own keys, ``KEY=VALUE``.

    Raises:
        ConfigurationError: no such study, a word that is no override, an unknown key or an impossible value.
    """
    for word in words:
        require("=" in word, f"{word!r} is not an override; write KEY=VALUE, such as steps=10.")
    chosen = [word.partition("=")[2] for word in words if word.startswith("study=")]
    known = studies()
    require(len(chosen) == 1, f"Name one study: study=NAME. There are: {', '.join(known)}.")
    require(chosen[0] in known, unknown_name(f"study study={chosen[0]}", chosen[0], known, "studies"))
    text = files(CONFIG_MODULE).joinpath(STUDIES, f"{chosen[0]}.yaml").read_text(encoding="utf-8")
    try:
        given = OmegaConf.from_dotlist([word for word in words if not word.startswith("study=")])
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(text), given), resolve=True)
    except OmegaConfBaseException as problem:
        raise ConfigurationError(" ".join(str(problem).split())) from problem
    assert isinstance(merged, dict)
    return parse_study({str(key): value for key, value in merged.items()} | {"name": chosen[0]})


def studies() -> list[str]:
    """Names of the studies in the package of configurations."""
    folder = files(CONFIG_MODULE).joinpath(STUDIES)
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def parse_study(mapping: Mapping[str, Any]) -> StudyConfig:
    """Check a study's mapping and turn it into its typed form.

    Raises:
        ConfigurationError: For unknown or missing keys, wrong types and values out of range.
    """
    typed = dict(mapping)
    for key, parse in (
        ("arms", _arm),
        ("warm_starts", _warm_start),
        ("sections", SectionConfig.from_mapping),
    ):
        blocks = mapping.get(key)
        where = f"{ROOT}.{key}"
        if not isinstance(blocks, Mapping) or not blocks:
            raise ConfigurationError(f"{where} is {blocks!r}; give it some entries.")
        typed[key] = {str(name): parse(block, f"{where}.{name}") for name, block in blocks.items()}
    return StudyConfig.from_mapping(typed, ROOT)


def _arm(mapping: Any, where: str) -> ArmConfig:
    return ArmConfig.from_mapping(mapping, where)


def _warm_start(mapping: Any, where: str) -> WarmStartConfig:
    known = {field.name: field for field in dataclasses.fields(WarmStartConfig)}
    if not isinstance(mapping, Mapping):
        raise ConfigurationError(f"{where} is {mapping!r}; give it keys, or {{}} for those of the demo.")
    for name, value in mapping.items():
        require(name in known, unknown_name(f"key {where}.{name}", str(name), known, "keys"))
        require(
            isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0,
            f"{where}.{name} is {value!r}; give it a number of at least 0.",
        )
    return WarmStartConfig(**mapping)
