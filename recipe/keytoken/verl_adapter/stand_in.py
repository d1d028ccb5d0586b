"""``attribution.on_failure=actor``: the actor's workers stand in for an attribution group that was lost.

They hold the weights that the group would have had, so passes and selection give the same numbers. A group
that may be lost has a weight broadcast of its own, behind that of the rollout: a receiver that dies in the
middle of one leaves the others with half the weights, and vLLM waits for the other half for ever (verl 0.9.1,
bucketed_weight_transfer.py:266).
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from keytoken.errors import WeightSyncError
from keytoken.schema import KeyTokenConfig
from keytoken.verl_adapter import pools
from keytoken.verl_adapter.lost import LOSSES, lost_process

if TYPE_CHECKING:
    from keytoken.verl_adapter.compat import PPOTrainer as _Trainer
else:
    _Trainer = object  # a mixin: which of verl's trainers comes next is the subclass's choice

Answer = TypeVar("Answer")
# A worker that lives and is busy does not answer; one that is dead is known to be within a second or two.
_DEAD_WITHIN_S = 10.0

logger = logging.getLogger(__name__)


class StandIn(_Trainer):
    """Which workers run the passes, now and after a loss."""

    keytoken: KeyTokenConfig
    attribution_wg: Any
    _own_broadcast: Any = None  # None: the group takes part in that of the rollout, or is lost
    _bounded_sync: Callable[[Callable[[], Any]], None]

    def _join_broadcast(self) -> None:
        manager = self.standalone_checkpoint_manager
        if self.keytoken.attribution.on_failure == "stop":
            pools.join_broadcast(manager, self.attribution_wg)
        else:
            self._own_broadcast = pools.own_broadcast(manager, self.attribution_wg)

    def _sync_attribution(self) -> None:
        """The group's own weight broadcast, if it has one; a group that is found lost is done without."""
        if self._own_broadcast is None:
            return
        try:
            self._bounded_sync(partial(self._own_broadcast.update_weights, self.global_steps))
        except (RayTaskError, WeightSyncError, *LOSSES) as problem:
            self._go_on_without(problem)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """Ask the attribution group, and if it is lost, who stands in for it."""
        try:
            return question()
        except (RayTaskError, *LOSSES) as problem:
            self._go_on_without(problem)
            return question()

    def _go_on_without(self, problem: BaseException) -> None:
        """Let the actor's workers stand in, if processes of the attribution group died and the run may go on.

        Raises:
            BaseException: the problem itself; it was another one, or the run has to stop.
        """
        group = self.attribution_wg
        if self._own_broadcast is None or not any(_is_dead(worker) for worker in group.workers):
            raise problem
        self._own_broadcast, self.attribution_wg = None, self.actor_rollout_wg
        for worker in group.workers:  # those that live wait for the dead one
            ray.kill(worker)
        logger.warning(
            "step %d: the attribution group is lost (%s). From here on its passes run in the actor's "
            "workers, which takes longer; the metric attribution/on_actor is 1. A restart of the run brings "
            "it back.",
            self.global_steps,
            lost_process(problem) or problem,
        )

    def _stand_in_metrics(self) -> dict[str, float]:
        """``attribution/on_actor``: 1 once the group is lost. Only where the run may go on without it."""
        if self.keytoken.attribution.on_failure == "stop":
            return {}
        return {"attribution/on_actor": float(self.attribution_wg is self.actor_rollout_wg)}


def _is_dead(worker: Any) -> bool:
    try:
        ray.get(worker.__ray_ready__.remote(), timeout=_DEAD_WITHIN_S)
    except RayActorError:
        return True
    except GetTimeoutError:
        return False
    return False
