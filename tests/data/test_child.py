"""Work in a child process: a clip that hangs or crashes it costs that clip."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import pytest

from keytoken.data import child
from keytoken.data.cache.store import clip_shape
from keytoken.data.child import ClipProcess
from keytoken.data.contract import SamplingContract
from keytoken.demo.render import write_clip
from keytoken.errors import ClipError, DataError

CONTRACT = SamplingContract(min_pixels=56 * 56, max_pixels=56 * 56)


def _work(path: str) -> str:
    if path == "hang":
        time.sleep(600)
    if path == "crash":
        os._exit(1)
    if path == "unforeseen":
        raise RuntimeError("not an error of a user")
    if path == "refused":
        raise DataError("refused")
    return path.upper()


def test_a_decoder_that_hangs_or_crashes_costs_one_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_START_METHOD", "fork")  # a child by spawn cannot import this file
    with ClipProcess(_work, limit_s=2.0) as process:
        assert process.run("fine") == "FINE"
        for path, message in {
            "hang": "not decoded within 2 s",
            "crash": "crashed",
            "unforeseen": "crashed",
            "refused": "refused",
        }.items():
            with pytest.raises(DataError, match=message) as caught:
                process.run(path)
            assert isinstance(caught.value, ClipError) == (path != "refused")
            assert process.run("fine") == "FINE"
        last = process._process
    assert not last.is_alive()


def test_a_clip_is_decoded_in_a_fresh_interpreter(tmp_path: Path) -> None:
    import numpy as np

    write_clip(tmp_path / "clip.mp4", np.zeros((4, 56, 56, 3), dtype=np.uint8))
    with ClipProcess(partial(clip_shape, contract=CONTRACT, root=None), limit_s=60.0) as process:
        assert process.run(str(tmp_path / "clip.mp4")) == (4, 3, 56, 56)
        with pytest.raises(ClipError, match=r"gone\.mp4"):
            process.run(str(tmp_path / "gone.mp4"))


def test_a_child_that_ends_while_it_starts_is_no_fault_of_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_START_METHOD", "fork")
    monkeypatch.setattr(child, "_serve", lambda pipe, work: os._exit(1))
    with ClipProcess(len, 5.0) as process:
        for _ in range(2):  # the next clip gets a child of its own
            with pytest.raises(DataError, match=r"ended while it started.*data\.clip_check_jobs"):
                process.run("a.mp4")
