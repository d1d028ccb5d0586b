"""A checkpoint is complete or not there, whenever its writer dies and whatever its disk does."""

from __future__ import annotations

import errno
import gc
import logging
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError

from keytoken.errors import CheckpointError, ClusterError
from keytoken.verl_adapter import whole_checkpoint
from keytoken.verl_adapter.whole_checkpoint import save_whole, settle

TRACKER = "latest_checkpointed_iteration.txt"
FILES = ("actor/model.pt", "actor/optim.pt", "data.pt")


def writer(step: int, content: str) -> Callable[[Path], None]:
    """Writes as verl does: its files, each in two parts, and the tracker without ceremony."""

    def write(aside: Path) -> None:
        for name in FILES:
            file = aside / f"global_step_{step}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w") as out:
                out.write(content[:1])
                out.flush()
                out.write(content[1:])
        (aside / TRACKER).write_text(str(step))

    return write


def content_of(folder: Path) -> set[str]:
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == sorted(
        FILES
    )
    return {(folder / name).read_text() for name in FILES}


class Killed(BaseException):
    """Ends a function as SIGKILL would: nobody catches it."""


def dies_at_line(number: int, work: Callable[[], None]) -> bool:
    """Run ``work`` up to one of its lines; whether it came that far."""
    left = number

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (whole_checkpoint.__file__, __file__):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Killed:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize(
    ("steps", "new", "keep"),
    [([], 2, None), ([2], 4, None), ([2, 4], 6, 1), ([2, 4], 4, None), ([2, 4, 6], 4, 2)],
    ids=["the first", "another", "the older ones go", "the same step again", "an earlier step again"],
)
def test_a_run_may_be_killed_before_any_line(
    tmp_path: Path, steps: list[int], new: int, keep: int | None
) -> None:
    """What is read afterwards is whole: the checkpoint before, or the new one."""
    number, outcomes = 0, []
    while True:
        folder = tmp_path / str(number)
        for step in steps:
            save_whole(folder, step, writer(step, f"old {step}"))
        died = dies_at_line(number, lambda: save_whole(folder, new, writer(new, f"new {new}"), keep))  # noqa: B023
        found = settle(folder)
        if found is None:
            assert not steps and died
            outcomes.append("none")
        else:
            (content,) = content_of(found)
            assert content in (f"old {steps[-1] if steps else None}", f"new {new}")
            outcomes.append(content[:3])
            assert (folder / TRACKER).read_text() == found.name.removeprefix("global_step_")
        save_whole(folder, 9, writer(9, "next"), keep)  # and the next run can save
        assert content_of(folder / "global_step_9") == {"next"} and not (folder / "unfinished").exists()
        number += 1
        if not died:
            break
    first = "old" if steps else "none"
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome == "new")  # never back again
    assert outcomes[0] == first and outcomes[-1] == "new" and number > 40
    assert steps[-1:] == [new] or outcomes.count("new") > 3  # it counts before it is in its place


def test_older_checkpoints_go_when_the_new_one_is_there(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save_whole(tmp_path, step, writer(step, "x"), keep=2)
    assert whole_checkpoint.complete_steps(tmp_path) == [6, 8]
    save_whole(tmp_path, 7, writer(7, "x"), keep=1)  # what lies ahead belongs to somebody else
    assert whole_checkpoint.complete_steps(tmp_path) == [7, 8]


def test_a_tracker_that_names_nothing_is_put_right_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As verl leaves it when killed before it wrote the number, or one whose folder somebody deleted."""
    assert settle(tmp_path / "none") is None
    for step in (2, 10):
        save_whole(tmp_path, step, writer(step, "x"))
    for text in ("", "4"):
        (tmp_path / TRACKER).write_text(text)
        with caplog.at_level(logging.WARNING):
            assert settle(tmp_path) == tmp_path / "global_step_10"
        assert "names no complete checkpoint" in caplog.text and "global_step_10" in caplog.text
        assert (tmp_path / TRACKER).read_text() == "10"
        caplog.clear()
    (tmp_path / TRACKER).write_text("2")  # a run that went back is not sent forward again
    assert settle(tmp_path) == tmp_path / "global_step_2"


def test_half_a_checkpoint_is_named_and_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def killed(aside: Path) -> None:
        writer(4, "half")(aside)
        raise KeyboardInterrupt

    save_whole(tmp_path, 2, writer(2, "x"))
    with pytest.raises(KeyboardInterrupt):
        save_whole(tmp_path, 4, killed)
    with caplog.at_level(logging.WARNING):
        assert settle(tmp_path) == tmp_path / "global_step_2"
    assert "unfinished/global_step_4 was not complete" in caplog.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def tensors(step: int, num_bytes: int) -> Callable[[Path], None]:
    def write(aside: Path) -> None:
        (aside / f"global_step_{step}").mkdir()
        torch.save(torch.zeros(num_bytes, dtype=torch.uint8), aside / f"global_step_{step}" / "model.pt")

    return write


def refusal(save: Callable[[], None]) -> str:
    """The message alone: the error itself holds on to the file that could not be written."""
    with pytest.raises(CheckpointError) as full:
        save()
    message = str(full.value)
    full.value.__cause__ = None
    del full
    gc.collect()
    return message


def test_a_disk_that_fills_up_is_named_with_its_bytes(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    message = refusal(lambda: save_whole(folder, 2, tensors(2, 3 << 20)))
    assert f"step 2 could not be written to trainer.default_local_dir={folder}" in message
    assert "0 are free, and it needs at least" in message and "\n" not in message
    assert "Make room" in message and "at step 0: nothing is saved yet" in message
    assert settle(folder) is None
    save_whole(folder, 2, tensors(2, 300 << 10))  # what was left of it is gone
    assert settle(folder) == folder / "global_step_2"


def test_a_disk_without_room_is_refused_before_anything_is_written(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    save_whole(folder, 2, tensors(2, 600 << 10))
    message = refusal(lambda: save_whole(folder, 4, tensors(4, 600 << 10)))
    assert re.search(r"the last one has 6\d{5} bytes, and 4\d{5} are free", message)
    assert "from step 2, the last complete checkpoint" in message
    assert not (folder / "unfinished").exists()


def test_an_error_of_a_worker_is_told_in_its_own_words(tmp_path: Path) -> None:
    """As Ray hands it on: once for the worker, once for the process that drives the run."""
    for error, expected in (
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), CheckpointError),
        (OSError(errno.EIO, "Input/output error"), ClusterError),
    ):
        inner = RayTaskError("save_checkpoint", "a long traceback", error).as_instanceof_cause()
        outer = RayTaskError("run", "a longer traceback", inner).as_instanceof_cause()

        def write(aside: Path, problem: BaseException = outer) -> None:
            raise problem

        with pytest.raises(expected, match=error.strerror) as refused:
            save_whole(tmp_path, 2, write)
        assert "traceback" not in str(refused.value) and type(refused.value) is expected


def test_another_failure_keeps_its_words_and_may_be_tried_again(tmp_path: Path) -> None:
    """A limit on the size of files, which the disk itself knows nothing of."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_whole(tmp_path, 2, tensors(2, 1 << 10))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ClusterError, match="could not be written to") as limited:
            save_whole(tmp_path, 4, tensors(4, 3 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the last complete checkpoint" in str(limited.value)
    assert settle(tmp_path) == tmp_path / "global_step_2"
