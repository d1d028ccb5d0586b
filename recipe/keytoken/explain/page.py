"""The page that ``keytoken explain`` prints; of a fixed width and without colours where nobody watches."""

from __future__ import annotations

import io
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from keytoken.explain import loss_words, words
from keytoken.explain.notes import METHOD, Note, Preset, read_preset
from keytoken.explain.run import Run, compose_run, values_of

WIDTH = 100  # of a page that is piped, and the widest on a terminal
INDENT = 2


def explain(overrides: Sequence[str], file: TextIO | None = None) -> None:
    """Print what a method is, as the configuration of a run has it.

    Args:
        overrides: Words as for ``keytoken train``; without an experiment that of the demo is taken.
        file: Where to; None for standard output.

    Raises:
        ConfigurationError: What ``keytoken train`` would refuse.
    """
    run = compose_run(overrides)
    console = Console(file=file or sys.stdout, highlight=False)
    if console.is_terminal:
        console.width = min(console.width, WIDTH)
        console.print(*page(run, console.width))
    else:
        console.file.write(plain_page(run))


def plain_page(run: Run) -> str:
    """The page as text for a file or a pipe."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(*page(run, WIDTH))
    return "".join(f"{line.rstrip()}\n" for line in captured.get().rstrip().splitlines())


def page(run: Run, width: int) -> Iterator[RenderableType]:
    """The sections of the page, from top to bottom."""
    preset = read_preset(run.preset)
    yield from _heading(run, preset, width)
    for title, text in words.sources(run.keytoken.method).items():
        yield section(f"What it is: {title}", Text("\n".join(docstring_lines(text, width - INDENT))))
    yield section("Passes over the answers of a step", rows_table(words.passes(run), run))
    if words.signals(run.keytoken.method):
        yield section("Signals: p under the real input, q under a view", signals_table(run))
    yield section("Token weights", rows_table(words.weighing(run), run))
    yield section("Loss", rows_table(loss_words.loss(run), run))
    beside = {key: value for key, value in _values(run, preset) if not key.startswith(f"{METHOD}.")}
    if beside:
        yield section("Set beside the method, in verl's configuration", settings_table(beside, run))
    yield section("What is known of its values", notes_table(run, preset))


def _heading(run: Run, preset: Preset, width: int) -> Iterator[RenderableType]:
    yield Text(f"method={run.preset}", style="bold")
    for name, heading in preset.headings.items():
        text = heading if name == run.preset else f"Builds on {name}: {heading}"
        yield Padding(Text("\n".join(textwrap.wrap(text, width - INDENT))), (0, 0, 0, INDENT))
    lines = [f"In the configuration of experiment={run.experiment}."]
    if run.overridden:
        lines.append("* marks what the command line changed:")
        lines += [f"  {_was(key, run)}" for key in run.overridden]
    yield Padding(Text("\n".join(lines)), (0, 0, 0, INDENT))


def _was(key: str, run: Run) -> str:
    now, before = values_of(run.config)[key], run.overridden[key]
    return f"{key} = {words.value_text(now)} (was {words.value_text(before)})"


def section(title: str, body: RenderableType) -> Group:
    """A title and what stands below it, set in."""
    return Group(Text(f"\n{title}", style="bold"), Padding(body, (0, 0, 0, INDENT)))


def _table(*columns: str, header: bool = True) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD if header else None, show_header=header, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for name in columns[:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table


def rows_table(rows: Iterable[words.Row], run: Run) -> Table:
    """Labels and texts; a star behind a label whose keys the command line changed."""
    table = _table("", "", header=False)
    for row in rows:
        table.add_row(Text(row.label + _star(row.keys, run)), Text(row.text))
    return table


def _star(keys: Iterable[str], run: Run) -> str:
    return " *" if any(key in run.overridden for key in keys) else ""


def signals_table(run: Run) -> Table:
    """One row for each signal in use."""
    table = _table("signal", "share", "weight", "score")
    for row in words.signals(run.keytoken.method):
        table.add_row(*map(Text, (row.name + _star(row.keys, run), row.share, row.weight, row.score)))
    return table


def settings_table(values: dict[str, Any], run: Run) -> Table:
    """Keys and values."""
    table = _table("", "", header=False)
    for key, value in values.items():
        table.add_row(Text(key + _star([key], run)), Text(words.value_text(value)))
    return table


def notes_table(run: Run, preset: Preset) -> Table:
    """Every key that the preset or the command line sets below the method, and how well it is known."""
    table = _table("key", "value", "status", "remark")
    last = ""
    for key, value in _values(run, preset):
        note = preset.notes.get(key)
        mark, remark = _status(key, value, note, run)
        table.add_row(
            Text(key.removeprefix(f"{METHOD}.")),
            Text(words.value_text(value)),
            Text(mark),
            Text("as above" if remark and remark == last else remark),
        )
        last = remark
    return table


def _status(key: str, value: Any, note: Note | None, run: Run) -> tuple[str, str]:
    preset = f"preset: {words.value_text(note.value)}" if note else "not a key of the preset"
    if key in run.overridden:
        return "overridden *", preset
    if note is None or (note.value != value and "${" not in str(note.value)):
        return "experiment", f"set by experiment={run.experiment}; {preset}"
    return note.mark, note.remark


def _values(run: Run, preset: Preset) -> Iterator[tuple[str, Any]]:
    """What the preset sets, and what was changed of the method besides, with the values of the run."""
    values = values_of(run.config)
    blocks = {parent for key in preset.notes for parent in _parents(key)}  # a value took the place of one
    changed = [key for key in (*run.overridden, *blocks) if key.startswith(f"{METHOD}.")]
    for key in dict.fromkeys([*preset.notes, *changed]):
        if key in values and key != f"{METHOD}.name":
            yield key, values[key]


def _parents(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def docstring_lines(text: str, width: int) -> Iterator[str]:
    """A docstring as plain text: paragraphs refilled, formulas and tables as they stand.

    Args:
        text: In reStructuredText, as this project writes it.
        width: Longest line. A longer one in a formula loses the blanks that align it, and is broken.
    """
    for number, block in enumerate(re.split(r"\n\s*\n", words.plain(text))):
        if number:
            yield ""
        if all(line.startswith("  ") for line in block.splitlines()):
            for line in textwrap.indent(textwrap.dedent(block), "  ").splitlines():
                squeezed = line if len(line) <= width else re.sub(r"(?<=.{10}) {3,}", "  ", line)
                yield from textwrap.wrap(squeezed, width, subsequent_indent=" " * 10)
            continue
        for item in re.split(r"\n(?=- )", block):
            hanging = "  " if item.startswith("- ") else ""
            yield from textwrap.wrap(" ".join(item.split()), width, subsequent_indent=hanging)
