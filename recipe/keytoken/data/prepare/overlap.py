"""Training rows that a test set holds as well: the same video, or the same question.

Videos are the same if their content is (where both files are at hand), or if they have one name. A name is a
YouTube id, or a file name that tells clips apart; of file names that collections have in common ("0.mp4",
"video_12.mp4") the folder counts too. Questions are the same if their wording and their options are, whatever
the order, or, without options, wording and answer: "What happens next?" alone is no overlap.

Not found: a video that was cut or encoded again under another name, and a question in other words.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from keytoken.data.prepare.samples import MULTIPLE_CHOICE, Sample, normalized
from keytoken.errors import ConfigurationError, DataError
from keytoken.scoring.benchmarks import BENCHMARKS, get_benchmark, own

_YOUTUBE = re.compile(r"(?:youtu\.be/|[?&]v=|/embed/|/shorts/)([A-Za-z0-9_-]{11})(?![A-Za-z0-9_-])")
# Names that say nothing: a number of up to five digits, with or without such a word in front.
_COMMON = re.compile(r"(?:video|vid|clip|sample|movie|scene|image|img|frame|output)?[ _-]*\d{0,5}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A question of a test set.

    Attributes:
        origin: Which set, for people.
        item_id: Its id there.
        video: Path or address; None without a video.
        question: Its wording, without options.
        options: Texts, in whatever order.
        answer: The text of the right answer.
        content: :func:`~keytoken.data.headers.quick_hash` of the file, if it is known.
    """

    origin: str
    item_id: str
    video: str | None
    question: str
    options: tuple[str, ...]
    answer: str
    content: str = ""


@dataclass(frozen=True, slots=True)
class Overlap:
    """A training row and what it has in common with a test set.

    Attributes:
        number: Position of the row in the source.
        place: Where that is, for people.
        media: The row's video or image.
        shared: "content", "video" or "question"; several are joined by " and ".
        against: The test set.
        item_id: The first of its questions that was found.
    """

    number: int
    place: str
    media: str
    shared: str
    against: str
    item_id: str


def read_references(words: Sequence[str]) -> list[Reference]:
    """Read the test sets of ``against=``.

    Args:
        words: ``BENCHMARK:FILE`` for an official question file, or a Parquet file that was prepared before.

    Raises:
        ConfigurationError: A word of another form, or an unknown benchmark.
        DataError: A file that cannot be read.
    """
    references: list[Reference] = []
    for word in words:
        name, colon, file = word.partition(":")
        if colon and name == own.NAME:
            references += _from_parquet(Path(file).expanduser())
        elif word.endswith(".parquet") and name not in BENCHMARKS:
            references += _from_parquet(Path(word).expanduser())
        elif colon:
            references += _from_benchmark(name, Path(file).expanduser())
        else:
            raise ConfigurationError(
                f"against={word}: write BENCHMARK:FILE, such as mmvu:validation.json, or a .parquet file "
                "that `keytoken data prepare` wrote"
            )
    return references


def find_overlaps(rows: Iterable[tuple[Sample, str]], references: Sequence[Reference]) -> list[Overlap]:
    """Compare training rows with test sets.

    Args:
        rows: Samples, each with the content hash of its file, or "" where there is none.
        references: Questions of the test sets.

    Returns:
        One entry for each row and test set that have anything in common, in the order of the rows.
    """
    tables: dict[str, dict[object, list[Reference]]] = {"content": {}, "video": {}, "question": {}}
    for reference in references:
        entries = {
            "content": reference.content,
            "video": video_name(reference.video) if reference.video else "",
            "question": _wording(reference.question, reference.options, reference.answer),
        }
        for kind, key in entries.items():
            if key:
                tables[kind].setdefault(key, []).append(reference)
    found = []
    for sample, content in rows:
        keys = {
            "content": content,
            "video": video_name(sample.media),
            "question": _wording(sample.question, sample.options, _answer_text(sample)),
        }
        hits = {kind: tables[kind].get(key, []) for kind, key in keys.items() if key}
        origins = dict.fromkeys(reference.origin for each in hits.values() for reference in each)
        for origin in origins:
            shared = {
                kind: [reference for reference in each if reference.origin == origin]
                for kind, each in hits.items()
            }
            kinds = [kind for kind, each in shared.items() if each]
            # The question that both have says more than any other question on the same video.
            first = shared[kinds[-1]][0]
            found.append(
                Overlap(sample.number, sample.place, sample.media, " and ".join(kinds), origin, first.item_id)
            )
    return found


def video_name(video: str) -> str:
    """What a video is called wherever it is kept: a YouTube id, a file name, or a folder and a file name."""
    address = _YOUTUBE.search(video)
    if address:
        return address[1]
    path = PurePosixPath(video.replace("\\", "/"))
    stem = path.stem if path.suffix.lower() in _SUFFIXES else path.name
    if _COMMON.fullmatch(stem.casefold()):
        return f"{path.parent.name.casefold()}/{stem.casefold()}" if path.parent.name else ""
    return stem


_SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".gif", ".jpg", ".jpeg", ".png", ".webp"}


def _wording(question: str, options: Sequence[str], answer: str) -> tuple[str, frozenset[str]]:
    texts = (
        frozenset(normalized(option) for option in options) if options else frozenset([normalized(answer)])
    )
    return normalized(question.partition("\nOptions:")[0]), texts


def _answer_text(sample: Sample) -> str:
    if sample.problem_type == MULTIPLE_CHOICE:
        return sample.options[ord(sample.answer) - ord("A")]
    return sample.answer


def _from_benchmark(name: str, file: Path) -> list[Reference]:
    benchmark = get_benchmark(name)
    return [
        Reference(f"{name}:{file.name}", item.item_id, item.video, item.question, item.options, item.answer)
        for item in benchmark.read([file])
    ]


def _from_parquet(path: Path) -> list[Reference]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path, columns=["extra_info"]).to_pylist()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(f"against={path}: no prepared Parquet file ({error}); prepare it first") from error
    references = []
    for row in rows:
        info: Mapping[str, object] = row["extra_info"] or {}
        if "question" not in info or "media" not in info:
            raise DataError(
                f"against={path}: its rows have no extra_info.question and .media; prepare it again with "
                "`keytoken data prepare`"
            )
        references.append(
            Reference(
                path.name,
                str(info.get("prompt_id", "")),
                str(info["media"]),
                str(info["question"]),
                tuple(info.get("options") or ()),  # type: ignore[arg-type]
                str(info.get("answer_text", "")),
                str(info.get("content") or ""),
            )
        )
    return references
