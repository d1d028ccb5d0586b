"""Python, the packages against the lock, and whether those of the stack can be imported."""

import platform
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.version import InvalidVersion, Version

import keytoken
from keytoken.doctor.child import run_child
from keytoken.doctor.finding import Finding, Subject, fail, of_error, ok, several, warn
from keytoken.errors import VersionError
from keytoken.verl_adapter.shims.hooks import on_cpu
from keytoken.verl_adapter.versions import check_versions

PYTHON = (3, 11)  # the only one that the locked versions exist for
_ADMITTED = ((3, 10), (3, 13))  # python_requires of setup.py: from the first, below the second
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)
_IMPORT_LIMIT_S = 300.0
STACK = ("torch", "transformers", "ray", "tensordict", "transfer_queue", "verl", "vllm")


def python(subject: Subject) -> Finding:
    """The interpreter and the system."""
    found = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info[:2] != PYTHON:
        words = f"{found}; the locked packages exist for Python 3.11 only"
        remedy = "Make an environment of Python 3.11: KEYTOKEN_PYTHON=/path/to/python3.11 make setup"
        admitted = _ADMITTED[0] <= sys.version_info[:2] < _ADMITTED[1]
        return warn(words, remedy) if admitted else fail(words, remedy)
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return warn(f"{found}; the stack was run on Linux x86_64 only", "Use such a machine or a container.")
    return ok(found)


def packages(subject: Subject) -> Finding:
    """Versions that KeyToken insists on, then those of the whole lock."""
    try:
        found = check_versions()
    except VersionError as problem:
        return of_error(problem)
    lock = lock_file()
    if lock is None:
        return ok(f"verl {found['verl']} and {len(found) - 1} more as needed; the lock file is not installed")
    pins = _PIN.findall(lock.read_text(encoding="utf-8"))
    different = [text for name, wanted in pins if (text := _difference(name, wanted))]
    if different:
        return warn(
            f"{len(different)} of {len(pins)} packages differ from requirements/{lock.name}: "
            f"{several(different, 5)}",
            f"pip install --no-deps -r requirements/{lock.name}, or go on: the packages that KeyToken names "
            "lines of have the right versions.",
        )
    return ok(f"all {len(pins)} packages of requirements/{lock.name}, verl {found['verl']} among them")


def lock_file() -> Path | None:
    """The lock of this installation's stack, which lies beside the source; None in an installed wheel."""
    root = Path(keytoken.__file__ or "").resolve().parents[2]
    lock = root / "requirements" / ("cpu.txt" if on_cpu() else "gpu.txt")
    return lock if lock.is_file() else None


def _difference(name: str, wanted: str) -> str:
    """``numpy 2.2.0 (locked: 2.3.5)``; nothing where they agree but for a local part such as +cpu."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} missing (locked: {wanted})"
    try:
        same = found == wanted or Version(found).public == Version(wanted).public
    except InvalidVersion:
        same = False
    return "" if same else f"{name} {found} (locked: {wanted})"


def imports(subject: Subject) -> Finding:
    """Import the stack in a child, as a worker of a run does; compiled parts fail here and not before."""
    code = (
        "import importlib, sys\n"
        "from keytoken.verl_adapter import register\n"
        "for name in sys.argv[1:]:\n"
        "    print(name, flush=True)\n"
        "    importlib.import_module(name)\n"
    )
    done = run_child(["-c", code, *STACK], _IMPORT_LIMIT_S)
    if done.error:
        last = (done.output.split() or ["keytoken"])[-1]
        return fail(
            f"importing {last}: {done.error}",
            "Install the locked set again (on a CPU: make setup); a missing library (.so) comes from the "
            "system's packages, such as libnuma1.",
        )
    return ok(f"{', '.join(STACK)} can be imported ({done.seconds:.0f} s)")
