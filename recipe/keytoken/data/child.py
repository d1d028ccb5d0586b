"""Work on clips in a child process that can be killed.

Native decoders cannot be interrupted from Python, and some files hang them or take their process down. That
costs one clip then, and the next clip gets a new child.
"""

import multiprocessing
import multiprocessing.connection
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from keytoken.data.part import AnyClip
from keytoken.errors import ClipError, DataError, KeyTokenError

_START_LIMIT_S = 300.0  # for the child's imports: seconds, but minutes on a machine with much else to do
_START_METHOD = "spawn"  # a fork would copy the threads' locks of a training process

AnswerT = TypeVar("AnswerT")


class ClipProcess(Generic[AnswerT]):
    """Calls a function on clips in a child process, under a time limit. A context manager.

    The child starts with the first clip and serves all others until one of them kills it.

    Args:
        work: Function of a clip or a part of one, importable in the child; its answer must survive pickling.
        limit_s: Seconds allowed for one clip.
    """

    def __init__(self, work: Callable[[Any], AnswerT], limit_s: float) -> None:
        self.work = work
        self.limit_s = limit_s
        self._killed = False
        self._process: Any = None
        self._pipe: multiprocessing.connection.Connection[Any, Any] | None = None

    def __enter__(self) -> "ClipProcess[AnswerT]":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, path: AnyClip) -> AnswerT:
        """What the function returns for a clip.

        Raises:
            ClipError: The child crashed, or the limit was exceeded.
            DataError: The child did not start.
            KeyTokenError: What the function raised.
        """
        pipe = self._start()
        try:
            pipe.send(path)
            answered = pipe.poll(self.limit_s)
            answer: Any = pipe.recv() if answered else None
        except (EOFError, BrokenPipeError, ConnectionResetError) as end:
            self.stop()
            raise ClipError(
                f"clip {path}: the decoder crashed; re-encode the clip or drop it from the dataset"
            ) from end
        except BaseException:  # interrupted: the answer would be taken for that of the next clip
            self.stop()
            raise
        if not answered:
            self.stop()
            raise ClipError(
                f"clip {path}: not decoded within {self.limit_s:g} s; re-encode it or raise the limit"
            )
        if isinstance(answer, KeyTokenError):
            raise answer
        result: AnswerT = answer
        return result

    def kill(self) -> None:
        """End the child for good from another thread, also while it starts; who waits for it sees a crash."""
        self._killed = True
        process = self._process
        if process is not None and process.is_alive():
            process.kill()

    def stop(self) -> None:
        """End the child; the next clip starts another one."""
        if self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._pipe = self._process = None

    def _start(self) -> "multiprocessing.connection.Connection[Any, Any]":
        if self._pipe is None:
            context: Any = multiprocessing.get_context(_START_METHOD)
            self._pipe, child_end = context.Pipe()
            self._process = context.Process(target=_serve, args=(child_end, self.work), daemon=True)
            self._process.start()
            child_end.close()
            if self._killed:  # while it had no process that could have been
                self._process.kill()
            self._wait_until_ready(self._pipe)
        return self._pipe

    def _wait_until_ready(self, pipe: "multiprocessing.connection.Connection[Any, Any]") -> None:
        try:
            ready = pipe.poll(_START_LIMIT_S) and pipe.recv()
        except (EOFError, ConnectionResetError) as end:
            self.stop()
            raise DataError(
                "the process that decodes clips ended while it started; its last words are above. Often "
                "there is too little memory: decode fewer clips at once (data.clip_check_jobs, jobs=)"
            ) from end
        if not ready:
            self.stop()
            raise DataError(f"the process that decodes clips did not start within {_START_LIMIT_S:g} s")


@contextmanager
def clip_processes(
    work: Callable[[Any], AnswerT], limit_s: float, jobs: int
) -> Iterator[Callable[[AnyClip], "Future[AnswerT | ClipError]"]]:
    """Several children at work on many clips.

    Args:
        work: As of :class:`ClipProcess`.
        limit_s: Seconds allowed for one clip.
        jobs: Clips at work at once, each in a process of its own.

    Yields:
        A function that gives a clip to the next child that is free, and whose future becomes the answer, or
        the error of a clip that cannot be used. Left early, what was given and not begun is forgotten.
    """
    own = threading.local()
    children: list[ClipProcess[AnswerT]] = []
    left = threading.Event()

    def run(clip: AnyClip) -> AnswerT | ClipError:
        if not hasattr(own, "child"):
            own.child = ClipProcess(work, limit_s)
            children.append(own.child)
            if left.is_set():  # perhaps before this child could be seen
                own.child.kill()
        try:
            answer: AnswerT = own.child.run(clip)
        except ClipError as problem:
            return problem
        return answer

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield lambda clip: pool.submit(run, clip)
        finally:
            # Left early, nobody waits for the clips that are being decoded.
            pool.shutdown(wait=False, cancel_futures=True)
            left.set()
            for child in children:
                child.kill()
    for child in children:
        child.stop()


def _serve(pipe: "multiprocessing.connection.Connection[Any, Any]", work: Callable[[Any], Any]) -> None:
    """The child: answers each path with a result or a user's error, until the parent hangs up."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # an interrupted parent ends it, with one message and not two
    pipe.send("ready")
    while True:
        try:
            path = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(work(path))
        except KeyTokenError as error:
            pipe.send(error)
