import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keytoken.data import quarantine
from keytoken.data.contract import SamplingContract
from keytoken.data.quarantine import ClipProbe, clip_paths, scan_parquet
from keytoken.demo.render import write_clip
from keytoken.errors import DataError

CONTRACT = SamplingContract(min_pixels=56 * 56, max_pixels=56 * 56)


def _crash_or_hang(pipe, contract) -> None:  # type: ignore[no-untyped-def]
    """A child whose decoder hangs on one path and takes the process down on another."""
    pipe.send("ready")
    while True:
        path = pipe.recv()
        if path == "hang":
            time.sleep(600)
        if path == "crash":
            raise SystemExit(1)
        pipe.send(None)


def test_unreadable_clips_are_listed_and_the_rest_is_kept(tmp_path: Path) -> None:
    good, empty = tmp_path / "good.mp4", tmp_path / "empty.mp4"
    write_clip(good, np.zeros((4, 56, 56, 3), dtype=np.uint8))
    empty.touch()
    rows = [
        {"question": "kept", "videos": [{"video": str(good)}]},
        {"question": "empty", "videos": [{"video": str(empty)}]},
        {"question": "text only", "videos": []},
        {"question": "missing", "videos": [{"video": str(good)}, {"video": str(tmp_path / "gone.mp4")}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
    kept, listed = tmp_path / "kept.parquet", tmp_path / "quarantine.jsonl"
    scan_parquet(tmp_path / "all.parquet", CONTRACT, kept_file=kept, quarantine_file=listed)
    assert pq.read_table(kept).to_pylist() == [rows[0], rows[2]]
    found = [json.loads(line) for line in listed.read_text().splitlines()]
    named = [(entry["row"], Path(entry["path"]).name) for entry in found]
    assert named == [(1, "empty.mp4"), (3, "gone.mp4")]
    assert "is empty" in found[0]["reason"] and "no such file" in found[1]["reason"]

    pq.write_table(pa.Table.from_pylist([rows[1]]), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="none of its 1 rows"):
        scan_parquet(tmp_path / "bad.parquet", CONTRACT, kept_file=kept, quarantine_file=listed)


def test_a_decoder_that_hangs_or_crashes_costs_one_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "_serve", _crash_or_hang)
    monkeypatch.setattr(quarantine, "_START_METHOD", "fork")  # the replaced child must be inherited
    with ClipProbe(CONTRACT, limit_s=0.5) as probe:
        assert probe.failure("fine") is None
        assert "not decoded within 0.5 s" in (probe.failure("hang") or "")
        assert probe.failure("fine") is None
        assert "crashed" in (probe.failure("crash") or "")
        assert probe.failure("fine") is None


def test_paths_of_a_row() -> None:
    assert clip_paths({"videos": [{"video": "file:///a.mp4"}, "b.mp4"]}) == ["/a.mp4", "b.mp4"]
    assert clip_paths({"videos": None}) == clip_paths({}) == []
    with pytest.raises(DataError, match="videos"):
        clip_paths({"videos": [{"video": [1, 2]}]})
