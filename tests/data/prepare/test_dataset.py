"""The whole way: nothing is lost, equal input gives equal bytes, nothing is half there, and verl reads it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from keytoken.cli import main
from keytoken.data.prepare.settings import PrepareSettings
from keytoken.errors import DataError
from keytoken.words import parse_words


def random_rows(rng: random.Random, count: int) -> list[Any]:
    """Good rows, copies, contradictions, repeated ids and broken rows in any mixture."""
    rows = []
    for _ in range(count):
        row: Any = {
            "video": rng.choice(
                ["one.mp4", "two.mp4", "three.mp4", "nine.mp4", "../x.mp4", "http://a/b.mp4"]
            ),
            "question": rng.choice(["Who?", "who", "What?", "Which?", ""]),
            "answer": rng.choice(["A", "B", "C", "a dog", "4", "red", ""]),
            "id": rng.choice(["", "1", "2", str(rng.randrange(1_000))]),
        }
        if rng.random() < 0.5:
            row["options"] = rng.choice([["red", "blue"], ["blue", "red"], ["red"], "red|blue", 7])
        if rng.random() < 0.2:
            row["problem_type"] = rng.choice(["multiple choice", "numerical", "free-form", "nonsense"])
        rows.append(row if rng.random() < 0.95 else rng.choice([7, "x", [], None, {}]))
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_every_row_ends_in_one_place(bench: Any, seed: int) -> None:
    raw = random_rows(random.Random(seed), 200)
    bench.json(raw)
    rows = bench.prepare("folder")
    ledger = bench.ledger
    written = {int(row["extra_info"]["prompt_id"][-6:]) for row in rows}
    refused = [entry.row for entry in ledger.quarantined]
    copies = [int(place.split()[1]) for place, _ in ledger.copies]
    assert sorted([*written, *refused, *copies]) == list(range(len(raw)))
    assert refused == sorted(refused)
    facts = json.loads((bench.out / "report.json").read_text())["rows"]
    assert facts["read"] == sum(count for key, count in facts.items() if key != "read") == 200
    assert sum(json.loads((bench.out / "report.json").read_text())["quarantine reasons"].values()) == len(
        refused
    )
    assert [row["extra_info"]["index"] for row in rows] == list(range(len(rows)))


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_the_same_input_gives_the_same_bytes(bench: Any) -> None:
    bench.json(random_rows(random.Random(1), 100))
    bench.prepare("folder", check="headers", jobs=2)
    first = digests(bench.out)
    (bench.tmp_path / "out.headers.jsonl").unlink()
    bench.prepare("folder", check="headers", jobs=1, overwrite=True)
    assert digests(bench.out) == first
    stated = json.loads((bench.out / "checksums.json").read_text())
    assert stated["output"]["sha256"] == first["train.parquet"]
    assert stated["source"]["sha256"] == hashlib.sha256(bench.source.read_bytes()).hexdigest()


KILLED = """
import sys, os, signal
from pathlib import Path
import keytoken.data.prepare.output as output
from keytoken.data.prepare.build import prepare
from keytoken.data.prepare.settings import PrepareSettings
inner = output.{function}
def stop(*arguments):
    {before}
    os.kill(os.getpid(), signal.SIGKILL)
output.{function} = stop
source, media, out, overwrite = sys.argv[1:]
prepare(PrepareSettings(name=("folder",), source=source, media_root=media, out=out, check="none",
                        overwrite=overwrite == "yes"))
"""


@pytest.mark.parametrize(
    ("function", "before"),
    [
        pytest.param("_write_rows", "arguments[0].write_bytes(b'PAR1 half a file')", id="while writing rows"),
        pytest.param("_write_lines", "pass", id="after the dataset, before the lists"),
        pytest.param("_sync", "inner(*arguments)", id="while bringing it to the disk"),
    ],
)
def test_a_killed_run_leaves_nothing_under_the_name(bench: Any, function: str, before: str) -> None:
    bench.json([{"video": "one.mp4", "question": "Who?", "answer": "a dog"}])
    code = KILLED.format(function=function, before=before)
    command = [sys.executable, "-c", code, str(bench.source), str(bench.media), str(bench.out)]
    done = subprocess.run([*command, "no"], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not bench.out.exists()
    bench.prepare("folder")
    first = digests(bench.out)
    bench.json([{"video": "two.mp4", "question": "Who?", "answer": "a cat"}])
    assert subprocess.run([*command, "yes"], capture_output=True).returncode == -signal.SIGKILL
    assert digests(bench.out) == first


def test_a_dataset_that_cannot_be_replaced_stays(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one is out of the way already when the new one cannot be given its name."""
    bench.json([{"video": "one.mp4", "question": "Who?", "answer": "a dog"}])
    bench.prepare("folder")
    first, genuine = digests(bench.out), Path.rename

    def rename(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError(5, "Input/output error")
        return genuine(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(DataError, match="cannot be written"):
        bench.prepare("folder", overwrite=True)
    assert digests(bench.out) == first
    assert [path.name for path in bench.tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_an_interrupt_while_reading_headers_ends_soon_and_keeps_what_was_read(bench: Any) -> None:
    os.mkfifo(bench.tmp_path / "trap")
    code = (
        "import signal, sys; from pathlib import Path\n"
        # As in a terminal: what a script starts in the background ignores the signal from its birth.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from keytoken.data.headers import Inspection\n"
        "from keytoken.data.prepare.inspection import inspect_all\n"
        "files = [(Path(name), 'video') for name in sys.argv[2:]]\n"
        "inspect_all(files, Inspection(), jobs=1, limit_s=30.0, cache=Path(sys.argv[1]))\n"
    )
    cache = bench.tmp_path / "headers.jsonl"
    files = [bench.media / "one.mp4", bench.tmp_path / "trap", bench.media / "two.mp4"]
    run = subprocess.Popen([sys.executable, "-c", code, cache, *files], stderr=subprocess.PIPE)
    started = time.monotonic()
    while not (cache.exists() and cache.read_text().strip()) and time.monotonic() - started < 300:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    run.wait(timeout=120)  # the reading that runs comes to its limit first
    run.stderr.close()
    assert run.returncode != 0
    assert cache.read_text().count('"key"') == 1


def test_a_row_of_every_kind_is_read_by_the_training_dataset(bench: Any, tmp_path: Path) -> None:
    """verl's own dataset code, under KeyToken's class, with the demo's tokenizer."""
    import datasets as hf
    from omegaconf import OmegaConf

    from keytoken.verl_adapter.dataset import VideoDataset

    bench.json(
        [
            {"video": "one.mp4", "question": "Who?", "answer": "a dog"},
            {"image": "photo.png", "question": "Which?", "answer": "B", "options": ["red", "blue"]},
        ]
    )
    bench.prepare("folder", check="headers")
    frame = hf.load_dataset("parquet", data_files=str(bench.out / "train.parquet"), cache_dir=str(tmp_path))
    reader = object.__new__(VideoDataset)
    reader.image_key, reader.video_key, reader.audio_key, reader.processor = (
        "images",
        "videos",
        "audios",
        object(),
    )
    config = OmegaConf.create({"sampling_contract": {"max_frames": 4}})
    reader.config, reader.image_patch_size = config, 14
    kinds = []
    for row in frame["train"]:
        (message,) = reader._build_messages(row, key="prompt")
        kinds.append([item["type"] for item in message["content"]])
        images, videos, _ = VideoDataset._process_multi_modal_info([message], 14, config)
        assert (images is None) != (videos is None)
    assert kinds == [["video", "text"], ["image", "text"]]


def test_nothing_left_writes_the_report_and_no_dataset(bench: Any) -> None:
    bench.json([{"video": "nine.mp4", "question": "Who?", "answer": "a dog"}])
    with pytest.raises(DataError, match=r"none of its 1 rows .* media missing \(1\); the first: .*nine\.mp4"):
        bench.prepare("folder")
    assert "media missing" in (bench.tmp_path / "out.failed/report.md").read_text()
    assert not bench.out.exists()


def test_the_report_for_people(bench: Any) -> None:
    bench.csv(
        ["video", "question", "answer", "remarks"],
        ["one.mp4", "How many?", "3", ""],
        ["one.mp4", "How many?", "3", ""],
        ["nine.mp4", "How many?", "3", ""],
        ["two.mp4", "Who?", "a dog", ""],
    )
    bench.prepare("folder", check="headers")
    text = (bench.out / "report.md").read_text()
    for line in (
        "# train: 2 of 4 rows",
        "| quarantined | 1 |",
        "| copies dropped | 1 |",
        "| media missing | 1 |",
        "| problem type inferred: numerical | 1 |",
        "| columns not used: remarks |  |",
        "| mpeg4 | 2 |",
        f"0 to 5  {'#' * 40} 2",
    ):
        assert line in text


def test_the_command(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench.csv(["video", "question", "answer"], ["one.mp4", "Who?", "a dog"], ["nine.mp4", "Who?", "a dog"])
    words = [
        "folder",
        f"source={bench.source}",
        f"media_root={bench.media}",
        f"out={bench.out}",
        "check=none",
    ]
    assert main(["data", "prepare", *words]) == 0
    printed = capsys.readouterr().out
    assert "train.parquet: 1 of 2 rows" in printed
    assert "1  media missing" in printed
    assert main(["data", "prepare", *words]) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert main(["data", "prepare", "foldr", *words[1:]]) == 2
    assert "Did you mean 'folder'" in capsys.readouterr().err


def test_a_row_that_is_set_aside_keeps_its_names(bench: Any) -> None:
    """Whatever is wrong with it, once it is known what it is called."""
    header = ("id", "video", "question", "answer", "options", "start", "end")
    faults = (("", "soon", "2"), ("", "3", "2"), ("[red", "", ""), ("red", "", ""))
    rows = ((f"q{number}", "one.mp4", "Who?", "a dog", *fault) for number, fault in enumerate(faults))
    bench.csv(header, ("good", "two.mp4", "Who?", "a dog", "", "", ""), *rows)
    bench.prepare("folder")
    assert [each.path for each in bench.ledger.quarantined] == ["one.mp4"] * 4
    assert [each.id for each in bench.ledger.quarantined] == ["q0", "q1", "q2", "q3"]


@pytest.mark.parametrize("words", [[], ["source=a", "out=b"], ["out=b"]])
def test_a_converter_that_is_not_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", *words]) == 2
    message = capsys.readouterr().err
    assert "name a converter: folder, tinyllava_video_r1, video_holmes, video_r1" in message
    assert "keytoken data prepare folder source=" in message


def test_a_misspelt_converter_is_named_before_settings_that_are_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["data", "prepare", "foldr"]) == 2
    assert "Did you mean 'folder'?" in capsys.readouterr().err


def test_words_of_the_command() -> None:
    words = ["folder", "source=a", "out=b", "against=mmvu:x.json,y.parquet", "limit=5", "overlap=drop"]
    settings = parse_words(words, PrepareSettings, "data prepare", plain="name")
    assert settings.against == ("mmvu:x.json", "y.parquet")
    assert (settings.limit, settings.overlap) == (5, "drop")
