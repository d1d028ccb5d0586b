"""Reading clips under a time limit while a job runs.

A clip that hangs its decoder would hold up a run for ever, since native code cannot be interrupted from
Python. Here a child process decodes and is killed when it takes too long; the frames come back through shared
memory. Children are kept for the next clip, as many as there were readers at the same time.
"""

import os
from functools import partial

from keytoken.data.child import ClipProcess
from keytoken.data.clips import Clip, read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.part import AnyClip

# Appending and popping are atomic, so threads need no lock.
_IDLE: dict[SamplingContract, list[ClipProcess[Clip]]] = {}
os.register_at_fork(after_in_child=_IDLE.clear)  # a pipe must not have two parents


def read_clip_within(path: AnyClip, contract: SamplingContract, limit_s: float) -> Clip:
    """:func:`~keytoken.data.clips.read_clip` in a child process, for at most ``limit_s`` seconds.

    The first clip waits for the child's imports besides. Threads may call it at the same time.

    Args:
        path: A local video file, a folder of frames, an image, or a part of one.
        contract: The sampling contract.
        limit_s: Seconds allowed for the clip.

    Returns:
        The clip, the same as from ``read_clip``.

    Raises:
        ClipError: The clip cannot be read, took longer, or crashed its decoder.
        ConfigurationError: The contract names a decoder that is not installed.
    """
    idle = _IDLE.setdefault(contract, [])
    try:
        process = idle.pop()
    except IndexError:
        process = ClipProcess(partial(read_clip, contract=contract), limit_s)
    process.limit_s = limit_s
    try:
        return process.run(path)
    finally:
        idle.append(process)
