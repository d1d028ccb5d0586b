"""The sampling contract that a command line names.

``sampling=eval_64f`` is a preset, ``sampling=FILE.json`` the contract that a run or a checkpoint has saved,
and ``sampling.max_frames=8`` changes one key of either, or of what the command takes by itself. The words
reach a command's settings joined, as ``eval_64f,max_frames=8`` (:func:`keytoken.words.parse_words`).
"""

from pathlib import Path
from typing import Any

import yaml

from keytoken.data.contract import SamplingContract
from keytoken.errors import ConfigurationError

SAMPLING = {"keys": True}  # metadata of a field of settings that takes such words


def named_contract(words: str, usual: SamplingContract | None = None) -> SamplingContract:
    """The contract of the words of a setting.

    Args:
        words: A preset, or a file, and changed keys, apart by commas; the first part may be empty.
        usual: What the keys change where there is neither preset nor file.

    Raises:
        ConfigurationError: An unknown preset or key, a value that cannot be, or keys of nothing.
        DataError: A file that is no contract.
    """
    name, *changes = words.split(",")
    if name.endswith(".json"):
        contract = SamplingContract.read(Path(name).expanduser())
    elif name or usual is None:
        contract = SamplingContract.preset(name)
    else:
        contract = usual
    if not changes:
        return contract
    return SamplingContract.from_mapping({**_fields(contract), **dict(map(_pair, changes))}, where="sampling")


def _fields(contract: SamplingContract) -> dict[str, Any]:
    return {name: getattr(contract, name) for name in contract.__dataclass_fields__}


def _pair(change: str) -> tuple[str, Any]:
    key, equals, value = change.partition("=")
    if not equals:
        raise ConfigurationError(
            f"sampling: {change!r} is no key; write sampling=PRESET sampling.KEY=VALUE, such as "
            "sampling.max_frames=8"
        )
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as problem:
        raise ConfigurationError(f"sampling.{key}={value}: give it a number or a name") from problem
