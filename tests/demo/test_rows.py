from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from keytoken.data.clips import read_clip
from keytoken.demo.render import draw_clip
from keytoken.demo.rows import split_question, write_split
from keytoken.demo.tokenizer import DEMO_CONTRACT
from keytoken.demo.world import FAMILIES


def test_rows_follow_verls_schema_and_name_real_clips(tmp_path: Path) -> None:
    rows = pq.read_table(write_split(tmp_path, "train", 14, seed=3, contract=DEMO_CONTRACT)).to_pylist()
    assert [row["extra_info"]["family"] for row in rows] == [*FAMILIES, *FAMILIES]
    for index, row in enumerate(rows):
        question, rng = split_question("train", index, 3)
        content = row["prompt"][0]["content"]
        assert content.count("<video>") == len(row["videos"]) == (question.family != "text")
        assert content.endswith(question.prompt)
        assert row["reward_model"] == {"style": "rule", "ground_truth": question.letter}
        assert row["extra_info"]["problem_type"] == "multiple choice"
        for video in row["videos"]:
            assert Path(video["video"]).is_absolute()
            frames = read_clip(video["video"], DEMO_CONTRACT).frames
            drawn = torch.from_numpy(draw_clip(question.bodies, rng)).permute(0, 3, 1, 2)
            assert torch.equal(frames, drawn)


def test_splits_do_not_share_clips(tmp_path: Path) -> None:
    for index in range(len(FAMILIES) - 1):
        left, right = (draw_clip(*_bodies(split, index)) for split in ("train", "heldout"))
        assert not np.array_equal(left, right)


def _bodies(split: str, index: int) -> tuple:
    question, rng = split_question(split, index, 0)
    return question.bodies, rng


def test_existing_clips_are_kept(tmp_path: Path) -> None:
    write_split(tmp_path, "heldout", 7, seed=0, contract=DEMO_CONTRACT)
    clips = sorted((tmp_path / "clips" / "heldout").iterdir())
    clips[0].unlink()
    times = {path: path.stat().st_mtime_ns for path in clips[1:]}
    write_split(tmp_path, "heldout", 7, seed=0, contract=DEMO_CONTRACT)
    assert {path: path.stat().st_mtime_ns for path in clips[1:]} == times and clips[0].exists()
