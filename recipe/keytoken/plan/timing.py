"""Seconds of every part of a step, from its operations and bytes and the assumed efficiencies.

A part that computes and gathers layers takes the longer of the two, since FSDP2 gathers the next layer while
one computes. Sampling reads the weights once for each token of the longest answer, and the cache of every
answer at each of its tokens. Nothing is said of imbalance between ranks.
"""

from __future__ import annotations

import dataclasses
import math

from omegaconf import DictConfig

from keytoken.plan.architecture import Architecture
from keytoken.plan.assumptions import Assumptions
from keytoken.plan.batches import StepBatches
from keytoken.plan.flops import Flops
from keytoken.plan.memory import Cache
from keytoken.plan.passes import StepFlops
from keytoken.plan.workload import Pools, Workload

GPU = 1e12
BYTES = 1e9
ROLLOUT, ACTOR, ATTRIBUTION, ALL = "rollout", "actor", "attribution", "all"


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One part of a step.

    Attributes:
        pool: Who is busy with it.
        flops: Operations over all GPUs of the pool.
        bound: What the time is spent on: arithmetic, gathering, memory, the network.
    """

    name: str
    pool: str
    flops: float
    seconds: float
    bound: str


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """The parts of a step, and how they lie to one another.

    Attributes:
        seconds: From one update to the next.
        busy: Seconds in which each pool works, by pool.
        limit: The pool whose work ends last, or that all wait for longest.
    """

    parts: tuple[Part, ...]
    seconds: float
    busy: dict[str, float]
    limit: str

    def of(self, name: str) -> Part | None:
        """A part by its name; None for one that this run does not have."""
        return next((part for part in self.parts if part.name == name), None)


def step_of(
    config: DictConfig,
    model: Architecture,
    work: Workload,
    pools: Pools,
    batches: StepBatches,
    flops: StepFlops,
    cache: Cache,
    given: Assumptions,
) -> Step:
    """Time one step."""
    score, update, view = batches.score.rounds, batches.update.rounds, batches.view.rounds
    offloaded = bool(config.actor_rollout_ref.actor.fsdp_config.offload_policy)
    actor = _Group(pools.actor, pools.shards, given, model.parameters, offloaded)
    scorers = actor
    if pools.attribution:
        scorers = _Group(pools.attribution, pools.attribution, given, model.parameters, False)
    of_views = ATTRIBUTION if pools.attribution else ACTOR
    forward = given.forward_efficiency
    parts = [
        _prefill(flops.prefill, pools, given),
        _decode(model, work, pools, flops.decode, cache, given),
        _pass("old log-probs", ACTOR, flops.old, actor, score, forward),
        *(_pass(f"view: {n}", of_views, f, scorers, view, forward) for n, f in flops.views.items()),
    ]
    if work.reference:
        reference = dataclasses.replace(actor, on_host=True)
        parts.append(_pass("reference", ACTOR, flops.reference, reference, score, forward))
    parts += [
        _update(flops.update, actor, update * work.updates, work.updates, given),
        _sync(model, pools, given),
        Part("overhead", ALL, 0.0, given.step_overhead_s, "chosen"),
    ]
    return _order(tuple(parts), pools)


@dataclasses.dataclass(frozen=True, slots=True)
class _Group:
    """Ranks that share a model by FSDP, in groups of ``shards`` that have all of it.

    The sum of gradients over such groups is not timed.
    """

    ranks: int
    shards: int
    given: Assumptions
    parameters: int
    on_host: bool

    def compute(self, flops: float, efficiency: float) -> float:
        return flops / (self.ranks * self.given.accelerator.tflops * GPU * efficiency)

    def gather(self, value_bytes: float) -> float:
        """Seconds to bring all layers to every rank, from the other ranks or from its host's memory."""
        whole = value_bytes * self.parameters
        seconds = whole * (self.shards - 1) / self.shards / (_rate(self.shards, self.given) * BYTES)
        if self.on_host:
            seconds += 4.0 * self.parameters / self.shards / (self.given.host_gb_s * BYTES)
        return seconds


def _rate(ranks: int, given: Assumptions) -> float:
    """10^9 bytes a second of a collective: links within a node, else all adapters of a node at once."""
    link = given.accelerator.link_gb_s
    across = min(link, given.network_gb_s * given.gpus_per_node)
    return given.network_efficiency * (link if ranks <= given.gpus_per_node else across)


def _pass(name: str, pool: str, flops: Flops, group: _Group, rounds: int, efficiency: float) -> Part:
    compute, gather = group.compute(flops.total, efficiency), rounds * group.gather(2.0)
    bound = "arithmetic" if compute >= gather else "gathering"
    return Part(name, pool, flops.total, max(compute, gather), bound)


def _update(flops: Flops, group: _Group, rounds: int, updates: int, given: Assumptions) -> Part:
    """Two gatherings and the reduction of float32 gradients for each micro-batch; then Adam."""
    compute = group.compute(flops.total, given.update_efficiency)
    gather = rounds * (2.0 * group.gather(2.0) + dataclasses.replace(group, on_host=False).gather(4.0))
    # Adam reads and writes weights and moments, and reads gradients: 28 bytes a parameter.
    rate = given.host_gb_s * BYTES if group.on_host else given.accelerator.memory_tb_s * GPU
    adam = updates * 28.0 * group.parameters / group.shards / rate
    bound = "arithmetic" if compute >= gather else "gathering"
    return Part("update", ACTOR, flops.total, max(compute, gather) + adam, bound)


def _prefill(flops: Flops, pools: Pools, given: Assumptions) -> Part:
    peak = pools.engines * pools.engine_gpus * given.accelerator.tflops * GPU
    return Part(
        "prefill", ROLLOUT, flops.total, flops.total / (peak * given.prefill_efficiency), "arithmetic"
    )


def _decode(
    model: Architecture, work: Workload, pools: Pools, flops: Flops, cache: Cache, given: Assumptions
) -> Part:
    """In as many waves as the cache makes necessary; the longest answer sets the number of steps of each."""
    engine = pools.engine_gpus
    text = model.text
    weights = 2.0 * (text.parameters - (0 if text.tied else text.embedding_parameters)) / engine
    answers = work.answers / pools.engines
    at_once = max(1, min(cache.sequences, cache.wanted))
    waves = math.ceil(answers / at_once)
    seen = work.prompt_tokens + work.answer_tokens / 2
    read = waves * work.longest_answer * weights + answers * work.answer_tokens * seen * cache.token_bytes
    memory = read / (given.accelerator.memory_tb_s * GPU * given.decode_bandwidth)
    peak = pools.engines * engine * given.accelerator.tflops * GPU * given.prefill_efficiency
    compute = flops.total / peak
    seconds = max(memory, compute) + waves * work.longest_answer * given.decode_overhead_s
    return Part("decode", ROLLOUT, flops.total, seconds, "memory" if memory >= compute else "arithmetic")


def _sync(model: Architecture, pools: Pools, given: Assumptions) -> Part:
    """Layers gathered in float32 by the actor, then broadcast in bf16, one adapter or link at the root."""
    gather = _Group(pools.actor, pools.shards, given, model.parameters, False).gather(4.0)
    rate = given.accelerator.link_gb_s if pools.total <= given.gpus_per_node else given.network_gb_s
    broadcast = 0.0 if pools.together else 2.0 * model.parameters / (rate * BYTES * given.network_efficiency)
    return Part("weight sync", ALL, 0.0, gather + broadcast + given.sync_overhead_s, "network")


def _order(parts: tuple[Part, ...], pools: Pools) -> Step:
    def seconds(*names: str) -> float:
        return sum(part.seconds for part in parts if part.name.startswith(names))

    rollout, views = seconds("prefill", "decode"), seconds("view")
    old, rest = seconds("old log-probs"), seconds("reference", "update")
    trained = (old + views if not pools.attribution else max(old, views)) + rest
    ends = seconds("weight sync", "overhead")
    total = (max(rollout, trained) if pools.ahead else rollout + trained) + ends
    busy = {ROLLOUT: rollout, ACTOR: old + rest + (0.0 if pools.attribution else views)}
    if pools.attribution:
        busy[ATTRIBUTION] = views
    return Step(parts, total, busy, max(busy, key=lambda pool: busy[pool]))
