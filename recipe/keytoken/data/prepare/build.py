"""From a source of questions and a folder of media to a dataset that training reads."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from keytoken.data.contract import SamplingContract
from keytoken.data.headers import Header, Inspection, MediaKind, ends_late, num_vision_tokens
from keytoken.data.part import WHOLE, AnyClip, SpanError
from keytoken.data.prepare import get_converter
from keytoken.data.prepare.converters import Converter
from keytoken.data.prepare.duplicates import Located, sort_out
from keytoken.data.prepare.inspection import inspect_all
from keytoken.data.prepare.ledger import Ledger
from keytoken.data.prepare.media import locate
from keytoken.data.prepare.output import check_target, write_dataset
from keytoken.data.prepare.overlap import find_overlaps, read_references
from keytoken.data.prepare.rows import Entry
from keytoken.data.prepare.samples import RowProblem, Sample, checked
from keytoken.data.prepare.settings import PrepareSettings
from keytoken.data.prepare.sources import read_source, table_columns
from keytoken.data.sampling_words import named_contract
from keytoken.errors import ClipError, DataError
from keytoken.scoring.prompts import render

_TABLES = (".csv", ".tsv", ".jsonl", ".json")
_JOBS = 8
# By the setting check: what nobody has looked at.
_UNSEEN = {
    "headers": "clips not decoded (check=decode does)",
    "none": "media not opened (check=headers or check=decode does)",
}
_LATE = "end of the part after the end of the clip, where it ends then"


def prepare(settings: PrepareSettings) -> tuple[Path, Ledger]:
    """Build the dataset.

    Returns:
        The folder of the dataset, and where every row went.

    Raises:
        ConfigurationError: A word that cannot be.
        DataError: A file that cannot be read or written, an overlap with ``overlap=stop``, or no row left.
    """
    converter = get_converter(settings.name[0])
    contract = named_contract(settings.sampling)
    render("?", "free-form", settings.style)
    out = _absolute(settings.out)
    check_target(out, settings.overwrite)
    source, root = _source_and_root(settings)
    references = read_references(settings.against)
    ledger = Ledger()
    rows = _read_rows(source, root, converter, settings, ledger)
    sorted_rows = sort_out(rows, converter.unique_ids)
    ledger.copies = [(copy.place, kept.place) for copy, kept in sorted_rows.copies]
    for sample, problem in sorted_rows.refused:
        ledger.refuse(sample, problem)
    if sorted_rows.num_variants:
        ledger.notes["the same question again with its options in another order"] = sorted_rows.num_variants
    if sorted_rows.num_repeated_ids:
        ledger.notes["id of an earlier row"] = sorted_rows.num_repeated_ids
    entries = _inspect(sorted_rows.kept, root, contract, settings, out, ledger)
    contents = [(entry.sample, entry.header.quick if entry.header else "") for entry in entries]
    ledger.overlaps = find_overlaps(contents, references)
    overlapping = {each.number for each in ledger.overlaps}
    failure = None
    if overlapping and settings.overlap != "keep":
        ledger.num_overlapping = len(overlapping)
        entries = [entry for entry in entries if entry.sample.number not in overlapping]
        if settings.overlap == "stop":
            failure = _overlap_message(ledger)
    ledger.entries = entries
    for entry in entries:
        ledger.notes.update(entry.sample.notes)
    ledger.close()
    if failure is None and not entries:
        failure = _nothing_left(source, ledger)
    return write_dataset(out, source, ledger, settings, contract, failure), ledger


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _source_and_root(settings: PrepareSettings) -> tuple[Path, Path]:
    source = _absolute(settings.source)
    if source.is_dir():
        tables = sorted(file for file in source.iterdir() if file.suffix.lower() in _TABLES)
        if len(tables) != 1:
            found = ", ".join(file.name for file in tables[:5]) or "none"
            raise DataError(f"{source}: a folder with one table is expected, found {found}; name the file")
        source = tables[0]
    if not source.is_file():
        raise DataError(f"{source}: no such file; check source=")
    root = Path(settings.media_root).expanduser() if settings.media_root else source.parent
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; check media_root=")
    return source, root.resolve()


def _read_rows(
    source: Path, root: Path, converter: Converter, settings: PrepareSettings, ledger: Ledger
) -> list[Located]:
    """Read, check and locate; rows that fail go to the quarantine."""
    columns = table_columns(source, settings.encoding)
    if columns is not None:
        try:
            unused = converter.check_columns(columns)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        if unused:
            ledger.notes[f"columns not used: {', '.join(unused)}"] = 0
    rows: list[Located] = []
    for row in tqdm(read_source(source, settings.encoding), "rows", unit="row", mininterval=1.0):
        if settings.limit is not None and ledger.num_read >= settings.limit:
            break
        ledger.num_read += 1
        draft = None
        try:
            if row.problem:
                raise RowProblem("unreadable row", row.problem)
            draft = converter.convert(row.values)
            sample = checked(draft, row.number, row.place)
            rows.append((sample, locate(draft, root)))
        except RowProblem as problem:
            named = draft or problem
            ledger.refuse(row, problem, named.media, named.item_id)
    if not ledger.num_read:
        raise DataError(f"{source}: no rows; it holds an empty list or a header alone")
    return rows


def _inspect(
    rows: Sequence[Located],
    root: Path,
    contract: SamplingContract,
    settings: PrepareSettings,
    out: Path,
    ledger: Ledger,
) -> list[Entry]:
    """Add headers and token counts; rows whose media fail go to the quarantine."""
    drafts = [_unread(sample, path, root) for sample, path in rows]
    headers: Mapping[tuple[AnyClip, MediaKind], Header | DataError] = {}
    if rows and settings.check in _UNSEEN:
        ledger.notes[_UNSEEN[settings.check]] = 0
    if settings.check != "none":
        asked = Inspection(
            full=settings.checksums == "full", contract=contract if settings.check == "decode" else None
        )
        files = dict.fromkeys((entry.clip, entry.sample.kind) for entry in drafts)
        headers = inspect_all(
            list(files),
            asked,
            jobs=settings.jobs or min(os.cpu_count() or 1, _JOBS),
            limit_s=settings.limit_s,
            cache=out.with_name(f"{out.name}.headers.jsonl"),
        )
    entries = []
    for entry in drafts:
        sample = entry.sample
        header = headers.get((entry.clip, sample.kind))
        try:
            if isinstance(header, DataError):
                raise header
            if header is not None:
                tokens = num_vision_tokens(header, sample.kind, contract, sample.span or WHOLE)
                if ends_late(header, sample.span or WHOLE):
                    sample = replace(sample, notes=(*sample.notes, _LATE))
                entry = replace(entry, sample=sample, header=header, num_vision_tokens=tokens)
        except ClipError as error:
            ledger.refuse(sample, RowProblem("media unreadable", str(error)))
        except SpanError as error:
            what = f"{entry.path}: {error}; correct the start and the end"
            ledger.refuse(sample, RowProblem("part outside of the clip", what))
        except DataError as error:
            ledger.refuse(sample, RowProblem("media unusable", f"{entry.path}: {error}"))
        else:
            entries.append(entry)
    return entries


def _unread(sample: Sample, path: Path, root: Path) -> Entry:
    media = path.relative_to(root).as_posix()
    return Entry(sample=sample, path=path, media=media, header=None, num_vision_tokens=None)


def _overlap_message(ledger: Ledger) -> str:
    shown = "; ".join(
        f"{each.place} ({each.media}) shares {each.shared} with {each.item_id} of {each.against}"
        for each in ledger.overlaps[:3]
    )
    more = "; ..." if len(ledger.overlaps) > 3 else ""
    return (
        f"{ledger.num_overlapping} of {ledger.num_read} rows are in a test set as well: {shown}{more}. Pass "
        "overlap=drop to leave them out, or overlap=keep to train on them and know it"
    )


def _nothing_left(source: Path, ledger: Ledger) -> str:
    reasons = Counter(entry.reason for entry in ledger.quarantined)
    if ledger.num_overlapping:
        reasons["in a test set"] = ledger.num_overlapping
    listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
    first = f"; the first: {ledger.quarantined[0].detail}" if ledger.quarantined else ""
    return f"{source}: none of its {ledger.num_read} rows can be used: {listed}{first}"
