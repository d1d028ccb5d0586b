"""Memory of one GPU of each pool, part by part, and how many answers an engine holds at once.

What is counted: FSDP2 with float32 weights, gradients and two moments of Adam, spread over the ranks; the
layers that it gathers in bf16, two at a time beside those that stay gathered (verl 0.9.1 wraps layers, vision
blocks, embedding and head); activations with bf16 arithmetic; logits in chunks. The reference lies in the
host's memory (verl 0.9.1, transformer_impl.py:462) and streams through.
"""

from __future__ import annotations

import dataclasses
import math

from omegaconf import DictConfig, OmegaConf

from keytoken.plan.architecture import Architecture, Text
from keytoken.plan.assumptions import Assumptions
from keytoken.plan.batches import Largest, StepBatches
from keytoken.plan.workload import Pools, Workload

GIB = float(1 << 30)
_LOGITS_CHUNK = 640 << 20  # keytoken_kernels.head.chunked, on a GPU


@dataclasses.dataclass(frozen=True, slots=True)
class PoolMemory:
    """Bytes on one GPU, by part, beside what it has; ``remedy`` is for the case that they do not fit."""

    parts: dict[str, float]
    room: float
    remedy: str

    @property
    def needed(self) -> float:
        """All parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.needed <= self.room


@dataclasses.dataclass(frozen=True, slots=True)
class Cache:
    """The engines' KV cache.

    Attributes:
        token_bytes: On one GPU for one token.
        room: Bytes on one GPU.
        sequences: Prompts with the longest answers that an engine holds at once.
        wanted: Answers that an engine is asked for at once.
    """

    token_bytes: int
    room: float
    sequences: int
    wanted: int


def kv_token_bytes(text: Text, engine_gpus: int, value_bytes: int = 2) -> int:
    """Keys and values of one token in all layers, on one of the GPUs that share an engine."""
    heads = max(1, text.kv_heads // engine_gpus)
    return 2 * text.layers * heads * text.head_dim * value_bytes


def activation_bytes(
    model: Architecture, tokens: float, patches: float, recompute: bool, keys: float = 0.0
) -> float:
    """What the backward pass finds of ``tokens`` and the ``patches`` of their clips, in bf16.

    With checkpointing the input of each layer, and all of the layer that is being computed anew. ``keys``
    are places whose keys and values are gathered for attention.
    """
    text, vision = model.text, model.vision
    layer, block = layer_bytes(model)
    # Inside no layer: a norm behind the last one, and what the mergers work on.
    ends = 6.0 * tokens * text.hidden + 14.0 * patches * vision.hidden * (1 + vision.deepstack)
    if not recompute:
        return ends + (tokens * layer + _gathered(text, keys)) * text.layers + patches * block * vision.depth
    inputs = 2.0 * (tokens * text.hidden * text.layers + patches * vision.hidden * vision.depth)
    return ends + inputs + max(tokens * layer + _gathered(text, keys), patches * block)


def _gathered(text: Text, keys: float) -> float:
    """Keys and values of a layer, gathered in bf16."""
    return 4.0 * keys * text.kv_heads * text.head_dim


def layer_bytes(model: Architecture) -> tuple[float, float]:
    """Of one layer for a token, of one vision block for a patch: what the backward pass reads."""
    text, vision = model.text, model.vision
    width, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    # Two norms (float32 input, bf16 result); queries, keys, values, rotated ones and the attention's result;
    # gate, up, activation and product of the MLP. Norms of queries and keys as the other norms.
    layer = 12.0 * text.hidden + 6.0 * width + 6.0 * keys + 8.0 * text.intermediate
    layer += 6.0 * (width + keys) if text.qk_norm else 0.0
    mlp = 4.0 if vision.positions else 8.0
    return layer, 24.0 * vision.hidden + mlp * vision.intermediate


def gathered_bytes(model: Architecture) -> float:
    """Whole layers in bf16: the largest two, and what belongs to none."""
    text, vision = model.text, model.vision
    ends = text.embedding_parameters
    units = [text.layer_parameters, vision.block_parameters, *([] if text.tied else [ends])]
    wrapped = text.layers * units[0] + vision.depth * units[1] + (0 if text.tied else 2 * ends)
    return 2.0 * (model.parameters - wrapped + 2 * max(units))


def actor_memory(
    config: DictConfig,
    model: Architecture,
    work: Workload,
    pools: Pools,
    batches: StepBatches,
    given: Assumptions,
) -> PoolMemory:
    """One GPU of the actor's pool during an update."""
    state = config.actor_rollout_ref.actor.fsdp_config
    size = (4.0 if state.model_dtype in ("fp32", "float32") else 2.0) * model.parameters / pools.shards
    batch = batches.update.largest
    patches = batch.prompts * math.prod(work.grid)
    parts = {} if state.offload_policy else {"weights": size, "gradients": size, "optimizer": 2 * size}
    parts |= {
        "gathered layers": gathered_bytes(model),
        "activations": activation_bytes(model, batch.tokens, patches, work.recompute, batch.keys),
        "logits": _logits(model.text, work, batch, trains=True),
        "sync buckets": _buckets(config),
    }
    remedy = (
        "smaller micro-batches (actor_rollout_ref.actor.ppo_max_token_len_per_gpu or "
        "ppo_micro_batch_size_per_gpu)"
    )
    if parts["activations"] + parts["logits"] < 0.5 * sum(parts.values()):
        remedy = (
            "more actor GPUs (trainer.nnodes, trainer.n_gpus_per_node), or "
            "actor_rollout_ref.actor.fsdp_config.offload_policy=true, which keeps the state in host memory"
        )
    return _pool(parts, given, remedy)


def attribution_memory(
    config: DictConfig,
    model: Architecture,
    work: Workload,
    pools: Pools,
    batches: StepBatches,
    given: Assumptions,
) -> PoolMemory:
    """One GPU of the attribution pool during a pass."""
    alone = any(name in work.per_answer for name in work.passes)
    batch = (batches.per_answer if alone else batches.view).largest
    parts = {
        "weights": 4.0 * model.parameters / pools.attribution,
        "gathered layers": gathered_bytes(model),
        "activations": _forward_bytes(model, batch.tokens, batch.prompts * math.prod(work.grid), batch.keys),
        "logits": _logits(model.text, work, batch, trains=False),
        "sync buckets": _buckets(config),
    }
    return _pool(
        parts,
        given,
        "more of them (keytoken.attribution.num_workers), or keytoken.attribution.micro_batch_size",
    )


def rollout_memory(
    config: DictConfig, model: Architecture, work: Workload, pools: Pools, given: Assumptions
) -> tuple[PoolMemory, Cache]:
    """One GPU of an engine: the share it may take, less weights and buffers, is its KV cache."""
    rollout = config.actor_rollout_ref.rollout
    value = 4.0 if rollout.dtype == "float32" else 2.0
    parts = {
        "weights": value * model.parameters / pools.engine_gpus,
        "activations": _forward_bytes(model, rollout.max_num_batched_tokens, 0),
        "buffers": given.engine_reserve_gib * GIB,
        "sync buckets": 0.0 if pools.together else _buckets(config),
    }
    share = rollout.gpu_memory_utilization * given.accelerator.memory_gib * GIB
    room = max(0.0, share - sum(parts.values()))
    set_by_hand = OmegaConf.select(rollout, "engine_kwargs.vllm.kv_cache_memory_bytes")
    room = float(set_by_hand) if set_by_hand else room
    token = kv_token_bytes(model.text, pools.engine_gpus, int(value))
    length = work.prompt_tokens + work.longest_answer
    cache = Cache(
        token_bytes=token,
        room=room,
        sequences=int(room // (token * length)),
        wanted=min(rollout.max_num_seqs, math.ceil(work.answers / pools.engines)),
    )
    parts["KV cache"] = max(room, float(token * length))  # at least one answer
    remedy = (
        "more GPUs for each engine (actor_rollout_ref.rollout.tensor_model_parallel_size), or a larger "
        "actor_rollout_ref.rollout.gpu_memory_utilization"
    )
    return PoolMemory(parts, share if not set_by_hand else given.accelerator.memory_gib * GIB, remedy), cache


def host_memory(config: DictConfig, model: Architecture, work: Workload, pools: Pools) -> dict[str, float]:
    """What a node of actors holds of the model beside its GPUs."""
    state = config.actor_rollout_ref.actor.fsdp_config
    ranks = config.trainer.n_gpus_per_node
    parts = {"reference": 4.0 * model.parameters * ranks / pools.actor} if work.reference else {}
    if state.offload_policy:
        parts["actor"] = 16.0 * model.parameters * ranks / pools.shards
    return parts


def _pool(parts: dict[str, float], given: Assumptions, remedy: str) -> PoolMemory:
    parts = {**parts, "CUDA, NCCL": given.reserve_gib * GIB}
    return PoolMemory(parts, given.accelerator.memory_gib * GIB, remedy)


def _buckets(config: DictConfig) -> float:
    """A sending and a receiving one (verl 0.9.1, nccl_checkpoint_engine.py)."""
    engine = config.actor_rollout_ref.rollout.checkpoint_engine
    megabytes = OmegaConf.select(engine, "update_weights_bucket_megabytes", default=0)
    return 0.0 if engine.backend == "naive" else 2.0 * float(megabytes) * (1 << 20)


def _logits(text: Text, work: Workload, batch: Largest, trains: bool) -> float:
    """One chunk in float32, and of an update the head's gradient; verl's head has all logits, thrice."""
    if not work.answer_head:
        return batch.tokens * text.vocabulary * (10.0 if trains else 6.0)
    chunk = min(float(_LOGITS_CHUNK), batch.answers * work.answer_tokens * text.vocabulary * 4.0)
    return chunk + (4.0 * text.embedding_parameters if trains else 0.0)


def _forward_bytes(model: Architecture, tokens: float, patches: float, keys: float = 0.0) -> float:
    """Without gradients one layer's arrays are alive."""
    text, vision = model.text, model.vision
    return max(
        tokens * (8.0 * text.hidden + 6.0 * text.intermediate) + _gathered(text, keys),
        patches * (8.0 * vision.hidden + 6.0 * vision.intermediate),
    )
