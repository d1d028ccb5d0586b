"""Whether TransferQueue lives, through which the rows of a run pass from process to process."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayTaskError

from keytoken.errors import KeyTokenError

# A process that lives and is busy does not answer; one that is dead is known to be at once.
_DEAD_WITHIN_S = 1.0


def require_alive() -> None:
    """Return if nothing is known against the controller and, where they were started, the storage processes.

    Raises:
        ray.exceptions.RayActorError: Ray's account of the death of one of them.
    """
    from transfer_queue import interface  # it keeps the handles by which this process joined

    storage = (interface._TQ_STORAGE or {}).get("SimpleStorage", {})
    controller = [] if interface._TQ_CONTROLLER is None else [interface._TQ_CONTROLLER]
    asked = [process.__ray_ready__.remote() for process in (*controller, *storage.values())]
    ray.get(ray.wait(asked, num_returns=len(asked), timeout=_DEAD_WITHIN_S)[0] if asked else [])


@contextmanager
def named_as_the_cause() -> Iterator[None]:
    """What fails inside because the data plane is lost ends with that loss.

    TransferQueue's client wraps what it meets in RuntimeError, of which Ray hands on the words alone.

    Raises:
        ray.exceptions.RayActorError: one of its processes has died.
        KeyTokenError: the controller did not answer this process in time.
    """
    try:
        yield
    except (RuntimeError, RayTaskError) as problem:
        require_alive()
        if isinstance(problem.__cause__, KeyTokenError):
            raise problem.__cause__ from problem
        raise
