"""The data files of a run: rows, media, and whether a sample of the clips decodes."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig

from keytoken.data.cache.store import clip_shape
from keytoken.data.child import ClipProcess
from keytoken.data.contract import SamplingContract
from keytoken.data.headers import tokens_of_frames
from keytoken.data.part import Part, clip_path
from keytoken.data.quarantine import named_clips
from keytoken.doctor.finding import Finding, Subject, fail, ok, several, skip, warn
from keytoken.errors import ClipError, DataError

_SHORT_ROWS = 256  # looked at before every run, from the start of a file
_SAMPLE = 8  # clips that are decoded
_CLIP_LIMIT_S = 60.0

Row = Mapping[str, Any]


def data_rows(subject: Subject) -> Finding:
    """Every row has what verl and the reward read, and a training step finds enough of them."""
    counts, others = {}, []
    for key in ("train_files", "val_files"):
        total = 0
        for path in files_of(subject, key):
            if path.suffix != ".parquet":
                others.append(path.name)
                continue
            try:
                total += pq.ParquetFile(path).metadata.num_rows
                reason = next(_faults(read_rows(path, subject), subject.run.data), "")
            except (OSError, pa.ArrowException) as problem:
                reason = f"no Parquet file that can be read ({str(problem).splitlines()[0][:150]})"
            if reason:
                return fail(f"data.{key}: {path}: {reason}", "Write the file again: keytoken data prepare")
        counts[key] = total
    batch = subject.run.data.train_batch_size
    if others:
        return skip(f"{several(others)}: only Parquet files are looked at")
    if counts["train_files"] < batch:
        return fail(
            f"data.train_files has {counts['train_files']} rows, data.train_batch_size is {batch}",
            "The loader drops an incomplete batch, so there would be no step. Lower data.train_batch_size.",
        )
    seen = f", the first {_SHORT_ROWS} of each file looked at" if subject.short else ""
    return ok(f"{counts['train_files']:,} rows to train on, {counts['val_files']:,} held out{seen}")


def files_of(subject: Subject, key: str) -> list[Path]:
    """The files of ``data.train_files`` or ``data.val_files``."""
    value = subject.run.data.get(key)
    names = [value] if isinstance(value, str) else list(value or [])
    return [Path(name).expanduser() for name in names if "://" not in name]


def read_rows(path: Path, subject: Subject) -> list[Row]:
    """All rows of a file, or in the short form the first few; read once, however many checks ask."""
    if path not in subject.rows:
        file = pq.ParquetFile(path)
        batch = next(file.iter_batches(batch_size=_SHORT_ROWS), None) if subject.short else file.read()
        subject.rows[path] = [] if batch is None else batch.to_pylist()
    return subject.rows[path]


def training_rows(subject: Subject) -> Iterator[tuple[Path, Row]]:
    """Rows of all Parquet files to train on, with their file; files that cannot be read have none."""
    for path in files_of(subject, "train_files"):
        if path.suffix == ".parquet":
            try:
                rows = read_rows(path, subject)
            except (OSError, pa.ArrowException):  # the check of the rows says so
                continue
            yield from ((path, row) for row in rows)


def truth_of(row: Row) -> Any:
    """A row's right answer, as the reward gets it; None if there is none or nothing but blanks."""
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, Mapping) else None
    return None if truth is None or not str(truth).strip() else truth


def _faults(rows: Sequence[Row], data: DictConfig) -> Iterator[str]:
    if not rows:
        yield "it has no rows"
        return
    missing = [name for name in (data.prompt_key, "data_source", "reward_model") if name not in rows[0]]
    if missing:
        yield f"it has no column {' and no column '.join(missing)}"
        return
    for number, row in enumerate(rows):
        messages, info = row[data.prompt_key], row.get("extra_info")
        if not messages:
            yield f"row {number} has no {data.prompt_key}"
        elif isinstance(messages, str) or not all(isinstance(each, Mapping) for each in messages):
            yield f"row {number}: {data.prompt_key} is no list of messages with role and content"
        elif not isinstance(row["reward_model"] or {}, Mapping):
            yield f"row {number}: reward_model is {type(row['reward_model']).__name__}, no mapping"
        elif not isinstance(info or {}, Mapping):
            yield f"row {number}: extra_info is {type(info).__name__}, no mapping"
        elif truth_of(row) is None:
            yield f"row {number} has no reward_model.ground_truth"
        else:
            yield from _unplaced(number, row, data)


def _unplaced(number: int, row: Row, data: DictConfig) -> Iterator[str]:
    """Media without a place in the prompt, and places without media; verl pairs them by order."""
    contents = [message.get("content") for message in row[data.prompt_key]]
    if not all(isinstance(content, str) for content in contents):
        return
    for column, mark in ((data.video_key, "<video>"), (data.image_key, "<image>")):
        places, given = sum(content.count(mark) for content in contents), len(row.get(column) or ())
        if places != given:
            yield f"row {number} has {given} {column} and {places} times {mark} in its prompt"


def media_files(subject: Subject) -> Finding:
    """Every clip and image that a row names exists, and no row contradicts the sampling contract."""
    named = dict.fromkeys(_media(subject))
    if not named:
        return skip("no row names a clip or an image")
    missing = [path for path in named if not Path(path).exists()]
    words = f"{len(missing)} of {len(named)} clips and images are missing: {several(missing)}"
    if missing:
        remedy = "Copy them there, or write the rows again with the right media_root (keytoken data prepare)."
        if len(missing) == len(named):
            return fail(words, remedy)
        return warn(words, f"{remedy} A run would set these rows aside.")
    contradiction = _contradiction(subject)
    if contradiction:
        return fail(contradiction, "Write the rows again, or choose their contract: sampling=NAME")
    return ok(f"{len(named):,} clips and images are there")


def _media(subject: Subject) -> Iterator[str]:
    data = subject.run.data
    for _, row in training_rows(subject):
        yield from (str(clip_path(clip)) for clip in clips_of(row, data.video_key))
        images = row.get(data.image_key) or ()
        given = [entry.get("image") if isinstance(entry, dict) else entry for entry in images]
        paths = [path.removeprefix("file://") for path in given if isinstance(path, str)]
        yield from (path for path in paths if "://" not in path)


def clips_of(row: Row, video_key: str) -> list[str | Part]:
    """A row's local clips or parts of clips; one that names them wrongly has none: a run sets it aside."""
    try:
        clips = named_clips(dict(row), video_key)
    except DataError:
        return []
    return [clip for clip in clips if "://" not in str(clip_path(clip))]


def _contradiction(subject: Subject) -> str:
    wanted = asdict(subject.contract)
    for path, row in training_rows(subject):
        for entry in row.get(subject.run.data.video_key) or ():
            for name in set(wanted) & set(entry) if isinstance(entry, dict) else ():
                if entry[name] is not None and entry[name] != wanted[name]:
                    return (
                        f"{path}: a row says {name}={entry[name]} for its clip, the run's sampling contract "
                        f"{name}={wanted[name]}"
                    )
    return ""


def clip_sample(subject: Subject) -> Finding:
    """Decode clips from all over the training set, as the run would; each in a child that can be killed."""
    video_key = subject.run.data.video_key
    clips = (path for _, row in training_rows(subject) for path in clips_of(row, video_key))
    named = list(dict.fromkeys(clips))
    if not named:
        return skip("no row names a clip")
    sample = named[:: max(1, len(named) // _SAMPLE)][:_SAMPLE]
    shapes, failures = _decode(sample, subject.contract)
    if failures:
        words = f"{len(failures)} of {len(sample)} clips cannot be decoded: {failures[0]}"
        remedy = "Find all of them: keytoken data cache build, or keytoken data prepare with check=decode."
        return fail(words, remedy) if not shapes else warn(words, f"{remedy} A run would set them aside.")
    tokens = max(tokens_of_frames(shape, subject.contract) for shape in shapes)
    limit = subject.run.data.max_prompt_length
    frames, _, height, width = shapes[0]
    words = f"{len(sample)} clips decode, the first as {frames} frames of {height}x{width}, {tokens} tokens"
    if tokens > limit:
        return fail(
            f"{words} at most; data.max_prompt_length is {limit}",
            "Raise it, or take fewer frames or pixels (sampling=).",
        )
    return ok(words)


def _decode(
    paths: Sequence[str | Part], contract: SamplingContract
) -> tuple[list[tuple[int, ...]], list[str]]:
    shapes: list[tuple[int, ...]] = []
    failures = []
    with ClipProcess(functools.partial(clip_shape, contract=contract, root=None), _CLIP_LIMIT_S) as probe:
        for path in paths:
            try:
                shapes.append(probe.run(path))
            except ClipError as problem:
                failures.append(str(problem))
    return shapes, failures
