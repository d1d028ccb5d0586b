"""What is submitted: the words of a training job, its environment and where its code comes from."""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keytoken.block import require

# The job's driver is `keytoken train`, called so that it is also found where only the packages were sent.
PROGRAM = ("python", "-m", "keytoken.cli", "train")
# The packages of a checkout, and files of theirs that no process needs.
PACKAGES = ("recipe/keytoken", "kernels/keytoken_kernels", "configs/keytoken_configs")
EXCLUDED = ("**/__pycache__/", "*.pyc")
# Variables of this machine that a configuration may read.
OWN_PREFIX = "KEYTOKEN_"
# A printed command stands in for a value by a word that no value contains, and becomes "$NAME".
_STAND_IN = "@@{}@@"


@dataclasses.dataclass(frozen=True)
class Request:
    """A training job as a job server takes it.

    Attributes:
        overrides: The words of ``keytoken train``.
        name: The job's id on the cluster; restarts append to it.
        variables: Environment variables of the job, which all its processes inherit.
        source: A checkout whose packages the job uses; None for those installed on the cluster.
    """

    overrides: tuple[str, ...]
    name: str
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: Path | None = None

    def entrypoint(self) -> str:
        """The command line of the job's driver, quoted for a shell."""
        return shlex.join([*PROGRAM, *self.overrides])

    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment; folders in it are sent along when the job is submitted."""
        environment: dict[str, Any] = {"env_vars": dict(self.variables)} if self.variables else {}
        if self.source is not None:
            environment["py_modules"] = [str(self.source / package) for package in PACKAGES]
            environment["excludes"] = list(EXCLUDED)
        return environment

    def plain_command(self, address: str) -> str:
        """The ``ray job submit`` that does the same; values of variables are left to the shell."""
        hidden = dataclasses.replace(
            self, variables={name: _STAND_IN.format(name) for name in self.variables}
        )
        words = ["ray", "job", "submit", "--address", address, "--submission-id", self.name]
        environment = hidden.runtime_env()
        words += ["--runtime-env-json", json.dumps(environment)] if environment else []
        command = shlex.join([*words, "--", *PROGRAM, *self.overrides])
        for name in self.variables:
            command = command.replace(_STAND_IN.format(name), f"'\"${name}\"'")
        return command


def variables_of(names: Sequence[str]) -> dict[str, str]:
    """The variables of this environment that a job takes along: KeyToken's own and those named.

    Args:
        names: ``NAME`` for the value that the variable has here, or ``NAME=VALUE``.

    Raises:
        ConfigurationError: a name that is none, or one that is not set here.
    """
    found = {name: value for name, value in os.environ.items() if name.startswith(OWN_PREFIX)}
    for word in names:
        name, given, value = word.partition("=")
        require(
            re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None,
            f"--env {word}: {name!r} is no name of a variable; give --env NAME or --env NAME=VALUE.",
        )
        require(
            bool(given) or name in os.environ,
            f"--env {name}: the variable is not set here; set it, or give --env {name}=VALUE.",
        )
        found[name] = value if given else os.environ[name]
    return found


def source_of(folder: str | None) -> Path | None:
    """The checkout whose packages a job uses.

    Raises:
        ConfigurationError: a folder without them.
    """
    if folder is None:
        return None
    source = Path(folder).expanduser().absolute()
    missing = [package for package in PACKAGES if not (source / package / "__init__.py").is_file()]
    require(
        not missing,
        f"--source {folder}: no {missing[0] if missing else ''} there; name the top folder of a KeyToken "
        "checkout, or leave --source away to use the packages that are installed on the cluster.",
    )
    return source
