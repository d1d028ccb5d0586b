"""The shape of the source tree: which way imports point, and how long files and functions may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = {"recipe": "keytoken", "kernels": "keytoken_kernels", "configs": "keytoken_configs"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# A part may import from itself and from lines further down; within the first and the last line anything goes.
COMMANDS = ("bench", "doctor", "evaluation", "explain", "golden", "plan", "study", "submit")
CONFIGS = ("loss_config", "view_config", "parity_config", "attribution_config", "cluster_config")
LAYERS = (
    ("cli", "parser", "main", "compose", "progress", *COMMANDS),
    ("verl_adapter",),
    ("lens",),
    ("workers",),
    ("demo",),
    ("validate", "resources", "stop_request"),
    ("batch_rules",),
    ("loss_rules",),
    ("data",),
    ("prefix",),
    ("scoring",),
    ("attribution", "losses", "rewards", "parity"),
    ("schema", *CONFIGS, "block", "words", "fields", "checks", "errors", "secret"),
)
PURE = {*LAYERS[-2], *LAYERS[-1]}
PURE_MAY_IMPORT = {"torch", "numpy", "keytoken", "keytoken_kernels"} | sys.stdlib_module_names
REWARDS_MAY_IMPORT = {"rouge_score", "jiwer", "rapidfuzz"}  # text distances
ONLY_THE_ADAPTER_IMPORTS = {"verl", "ray", "vllm", "transfer_queue"}
ADAPTER = {"verl_adapter", "workers", "submit"}  # submit talks to Ray's job server, before any of the rest
# The one door to what is not public in verl; workers sit below the adapter and go through it as well.
OPEN_TO_WORKERS = "keytoken.verl_adapter.compat"


def sources(*roots: str) -> list[Path]:
    return sorted(
        path
        for root in roots
        for path in (ROOT / root / SOURCE_ROOTS[root]).rglob("*.py")
        if "__pycache__" not in path.parts
    )


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield node.lineno, base
            if base == "keytoken":
                yield from ((node.lineno, f"keytoken.{alias.name}") for alias in node.names)


def part_of(path: Path) -> str:
    """First level below ``recipe/keytoken``: ``losses`` for losses/policy.py, ``schema`` for schema.py."""
    return path.relative_to(ROOT / "recipe" / "keytoken").parts[0].removesuffix(".py")


def layer_of(part: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


def may_import(part: str, target: str) -> bool:
    own, other = layer_of(part), layer_of(target)
    return part == target or own < other or (own == other and own in (0, len(LAYERS) - 1))


def report(offenders: list[str], rule: str) -> None:
    assert not offenders, f"{rule}:\n  " + "\n  ".join(offenders)


def test_every_part_has_a_layer() -> None:
    known = {part for parts in LAYERS for part in parts}
    unknown = sorted({part_of(path) for path in sources("recipe")} - known - {"__init__"})
    report(unknown, "parts without a place in LAYERS")


def test_imports_point_one_way() -> None:
    offenders = [
        f"{name_of(path)}:{line} imports {name}"
        for path in sources("recipe")
        for line, name in imports(path)
        if name.startswith("keytoken.")
        and not may_import(part_of(path), name.split(".")[1])
        and not (part_of(path) == "workers" and name == OPEN_TO_WORKERS)
    ]
    report(offenders, "imports against the direction of LAYERS")


def test_no_relative_imports() -> None:
    found = [
        f"{name_of(path)}:{line}"
        for path in sources(*SOURCE_ROOTS)
        for line, name in imports(path)
        if name.startswith(".")
    ]
    report(found, "relative imports")


def test_the_pure_core_imports_no_framework() -> None:
    offenders = [
        f"{name_of(path)}:{line} imports {name}"
        for path in sources("recipe")
        if part_of(path) in PURE
        for line, name in imports(path)
        if name.split(".")[0] not in PURE_MAY_IMPORT
        and not (part_of(path) == "rewards" and name.split(".")[0] in REWARDS_MAY_IMPORT)
    ]
    report(offenders, "imports that the pure core may not have")


def test_only_the_adapter_knows_verl_and_ray() -> None:
    offenders = [
        f"{name_of(path)}:{line} imports {name}"
        for path in sources("recipe")
        if part_of(path) not in ADAPTER
        for line, name in imports(path)
        if name.split(".")[0] in ONLY_THE_ADAPTER_IMPORTS
    ]
    report(offenders, "imports of verl, ray or vllm outside verl_adapter and workers")


def test_kernels_and_configs_import_nothing_of_ours() -> None:
    offenders = [
        f"{name_of(path)}:{line} imports {name}"
        for root in ("kernels", "configs")
        for path in sources(root)
        for line, name in imports(path)
        if name.split(".")[0] in set(SOURCE_ROOTS.values()) - {SOURCE_ROOTS[root]}
    ]
    report(offenders, "imports from kernels or configs into the recipe")


@pytest.mark.parametrize("root", ["recipe", "kernels", "configs"])
def test_every_module_says_what_it_is(root: str) -> None:
    """Empty package files have nothing to say."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources(root)}
    silent = [name_of(path) for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
    report(silent, "modules without a docstring")


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*SOURCE_ROOTS)}
    long = [f"{name_of(path)}: {lines} lines" for path, lines in lengths.items() if lines > MAX_FILE_LINES]
    report(long, f"files above {MAX_FILE_LINES} lines")


def test_functions_are_short() -> None:
    """Without the docstring: a formula, a source and every departure may take their room."""
    offenders = []
    for path in sources(*SOURCE_ROOTS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                signature = node.body[0].lineno - node.lineno
                lines = signature + (node.end_lineno or 0) - first.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    offenders.append(f"{name_of(path)}:{node.lineno} {node.name}: {lines} lines")
    report(offenders, f"functions above {MAX_FUNCTION_LINES} lines")


def test_no_copied_training_loop() -> None:
    """verl's loop is extended step by step, never written again."""
    offenders = [
        f"{name_of(path)}:{node.lineno} defines {node.name}"
        for path in sources("recipe")
        if part_of(path) == "verl_adapter"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in {"fit", "_step_once"}
        if f"super().{node.name}(" not in ast.unparse(node)
        or any(isinstance(inside, ast.For | ast.While) for inside in ast.walk(node))
    ]
    report(offenders, "copies of verl's training loop")
