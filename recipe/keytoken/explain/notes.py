"""What the file of a preset says about its values: how well each is known, and why it was chosen.

A comment behind a key, or right above it, belongs to that key and to all below it. The first of the words
``known``, ``reconstructed`` and ``chosen`` in it is its mark. The comment at the head of the file is about
the whole; where it says that all values are known, keys without a mark of their own are.
"""

from __future__ import annotations

import dataclasses
import re
from importlib import resources
from typing import Any

import yaml

METHOD = "keytoken.method"
UNMARKED = "not marked"
_MARK = re.compile(
    r"(?<!not )\b(known in kind|known at second hand|known|reconstructed|chosen)\b", re.IGNORECASE
)
_ALL_KNOWN = re.compile(r"\ball values are known\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """What is known of one value.

    Attributes:
        value: The value that the file gives.
        mark: ``known``, ``known in kind``, ``known at second hand``, ``reconstructed``, ``chosen`` or
            ``not marked``.
        remark: The rest of the comment; may be empty.
        preset: The file that says so.
    """

    value: Any
    mark: str
    remark: str
    preset: str


@dataclasses.dataclass(frozen=True, slots=True)
class Preset:
    """One preset and those that it builds on.

    Attributes:
        headings: The comment at the head of each file by preset, the preset itself first.
        notes: Of every key that one of them sets, by its dotted key; the last word is the preset's own.
    """

    headings: dict[str, str]
    notes: dict[str, Note]


def read_preset(name: str) -> Preset:
    """Read ``method/<name>.yaml`` of the package ``keytoken_configs`` with its comments."""
    text = resources.files("keytoken_configs").joinpath("method", f"{name}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    content = yaml.safe_load(text)
    heading = _comment_block(lines[: root.start_mark.line])
    package = next((words[2] for line in lines if (words := line.split())[1:2] == ["@package"]), METHOD)
    headings = {name: heading}
    notes: dict[str, Note] = {}
    for base in content.get("defaults", []):
        if base != "_self_":
            below = read_preset(base)
            headings |= below.headings
            notes |= below.notes
    own = _notes(root, lines, name, "" if package == "_global_" else package, heading)
    return Preset(headings, {key: note for key, note in notes.items() if not _replaced(key, own)} | own)


def _replaced(key: str, own: dict[str, Note]) -> bool:
    """Whether a block takes the place of this value, or a value that of the block which held it."""
    return any(other.startswith(f"{key}.") or key.startswith(f"{other}.") for other in own)


def _notes(
    node: yaml.MappingNode, lines: list[str], preset: str, prefix: str, heading: str, inherited: str = ""
) -> dict[str, Note]:
    """The notes of a block; ``inherited`` is the comment of the blocks around it."""
    found: dict[str, Note] = {}
    first = not prefix or prefix == METHOD
    for number, (key_node, value_node) in enumerate(node.value):
        if first and key_node.value == "defaults":
            continue
        key = f"{prefix}.{key_node.value}".lstrip(".")
        at_head = first and number == 0  # what stands above the first key is about the file
        comment = _comment(lines, key_node, value_node, at_head) or inherited
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            found |= _notes(value_node, lines, preset, key, heading, comment)
        else:
            found[key] = Note(yaml.safe_load(yaml.serialize(value_node)), *_mark(comment, heading), preset)
    return found


def _comment(lines: list[str], key: yaml.Node, value: yaml.Node, at_head: bool) -> str:
    """The comment behind a key, else the one right above it."""
    block = isinstance(value, yaml.MappingNode) and value.value
    end = key.end_mark.column if block else value.end_mark.column
    behind = lines[key.start_mark.line][end:].partition("#")[2].strip()
    if behind or at_head:
        return behind
    above: list[str] = []
    for line in reversed(lines[: key.start_mark.line]):
        if not line.lstrip().startswith("#"):
            break
        above.insert(0, line)
    return _comment_block(above)


def _comment_block(lines: list[str]) -> str:
    """The text of whole-line comments, but for the directive that hydra reads."""
    comments = [line.strip() for line in lines if line.strip().startswith("#")]
    return " ".join(text for line in comments if not (text := line.lstrip("# ")).startswith("@package"))


def _mark(comment: str, heading: str) -> tuple[str, str]:
    """Mark and remark of a comment."""
    found = _MARK.search(comment)
    if found is None:
        return ("known" if _ALL_KNOWN.search(heading) else UNMARKED), comment
    remark = comment[found.end() :].lstrip(" ,:;") if found.start() == 0 else comment
    return found[1].lower(), remark
