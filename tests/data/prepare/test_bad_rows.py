"""Broken input to ``keytoken data prepare``: one line for each, and what comes of it.

Either the whole source is refused with a message that names the place, or the row is set aside with a reason
and the rest goes on. Nothing is replaced, and nothing is lost: rows read are rows written, set aside or
dropped as copies.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keytoken.errors import ConfigurationError, DataError

GOOD = {"video": "one.mp4", "question": "Who jumps?", "answer": "a dog", "id": "good"}
CHOICE = {"video": "two.mp4", "question": "Which?", "answer": "B", "options": ["red", "blue"], "id": "choice"}
LINE = json.dumps(GOOD)

# What the file holds, its name, and words of the message.
REFUSED = [
    pytest.param("a.json", f"[{LINE}, {LINE[:30]}", r"entry 1: it is cut off", id="JSON cut in an entry"),
    pytest.param("a.json", f"[{LINE},", r"ends before its list does", id="JSON cut between entries"),
    pytest.param(
        "a.json", f"[{LINE} {LINE}]", r"entry 1: a comma or '\]' is missing", id="JSON without a comma"
    ),
    pytest.param(
        "a.json", json.dumps({"rows": [GOOD]}), r"does not start with '\['", id="JSON that is no list"
    ),
    pytest.param("a.json", "[]", "no rows", id="JSON list without entries"),
    pytest.param("a.json", "[" + "[" * 100_000, "nested too deeply|cut off", id="JSON nested very deeply"),
    pytest.param("a.csv", "", "the file is empty", id="file of 0 bytes"),
    pytest.param("a.csv", "video,question,answer\n", "no rows", id="CSV with a header alone"),
    pytest.param(
        "a.csv",
        "video,question,solutoin\none.mp4,Who?,a dog\n",
        r"column answer cannot be found among 'video', 'question', 'solutoin'",
        id="CSV without an answer column",
    ),
    pytest.param(
        "a.csv",
        "video,question,answer,solution\none.mp4,Who?,a dog,a cat\n",
        r"'answer' and 'solution' both give the answer",
        id="CSV with two columns for one thing",
    ),
    pytest.param(
        "a.csv",
        "video,question,answer,answer\na,b,c,d\n",
        "'answer' stands there twice",
        id="CSV column twice",
    ),
    pytest.param(
        "a.csv",
        'video,question,answer\none.mp4,Who?,a dog\ntwo.mp4,"Who,a cat\n',
        r"from line 3 on: .* quote is probably not closed",
        id="CSV with a quote left open",
    ),
    pytest.param(
        "a.csv",
        "video,question,answer\none.mp4,Où?,là\n".encode("latin-1"),
        r"line 2: byte 0xF9 in column 10 is not utf-8; .*encoding=cp1252",
        id="Latin-1 read as UTF-8",
    ),
    pytest.param(
        "a.csv", "video,question,answer\n".encode("utf-16"), "is UTF-16; save it as UTF-8", id="UTF-16"
    ),
    pytest.param("a.xlsx", "PK", r"suffix '.xlsx' is not known; give a file of .json", id="spreadsheet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_refused_as_a_whole(bench: Any, name: str, content: str | bytes, message: str) -> None:
    source = bench.write(name, content)
    with pytest.raises(DataError, match=message) as caught:
        bench.prepare("folder")
    assert str(source) in str(caught.value)
    assert not bench.out.exists()


def set_aside(reason: str, detail: str, **changes: Any) -> Any:
    """A row of the matrix: what differs from a good row, the reason, and words of the detail."""
    return (changes, reason, detail)


ROWS = {
    "question empty": set_aside("empty question", "write one", question="  "),
    "question that is a placeholder alone": set_aside("empty question", "write one", question="<video>"),
    "question that ends the model's turn": set_aside("special tokens", "im_end", question="Who?<|im_end|>"),
    "question that is a list": set_aside("wrong type", "question is a list", question=["Who?"]),
    "answer empty": set_aside("empty answer", "write one", answer=""),
    "answer of 10,000 characters": set_aside("answer too long", "10000 characters", answer="x" * 10_000),
    "answer not among the options": set_aside(
        "answer not among the options",
        "'C' is none of the options, A to B",
        options=["red", "blue"],
        answer="C",
    ),
    "answer that is the text of two options": set_aside(
        "answer not among the options", "several", options=["red", "Red "], answer="red"
    ),
    "multiple choice without options": set_aside(
        "options missing", "0 options", problem_type="multiple choice", answer="A"
    ),
    "one option": set_aside("options missing", "1 options", options=["red"], answer="A"),
    "27 options": set_aside(
        "too many options", "26 at most", options=["x" * n for n in range(1, 28)], answer="A"
    ),
    "an empty option": set_aside("empty option", "option B is empty", options=["red", ""], answer="A"),
    "options that are a number": set_aside("options unreadable", "must be a list", options=4, answer="A"),
    "options in one cell without a mark between": set_aside(
        "options unreadable", "write them as a | b", options="red, blue", answer="A"
    ),
    "options that start as JSON and are not": set_aside(
        "options unreadable", "no JSON list", options="[red, blue]", answer="A"
    ),
    "unknown problem type": set_aside(
        "unknown problem type", "Did you mean 'numerical'", problem_type="numericla", answer="4"
    ),
    "numerical answer that is no number": set_aside(
        "answer is no number", "'four' is no number", problem_type="numerical", answer="four"
    ),
    "answer with a decimal comma": set_aside(
        "answer with a decimal comma", "read '1,5' as 15", problem_type="regression", answer="1,5"
    ),
    "decimal comma of a number whose type is inferred": set_aside(
        "answer with a decimal comma", "read '0,138' as 138", answer="0,138"
    ),
    "no video": set_aside("no media", "no video and no image", video=None),
    "a video and an image": set_aside("two media", "give one", image="photo.png"),
    "missing media": set_aside("media missing", "no such file", video="nine.mp4"),
    "media of 0 bytes": set_aside("media empty", "0 bytes", video="empty.mp4"),
    "media that is a folder": set_aside("media is no file", "folder", video="deep"),
    "media that is a named pipe": set_aside("media is no file", "device", video="pipe.mp4"),
    "path with .. out of the root": set_aside(
        "path outside media_root", "lies outside", video="../outside.mp4"
    ),
    "path with .. through a folder": set_aside(
        "path outside media_root", "lies outside", video="deep/../../outside.mp4"
    ),
    "path with .. in Windows style": set_aside(
        "path outside media_root", "lies outside", video="deep\\..\\..\\outside.mp4"
    ),
    "absolute path outside": set_aside("path outside media_root", "lies outside", video="/etc/passwd"),
    "absolute path of Windows": set_aside(
        "path outside media_root", "on a drive", video="C:\\clips\\one.mp4"
    ),
    "link out of the root": set_aside("path outside media_root", "is a link to", video="link.mp4"),
    "folder that is a link out of the root": set_aside(
        "path outside media_root", "is a link to", video="linked/outside.mp4"
    ),
    "part in words": set_aside("part unreadable", "write seconds", start="a minute"),
    "part that ends before it starts": set_aside("part of no length", "from 4 s to 2 s", start=4, end="2"),
    "part of an image": set_aside("part of an image", "leave them out", video=None, image="photo.png", end=2),
    "link to itself": set_aside("media missing", "no such file", video="circle.mp4"),
    "URL": set_aside("URL", "download the file", video="https://example.org/one.mp4"),
    "URL of a local file": set_aside("URL", "download the file", video="file:///etc/passwd"),
    "data in the path": set_aside("URL", "download the file", video="data:video/mp4;base64,AAAA"),
    "path with a null character": set_aside("no media", "names no file", video="one.mp4\0.jpg"),
    "id of an earlier row": set_aside("repeated id", "that of entry 0 already", id="good"),
}


@pytest.fixture
def traps(media: Path, tmp_path: Path) -> None:
    """What lies in the media root beside the clips, and what lies outside."""
    (tmp_path / "outside").mkdir()
    for outside in (tmp_path / "outside.mp4", tmp_path / "outside/outside.mp4"):
        outside.write_bytes((media / "one.mp4").read_bytes())
    (media / "empty.mp4").touch()
    (media / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (media / "linked").symlink_to(tmp_path / "outside")
    (media / "circle.mp4").symlink_to(media / "circle.mp4")
    os.mkfifo(media / "pipe.mp4")


@pytest.mark.usefixtures("traps")
@pytest.mark.parametrize(
    ("changes", "reason", "detail"), [pytest.param(*row, id=name) for name, row in ROWS.items()]
)
def test_set_aside(bench: Any, changes: dict[str, Any], reason: str, detail: str) -> None:
    bad = {**GOOD, "id": "bad", "question": "Who runs?", **changes}
    bench.json([GOOD, bad, CHOICE])
    rows = bench.prepare("folder")
    assert [row["extra_info"]["source_id"] for row in rows] == ["good", "choice"]
    (entry,) = bench.ledger.quarantined
    assert (entry.place, entry.reason) == ("entry 1", reason)
    assert detail in entry.detail
    (written,) = [
        json.loads(line) for line in (bench.out / "quarantine.jsonl").read_text().split("\n") if line
    ]
    assert (written["row"], written["reason"]) == (1, reason)


LINES = [
    pytest.param(
        "a.jsonl", f"{LINE}\n{LINE[:20]}\n", "line 2", "not JSON at column", id="one bad line of JSON Lines"
    ),
    pytest.param(
        "a.jsonl", f"{LINE}\n[1, 2]\n", "line 2", "a list, not an object", id="a list in JSON Lines"
    ),
    pytest.param(
        "a.json", f"[{LINE}, 7]", "entry 1", "a int; it must be an object", id="a number in a JSON list"
    ),
    pytest.param(
        "a.csv",
        "video,question,answer\none.mp4,Who jumps?,a dog\ntwo.mp4,Who, then,a cat\n",
        "line 3",
        "4 cells under 3 columns",
        id="a comma that is not quoted",
    ),
]


@pytest.mark.parametrize(("name", "content", "place", "detail"), LINES)
def test_one_unreadable_row_does_not_stop_the_others(
    bench: Any, name: str, content: str, place: str, detail: str
) -> None:
    bench.write(name, content)
    assert len(bench.prepare("folder")) == 1
    (entry,) = bench.ledger.quarantined
    assert (entry.place, entry.reason) == (place, "unreadable row")
    assert detail in entry.detail


def test_a_first_row_that_cannot_be_read_does_not_stop_the_others(bench: Any) -> None:
    bench.write("a.jsonl", f'{{"video": \n{LINE}\n')
    assert len(bench.prepare("folder")) == 1
    bench.write("a.csv", "video,question,answer\none.mp4,Who, then,a cat\ntwo.mp4,Who?,a dog\n")
    assert len(bench.prepare("folder", overwrite=True)) == 1


def test_a_line_may_hold_characters_that_end_lines_elsewhere(bench: Any) -> None:
    text = json.dumps({**GOOD, "question": "Who\u2028jumps\x85here?"}, ensure_ascii=False)
    bench.write("a.jsonl", text + "\n" + json.dumps(CHOICE))
    assert len(bench.prepare("folder")) == 2
    assert not bench.ledger.quarantined


def test_links_and_paths_that_stay_below_the_root_are_fine(bench: Any) -> None:
    (bench.media / "inner.mp4").symlink_to("deep/four.mp4")
    whole = str(bench.media / "one.mp4")
    videos = ["inner.mp4", "deep/../two.mp4", "deep\\four.mp4", whole, "./three.mp4"]
    bench.json([{**GOOD, "video": video, "id": str(n), "question": str(n)} for n, video in enumerate(videos)])
    media = [row["extra_info"]["media"] for row in bench.prepare("folder")]
    assert media == ["deep/four.mp4", "two.mp4", "deep/four.mp4", "one.mp4", "three.mp4"]


def test_a_media_root_that_is_a_link_is_followed(bench: Any) -> None:
    link = bench.tmp_path / "root"
    link.symlink_to(bench.media)
    bench.json([GOOD])
    (row,) = bench.prepare("folder", media_root=str(link))
    assert row["extra_info"]["media"] == "one.mp4"


SETTINGS = [
    pytest.param(
        {"media_root": "/no/such"}, DataError, "no such folder; check media_root", id="no media root"
    ),
    pytest.param({"source": "/no/such.csv"}, DataError, "no such file; check source", id="no source"),
    pytest.param(
        {"sampling": "video_r1_16"}, ConfigurationError, "video_r1_16f", id="misspelt sampling preset"
    ),
    pytest.param({"style": "resoning"}, ConfigurationError, "Did you mean 'reasoning'", id="misspelt style"),
    pytest.param({"limit": 0}, ConfigurationError, "above 0", id="limit of 0"),
    pytest.param({"split": "a/b"}, ConfigurationError, "file name", id="split with a slash"),
    pytest.param({"encoding": "utf-88"}, DataError, "no such encoding", id="unknown encoding"),
    pytest.param({"against": ("mmvu",)}, ConfigurationError, "BENCHMARK:FILE", id="test set without a file"),
    pytest.param(
        {"against": ("mnvu:a.json",)}, ConfigurationError, "Unknown benchmark", id="unknown benchmark"
    ),
    pytest.param(
        {"against": ("a.parquet",)}, DataError, "no prepared Parquet", id="test set that is missing"
    ),
    pytest.param(
        {"check": "none", "checksums": "full"}, ConfigurationError, "opens no file", id="checks that clash"
    ),
]


@pytest.mark.parametrize(("settings", "error", "message"), SETTINGS)
def test_refused_settings(bench: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    bench.json([GOOD])
    with pytest.raises(error, match=message):
        bench.prepare("folder", **settings)
    assert not bench.out.exists()


TARGETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "out exists": (lambda out: (out.mkdir(), (out / "mine.txt").touch()), "exists; name another folder"),
    "out is a file": (lambda out: out.touch(), "is a file"),
}


@pytest.mark.parametrize(("make", "message"), [pytest.param(*row, id=name) for name, row in TARGETS.items()])
def test_an_existing_target_is_refused(bench: Any, make: Callable[[Path], object], message: str) -> None:
    make(bench.out)
    bench.json([GOOD])
    with pytest.raises(ConfigurationError, match=message):
        bench.prepare("folder")


def test_overwrite_replaces_a_dataset_and_nothing_else(bench: Any) -> None:
    bench.json([GOOD])
    bench.prepare("folder")
    bench.json([CHOICE])
    (row,) = bench.prepare("folder", overwrite=True)
    assert row["extra_info"]["source_id"] == "choice"
    mine = bench.tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigurationError, match="was not written by"):
        bench.prepare("folder", overwrite=True, out=str(mine))
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_50_megabytes_of_json_take_little_memory(bench: Any) -> None:
    """Reading holds one row at a time: 1,000 rows of 50 kB, of which a limit takes none but the first 50."""
    filler = "word " * 10_000
    with (bench.tmp_path / "huge.json").open("w") as file:
        file.write("[")
        for number in range(1_000):
            file.write(("," if number else "") + json.dumps({**GOOD, "id": str(number), "remark": filler}))
        file.write("]")
    source = bench.tmp_path / "huge.json"
    assert source.stat().st_size > 50_000_000
    code = (
        "import sys, resource, time; from pathlib import Path\n"
        "from keytoken.data.prepare.sources import read_source\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "print(sum(1 for _ in read_source(Path(sys.argv[1]))), peak() - before, int(time.process_time()))"
    )
    done = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, check=True)
    count, kilobytes, seconds = map(int, done.stdout.split())
    assert count == 1_000
    assert kilobytes < 12_000
    assert seconds < 30  # of the processor: it may be busy with something else


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 2 kB: it ends as a full disk does, in the middle of a write."""
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_disk_full(bench: Any, request: pytest.FixtureRequest) -> None:
    bench.json([GOOD])
    request.getfixturevalue("small_files")
    with pytest.raises(DataError, match="the disk is full, or over a quota; nothing was left there"):
        bench.prepare("folder")
    assert sorted(path.name for path in bench.tmp_path.iterdir()) == ["media", "source.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_disk_full_for_real(bench: Any) -> None:
    mount = bench.tmp_path / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", mount], capture_output=True
    ).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        bench.json([{**GOOD, "id": str(n), "question": f"{n} " + "who " * 200} for n in range(50)])
        with pytest.raises(DataError, match="the disk is full"):
            bench.prepare("folder", out=str(mount / "out"))
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", mount], check=True)
