"""Reading under a time limit: the same clips, and a decoder that hangs or dies costs one of them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from keytoken.data import child, timed
from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.decoders import AUTO, DECODERS, Decoded
from keytoken.data.part import Span
from keytoken.data.timed import read_clip_within
from keytoken.errors import ClipError, ConfigurationError

CONTRACT = SamplingContract(fps=2.0, min_frames=4, max_frames=8, min_pixels=56 * 56, max_pixels=112 * 112)


@pytest.fixture(autouse=True)
def _children(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No child of an earlier test serves a later one, and none outlives its test."""
    monkeypatch.setattr(timed, "_IDLE", {})
    yield
    for idle in timed._IDLE.values():
        for process in idle:
            process.__exit__()


def children() -> list[int | None]:
    """Processes that wait for a clip."""
    return [process._process and process._process.pid for idle in timed._IDLE.values() for process in idle]


def test_the_clip_is_that_of_read_clip(numbered: Callable[..., Path]) -> None:
    """In a fresh interpreter, as in a run; the second clip is read by the same child."""
    path = numbered("a.mp4")
    for _ in range(2):
        clip, expected = read_clip_within(path, CONTRACT, 60.0), read_clip(path, CONTRACT)
        assert torch.equal(clip.frames, expected.frames)
        assert (clip.metadata(), clip.timestamps_s, clip.path) == (
            expected.metadata(),
            expected.timestamps_s,
            expected.path,
        )
    assert len(children()) == 1
    with pytest.raises(ClipError, match=r"gone\.mp4: no such file"):
        read_clip_within(path.parent / "gone.mp4", CONTRACT, 60.0)
    assert len(children()) == 1 and children() != [None]


def strange(path: Path, contract: SamplingContract, span: Span) -> Decoded:
    """A decoder that hangs on one clip and takes its process down on another."""
    if path.name == "hang.mp4":
        time.sleep(600)
    if path.name == "crash.mp4":
        os._exit(1)
    return DECODERS["decord"](path, contract, span)


@pytest.fixture
def strange_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """By fork, since only so a child has this registry."""
    monkeypatch.setattr(child, "_START_METHOD", "fork")
    for name in AUTO:
        monkeypatch.setitem(DECODERS, name, strange)


@pytest.mark.parametrize(
    ("name", "words"),
    [("hang.mp4", "not decoded within 0.5 s"), ("crash.mp4", "the decoder crashed")],
    ids=["decoder that hangs", "decoder that crashes"],
)
@pytest.mark.usefixtures("strange_decoder")
def test_a_decoder_that_hangs_or_crashes_costs_one_clip(
    name: str, words: str, numbered: Callable[..., Path]
) -> None:
    good, bad = numbered("good.mp4"), numbered(name)
    assert read_clip_within(good, CONTRACT, 60.0).num_source_frames == 60
    first = children()
    with pytest.raises(ClipError, match=rf"clip {bad}: {words}"):
        read_clip_within(bad, CONTRACT, 0.5)
    assert read_clip_within(good, CONTRACT, 60.0).num_source_frames == 60
    assert children() != first and len(children()) == 1
    with pytest.raises(ProcessLookupError):  # the one that hung has gone
        os.kill(first[0] or 0, 0)


@pytest.mark.usefixtures("strange_decoder")
def test_threads_have_children_of_their_own(numbered: Callable[..., Path]) -> None:
    """One clip that hangs does not hold up the others; children are kept for the next readers."""
    good, bad = numbered("good.mp4"), numbered("hang.mp4")
    ready = threading.Barrier(3)

    def read(path: Path) -> int:
        ready.wait(30)
        return read_clip_within(path, CONTRACT, 3.0 if path == bad else 60.0).num_source_frames

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(read, path) for path in (good, bad, good)]
        assert [futures[0].result(30), futures[2].result(30)] == [60, 60]
        assert isinstance(futures[1].exception(30), ClipError)
    assert 2 <= len(children()) <= 3


def test_a_setting_that_cannot_be_is_no_bad_clip(
    numbered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that is not installed would put every row of a dataset into the quarantine."""
    from keytoken.data.decoders import with_torchcodec

    monkeypatch.setattr(with_torchcodec, "_load", lambda: "torchcodec cannot be imported: gone")
    monkeypatch.setattr(child, "_START_METHOD", "fork")
    path = numbered("a.mp4")
    for read in (read_clip, lambda path, contract: read_clip_within(path, contract, 60.0)):
        with pytest.raises(
            ConfigurationError, match=r"decoder=torchcodec: .*gone; install it, or set decoder=auto"
        ):
            read(path, SamplingContract(decoder="torchcodec"))
