"""What one step of a run has to do: read off its configuration, its model's shape and the assumptions.

Every prompt is taken to have one clip, of the assumed length and size, and every answer the mean length.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from keytoken.attribution.methods import measures_of, needs_passes
from keytoken.data.contract import SamplingContract, resized_shape, select_frames
from keytoken.data.positions import Grid
from keytoken.plan.architecture import Architecture
from keytoken.plan.assumptions import Assumptions
from keytoken.prefix.layout import HIDING_ATTENTION
from keytoken.schema import KeyTokenConfig
from keytoken.validate import ATTENTION, SYNC

# Of Qwen3-VL, for two frames: a time such as <10.5 seconds> and the ends of a block of vision tokens.
STAMP_TOKENS = 9
# The view that leaves the clip out; the others have as many vision tokens as the real input.
WITHOUT_CLIP = "masked"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One step.

    Attributes:
        grid: A clip in patches: temporal, height, width.
        text_tokens: Of a prompt, besides those of its clip.
        passes: Of the attribution group; "real" is the unchanged input.
        packed: Whether answers lie one behind the other without padding, and attention skips what lies above
            the diagonal.
        shared: Whether a micro-batch computes a prompt once for all answers to it that it holds.
        per_answer: Views that draw anew for each answer, so that no two of them share a prompt.
        hides: Whether attention of an update computes the pairs between answers and hides them, as sdpa does.
    """

    prompts: int
    group: int
    grid: Grid
    video_tokens: int
    text_tokens: int
    answer_tokens: int
    longest_answer: int
    padding: float
    passes: tuple[str, ...]
    reference: bool
    updates: int
    packed: bool
    answer_head: bool
    recompute: bool
    frozen_vision: bool
    shared: bool
    per_answer: tuple[str, ...]
    hides: bool

    @property
    def prompt_tokens(self) -> int:
        """Text and clip."""
        return self.video_tokens + self.text_tokens

    @property
    def answers(self) -> int:
        """Of a step."""
        return self.prompts * self.group

    @property
    def row_tokens(self) -> float:
        """Tokens that a pass computes for one answer with a prompt of its own."""
        return (self.prompt_tokens + self.answer_tokens) * self.padding


def workload_of(
    config: DictConfig, keytoken: KeyTokenConfig, model: Architecture, given: Assumptions
) -> Workload:
    """Read a validated configuration.

    Raises:
        DataError: the assumed clip cannot be sampled.
    """
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    contract = contract_of(keytoken, model)
    num_source = max(1, round(given.clip_seconds * given.clip_fps))
    frames = len(select_frames(num_source, given.clip_fps, contract))
    height, width = resized_shape(given.clip_height, given.clip_width, contract)
    grid = (
        frames // contract.temporal_patch_size,
        height // contract.patch_size,
        width // contract.patch_size,
    )
    packed = bool(config.actor_rollout_ref.model.use_remove_padding)
    return Workload(
        prompts=config.data.train_batch_size,
        group=rollout.n,
        grid=grid,
        video_tokens=math.prod(grid) // contract.merge_size**2,
        text_tokens=given.text_tokens + (grid[0] * STAMP_TOKENS if model.vision.positions else 0),
        answer_tokens=max(1, round(given.answer_share * config.data.max_response_length)),
        longest_answer=config.data.max_response_length,
        padding=given.padding,
        passes=_passes(keytoken),
        reference=bool(actor.use_kl_loss),
        updates=actor.ppo_epochs,
        packed=packed,
        answer_head=keytoken.kernels.head == "fused",
        recompute=bool(config.actor_rollout_ref.model.enable_gradient_checkpointing),
        frozen_vision=bool(actor.get("freeze_vision_tower", False)),
        shared=keytoken.prefix == "shared" and keytoken.kernels.head == "fused",
        hides=OmegaConf.select(config, ATTENTION) == HIDING_ATTENTION,
        per_answer=("blackened",) if keytoken.method.view.blackened.per == "response" else (),
    )


def contract_of(keytoken: KeyTokenConfig, model: Architecture) -> SamplingContract:
    """The run's sampling contract with the patches of its model, where the contract leaves them to it."""
    contract = SamplingContract.from_mapping(keytoken.sampling, where="keytoken.sampling")
    if "patch_size" in keytoken.sampling:
        return contract
    return dataclasses.replace(contract, patch_size=model.vision.patch)


def _passes(keytoken: KeyTokenConfig) -> tuple[str, ...]:
    if not needs_passes(keytoken.method):
        return ()
    real = keytoken.attribution.check_base or bool(measures_of(keytoken.method))
    return (*(("real",) if real else ()), *keytoken.method.views)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """How many GPUs do what.

    Attributes:
        engine_gpus: GPUs of one engine.
        shards: GPUs over which the actor's state is spread; as many replicas of it as that divides the ranks.
        together: One device does everything, in turns.
        ahead: Answers are sampled while the last batch is trained on.
    """

    actor: int
    rollout: int
    attribution: int
    engine_gpus: int
    shards: int
    together: bool
    ahead: bool

    @property
    def engines(self) -> int:
        """Copies of the model that sample."""
        return max(1, self.rollout // self.engine_gpus)

    @property
    def total(self) -> int:
        """GPUs of the run."""
        return self.actor if self.together else self.actor + self.rollout + self.attribution


def pools_of(config: DictConfig, keytoken: KeyTokenConfig) -> Pools:
    """The pools of a validated configuration."""
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    together = trainer.v1.trainer_mode == SYNC
    actor = trainer.nnodes * trainer.n_gpus_per_node
    size: Any = config.actor_rollout_ref.actor.fsdp_config.fsdp_size
    own_pool = needs_passes(keytoken.method) and keytoken.attribution.placement == "pool"
    warm_up = OmegaConf.select(config, "trainer.v1.keytoken_separate.num_warmup_batches", default=0)
    return Pools(
        actor=actor,
        rollout=actor if together else rollout.nnodes * rollout.n_gpus_per_node,
        attribution=keytoken.attribution.num_workers if own_pool else 0,
        engine_gpus=rollout.tensor_model_parallel_size,
        shards=min(size, actor) if size > 0 else actor,
        together=together,
        ahead=not together and warm_up > 0,
    )
