"""Rules that join several keys, KeyToken's and verl's; one rule, one message with its remedy.

They run before any process starts. What one key allows by itself is checked where the key is parsed
(:mod:`keytoken.schema`, :class:`keytoken.data.contract.SamplingContract`, verl's own dataclasses).
"""

import os
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from keytoken.attribution.methods import METHODS
from keytoken.data.contract import SamplingContract
from keytoken.errors import ConfigurationError
from keytoken.schema import KeyTokenConfig, unknown_name

MODES = ("keytoken_separate", "keytoken_sync")


def validate_run(config: DictConfig) -> KeyTokenConfig:
    """Check a composed, resolved configuration as a whole.

    Returns:
        KeyToken's own block, typed.

    Raises:
        ConfigurationError: for the first rule that is broken.
    """
    block = OmegaConf.to_container(config.keytoken, resolve=True)
    keytoken = KeyTokenConfig.from_mapping(block)  # type: ignore[arg-type]
    if keytoken.method.name not in METHODS:
        raise ConfigurationError(
            unknown_name(f"method keytoken.method.name={keytoken.method.name}", keytoken.method.name, METHODS, "methods")
        )
    try:
        SamplingContract(**keytoken.sampling)
    except TypeError as problem:
        raise ConfigurationError(f"keytoken.sampling: {problem}") from problem
    for rule in _RULES:
        rule(config, keytoken)
    return keytoken


def num_slots(config: DictConfig) -> int:
    """GPUs (logical slots on a CPU) that all pools of a run ask for together."""
    slots = config.trainer.nnodes * config.trainer.n_gpus_per_node
    rollout = config.actor_rollout_ref.rollout
    if not config.actor_rollout_ref.hybrid_engine:
        slots += rollout.nnodes * rollout.n_gpus_per_node
    if config.keytoken.attribution.placement == "pool" and _has_views(config):
        slots += config.keytoken.attribution.num_workers
    return int(slots)


def _has_views(config: DictConfig) -> bool:
    selection = config.keytoken.method.selection
    return selection is not None and max(selection.visual_ratio, selection.temporal_ratio) > 0


def _mode(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    mode = config.trainer.v1.trainer_mode
    if mode not in MODES:
        raise ConfigurationError(f"trainer.v1.trainer_mode is {mode!r}; use one of {', '.join(MODES)}.")
    separate = mode == "keytoken_separate"
    if separate == bool(config.actor_rollout_ref.hybrid_engine):
        raise ConfigurationError(
            f"trainer.v1.trainer_mode={mode} needs actor_rollout_ref.hybrid_engine={str(not separate).lower()}; "
            "choose the pair with pools=three_pools or pools=one_device."
        )
    if not separate and keytoken.attribution.placement == "pool" and keytoken.method.views:
        raise ConfigurationError(
            "keytoken.attribution.placement=pool needs trainer.v1.trainer_mode=keytoken_separate, whose weight "
            "broadcast feeds the attribution group; with keytoken_sync use keytoken.attribution.placement=actor."
        )


def _group(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    size = config.actor_rollout_ref.rollout.n
    if config.algorithm.adv_estimator.startswith("grpo") and size < 2:
        raise ConfigurationError(
            f"actor_rollout_ref.rollout.n={size}: a group of one answer has no advantage, every update would be "
            "zero. Use 2 or more answers a prompt, such as actor_rollout_ref.rollout.n=8."
        )


def _mini_batch(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    actor, data = config.actor_rollout_ref.actor, config.data
    steps = config.trainer.v1.separate_async.parameter_sync_step
    expected = data.train_batch_size // steps if config.trainer.v1.trainer_mode == MODES[0] else data.train_batch_size
    if actor.ppo_mini_batch_size != expected:
        raise ConfigurationError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} must be {expected}, the "
            "prompts of one update: the loss divides by counts of the whole mini-batch. Set it, or "
            f"data.train_batch_size={actor.ppo_mini_batch_size * steps}."
        )
    rows = expected * config.actor_rollout_ref.rollout.n
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    per_rank = actor.ppo_micro_batch_size_per_gpu
    if not actor.use_dynamic_bsz and (rows % ranks or per_rank is None or (rows // ranks) % per_rank):
        raise ConfigurationError(
            f"{rows} answers over {ranks} actor ranks in micro-batches of {per_rank}: they do not divide. Change "
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu, data.train_batch_size or rollout.n."
        )


def _loss(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    actor = config.actor_rollout_ref.actor
    if actor.entropy_coeff != 0:
        raise ConfigurationError(
            "actor_rollout_ref.actor.entropy_coeff has no place in KeyToken's loss; leave it at 0."
        )
    if bool(actor.use_kl_loss) != (keytoken.method.loss.kl_coef > 0):
        raise ConfigurationError(
            "actor_rollout_ref.actor.use_kl_loss follows keytoken.method.loss.kl_coef; change that one instead."
        )
    correction = config.algorithm.get("rollout_correction")
    if correction and (correction.get("bypass_mode") or correction.get("rollout_is")):
        raise ConfigurationError(
            "algorithm.rollout_correction: bypass mode has no entropies to select by, and importance weights are "
            "not in KeyToken's loss; leave bypass_mode=false and rollout_is=null."
        )


def _model(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    if not keytoken.method.views:
        return
    if actor.strategy != "fsdp2":
        raise ConfigurationError(f"actor_rollout_ref.actor.strategy={actor.strategy}: attribution needs fsdp2.")
    if actor.ulysses_sequence_parallel_size > 1:
        raise ConfigurationError(
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size > 1: the attribution passes read answer "
            "rows of whole sequences; set it to 1."
        )
    reduced = (actor.fsdp_config.get("mixed_precision") or {}).get("param_dtype", "bf16") not in ("fp32", "float32")
    if reduced and not keytoken.attribution.check_base:
        raise ConfigurationError(
            "keytoken.attribution.check_base=false takes the actor's log-probs as the real side, which is exact "
            "in fp32 only; set it to true for bf16 and fp16."
        )
    if model.get("lora_rank", 0) > 0:
        raise ConfigurationError("actor_rollout_ref.model.lora_rank > 0: attribution of adapters is not supported.")


def _attribution_rows(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    rows = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    workers = keytoken.attribution.num_workers
    if keytoken.method.views and keytoken.attribution.placement == "pool" and rows % workers:
        raise ConfigurationError(
            f"keytoken.attribution.num_workers={workers} does not divide the {rows} answers of a step."
        )


def _files(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    named = {
        "data.train_files": config.data.train_files,
        "data.val_files": config.data.val_files,
        "actor_rollout_ref.model.path": config.actor_rollout_ref.model.path,
    }
    for key, value in named.items():
        for path in [value] if isinstance(value, str) else value:
            local = os.path.isabs(os.path.expanduser(path)) or path.startswith(".")
            if local and not Path(path).expanduser().exists():
                raise ConfigurationError(f"{key}: {path} does not exist on this machine.")


_RULES: tuple[Callable[[DictConfig, KeyTokenConfig], None], ...] = (
    _mode,
    _group,
    _mini_batch,
    _loss,
    _model,
    _attribution_rows,
)


def validate_files(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    """Check that local files named in the configuration exist; needs the machine that will run the job."""
    _files(config, keytoken)
