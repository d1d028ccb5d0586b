"""``keytoken data cache``: from datasets and folders to a cache, with exit codes, lists, one-line errors."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keytoken.cli import main
from keytoken.data import child
from keytoken.data.cache import build as cache_build
from keytoken.data.cache import upkeep
from keytoken.data.cache.build import find_clips
from keytoken.data.cache.store import FrameCache, add_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.part import Part
from keytoken.demo.render import write_clip
from keytoken.errors import DataError

DEMO = SamplingContract.preset("demo")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder with two clips, a copy of one, a broken one, and a file that is no clip."""
    folder = tmp_path / "clips"
    (folder / "deeper").mkdir(parents=True)
    for number in range(2):
        frames = np.full((8, 56, 56, 3), 40 * number, dtype=np.uint8)
        frames[:, number * 8 : number * 8 + 8] = 255
        write_clip(folder / f"{number}.mp4", frames)
    shutil.copy(folder / "0.mp4", folder / "deeper" / "copy.MP4")
    (folder / "broken.mp4").write_bytes((folder / "0.mp4").read_bytes()[:200])
    (folder / "readme.txt").write_text("no clip")
    return folder


def cache_command(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["data", "cache", *words])
    out, err = capsys.readouterr()
    return code, out, "\n".join(line for line in err.splitlines() if line.startswith("keytoken:"))


def test_from_a_folder_to_a_cache_and_back(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = f"cache={tmp_path}/cache"
    code, out, _ = cache_command("build", str(clips), cache, "sampling=demo", "jobs=2", capsys=capsys)
    assert code == 1
    assert out.startswith("4 clips: ")
    assert "1 cannot be read" in out and f"data.frame_cache={tmp_path}/cache" in out
    (failure,) = [json.loads(line) for line in (tmp_path / "cache/quarantine.jsonl").read_text().splitlines()]
    assert failure["path"] == str(clips / "broken.mp4") and "broken.mp4" in failure["reason"]
    assert len(list(upkeep.entries(tmp_path / "cache"))) == 2
    assert FrameCache(tmp_path / "cache").has(str(clips / "1.mp4"), DEMO)

    (clips / "broken.mp4").unlink()
    code, out, _ = cache_command("build", str(clips), cache, "sampling=demo", "jobs=1", capsys=capsys)
    assert (code, out.splitlines()[0]) == (
        0,
        "3 clips: 0 decoded and stored (0.0 MiB), 3 present before, 0 cannot be read",
    )
    assert (tmp_path / "cache/quarantine.jsonl").read_text() == ""

    code, out, _ = cache_command("stats", str(clips), cache, "sampling=demo", capsys=capsys)
    assert code == 0
    assert out.startswith(f"demo {DEMO.digest()}: 2 entries")
    assert "max_frames 8" in out and "of 3 clips 3 are in the cache and 0 are not" in out

    entry = next(upkeep.entries(tmp_path / "cache")).path
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(content)
    code, out, _ = cache_command("verify", cache, capsys=capsys)
    assert code == 1 and str(entry) in out and out.endswith("1 sound, 1 not\n")
    code, out, _ = cache_command("verify", cache, capsys=capsys)
    assert code == 0 and out.startswith("1 entries")

    code, out, _ = cache_command("prune", cache, "keep=eval_64f", "dry_run=true", capsys=capsys)
    assert code == 0 and out.startswith("would remove 1 files") and "other contract" in out
    assert len(list(upkeep.entries(tmp_path / "cache"))) == 1
    code, out, _ = cache_command("prune", cache, "max_gib=0", capsys=capsys)
    assert code == 0 and out.startswith("removed 1 files") and "least recently used" in out
    assert list(upkeep.entries(tmp_path / "cache")) == []


def test_clips_are_found_in_datasets_lists_and_folders(clips: Path, tmp_path: Path) -> None:
    rows = [
        {"videos": [{"video": str(clips / "0.mp4")}, {"video": f"file://{clips}/1.mp4"}]},
        {"videos": [{"video": str(clips / "0.mp4")}]},
        {"videos": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "list.txt").write_bytes(
        b"\xef\xbb\xbfclips/1.mp4\r\n\n" + os.fsencode(clips / "0.mp4") + b"\n"
    )
    zero, one = str(clips / "0.mp4"), str(clips / "1.mp4")
    assert find_clips([str(tmp_path / "rows.parquet")]) == [zero, one]
    assert find_clips([str(tmp_path / "list.txt")]) == [one, zero]
    assert find_clips([one, str(tmp_path / "rows.parquet")]) == [one, zero]
    names = [Path(clip).name for clip in find_clips([str(clips)])]
    assert names == ["0.mp4", "1.mp4", "broken.mp4", "copy.MP4"]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"clip": ["a"]}), tmp_path / "columns.parquet")
    pq.write_table(pa.table({"videos": [[1]]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"videos": [["a"], []]}).slice(1), tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "bare").mkdir()
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").touch()
    return tmp_path


WRONG_SOURCES = {
    "missing": ("gone.parquet", "no such file or folder"),
    "dataset without the column": ("columns.parquet", r"no column 'videos' but clip.*video_key=NAME"),
    "numbers for paths": ("numbers.parquet", "column 'videos': a video given as int"),
    "dataset without clips": ("none.parquet", "has no clips"),
    "text named parquet": ("text.parquet", "cannot be read as Parquet"),
    "empty list": ("empty.txt", "has no clips"),
    "empty folder": ("bare", "has no clips"),
    "folder of frames": ("frames", "a folder of frames is named by a row of a dataset or a line of a .txt"),
    "another kind of file": ("rows.json", "is of no known kind"),
}


@pytest.mark.parametrize(("name", "message"), WRONG_SOURCES.values(), ids=WRONG_SOURCES)
def test_a_wrong_source_is_one_message(name: str, message: str, sources: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        find_clips([str(sources / name)])
    assert "\n" not in str(caught.value)


WRONG_WORDS = {
    "unknown preset": (["build", ".", "cache=c", "sampling=eval_64"], "'eval_64f'?"),
    "unknown key of a contract": (["build", ".", "cache=c", "sampling=demo", "sampling.fp=1"], "'fps'?"),
    "keys of no contract": (["build", ".", "cache=c", "sampling.fps=1"], "preset sampling="),
    "contract that is no contract": (["build", ".", "cache=c", "sampling=c.json"], "no sampling contract"),
    "no source": (["build", "cache=c", "sampling=demo"], "at least one SOURCES"),
    "no jobs": (["build", ".", "cache=c", "sampling=demo", "jobs=0"], "must be positive"),
    "cache that is a file": (["build", "CLIP", "cache=CLIP", "sampling=demo", "jobs=1"], "is a file; name a"),
    "cache that is not there": (["verify", "cache=gone"], "no such folder"),
    "sources without a preset": (["stats", "cache=.", "."], "sampling=NAME together"),
    "negative age": (["prune", "cache=.", "unused_days=-1"], "unused_days=-1.0 is no amount"),
    "age that is no number": (["prune", "cache=.", "unused_days=nan"], "is no amount"),
}


@pytest.mark.parametrize(("words", "message"), WRONG_WORDS.values(), ids=WRONG_WORDS)
def test_wrong_words_are_one_message(
    words: list[str],
    message: str,
    clips: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(clips)
    words = [word.replace("CLIP", str(clips / "0.mp4")) for word in words]
    code, out, err = cache_command(*words, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 0)
    assert message in err


def test_a_full_disk_stops_the_build_with_one_message(clips: Path, tmp_path: Path) -> None:
    """The limit on the size of a file stands for the full disk; children inherit it."""
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash"]
    command = [*limited, sys.executable, "-m", "keytoken.cli", "data", "cache", "build", str(clips)]
    done = subprocess.run(
        [*command, f"cache={tmp_path}/cache", "sampling=demo", "jobs=1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith("keytoken: frame cache") and "File too large" in last and "free space" in last
    assert list((tmp_path / "cache").rglob("*.partial")) == []


def hang_on_one(path: str, contract: SamplingContract, root: str) -> int:
    if path.endswith("1.mp4"):
        time.sleep(600)
    return add_clip(path, contract, root)


@pytest.mark.timeout(60)
def test_a_clip_that_hangs_costs_its_limit_and_is_listed(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_START_METHOD", "fork")  # a child by spawn would not see the next line
    monkeypatch.setattr(cache_build, "add_clip", hang_on_one)
    paths = [str(clips / f"{number}.mp4") for number in (1, 0)] + [str(clips / "deeper" / "copy.MP4")]
    built = cache_build.build(paths, DEMO, tmp_path / "cache", jobs=1, limit_s=5.0)
    assert list(built.failures) == paths[:1]
    assert "not decoded within 5 s" in built.failures[paths[0]]
    assert (built.num_stored, built.num_present) == (1, 1)


def test_parts_that_print_alike_fail_apart(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_START_METHOD", "fork")
    parts = [Part(str(clips / "0.mp4"), 1234.5671 + number / 1e5) for number in range(2)]
    assert str(parts[0]) == str(parts[1]) == f"{clips}/0.mp4 (1234.567 s to its end)"
    built = cache_build.build(parts, DEMO, tmp_path / "cache", jobs=1, limit_s=60.0)
    assert list(built.failures) == parts
    cache_build.write_failures(tmp_path / "list.jsonl", built.failures)
    assert [json.loads(line)["path"] for line in (tmp_path / "list.jsonl").open()] == [*map(str, parts)]


def test_a_row_that_names_no_clip_is_named(tmp_path: Path) -> None:
    rows = [{"videos": ["a.mp4"]}, {"videos": ["b.mp4"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "good.parquet")
    assert find_clips([str(tmp_path / "good.parquet")]) == ["a.mp4", "b.mp4"]
    bad = pa.table(
        {"videos": [[{"video": "a.mp4", "video_start": None}], [{"video": "b", "video_start": "2"}]]}
    )
    pq.write_table(bad, tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"bad\.parquet: row 1: column 'videos': clip b: video_start"):
        find_clips([str(tmp_path / "bad.parquet")])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupted_build_ends_at_once(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """It does not wait for a clip that is being decoded or about to be, and leaves no child behind."""
    monkeypatch.setattr(child, "_START_METHOD", "fork")
    monkeypatch.setattr(cache_build, "add_clip", hang_on_one)

    others = set(multiprocessing.active_children())  # kept by other tests, to be used again

    def interrupted(*_: object, **__: object) -> Iterator[object]:
        deadline = time.monotonic() + 30
        while begun and not set(multiprocessing.active_children()) - others and time.monotonic() < deadline:
            time.sleep(0.05)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(cache_build, "tqdm", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cache_build.build([str(clips / "1.mp4")] * 3, DEMO, tmp_path / "cache", jobs=1, limit_s=600.0)
    assert time.monotonic() - start < 30
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("action", ["verify", "stats", "prune"])
def test_a_folder_that_is_no_cache_is_not_taken_for_an_empty_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    """An empty folder is a cache that nothing was written to yet; one with other files is none."""
    for name in ("frames", "clips/a", f"mine/cache/{'0' * 16}"):
        (tmp_path / name).mkdir(parents=True)
    assert main(["data", "cache", action, f"cache={tmp_path}/frames"]) == 0
    assert main(["data", "cache", action, f"cache={tmp_path}/mine/cache"]) == 0
    capsys.readouterr()
    assert main(["data", "cache", action, f"cache={tmp_path}/clips"]) == 2
    message = capsys.readouterr().err
    assert "no frame cache, it holds a; name the folder" in message and "Did you mean" not in message
    assert main(["data", "cache", action, f"cache={tmp_path}/mine"]) == 2
    assert f"Did you mean {tmp_path}/mine/cache?" in capsys.readouterr().err
