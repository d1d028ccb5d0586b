"""Reads per-token exports (:mod:`keytoken.verl_adapter.export`) of this and of earlier versions.

What an older export does not hold is named in :attr:`Export.missing`, never made up.
"""

import codecs
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from keytoken.data.part import AnyClip, named_clip
from keytoken.errors import DataError

NEWEST_VERSION = 2
METADATA_KEY = b"keytoken"
# Lists with one number for each token.
NUMBERS = (
    *("log_prob", "log_prob_masked", "log_prob_shuffled", "entropy", "truncated_entropy", "disagreement"),
    *("visual", "temporal", "uncertainty", "weight", "advantage"),
)
_OF_A_RUN = ("config.yaml", "metrics.jsonl", "tokens")
SIGNALS = ("visual", "temporal", "entropy")
REQUIRED = ("step", "prompt_id", "answer", "prompt", "reward", "token_ids", "tokens", "weight")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer of an export.

    Attributes:
        prompt_id: Names the prompt.
        number: Of the answer within its group.
        prompt: The prompt's text.
        reward: Sum of its rewards; NaN if the export does not say.
        accuracy: What the reward function said of it; None if nothing.
        clips: The prompt's videos, or parts of them; None if the export does not say.
        group_size: Answers to the prompt in the batch; None if the export does not say.
        row_key: What ties know it by; None if the export does not say.
        applies: For each signal whether the prompt has it.
        texts: [T] what each token adds to the text; a character of several tokens stands at the last one.
        counted: [T] bool, tokens of the loss.
        values: Of :data:`NUMBERS` those that were exported, [T] float32.
        selected: Of :data:`SIGNALS` those that selected, [T] bool.
    """

    prompt_id: str
    number: int
    prompt: str
    reward: float
    accuracy: float | None
    clips: tuple[AnyClip, ...] | None
    group_size: int | None
    row_key: int | None
    applies: dict[str, bool]
    texts: tuple[str, ...]
    counted: np.ndarray
    values: dict[str, np.ndarray]
    selected: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """One exported step.

    Attributes:
        run: Name of the run folder.
        file: Where it lies.
        step: The training step.
        version: Of the schema.
        about: What holds for all answers; see the export's documentation. Keys may be absent.
        answers: In the order of the file: by prompt and number.
        missing: What this export does not hold, in sentences.
    """

    run: str
    file: Path
    step: int
    version: int
    about: dict[str, Any]
    answers: tuple[Answer, ...]
    missing: tuple[str, ...]


def find_files(source: Path) -> list[Path]:
    """The exports of a run folder, a folder ``tokens``, or the file itself.

    Raises:
        DataError: there is none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder; give a run folder or a tokens/step_*.parquet")
    for folder in (source / "tokens", source):
        found = sorted(folder.glob("step_*.parquet"))
        if found:
            return found
    if any((source / name).exists() for name in _OF_A_RUN):
        raise DataError(
            f"{source}: no exports (tokens/step_*.parquet). The run has not come to a step that is exported: "
            "set keytoken.export.every_steps=1 for every one, and leave keytoken.export.enabled=true"
        )
    held = sorted(path.name for path in source.iterdir())
    runs = [name for name in held if any((source / name / "tokens").glob("step_*.parquet"))]
    what = f"it holds {', '.join(held[:3])}{', ...' if held[3:] else ''}" if held else "it is empty"
    named = f"; these of its folders are runs with exports: {', '.join(runs[:5])}" if runs else ""
    raise DataError(
        f"{source}: no exports (tokens/step_*.parquet), for this is no run folder: {what}; give the folder "
        f"that keytoken train has written (keytoken.run_dir), or one of the files{named}"
    )


def read_export(file: Path) -> Export:
    """Read one file.

    Raises:
        DataError: not a Parquet file, cut short, of a newer version, or not an export of tokens.
    """
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as problem:
        raise DataError(
            f"{file}: cannot be read as Parquet ({str(problem).splitlines()[0][:120]}); it was cut short or "
            "is of another kind: copy it again, or leave it out"
        ) from problem
    absent = [name for name in REQUIRED if name not in table.column_names]
    if absent:
        raise DataError(
            f"{file}: not an export of tokens: it has no column {', '.join(absent)}; give a file of a run's "
            "folder tokens"
        )
    _require_types(file, table)
    about = _about(file, table.schema.metadata or {})
    version = int(about.get("version", 1))
    if version > NEWEST_VERSION:
        raise DataError(
            f"{file}: written by a newer KeyToken (schema version {version}, this one reads up to "
            f"{NEWEST_VERSION}); update KeyToken"
        )
    steps = set(table["step"].to_pylist())
    if len(steps) > 1:
        raise DataError(f"{file}: holds the steps {sorted(steps)}; give the file of one step")
    step = steps.pop() if steps else int(about.get("step", 0))
    answers, folder = _answers(file, table), _run_folder(file)
    missing = _missing(version, answers, about)
    return Export(
        run=folder.name or str(folder),
        file=file,
        step=int(step),
        version=version,
        about=about,
        answers=answers,
        missing=missing,
    )


def _require_types(file: Path, table: pa.Table) -> None:
    """Refuse columns of another type than the export's.

    Raises:
        DataError: names the column and its type.
    """
    numbers = dict.fromkeys(NUMBERS, pa.types.is_floating)
    flags = dict.fromkeys(("counted", *(f"selected_{name}" for name in SIGNALS)), pa.types.is_boolean)
    for name, is_right in {**numbers, **flags, "tokens": pa.types.is_string}.items():
        if name in table.column_names:
            kind = table.schema.field(name).type
            if not (pa.types.is_list(kind) and is_right(kind.value_type)):
                raise DataError(
                    f"{file}: not an export of tokens: its column {name} is of the type {kind}; give a file "
                    "that a run wrote"
                )


def _run_folder(file: Path) -> Path:
    folder = file.absolute().parent
    return folder.parent if folder.name == "tokens" else folder


def _about(file: Path, metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """The file's own account, or for version 1 what the run's configuration says."""
    if METADATA_KEY in metadata:
        try:
            found = json.loads(metadata[METADATA_KEY])
            return {**found, "version": int(found["version"])}
        except (ValueError, KeyError, TypeError) as problem:
            raise DataError(f"{file}: its metadata are damaged ({problem}); copy it again") from problem
    config = _run_folder(file) / "config.yaml"
    if not config.is_file():
        return {}
    try:
        block = (yaml.safe_load(config.read_text(encoding="utf-8")) or {})["keytoken"]
        wanted = {"method": block.get("method"), "sampling": block.get("sampling")}
        seed = (block.get("attribution") or {}).get("shuffle_seed")
        return {key: value for key, value in {**wanted, "shuffle_seed": seed}.items() if value is not None}
    except (yaml.YAMLError, KeyError, AttributeError, TypeError):
        return {}  # named as missing


def _missing(version: int, answers: tuple[Answer, ...], about: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    if not answers:
        found.append("The export holds no answers.")
    if version < NEWEST_VERSION:
        found.append(
            f"Written by an older KeyToken (schema {version}): without clips, accuracies, whole characters "
            "and what breaks ties; an answer counts as right if its reward is the largest of the step."
        )
    if not (about.get("method") or {}).get("selection"):
        found.append("No selection is known of this export: the method keeps every token, or says nothing.")
    for name in ("visual", "temporal"):
        if answers and all(name not in answer.values for answer in answers):
            found.append(f"The method has no {name} signal here, so there are no scores of it.")
    total = about.get("batch_answers")
    if total is not None and total > len(answers):
        found.append(
            f"{len(answers)} of the batch's {total} answers were exported (keytoken.export.max_responses): "
            "the scope batch means these."
        )
    return tuple(found)


def _answers(file: Path, table: pa.Table) -> tuple[Answer, ...]:
    """Rows as answers; every list is checked to be as long as its answer."""
    flags = {f"selected_{name}" for name in SIGNALS} | {"counted"}
    arrays = {name: _rows_of(table[name]) for name in (*NUMBERS, *flags) if name in table.column_names}
    plain = {
        name: table[name].to_pylist()
        for name in table.column_names
        if name not in arrays and name not in ("token_ids", "step")
    }
    answers = []
    for row in range(table.num_rows):
        given = {name: _known(plain, name, row) for name in ("reward", "accuracy", "group_size", "row_key")}
        texts = _texts(plain, row)
        size = len(texts)
        own = {name: rows[row] for name, rows in arrays.items()}
        for name, values in own.items():
            if values is not None and len(values) != size:
                raise DataError(
                    f"{file}: row {row} has {size} tokens and {len(values)} entries of {name}; the file is "
                    "damaged, write it again"
                )
        counted = own.get("counted")
        answers.append(
            Answer(
                prompt_id=str(plain["prompt_id"][row]),
                number=int(plain["answer"][row]),
                prompt=plain["prompt"][row] or "",
                reward=math.nan if given["reward"] is None else given["reward"],
                accuracy=given["accuracy"],
                clips=_clips(plain, row),
                group_size=None if given["group_size"] is None else int(given["group_size"]),
                row_key=None if given["row_key"] is None else int(given["row_key"]),
                applies=_applies(plain, own, row),
                texts=texts,
                counted=np.ones(size, dtype=bool) if counted is None else counted.astype(bool),
                values={
                    name: values.astype(np.float32)
                    for name in NUMBERS
                    if (values := own.get(name)) is not None
                },
                selected={
                    name: values.astype(bool)
                    for name in SIGNALS
                    if (values := own.get(f"selected_{name}")) is not None
                },
            )
        )
    return tuple(answers)


def _known(plain: Mapping[str, Any], name: str, row: int) -> float | None:
    """A number of a row; None for null, and for the NaN that pandas writes in its place."""
    value = plain[name][row] if name in plain else None
    return None if value is None or math.isnan(value) else float(value)


def _rows_of(column: pa.ChunkedArray) -> list[np.ndarray | None]:
    """Of a column of lists one array for each row, None for null."""
    rows: list[np.ndarray | None] = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy(zero_copy_only=False)
        known = chunk.is_valid().to_numpy(zero_copy_only=False)
        rows += [values[offsets[row] : offsets[row + 1]] if known[row] else None for row in range(len(chunk))]
    return rows


def _clips(plain: Mapping[str, Any], row: int) -> tuple[AnyClip, ...] | None:
    if "clips" not in plain:
        return None
    entries = plain["clips"][row] or ()
    return tuple(named_clip({"video": entry} if isinstance(entry, str) else entry) for entry in entries)


def _texts(plain: Mapping[str, Any], row: int) -> tuple[str, ...]:
    """What each token adds to the text; without bytes each token as it was decoded by itself."""
    if "token_bytes" not in plain or plain["token_bytes"][row] is None:
        return tuple(plain["tokens"][row] or ())
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces = plain["token_bytes"][row]
    texts = [decoder.decode(piece) for piece in pieces]
    rest = decoder.decode(b"", final=True)  # an answer that ends within a character
    return (*texts[:-1], texts[-1] + rest) if texts else ()


def _applies(plain: Mapping[str, Any], own: Mapping[str, Any], row: int) -> dict[str, bool]:
    """Whether a row has the signals. Version 1 does not say; a view that is not there scores exactly 0."""
    found = {"entropy": True}
    for name in ("visual", "temporal"):
        if f"has_{name}" in plain:
            found[name] = bool(plain[f"has_{name}"][row])
        else:
            scores = own.get(name)
            found[name] = scores is not None and bool(np.any(scores != 0))
    return found
