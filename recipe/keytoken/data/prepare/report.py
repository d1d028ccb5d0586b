"""What a preparation found, as JSON for programs and as Markdown for people."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keytoken.data.contract import SamplingContract
from keytoken.data.prepare import get_converter
from keytoken.data.prepare.ledger import Ledger
from keytoken.data.prepare.settings import PrepareSettings

_SECONDS = (0, 5, 10, 20, 30, 60, 120, 300, 600)
_TOKENS = (0, 256, 512, 1024, 2048, 4096, 8192, 16384)
_BAR = 40


def as_json(
    ledger: Ledger, settings: PrepareSettings, contract: SamplingContract, source: Path
) -> dict[str, Any]:
    """Counts, distributions and settings; the same for the same input."""
    samples = [entry.sample for entry in ledger.entries]
    clips = [entry.header for entry in ledger.entries if entry.header and entry.sample.kind == "video"]
    tokens = [entry.num_vision_tokens for entry in ledger.entries if entry.num_vision_tokens is not None]
    contents = {entry.header.quick: entry.media for entry in ledger.entries if entry.header}
    media = {entry.media for entry in ledger.entries}
    return {
        "converter": get_converter(settings.name[0]).title,
        "source": str(source),
        "split": settings.split,
        "check": settings.check,
        "rows": {
            "read": ledger.num_read,
            "written": len(ledger.entries),
            "quarantined": len(ledger.quarantined),
            "copies dropped": len(ledger.copies),
            "overlapping dropped": ledger.num_overlapping,
        },
        "quarantine reasons": _counted(entry.reason for entry in ledger.quarantined),
        "notes": dict(ledger.notes.most_common()),
        "problem types": _counted(sample.problem_type for sample in samples),
        "media kinds": _counted(sample.kind for sample in samples),
        "collections": _counted(sample.data_source for sample in samples),
        "categories": _counted(sample.category for sample in samples if sample.category),
        "media": {
            "files": len(media),
            "same content under several names": len(media) - len(contents) if contents else 0,
            "bytes": sum({e.media: e.header.num_bytes for e in ledger.entries if e.header}.values()),
            "codecs": _counted(header.codec for header in clips),
            "length from": _counted(header.frames_from for header in clips),
        },
        "duration of clips in s": _distribution([header.duration_s for header in clips], _SECONDS),
        "vision tokens of rows": _distribution(tokens, _TOKENS),
        "characters of questions": _distribution([len(sample.question) for sample in samples], ()),
        "copies": [{"dropped": dropped, "kept": kept} for dropped, kept in ledger.copies],
        "against": list(settings.against),
        "overlap": settings.overlap,
        "overlaps": _counted(f"{each.shared}, {each.against}" for each in ledger.overlaps),
        "sampling": {"preset": settings.sampling, "digest": contract.digest(), **asdict(contract)},
    }


def as_markdown(facts: Mapping[str, Any]) -> str:
    """The report for people, from :func:`as_json`."""
    rows = facts["rows"]
    lines = [
        f"# {facts['split']}: {rows['written']} of {rows['read']} rows",
        "",
        f"From {facts['converter']}, `{facts['source']}`.",
        "",
        *_table("where the rows went", {f"{key}": value for key, value in rows.items()}),
        *_table("quarantine: reason", facts["quarantine reasons"]),
    ]
    if facts["quarantine reasons"]:
        lines += ["Row by row with the remedy: `quarantine.jsonl`.", ""]
    lines += _table("inferred, removed, noticed", facts["notes"])
    for title in ("problem types", "media kinds", "collections", "categories"):
        lines += _table(title, facts[title])
    media = facts["media"]
    lines += [f"{media['files']} media files, {media['bytes'] / 1e6:.1f} MB.", ""]
    if media["same content under several names"]:
        lines += [f"{media['same content under several names']} of them are copies of others.", ""]
    lines += _table("codecs", media["codecs"])
    if media["length from"].keys() - {"header"}:
        lines += [*_table("length of a clip taken from", media["length from"])]
    for title in ("duration of clips in s", "vision tokens of rows"):
        lines += _histogram(title, facts[title])
    sampling = facts["sampling"]
    if facts["vision tokens of rows"]:
        source = "decoded media" if facts["check"] == "decode" else "headers"
        lines += [
            f"Counted from {source} under sampling={sampling['preset']} (digest {sampling['digest']}), "
            "without the text. A prompt has these and the tokens of its text; `data.max_prompt_length` "
            "limits both.",
            "",
        ]
    if facts["against"]:
        lines += [f"Compared with {', '.join(facts['against'])}; overlap={facts['overlap']}.", ""]
        lines += _table("rows that share with a test set", facts["overlaps"]) or ["No overlap found.", ""]
    return "\n".join(lines)


def _counted(values: Iterable[str]) -> dict[str, int]:
    """Counts, the most frequent first, equal ones by name."""
    return dict(sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0])))


def _distribution(values: Sequence[float], edges: Sequence[int]) -> dict[str, Any]:
    """Median, extremes and a histogram; empty without values."""
    if not values:
        return {}
    ordered = sorted(values)
    bins = {}
    for low, high in zip(edges, [*edges[1:], math.inf], strict=True) if edges else ():
        label = f"{low} to {high}" if high < math.inf else f"{low} and more"
        bins[label] = sum(low <= value < high for value in ordered)
    return {
        "least": ordered[0],
        "median": ordered[len(ordered) // 2],
        "95 %": ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)],
        "most": ordered[-1],
        "sum": sum(ordered),
        "histogram": bins,
    }


def _table(title: str, counts: Mapping[str, int]) -> list[str]:
    """A table of two columns; nothing without counts."""
    if not counts:
        return []
    cells = [(key.replace("|", "\\|"), f"{count:,}" if count else "") for key, count in counts.items()]
    if title == "where the rows went":
        cells = [(key, f"{count:,}") for key, count in counts.items()]
    return [f"| {title} | rows |", "|---|---:|", *(f"| {key} | {count} |" for key, count in cells), ""]


def _histogram(title: str, facts: Mapping[str, Any]) -> list[str]:
    """A histogram of bars in text."""
    if not facts:
        return []
    bins = list(facts["histogram"].items())
    filled = [place for place, (_, count) in enumerate(bins) if count]
    bins = bins[filled[0] : filled[-1] + 1]
    most = max(count for _, count in bins)
    width = max(len(label) for label, _ in bins)
    bars = [
        f"{label:>{width}}  {'#' * math.ceil(_BAR * count / most):<{_BAR}} {count:,}" for label, count in bins
    ]
    summary = ", ".join(f"{key} {facts[key]:g}" for key in ("least", "median", "95 %", "most"))
    return [f"**{title}**: {summary}", "", "```", *bars, "```", ""]
