"""Which answers are wanted, their seeds, and media that stay below their root."""

from __future__ import annotations

from pathlib import Path

import pytest

from keytoken.data.part import Part
from keytoken.errors import ClipError, DataError
from keytoken.evaluation.rows import (
    VIDEO_ENDINGS,
    Job,
    SampleKey,
    conversation,
    key_of,
    media_of,
    media_path,
    plan,
    sample_seed,
)
from keytoken.scoring.items import Item, Prediction


def item(name: str, **fields: object) -> Item:
    return Item(
        benchmark="demo",
        item_id=name,
        question="q",
        answer="A",
        kind="multiple choice",
        **fields,  # type: ignore[arg-type]
    )


def test_plan_is_every_combination_once() -> None:
    items = [item("a"), item("b")]
    jobs = plan(items, ["none", "blank"], {"greedy": 1, "sampled": 3})
    assert [job.item.item_id for job in jobs] == ["a", "b"]
    keys = [key for job in jobs for key in job.keys]
    assert len(set(keys)) == len(keys) == 2 * 2 * 4
    assert SampleKey("b", "blank", "sampled", 2) in keys
    # Answers under one control follow each other: their prompt is made once.
    assert [key.control for key in jobs[0].keys] == ["none"] * 4 + ["blank"] * 4


def test_plan_leaves_out_what_is_there() -> None:
    items = [item("a"), item("b")]
    everything = [key for job in plan(items, ["none"], {"sampled": 2}) for key in job.keys]
    rest = plan(items, ["none"], {"sampled": 2}, everything[:3])
    assert rest == [Job(items[1], (everything[3],))]
    assert plan(items, ["none"], {"sampled": 2}, everything) == []
    # More answers than before: only the further ones.
    more = plan(items, ["none"], {"sampled": 3}, everything)
    assert [[key.sample for key in job.keys] for job in more] == [[2], [2]]


def test_key_of_an_answer() -> None:
    prediction = Prediction(item_id="a", response="x", decoding="sampled", sample=3, control="text")
    assert key_of(prediction) == SampleKey("a", "text", "sampled", 3)


def test_seed_depends_on_each_part_of_the_key() -> None:
    base = SampleKey("a", "none", "sampled", 1)
    keys = [
        base,
        base._replace(item_id="b"),
        base._replace(control="text"),
        base._replace(decoding="greedy"),
        base._replace(sample=2),
    ]
    seeds = [sample_seed(7, key) for key in keys] + [sample_seed(8, base)]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    # A file that was begun with another version must go on with the same seeds.
    assert sample_seed(7, base) == 6891468707059592622  # the upper 63 bits of b2sum -l 64


def test_conversation_is_media_first() -> None:
    (message,) = conversation("what ?", [Path("v.mp4")], [Path("p.png")])
    assert message["content"] == [
        {"type": "video", "video": "v.mp4"},
        {"type": "image", "image": "p.png"},
        {"type": "text", "text": "what ?"},
    ]
    (message,) = conversation("what ?", [Part("v.mp4", 11.1, 19.6)])
    named = {"type": "video", "video": "v.mp4", "video_start": 11.1, "video_end": 19.6}
    assert message["content"][0] == named
    assert conversation("what is <video> ?") == [{"role": "user", "content": "what is <video> ?"}]


def test_video_is_found_with_and_without_its_ending(tmp_path: Path) -> None:
    (tmp_path / "Art").mkdir()
    (tmp_path / "Art" / "1.mkv").touch()
    frames = tmp_path / "Art" / "2"
    frames.mkdir()
    assert media_path(tmp_path, "Art/1", VIDEO_ENDINGS) == tmp_path / "Art" / "1.mkv"
    assert media_path(tmp_path, "Art/1.mkv", VIDEO_ENDINGS) == tmp_path / "Art" / "1.mkv"
    assert media_path(tmp_path, "Art/2", VIDEO_ENDINGS) == frames
    with pytest.raises(ClipError, match=r"Art/3: no such file .*\.mp4.*media_root"):
        media_path(tmp_path, "Art/3", VIDEO_ENDINGS)


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/passwd", "link.mp4", "inside/../../secret.mp4"])
def test_media_stay_below_their_root(name: str, tmp_path: Path) -> None:
    root = tmp_path / "media"
    (root / "inside").mkdir(parents=True)
    (tmp_path / "secret.mp4").touch()
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(DataError, match="leads out of the media root"):
        media_path(root, name)


def test_root_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "v.mp4").touch()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert media_path(tmp_path / "root", "v.mp4") == tmp_path / "root" / "v.mp4"


def test_media_of_an_item(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").touch()
    (tmp_path / "p.png").touch()
    both = item("a", video="v", images=("p.png",))
    assert media_of(both, tmp_path) == ([tmp_path / "v.mp4"], [tmp_path / "p.png"])
    assert media_of(item("b"), None) == ([], [])
    part = item("c", video="v", span=(11.1, 19.6))
    assert media_of(part, tmp_path) == ([Part(str(tmp_path / "v.mp4"), 11.1, 19.6)], [])
    with pytest.raises(DataError, match="give media_root"):
        media_of(both, None)
    named = item("d", video="v.mp4", root=str(tmp_path))
    assert media_of(named, None) == ([tmp_path / "v.mp4"], [])
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "v.mp4").touch()
    assert media_of(named, tmp_path / "moved") == ([tmp_path / "moved" / "v.mp4"], [])
