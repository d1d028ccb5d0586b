"""A checkpoint is written aside and takes its place when it is complete and on disk.

verl writes it where it will be read, deletes the one before while the new one is not marked as complete yet,
and empties its tracker file before it writes the number (verl 0.9.1, trainer_base.py:948-1024,
checkpoint_manager.py:154): a process killed at the wrong moment leaves a tracker without a number, or one
that names half a checkpoint. Here a folder ``global_step_N`` is complete because it exists. The tracker is
what decides: it names a checkpoint once that is on disk, and then the checkpoint takes its place, in the run
that saved it or in the next one.
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ray.exceptions import RayTaskError

from keytoken.errors import CheckpointError, ClusterError
from keytoken.verl_adapter.compat import get_checkpoint_tracker_filename

UNFINISHED = "unfinished"  # a folder beside the complete ones, which verl does not look into
REPLACED = "replaced"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM_WORDS = tuple(os.strerror(code) for code in _NO_ROOM)

logger = logging.getLogger(__name__)


def save_whole(folder: Path, step: int, write: Callable[[Path], None], keep: int | None = None) -> None:
    """Write a checkpoint, put it in its place, and only then delete older ones.

    Args:
        folder: Holds the checkpoints of a run.
        step: The step that is saved.
        write: Writes ``global_step_N`` into the folder that it is given.
        keep: So many checkpoints up to this one remain; None for all.

    Raises:
        CheckpointError: the disk has no room for it.
        ClusterError: it could not be written for another reason.
    """
    require_room(folder)
    aside = folder / UNFINISHED
    _remove(aside)
    aside.mkdir(parents=True)
    try:
        write(aside)
        for path in _everything(aside):
            _flush(path)
    except (RayTaskError, OSError, RuntimeError) as problem:
        cause = problem
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if not isinstance(cause, (OSError, RuntimeError)):  # torch's writer raises the latter on a full disk
            raise
        raise _not_written(folder, step, cause) from problem
    place = folder / _name(step)
    if place.exists():  # of a try that was abandoned; the tracker must not bring it back
        place.rename(aside / REPLACED)
    _write_tracker(folder, step)
    _put_in_place(folder, step)
    if keep:
        for old in [known for known in complete_steps(folder) if known <= step][:-keep]:
            _remove(folder / _name(old))


def complete_steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints, in order."""
    if not folder.is_dir():
        return []
    found = (re.fullmatch(r"global_step_(\d+)", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def settle(folder: Path) -> Path | None:
    """The checkpoint that a run goes on from, after which verl's tracker names it too; None without one.

    It is the one that the tracker names, if that is there, else the last one. What a run left that died while
    it saved is set aside, which is said: the next checkpoint overwrites it.
    """
    tracker = Path(get_checkpoint_tracker_filename(str(folder)))
    named = _number_in(tracker)
    if named is not None:
        place, aside = folder / _name(named), folder / UNFINISHED / _name(named)
        if aside.exists() and not place.exists():
            _put_in_place(folder, named)
    for half in sorted((folder / UNFINISHED).glob(_name("*"))):
        logger.warning("%s was not complete when its run died; it is not read", half)
    if named is not None and place.exists():
        return place
    steps = complete_steps(folder)
    if tracker.exists():
        logger.warning(
            "%s names no complete checkpoint: %s", tracker, _name(named if named is not None else "?")
        )
        tracker.unlink()
    if not steps:
        return None
    logger.warning("the run goes on from the last complete checkpoint, %s", folder / _name(steps[-1]))
    _write_tracker(folder, steps[-1])
    return folder / _name(steps[-1])


def _write_tracker(folder: Path, step: int) -> None:
    """Let verl's tracker file name a step; at no moment is it without a number."""
    tracker = Path(get_checkpoint_tracker_filename(str(folder)))
    fresh = tracker.with_suffix(".new")
    fresh.write_text(str(step))
    _flush(fresh)
    fresh.replace(tracker)
    _flush(folder)


def require_room(folder: Path) -> None:
    """Refuse to save where the last checkpoint would not fit a second time.

    Raises:
        CheckpointError: names the folder, what is needed and what is free.
    """
    steps = complete_steps(folder)
    needed = _size(folder / _name(steps[-1])) if steps else 0
    if needed > _free(folder):
        raise CheckpointError(
            f"No room for a checkpoint in trainer.default_local_dir={folder}: the last one has {needed} "
            f"bytes, and {_free(folder)} are free. {_remedy(folder)}"
        )


def _not_written(folder: Path, step: int, cause: Exception) -> CheckpointError | ClusterError:
    steps, written = complete_steps(folder), _size(folder / UNFINISHED)
    needed = max(_size(folder / _name(steps[-1])) if steps else 0, written)
    full = getattr(cause, "errno", None) in _NO_ROOM or any(word in str(cause) for word in _NO_ROOM_WORDS)
    words = str(cause).strip().partition("\n")[0][:200]
    what = (
        f"The checkpoint of step {step} could not be written to trainer.default_local_dir={folder}: {words}. "
        f"{written} bytes of it lie in {UNFINISHED}, {_free(folder)} are free, and it needs "
        f"{'at least' if needed == written else 'about'} {needed}."
    )
    if full or _free(folder) < max(needed - written, _ALMOST_NOTHING):
        return CheckpointError(f"{what} {_remedy(folder)}")
    return ClusterError(f"{what} The same command goes on from the last complete checkpoint.")


_ALMOST_NOTHING = 1 << 20  # a writer that found no room for a buffer of its own leaves less than that


def _remedy(folder: Path) -> str:
    steps = complete_steps(folder)
    last = (
        f"from step {steps[-1]}, the last complete checkpoint" if steps else "at step 0: nothing is saved yet"
    )
    return (
        "Make room, keep fewer checkpoints (trainer.max_actor_ckpt_to_keep, which needs room for one more "
        "while it saves), or name another disk by trainer.default_local_dir and move the checkpoints there; "
        f"the same command then goes on {last}."
    )


def _put_in_place(folder: Path, step: int) -> None:
    (folder / UNFINISHED / _name(step)).rename(folder / _name(step))
    _flush(folder)
    _remove(folder / UNFINISHED)


def _name(step: int | str) -> str:
    return f"global_step_{step}"


def _number_in(tracker: Path) -> int | None:
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return int(text) if text.isdecimal() else None


def _everything(folder: Path) -> Iterator[Path]:
    """Files and folders below a folder, and itself last."""
    yield from folder.rglob("*")
    yield folder


def _flush(path: Path) -> None:
    """Until here a lost machine may lose what a process has written; also of a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _free(folder: Path) -> int:
    """Bytes that an ordinary user may still write where a folder is, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    state = os.statvfs(there)
    return state.f_bavail * state.f_frsize


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
