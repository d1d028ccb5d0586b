"""Bytes that cross the network, or a node's links, in one step."""

from __future__ import annotations

import dataclasses
import math

from keytoken.plan.architecture import Architecture
from keytoken.plan.batches import StepBatches, groups_of_rank
from keytoken.plan.workload import Pools, Workload

# verl's fields of an answer: ids and mask in int64, four rows of positions; and of each answer token masks,
# log-probs, entropy, rewards, advantages, weights and the scores of the views.
_ROW_BYTES, _ANSWER_BYTES = 48, 80


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one step, all receivers together.

    Attributes:
        weights: The policy in bf16, to every GPU that samples or scores.
        gathers: Layers gathered and gradients spread by FSDP, all ranks of actor and attribution.
        media_put: Pixels into the data plane, once for a prompt.
        media_got: Pixels out of it, once for each process that has an answer to the prompt.
        frames: Frames to the engines, with every answer that is asked for.
        batch: Token fields into the data plane, and out of it at each of their readings.
        checkpoint: A checkpoint on disk, in the steps that write one.
    """

    weights: float
    gathers: float
    media_put: float
    media_got: float
    frames: float
    batch: float
    checkpoint: float


def clip_bytes(model: Architecture, work: Workload) -> float:
    """A clip's patches in float32, as the processor leaves them."""
    return 4.0 * math.prod(work.grid) * model.vision.patch_values


def traffic_of(model: Architecture, work: Workload, pools: Pools, batches: StepBatches) -> Traffic:
    """Traffic of one step of a run."""
    receivers = 0 if pools.together else pools.rollout + pools.attribution
    whole = 2.0 * model.parameters
    away = (pools.shards - 1) / pools.shards
    scoring = 1 + (1 if work.reference else 0)
    # FSDP gathers all layers for every micro-batch; an update does so in both directions and spreads float32
    # gradients, twice the size.
    actor = batches.score.rounds * scoring * whole + batches.update.rounds * work.updates * 4 * whole
    ranks = pools.attribution or pools.actor
    views = batches.view.rounds * len(work.passes) * whole * (ranks - 1) / ranks
    frames = math.prod(work.grid) * model.vision.patch_values  # uint8
    readers = sum(_readers(work, pool) for pool in (pools.actor, pools.attribution) if pool)
    pixels = work.prompts * clip_bytes(model, work)
    row = (work.prompt_tokens + work.answer_tokens) * _ROW_BYTES + work.answer_tokens * _ANSWER_BYTES
    readings = 1 + scoring + 1 + (1 if work.passes else 0)  # put, scored, updated
    return Traffic(
        weights=whole * receivers,
        gathers=actor * away * pools.actor + views * ranks,
        media_put=pixels,
        media_got=pixels * readers,
        frames=float(work.answers * frames),
        batch=float(work.answers * row * readings),
        checkpoint=12.0 * model.parameters,
    )


def _readers(work: Workload, ranks: int) -> float:
    """Ranks that have an answer to a prompt; answers that share its computation are kept on one."""
    if not work.shared:
        return min(work.group, ranks)
    return ranks * len(groups_of_rank(work, ranks)) / work.prompts
