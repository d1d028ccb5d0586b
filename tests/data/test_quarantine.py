import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keytoken.data import child
from keytoken.data.contract import SamplingContract
from keytoken.data.headers import quick_hash
from keytoken.data.quarantine import named_clips, scan_parquet, scan_rows
from keytoken.demo.render import write_clip
from keytoken.errors import DataError

CONTRACT = SamplingContract(min_pixels=56 * 56, max_pixels=56 * 56)


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


def test_paths_of_a_row() -> None:
    assert named_clips({"videos": [{"video": "file:///a.mp4"}, "b.mp4"]}) == ["/a.mp4", "b.mp4"]
    assert named_clips({"videos": None}) == named_clips({}) == []
    with pytest.raises(DataError, match="videos"):
        named_clips({"videos": [{"video": [1, 2]}]})


def test_several_children_find_what_one_finds(tmp_path: Path) -> None:
    """Good and bad clips, one clip in several rows, in whatever order the children answer."""
    paths = [tmp_path / f"{number}.mp4" for number in range(12)]
    for number, path in enumerate(paths):
        if number % 3:
            write_clip(path, np.full((4 + number, 56, 56, 3), number, dtype=np.uint8))
        else:
            path.touch()
    rows = [{"videos": [{"video": str(path)}]} for path in [*paths, *reversed(paths)]]
    one, three = (scan_rows(rows, CONTRACT, jobs=jobs) for jobs in (1, 3))
    assert one == three
    assert one.kept == [number for number in range(12) if number % 3] + [
        12 + number for number in range(12) if (11 - number) % 3
    ]
    assert len(one.quarantined) == 8 and len(one.shapes) == 8


def test_known_rows_are_decoded_again_if_their_clips_changed(tmp_path: Path) -> None:
    """Also a row that does not say what its clip held."""
    paths = [tmp_path / f"{number}.mp4" for number in range(6)]
    for path in paths:
        write_clip(path, np.zeros((4, 56, 56, 3), dtype=np.uint8))
    rows = [{"videos": [{"video": str(path)}], "extra_info": {"content": quick_hash(path)}} for path in paths]
    paths[1].write_bytes(b"")
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    paths[3].unlink()
    write_clip(paths[4], np.zeros((8, 56, 56, 3), dtype=np.uint8))
    rows[5]["extra_info"] = None
    scan = scan_rows(rows, CONTRACT, jobs=1, known=range(6))
    assert (scan.kept, sorted(scan.unchanged)) == ([0, 4, 5], [0])
    assert set(scan.shapes) == {str(paths[4]), str(paths[5])}
    words = [entry.reason for entry in scan.quarantined]
    assert [entry.row for entry in scan.quarantined] == [1, 2, 3]
    assert "is empty" in words[0] and "cannot be decoded" in words[1] and "no such file" in words[2]


def test_a_closed_folder_costs_its_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 asks os.stat whether a file exists, and raises if it may not look."""
    closed = str(tmp_path / "closed.mp4")
    genuine = os.stat

    def stat(path: Any, *rest: Any, **options: Any) -> os.stat_result:
        if os.fspath(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", closed)
        return genuine(path, *rest, **options)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(child, "_START_METHOD", "fork")  # the child as well
    rows = [{"videos": []}, {"videos": [closed], "extra_info": {"content": "0"}}]
    scan = scan_rows(rows, CONTRACT, jobs=1, known=range(2))
    assert scan.kept == [0]
    assert "closed.mp4: cannot be found (Permission denied)" in scan.quarantined[0].reason


def test_a_row_that_names_no_clip_is_set_aside_alone() -> None:
    scan = scan_rows([{"videos": [{"video": 7}]}, {"videos": []}], CONTRACT, jobs=1)
    assert scan.kept == [1]
    (entry,) = scan.quarantined
    assert entry.row == 0 and "a video given as int is not supported" in entry.reason
