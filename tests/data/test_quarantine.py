import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keytoken.data.contract import SamplingContract
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
    known = scan_rows(rows, CONTRACT, jobs=1, known=range(24))  # they only have to be there
    assert known.kept == list(range(24)) and known.shapes == {}
