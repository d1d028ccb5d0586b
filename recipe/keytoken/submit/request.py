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
from keytoken.secret import is_secret

# The job's driver is `keytoken train`, called so that it is also found where only the packages were sent.
ENTRY = ("exec", "python", "-m", "keytoken.cli", "train")
# The packages of a checkout, and files of theirs that no process needs.
PACKAGES = ("recipe/keytoken", "kernels/keytoken_kernels", "configs/keytoken_configs")
EXCLUDED = ("**/__pycache__/", "*.pyc")
RUN_DIR = "keytoken_run_dir"  # in a job's metadata
# Variables of this machine that a configuration may read.
OWN_PREFIX = "KEYTOKEN_"
# A step, a validation and a checkpoint of a large model.
STOP_GRACE_S = 900
# A printed command stands in for a value by a word that no value contains, and becomes "$NAME".
_STAND_IN = "@@{}@@"


@dataclasses.dataclass(frozen=True)
class Request:
    """A training job as a job server takes it.

    Attributes:
        overrides: The words of ``keytoken train``.
        name: The job's id on the cluster; restarts append to it.
        run_dir: Its run folder, by which two jobs that would write into one are told.
        variables: Environment variables of the job, which all its processes inherit.
        hidden: Names of those whose values are not printed.
        stop_grace_s: What the job has to end by itself when it is stopped, before it is killed.
        source: A checkout whose packages the job uses; None for those installed on the cluster.
    """

    overrides: tuple[str, ...]
    name: str
    run_dir: str
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    source: Path | None = None
    stop_grace_s: int = STOP_GRACE_S

    def entrypoint(self) -> str:
        """The command line of the job's driver, quoted for a shell.

        Ray gives it to one. A shell that waited for the driver would die of the SIGTERM of ``ray job stop``
        and leave the driver to process 1, which in many containers reaps nobody; Ray would wait for a zombie.
        """
        return shlex.join([*ENTRY, *self.overrides])

    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment; folders in it are sent along when the job is submitted."""
        # Read by the process that Ray starts to watch the job; Ray's own limit is 3 s.
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(self.stop_grace_s), **self.variables}
        environment: dict[str, Any] = {"env_vars": variables}
        if self.source is not None:
            environment["py_modules"] = [str(self.source / package) for package in PACKAGES]
            environment["excludes"] = list(EXCLUDED)
        return environment

    def plain_command(self, address: str) -> str:
        """The ``ray job submit`` that does the same; hidden values are left to the shell.

        Raises:
            ConfigurationError: a hidden value that a shell cannot put into JSON as it is.
        """
        for name in self.hidden:
            require(
                json.dumps(self.variables[name], ensure_ascii=False) == f'"{self.variables[name]}"',
                f"--env {name}: its value holds a quotation mark, a backslash or a line break, which the "
                f"printed command could not hand on; submit without --dry-run, or give --env {name}=VALUE.",
            )
        stand_ins = {name: _STAND_IN.format(name) for name in self.hidden}
        environment = dataclasses.replace(self, variables={**self.variables, **stand_ins}).runtime_env()
        words = ["ray", "job", "submit", "--submission-id", self.name]
        words += ["--runtime-env-json", json.dumps(environment)]
        words += ["--metadata-json", json.dumps(self.metadata())]
        command = shlex.join([*words, "--", *ENTRY, *self.overrides])
        for name, stand_in in stand_ins.items():
            command = command.replace(stand_in, f"'\"${name}\"'")
        # Not --address: a variable of the shell that runs this would win over it.
        return f"RAY_API_SERVER_ADDRESS={shlex.quote(address)} {command}"

    def metadata(self) -> dict[str, str]:
        """What the job server keeps with the job."""
        return {RUN_DIR: self.run_dir}


def variables_of(names: Sequence[str]) -> tuple[dict[str, str], frozenset[str]]:
    """The variables that a job takes along, KeyToken's own and those named, and which of them to hide.

    Args:
        names: ``NAME`` for the value that the variable has here, or ``NAME=VALUE``.

    Raises:
        ConfigurationError: a name that is none, or one that is not set here.
    """
    found = {name: value for name, value in os.environ.items() if name.startswith(OWN_PREFIX)}
    hidden: set[str] = set()
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
        hidden |= set() if given else {name}
    hidden |= {name for name, value in found.items() if is_secret(name, value)}
    return found, frozenset(hidden)


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
