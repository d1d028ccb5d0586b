"""From what a user names to a file: the exports of a run as a page, or one answer as a picture."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from keytoken.errors import DataError
from keytoken.lens.page import build_page
from keytoken.lens.read import Export, find_files, read_export

# Of one page, unless steps are named.
MAX_ANSWERS = 2000
MAX_TOKENS = 1_500_000  # about 65 bytes each


def write_lens(
    source: Path,
    *,
    out: Path | None = None,
    step: int | None = None,
    compare: str | None = None,
    say: Callable[[str], None],
) -> Path:
    """Write the page; returns its file.

    Args:
        source: A run folder, its folder ``tokens``, or one file of it.
        out: The file to write; None for ``lens.html`` in the run folder.
        step: The one step to show; None for all of them.
        compare: ``RUN`` or ``RUN/STEP``, or ``STEP`` of the same run: shown beside the first one.
        say: Prints a line.

    Raises:
        DataError: nothing there can be read, or the file cannot be written.
    """
    exports = read_source(source, step, say)
    other = None if compare is None else read_other(compare, source, say)
    if other is not None:
        exports = [export for export in exports if export.file.resolve() != other.file.resolve()]
        if not exports:
            raise DataError(
                f"--compare {compare}: the same export as the other one; name another step or run"
            )
        exports.append(other)
        _require_common(exports, compare)
    target = out or folder_of(exports[0].file) / "lens.html"
    page = build_page(exports, title=exports[0].run, compare=None if other is None else len(exports) - 1)
    with writing(target):
        target.write_text(page, encoding="utf-8")
    return target


def _require_common(exports: Sequence[Export], compare: str | None) -> None:
    """Two exports are compared on prompts with the same text and the same clips.

    Raises:
        DataError: they have none.
    """

    def prompts(export: Export) -> dict[tuple[str, tuple[str, ...]], str]:
        return {
            (answer.prompt, tuple(map(str, answer.clips or ()))): answer.prompt_id
            for answer in export.answers
        }

    *firsts, other = exports
    mine = {key: name for export in firsts for key, name in prompts(export).items()}
    theirs = prompts(other)
    if mine.keys() & theirs.keys() or not mine or not theirs:
        return
    raise DataError(
        f"--compare {compare}: no prompt in common: {firsts[0].run} has {len(mine)} in "
        f"{_steps(firsts)}, {other.run} has {len(theirs)} in step {other.step}, with other text or clips. "
        "Two runs have the same prompts in a step if data and keytoken.seed are the same: compare the same "
        "step of two such runs, --step N --compare RUN/N"
    )


def _steps(exports: Sequence[Export]) -> str:
    """``step 10`` or ``steps 10, 20``."""
    return f"step{'s' if len(exports) > 1 else ''} {', '.join(str(export.step) for export in exports)}"


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Make the folder of a file that is written inside.

    Raises:
        DataError: the folder or the file cannot be written, such as on a full or read-only disk.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as problem:
        raise DataError(
            f"{target}: cannot be written ({problem.strerror or problem}); name another file by --out"
        ) from problem


def read_source(source: Path, step: int | None, say: Callable[[str], None]) -> list[Export]:
    """The exports to show. A file that cannot be read is named and left out if there are others.

    Raises:
        DataError: none is left.
    """
    files = find_files(source)
    if step is not None:
        files = [file for file in files if file.stem == f"step_{step:06d}"] or _no_step(source, step, files)
    exports, problems = [], []
    for file in files:
        try:
            exports.append(read_export(file))
        except DataError as error:
            problems.append(error)
    if not exports:
        raise problems[0]
    for problem in problems:
        say(f"left out: {problem}")
    return _few_enough(exports, say)


def read_other(compare: str, source: Path, say: Callable[[str], None]) -> Export:
    """The export to compare with: a run (its last step), a run and a step, a file, or a step of this run.

    Raises:
        DataError: there is no such export.
    """
    path = Path(compare)
    if path.exists():
        return read_source(path, None, say)[-1]
    if path.name.isdigit():
        return read_source(path.parent if len(path.parts) > 1 else source, int(path.name), say)[0]
    raise DataError(f"--compare {compare}: no such run; give RUN, RUN/STEP, or a STEP of the same run")


def _no_step(source: Path, step: int, files: Sequence[Path]) -> list[Path]:
    steps = ", ".join(str(int(file.stem.removeprefix("step_"))) for file in files if "step_" in file.stem)
    raise DataError(f"{source}: step {step} was not exported; these were: {steps}")


def _few_enough(exports: list[Export], say: Callable[[str], None]) -> list[Export]:
    """Evenly many steps of a long run, the first and the last among them; says which are left out."""
    total = sum(len(export.answers) for export in exports)
    tokens = sum(len(answer.texts) for export in exports for answer in export.answers)
    if (total <= MAX_ANSWERS and tokens <= MAX_TOKENS) or len(exports) == 1:
        return exports
    part = min(MAX_ANSWERS / max(total, 1), MAX_TOKENS / max(tokens, 1))
    count = max(2, int(len(exports) * part))
    kept = sorted({round(i * (len(exports) - 1) / (count - 1)) for i in range(count)})
    much = f"{total} answers of {tokens} tokens are many for one page"
    say(f"{much}: {len(kept)} of {len(exports)} steps; --step N shows one")
    return [exports[i] for i in kept]


def folder_of(file: Path) -> Path:
    """The run folder of an export."""
    folder = file.absolute().parent
    return folder.parent if folder.name == "tokens" else folder
