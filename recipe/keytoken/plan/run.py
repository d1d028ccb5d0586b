"""From the words of a command line to a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from keytoken.compose import compose_config
from keytoken.plan.architecture import Architecture, architecture_of
from keytoken.plan.assumptions import Assumptions, split_words
from keytoken.plan.batches import StepBatches, batches_of
from keytoken.plan.limits import Limits, limits_of
from keytoken.plan.memory import (
    Cache,
    PoolMemory,
    actor_memory,
    attribution_memory,
    host_memory,
    rollout_memory,
)
from keytoken.plan.passes import StepFlops, step_flops
from keytoken.plan.timing import ACTOR, ATTRIBUTION, ROLLOUT, Step, step_of
from keytoken.plan.traffic import Traffic, traffic_of
from keytoken.plan.workload import Pools, Workload, pools_of, workload_of
from keytoken.validate import validate_run


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All figures of one run.

    Attributes:
        memory: By pool.
        host: Bytes of the model's copies in the memory of a node of actors.
        batches: Micro-batches of a rank.
        other: Operations with the other value of ``keytoken.prefix`` (sharing needs the fused head).
    """

    name: str
    model: Architecture
    work: Workload
    pools: Pools
    batches: StepBatches
    flops: StepFlops
    other: StepFlops
    memory: dict[str, PoolMemory]
    cache: Cache
    host: dict[str, float]
    traffic: Traffic
    step: Step
    limits: Limits
    given: Assumptions
    changed: tuple[str, ...]

    @property
    def warnings(self) -> list[str]:
        """What does not fit, with what to do about it."""
        return [*_room(self), *_turns(self), *_readers(self), *_cuts(self)]


def plan_of(words: Sequence[str]) -> Plan:
    """Plan the run that ``keytoken train`` would start with these words.

    Args:
        words: hydra overrides, and assumptions as ``plan.KEY=VALUE``.

    Raises:
        ConfigurationError: a wrong word, a run that is refused, a model whose shape is not known.
        DataError: the assumed clip cannot be sampled.
    """
    own, changed = split_words(words)
    config = compose_config(own)
    keytoken = validate_run(config)
    on_cpu = {"device": "cpu"} if config.trainer.device == "cpu" else {}
    given = Assumptions(**{**on_cpu, **changed})
    model = architecture_of(config.actor_rollout_ref.model.path)
    work = workload_of(config, keytoken, model, given)
    pools = pools_of(config, keytoken)
    caching = bool(config.actor_rollout_ref.rollout.enable_prefix_caching)
    # Answers go to the engine with the fewest requests, so those to one prompt are spread over engines.
    prefills = min(work.group, pools.engines) if caching else work.group
    batches = batches_of(config, work, pools)
    flops = step_flops(model, work, prefills, batches)
    reverse = dataclasses.replace(work, shared=not work.shared, answer_head=True)
    rollout, cache = rollout_memory(config, model, work, pools, given)
    memory = {ROLLOUT: rollout, ACTOR: actor_memory(config, model, work, pools, batches, given)}
    if pools.attribution:
        memory[ATTRIBUTION] = attribution_memory(config, model, work, pools, batches, given)
    traffic = traffic_of(model, work, pools, batches)
    step = step_of(config, model, work, pools, batches, flops, cache, given)
    return Plan(
        name=config.trainer.experiment_name,
        model=model,
        work=work,
        pools=pools,
        batches=batches,
        flops=flops,
        other=step_flops(model, reverse, prefills, batches_of(config, reverse, pools)),
        memory=memory,
        cache=cache,
        host=host_memory(config, model, work, pools),
        traffic=traffic,
        step=step,
        limits=limits_of(config, work, pools, traffic, step, given),
        given=given,
        changed=tuple(changed),
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    return {
        **dataclasses.asdict(plan),
        "parameters": plan.model.parameters,
        "prompt_tokens": plan.work.prompt_tokens,
        "warnings": plan.warnings,
    }


def _room(plan: Plan) -> list[str]:
    found = []
    for pool, memory in plan.memory.items():
        if not memory.fits:
            found.append(
                f"{pool}: {memory.needed / 2**30:.0f} GiB are needed on a GPU that has "
                f"{memory.room / 2**30:.0f} for it: {memory.remedy}."
            )
    if plan.memory[ROLLOUT].fits and plan.cache.sequences < plan.cache.wanted:
        found.append(
            f"rollout: an engine holds {plan.cache.sequences} answers at once and is asked for "
            f"{plan.cache.wanted}; the others wait for their turn: {plan.memory[ROLLOUT].remedy}."
        )
    return found


def _readers(plan: Plan) -> list[str]:
    workers, needed = plan.limits.decode_workers
    if needed <= workers:
        return []
    return [
        f"clips: {workers} workers read those of a step in {plan.limits.decode_s:.0f} s, longer than it "
        f"takes: actor_rollout_ref.rollout.agent.num_workers={needed}, or a filled data.frame_cache."
    ]


def _cuts(plan: Plan) -> list[str]:
    """Prompts that are computed more often than the ranks' shares of answers make necessary."""
    work, batches = plan.work, plan.batches
    if not work.shared:
        return []
    used = [batches.update, batches.score, *([batches.view] if work.passes else [])]
    found = []
    for one in {batches.size: batches for batches in used}.values():
        most = math.ceil(one.answers / work.group)
        if one.prompts > most:
            tokens = work.prompt_tokens - 1 + work.group * work.longest_answer
            enough = f"at least {tokens}" if one.by_tokens else f"a multiple of {work.group}"
            found.append(
                f"micro-batches: {one.size} cuts the {work.group} answers to a prompt, which is then "
                f"computed {one.prompts / most:.1f} times; set it to {enough}, if the memory has room."
            )
    return found


def _turns(plan: Plan) -> list[str]:
    """One device: what the trainer keeps on it lies beside the engine."""
    if not plan.pools.together:
        return []
    actor = plan.memory[ACTOR]
    state = sum(actor.parts.get(name, 0.0) for name in ("weights", "gradients", "optimizer"))
    engine = plan.memory[ROLLOUT].needed
    if state + engine <= actor.room:
        return []
    return [
        f"one device: the trainer's state ({state / 2**30:.0f} GiB) and the engine ({engine / 2**30:.0f}) "
        f"are more than {actor.room / 2**30:.0f} GiB: take pools=one_gpu, or a smaller "
        "actor_rollout_ref.rollout.gpu_memory_utilization."
    ]
