"""What grows with the size of a run, and what one process or one disk has to carry of it."""

from __future__ import annotations

import dataclasses
import math

from omegaconf import DictConfig

from keytoken.plan.assumptions import Assumptions
from keytoken.plan.timing import Step
from keytoken.plan.traffic import Traffic
from keytoken.plan.workload import Pools, Workload

_BYTES = 1e9


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Of one run.

    Attributes:
        failure_hours: Mean time until one of its GPUs or what belongs to it fails; the whole run then stops.
        checkpoint_s: Writing one checkpoint, in which nothing else happens.
        checkpoint_steps: Steps between two, so that writing them and work done twice cost least together.
        lost_share: Of the time: checkpoints, work done twice, starts after failures.
        decode_s: Reading the clips of a step by the workers that there are.
        decode_workers: Workers that read clips, and those needed to read a step's clips within a step.
        media_gb_s: Rate at which pixels have to leave the data plane, spread over a whole step.
        requests: Asked of the one process that gives every answer its engine, two calls each.
    """

    failure_hours: float
    checkpoint_s: float
    checkpoint_steps: int
    lost_share: float
    decode_s: float
    decode_workers: tuple[int, int]
    media_gb_s: float
    requests: int


def limits_of(
    config: DictConfig, work: Workload, pools: Pools, traffic: Traffic, step: Step, given: Assumptions
) -> Limits:
    """The limits of a run whose step is known.

    The best time between checkpoints is Young's, the root of twice their cost times the time to a failure.
    """
    to_failure = given.gpu_hours_to_failure / pools.total * 3600.0
    write = traffic.checkpoint / (given.storage_gb_s * _BYTES)
    steps = max(1, round(math.sqrt(2.0 * write * to_failure) / step.seconds))
    between = steps * step.seconds
    workers = int(config.actor_rollout_ref.rollout.agent.num_workers)
    reading = work.prompts * given.decode_s
    return Limits(
        failure_hours=to_failure / 3600.0,
        checkpoint_s=write,
        checkpoint_steps=steps,
        lost_share=write / between + (between / 2.0 + given.restart_s) / to_failure,
        decode_s=reading / workers,
        decode_workers=(workers, math.ceil(reading / step.seconds)),
        media_gb_s=traffic.media_got / _BYTES / step.seconds,
        requests=work.answers,
    )
