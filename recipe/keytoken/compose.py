"""From the words of a command line to a composed, resolved configuration, by hydra.

Whatever a user can get wrong here becomes one message that names the word, what was expected and the
closest thing that exists; hydra's own messages name files and classes of its search instead.
"""

import difflib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from keytoken.errors import ConfigurationError
from keytoken.schema import unknown_name
from keytoken.secret import shown

CONFIG_MODULE = "keytoken_configs"
ROOT = "train"
STUDIES = "study"  # a folder of sweeps over runs, which no run chooses
# What to do about an environment variable that a configuration file reads and nobody has set.
VARIABLES = {
    "KEYTOKEN_DEMO_DIR": "run `keytoken demo`, which prepares the demo world and sets it, or set it to a "
    "prepared folder, which `keytoken demo --prepare-only` prints",
}


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose ``train.yaml`` with overrides and resolve every interpolation.

    Args:
        overrides: hydra overrides, such as ``experiment=demo_cpu`` or ``trainer.save_freq=10``.

    Raises:
        ConfigurationError: a word that is no override, an unknown key, group option or variable.
    """
    typed = [_parse(text) for text in overrides]
    try:
        config = _compose(overrides)
    except (HydraException, OmegaConfBaseException) as problem:
        raise ConfigurationError(_explain_composition(problem, typed)) from problem
    raw = dict(leaves(OmegaConf.to_container(config, resolve=False)))
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as problem:
        raise ConfigurationError(_explain_interpolation(str(problem), raw)) from problem
    return config


def groups() -> dict[str, list[str]]:
    """KeyToken's configuration groups and the options of each, as they lie in the package."""
    folders = [
        entry
        for entry in files(CONFIG_MODULE).iterdir()
        if entry.is_dir() and entry.name[0] not in "._" and entry.name != STUDIES
    ]
    return {
        folder.name: sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))
        for folder in sorted(folders, key=lambda folder: folder.name)
    }


def choices(overrides: Sequence[str]) -> dict[str, str | None]:
    """The option of each configuration group that overrides lead to; they must compose."""
    return dict(_compose(overrides, return_hydra_config=True).hydra.runtime.choices)


def _needs_reference(kl_coef: Any) -> bool:
    """Whether verl has to compute reference log-probs; the schema refuses what is not a number."""
    return isinstance(kl_coef, (int, float)) and kl_coef > 0


def _share(share: Any, total: Any) -> Any:
    """A share of a count, at least 1; the rules refuse what is not a count."""
    return max(1, round(share * total)) if isinstance(total, int) else total


def _compose(overrides: Sequence[str], return_hydra_config: bool = False) -> DictConfig:
    OmegaConf.register_new_resolver("keytoken.needs_reference", _needs_reference, replace=True)
    OmegaConf.register_new_resolver("keytoken.share", _share, replace=True)
    GlobalHydra.instance().clear()
    folder = str(_verls_files()).replace("'", r"\'")
    verls = f"hydra.searchpath=['file://{folder}']"
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        return compose(ROOT, overrides=[verls, *overrides], return_hydra_config=return_hydra_config)


def _verls_files() -> Path:
    """The folder of verl's configuration files, found without importing verl.

    ``pkg://verl.trainer.config`` names it as well, and hydra would then import verl, torch, Ray and
    transformers, five seconds of processor time before the first misspelt word is reported.

    Raises:
        ConfigurationError: verl is not installed.
    """
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        raise ConfigurationError("verl is not installed; make setup installs the locked set of packages.")
    return Path(spec.origin).parent / "trainer" / "config"


def _parse(text: str) -> Override:
    """One word of the command line, or a message about what is wrong with it."""
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except (OverrideParseException, HydraException) as problem:
        raise ConfigurationError(
            f"{shown(text)!r} is not an override. Write KEY=VALUE, such as trainer.save_freq=10, and quote a "
            "value that holds blanks or any of ,:{}[]() for hydra as well as the shell: 'KEY=\"a value\"'."
        ) from problem
    if override.is_delete():
        return override
    if override.is_sweep_override() or (
        isinstance(override.value(), list) and override.key_or_group in groups()
    ):
        raise ConfigurationError(
            f"{shown(text)!r} gives several values, and a run takes one: call the command once for each. The "
            f"value of a key that is a list itself is written in brackets: {override.key_or_group}=[a,b]."
        )
    if text.rpartition("=")[2].strip() in ("", "???"):
        raise ConfigurationError(
            f"{shown(text)!r} has no value after the equals sign. Give it one, or "
            f"{override.key_or_group}=null for none."
        )
    return override


def _explain_composition(problem: Exception, typed: Sequence[Override]) -> str:
    if (
        isinstance(problem, MissingConfigException)
        and problem.missing_cfg_file
        and problem.options is not None
    ):
        group, _, option = problem.missing_cfg_file.partition("/")
        return unknown_name(f"option {group}={option}", option, problem.options, f"options of {group}")
    missing = re.search(r"Could not (?:override|delete from config\.) '([^']+)'", str(problem))
    if missing:
        word = next(each for each in typed if each.key_or_group == missing[1])
        return _unknown_key(word, typed)
    return " ".join(line.strip() for line in str(problem).splitlines() if line.strip())


def _unknown_key(word: Override, typed: Sequence[Override]) -> str:
    """Names the closest keys of the configuration that the other words, the group choices, select."""
    known_groups = groups()
    chosen = [each.input_line for each in typed if each.key_or_group in known_groups and each.input_line]
    tree = OmegaConf.to_container(_compose(chosen), resolve=False)
    key, line = word.key_or_group, shown(str(word.input_line))
    found = _closest_keys(key, [*known_groups, *(name for name, _ in _nodes(tree))])
    hint = f" Did you mean {' or '.join(found)}?" if found else ""
    if "." in key and not key.startswith("keytoken."):
        hint += f" A key that verl reads but does not list needs a plus sign: +{line}"
    return f"Unknown key {key} in {line!r}.{hint}"


def _closest_keys(key: str, known: Sequence[str]) -> list[str]:
    """Up to three keys: the same place with one name misspelt, else the same last name elsewhere."""
    parts = key.split(".")
    names = set(known)
    depth = next((n for n in range(len(parts)) if ".".join(parts[: n + 1]) not in names), len(parts) - 1)
    parent = "".join(f"{part}." for part in parts[:depth])
    siblings = [name[len(parent) :] for name in known if name.startswith(parent)]
    siblings = [name for name in siblings if "." not in name]
    near = difflib.get_close_matches(parts[depth], siblings, n=1, cutoff=0.7)
    if near:
        whole = ".".join([f"{parent}{near[0]}", *parts[depth + 1 :]])
        return [whole if whole in names else f"{parent}{near[0]}"]
    same_name = [name for name in known if name.rpartition(".")[2] == parts[-1]]
    return same_name[:3] or difflib.get_close_matches(key, known, n=1, cutoff=0.7)


def _explain_interpolation(problem: str, raw: dict[str, Any]) -> str:
    variable = re.search(r"Environment variable '([^']+)' not found", problem)
    if variable:
        name = variable[1]
        users = [key for key, value in raw.items() if f"${{oc.env:{name}" in str(value)]
        remedy = VARIABLES.get(name, "export it, or give those keys a value")
        return f"The environment variable {name}, used by {', '.join(users)}, is not set: {remedy}."
    missing = re.search(r"Interpolation key '([^']+)' not found", problem)
    if missing:
        users = [key for key, value in raw.items() if f"${{{missing[1]}}}" in str(value)]
        return f"{missing[1]}, used by {', '.join(users)}, does not exist: restore it, or give those a value."
    block = re.search(r"node `([^`]+)` is not a container", problem)
    if block:
        return f"{block[1]} is a block of keys; set one of its keys instead: {block[1]}.KEY=VALUE."
    return " ".join(problem.split())


def _nodes(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every node below the root with its dotted name, blocks before what they hold."""
    for name, value in tree.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from _nodes(value, f"{prefix}{name}.")


def leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every value of a configuration, given as nested dicts, with its dotted key."""
    return ((name, value) for name, value in _nodes(tree) if not isinstance(value, dict))
