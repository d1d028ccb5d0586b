import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from keytoken.demo.validation import HeldOutAnswer, read_answers, write_validation


def test_every_prompt_is_asked_twice_and_those_with_a_clip_under_every_control(tmp_path: Path) -> None:
    rows = [
        {"videos": [{"video": "a.mp4"}], "data_source": "x", "extra_info": {"prompt_id": "p0"}},
        {"videos": [], "data_source": "x", "extra_info": {"prompt_id": "p1"}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "heldout.parquet")
    target = write_validation(tmp_path / "heldout.parquet", tmp_path / "validation.parquet", 3)
    asked = [
        (
            row["extra_info"]["prompt_id"],
            row["data_source"],
            row["extra_info"]["control"],
            row["__rollout_n__"],
        )
        for row in pq.read_table(target).to_pylist()
    ]
    assert asked == [
        ("p0", "demo_sampled", "none", 3),
        ("p0", "demo_greedy", "none", 1),
        ("p0", "demo_greedy_blank", "blank", 1),
        ("p0", "demo_greedy_shuffled", "shuffled", 1),
        ("p1", "demo_sampled", "none", 3),
        ("p1", "demo_greedy", "none", 1),
    ]
    without = write_validation(tmp_path / "heldout.parquet", tmp_path / "plain.parquet", 3, controls=())
    assert pq.read_table(without).num_rows == 4


def test_an_answer_may_hold_what_looks_like_the_end_of_a_line(tmp_path: Path) -> None:
    """verl writes answers as they are; str.splitlines() would cut them at these characters."""
    answer = "a\u2028b\x85c\x0bd"
    row = {"prompt_id": "p", "family": "color", "acc": 1.0, "decoding": "greedy", "control": "none"}
    file = tmp_path / "0.jsonl"
    file.write_text(json.dumps({**row, "output": answer}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_answers(file) == [HeldOutAnswer("p", "color", 1.0, "greedy", "none", answer)]
