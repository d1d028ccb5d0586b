"""Reads the headers of many files in parallel children.

A header can hang a demuxer as a frame can hang a decoder, so files are opened in child processes that are
killed when they take too long.
"""

import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from keytoken.data.child import ClipProcess
from keytoken.data.headers import Header, Inspection, MediaKind, inspect_file
from keytoken.data.part import AnyClip, clip_path
from keytoken.errors import ClipError, DataError


def inspect_all(
    files: Sequence[tuple[AnyClip, MediaKind]],
    asked: Inspection,
    *,
    jobs: int,
    limit_s: float,
    cache: Path | None = None,
) -> dict[tuple[AnyClip, MediaKind], Header | DataError]:
    """Inspect every file once.

    Args:
        files: Each file, folder of frames or part of one, once for what it is supposed to be.
        asked: What to find out.
        jobs: Children at work at a time.
        limit_s: Seconds allowed for one file.
        cache: A file that remembers headers from run to run, and lets an interrupted run go on; a file that
            failed is tried again.

    Returns:
        The header of each file, or why there is none, in the order of ``files``.
    """
    known = _remembered(cache)
    keys: dict[tuple[AnyClip, MediaKind], str] = {}
    found: dict[tuple[AnyClip, MediaKind], Header | DataError] = {}
    for file in files:
        try:
            keys[file] = asked.key(*file)
        except (OSError, DataError) as problem:  # gone since it was located
            gone = f"{clip_path(file[0])} cannot be opened any more ({problem}); see where it went"
            found[file] = ClipError(gone)
        else:
            if keys[file] in known:
                found[file] = known[keys[file]]
    unknown = [file for file in files if file not in found]
    with _children(asked, limit_s) as call, _notebook(cache) as remember, ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[Header | DataError], tuple[AnyClip, MediaKind]] = {
            pool.submit(call, *file): file for file in unknown
        }
        try:
            for future in tqdm(as_completed(futures), "media", len(futures), unit="file", mininterval=1.0):
                file, result = futures[future], future.result()
                found[file] = result
                if isinstance(result, Header):
                    remember(keys[file], result)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {file: found[file] for file in files}


@contextmanager
def _children(
    asked: Inspection, limit_s: float
) -> Iterator[Callable[[AnyClip, MediaKind], Header | DataError]]:
    """A function that inspects a file in a child of the calling thread."""
    own = threading.local()
    with ExitStack() as started:

        def call(clip: AnyClip, kind: MediaKind) -> Header | DataError:
            children = own.__dict__
            if kind not in children:
                work = functools.partial(_work(asked), kind=kind, asked=asked)
                children[kind] = started.enter_context(ClipProcess(work, limit_s))
            try:
                header: Header = children[kind].run(clip)
            except DataError as error:
                return error
            return header

        yield call


def _work(asked: Inspection) -> Callable[..., Header]:
    """What a child does with a file."""
    if asked.contract is None:
        return inspect_file
    from keytoken.data.prepare.decoding import decode_file

    return decode_file


def _remembered(cache: Path | None) -> Mapping[str, Header]:
    """Headers of earlier runs; a line that was cut when one was stopped is left out."""
    headers: dict[str, Header] = {}
    if cache is not None and cache.is_file():
        with cache.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    header = Header(**entry["header"])
                    # JSON has no tuples.
                    headers[entry["key"]] = replace(header, decoded_shape=tuple(header.decoded_shape))
                except (json.JSONDecodeError, TypeError, KeyError):
                    continue
    return headers


@contextmanager
def _notebook(cache: Path | None) -> Iterator[Callable[[str, Header], None]]:
    """A function that appends a header to the cache; each line is out of our hands when it returns."""
    if cache is None:
        yield lambda key, header: None
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a", encoding="utf-8", buffering=1) as file:
        file.write("\n")  # ends a line that was cut

        def remember(key: str, header: Header) -> None:
            file.write(json.dumps({"key": key, "header": asdict(header)}) + "\n")

        yield remember
