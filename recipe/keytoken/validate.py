"""Rules that join several keys, KeyToken's and verl's; one function a rule, one message with its remedy.

They run before any process starts. What one key allows by itself is checked where the key is parsed
(:mod:`keytoken.schema`, :class:`keytoken.data.contract.SamplingContract`, verl's own dataclasses).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from keytoken.attribution.methods import measures_of, method_of, needs_passes
from keytoken.attribution.views import VIEWS
from keytoken.batch_rules import BATCH_RULES
from keytoken.data.clip_check import NEW, check_settings
from keytoken.data.contract import SamplingContract
from keytoken.errors import ConfigurationError
from keytoken.loss_rules import LOSS_RULES, SEPARATE
from keytoken.prefix.layout import SHARING_ATTENTION
from keytoken.schema import KeyTokenConfig, unknown_name
from keytoken.secret import is_secret

SYNC = "keytoken_sync"
ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"

# Estimators that need rewards and groups only. All but reinforce_plus_plus compare answers of one prompt.
UNGROUPED = "reinforce_plus_plus"
ESTIMATORS = (
    "keytoken_grpo",
    "grpo_passk",
    "rloo",
    "rloo_vectorized",
    "opo",
    "reinforce_plus_plus_baseline",
    UNGROUPED,
)

_BLOCKS = (
    *("keytoken", "algorithm", "data", "trainer", "trainer.v1", "reward", "ray_kwargs.ray_init"),
    *("actor_rollout_ref", "actor_rollout_ref.model", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"),
    *("actor_rollout_ref.actor", "actor_rollout_ref.actor.optim", "actor_rollout_ref.actor.fsdp_config"),
)

# Keys that are multiplied and divided below and in verl, with the smallest value they take.
_COUNTS = {
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 1,
    "trainer.v1.separate_async.parameter_sync_step": 1,
    "data.train_batch_size": 1,
    "data.max_prompt_length": 1,
    "data.max_response_length": 1,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 1,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 1,
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.rollout.nnodes": 0,
    "actor_rollout_ref.rollout.n_gpus_per_node": 1,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.max_num_batched_tokens": 1,
}

# Rates and shares, of which verl checks no type before a worker computes with them.
_NUMBERS = (
    "actor_rollout_ref.actor.grad_clip",
    "actor_rollout_ref.actor.optim.lr",
    "actor_rollout_ref.actor.optim.weight_decay",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.top_p",
)

FUSED_HEAD_NEEDS = {
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 1,
    "actor_rollout_ref.actor.calculate_sum_pi_squared": False,
    "actor_rollout_ref.model.use_fused_kernels": False,
    "distillation.enabled": False,
}


def validate_run(config: DictConfig) -> KeyTokenConfig:
    """Check a composed, resolved configuration as a whole.

    Returns:
        KeyToken's own block, typed.

    Raises:
        ConfigurationError: for the first rule that is broken.
    """
    _types(config)
    block = OmegaConf.to_container(config.keytoken, resolve=True)
    keytoken = KeyTokenConfig.from_mapping(block)  # type: ignore[arg-type]
    for rule in RULES:
        rule(config, keytoken)
    return keytoken


def _types(config: DictConfig) -> None:
    """Before all other rules, which take blocks for blocks and numbers for numbers."""
    for name in _BLOCKS:
        value = OmegaConf.select(config, name)
        if not isinstance(value, DictConfig):
            raise ConfigurationError(
                f"{name} is {value!r}; it is a block of keys, set one of them: {name}.KEY=VALUE."
            )
    for key, least in _COUNTS.items():
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigurationError(f"{key} is {value!r}; give it a whole number of at least {least}.")
    for key in _NUMBERS:
        value = OmegaConf.select(config, key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ConfigurationError(f"{key} is {value!r}; give it a number of at least 0.")


def _no_secrets(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    """The first rule: no other message may quote one."""
    places = _strings(OmegaConf.to_container(config, resolve=True))
    found = next((place for place, value in places if is_secret(place, value)), None)
    if found is not None:
        raise ConfigurationError(
            f"{found} holds what looks like a secret (not shown here). A configuration is printed, kept in "
            "the run folder and given to trackers: take it out, and export the secret as an environment "
            "variable (`keytoken submit --env NAME` sends one along)."
        )


def _strings(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text below a node, with its dotted place."""
    if isinstance(node, str):
        yield place, node
    elif isinstance(node, (dict, list)):
        named = node.items() if isinstance(node, dict) else enumerate(node)
        for name, value in named:
            yield from _strings(value, f"{place}.{name}" if place else str(name))


def _method(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    method_of(keytoken.method)


def _views(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    choice = keytoken.method.view
    for kind, name in (("visual", choice.visual), ("temporal", choice.temporal)):
        key = f"keytoken.method.view.{kind}={name}"
        fitting = [known for known, view in VIEWS.items() if view.kind == kind]
        if name not in VIEWS:
            raise ConfigurationError(unknown_name(f"view {key}", name, fitting, f"{kind} views"))
        if name not in fitting:
            raise ConfigurationError(f"{key} is a {VIEWS[name].kind} view; use one of {', '.join(fitting)}.")


def _sampling(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    SamplingContract.from_mapping(keytoken.sampling, where="keytoken.sampling")


def _clip_check(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    check_settings(config.data.get("clip_check", NEW), config.data.get("clip_check_jobs"))


def _mode(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    mode = config.trainer.v1.trainer_mode
    if mode not in (SEPARATE, SYNC) or not config.trainer.use_v1:
        raise ConfigurationError(
            f"trainer.v1.trainer_mode is {mode!r}, with "
            f"trainer.use_v1={str(config.trainer.use_v1).lower()}; use {SEPARATE} or {SYNC}, with "
            "trainer.use_v1=true. pools=three_pools and pools=one_device set them."
        )
    separate = mode == SEPARATE
    if separate == bool(config.actor_rollout_ref.hybrid_engine):
        raise ConfigurationError(
            f"trainer.v1.trainer_mode={mode} needs "
            f"actor_rollout_ref.hybrid_engine={str(not separate).lower()}; choose the pair with "
            "pools=three_pools or pools=one_device."
        )
    if not separate and keytoken.attribution.placement == "pool" and needs_passes(keytoken.method):
        raise ConfigurationError(
            f"keytoken.attribution.placement=pool needs trainer.v1.trainer_mode={SEPARATE}, whose weight "
            f"broadcast feeds the attribution group; with {SYNC} use keytoken.attribution.placement=actor."
        )


def _weight_transport(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    key = "actor_rollout_ref.rollout.checkpoint_engine.backend"
    backend = OmegaConf.select(config, key)
    separate = config.trainer.v1.trainer_mode == SEPARATE
    if separate and backend == "naive":
        raise ConfigurationError(
            f"{key}=naive moves weights inside one process; pools of their own need nccl."
        )
    if separate and config.trainer.device == "cpu" and backend == "nccl":
        raise ConfigurationError(f"{key}=nccl needs GPUs; platform=cpu sets keytoken_gloo.")
    if separate and config.actor_rollout_ref.rollout.nnodes < 1:
        raise ConfigurationError(
            "actor_rollout_ref.rollout.nnodes=0 leaves no node for the rollout pool; set it to 1 or more."
        )


def _advantage(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    name, rollout = config.algorithm.adv_estimator, config.actor_rollout_ref.rollout
    if name not in ESTIMATORS:
        raise ConfigurationError(
            f"algorithm.adv_estimator={name}: use one of {', '.join(ESTIMATORS)}. verl's own grpo has its "
            "epsilon built in (keytoken_grpo is the same with keytoken.method.advantage_epsilon=1e-6), and "
            "estimators with a critic have no place in the pools."
        )
    if rollout.n < 2 and name != UNGROUPED:
        raise ConfigurationError(
            f"actor_rollout_ref.rollout.n={rollout.n}: a group of one answer has no baseline to compare "
            "with. Use 2 or more answers a prompt, such as actor_rollout_ref.rollout.n=8."
        )
    if not rollout.temperature > 0:
        raise ConfigurationError(
            f"actor_rollout_ref.rollout.temperature={rollout.temperature}: all answers of a group would be "
            "the same and have no advantage. Use a temperature above 0, such as 1.0."
        )


def _rollout_correction(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    correction = config.algorithm.get("rollout_correction") or {}
    reasons = {
        "bypass_mode": (False, "bypass mode computes no entropies to select tokens by"),
        "rollout_is": (None, "importance weights are not in KeyToken's loss"),
        "rollout_rs": (None, "rejection edits the response mask, which is the real length of an answer here"),
    }
    for name, (default, reason) in reasons.items():
        if correction.get(name, default) != default:
            raise ConfigurationError(
                f"algorithm.rollout_correction.{name}={correction[name]}: {reason}. Leave it at "
                f"{str(default).lower().replace('none', 'null')}."
            )


def _rollout(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    rollout, data = config.actor_rollout_ref.rollout, config.data
    if rollout.name != "vllm":
        raise ConfigurationError(
            f"actor_rollout_ref.rollout.name={rollout.name}: KeyToken runs with vllm only."
        )
    longest = data.max_prompt_length + data.max_response_length
    if rollout.max_model_len is not None and rollout.max_model_len < longest:
        raise ConfigurationError(
            f"actor_rollout_ref.rollout.max_model_len={rollout.max_model_len} is below "
            f"data.max_prompt_length + data.max_response_length = {longest}: long prompts would lose their "
            "answers. Raise it, or set it to null."
        )
    window = rollout.max_model_len or longest
    if not rollout.enable_chunked_prefill and rollout.max_num_batched_tokens < window:
        raise ConfigurationError(
            f"actor_rollout_ref.rollout.max_num_batched_tokens={rollout.max_num_batched_tokens} cannot hold "
            f"one prompt of up to {window} tokens in one piece; raise it, or set "
            "actor_rollout_ref.rollout.enable_chunked_prefill=true (GPUs only)."
        )
    gpus = rollout.n_gpus_per_node
    if config.trainer.v1.trainer_mode == SEPARATE and gpus % rollout.tensor_model_parallel_size:
        raise ConfigurationError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={rollout.tensor_model_parallel_size} "
            f"does not divide actor_rollout_ref.rollout.n_gpus_per_node={gpus}; change one of them."
        )


def _model(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    if not needs_passes(keytoken.method) and keytoken.diagnostics.every_steps is None:
        return
    if actor.strategy != "fsdp2":
        raise ConfigurationError(
            f"actor_rollout_ref.actor.strategy={actor.strategy}: attribution needs fsdp2."
        )
    if actor.ulysses_sequence_parallel_size > 1:
        raise ConfigurationError(
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size > 1: the attribution passes read answer "
            "rows of whole sequences; set it to 1."
        )
    reduced = (actor.fsdp_config.get("mixed_precision") or {}).get("param_dtype", "bf16") not in (
        "fp32",
        "float32",
    )
    if reduced and keytoken.method.views and not keytoken.attribution.check_base:
        raise ConfigurationError(
            "keytoken.attribution.check_base=false takes the actor's log-probs as the real side, which is "
            "exact in fp32 only; set it to true for bf16 and fp16."
        )
    if model.get("lora_rank", 0) > 0 or model.lora.rank > 0:
        raise ConfigurationError(
            "actor_rollout_ref.model.lora_rank > 0: attribution of adapters is not supported; set it to 0."
        )


def _kernels(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    if keytoken.kernels.impl == "triton" and config.trainer.device == "cpu":
        raise ConfigurationError(
            "keytoken.kernels.impl=triton needs a GPU, and trainer.device is cpu; set "
            "keytoken.kernels.impl=auto, which takes plain torch there."
        )


def _head(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    if keytoken.kernels.head != "fused":
        return
    for key, needed in FUSED_HEAD_NEEDS.items():
        value = OmegaConf.select(config, key, default=needed)
        if value != needed:
            raise ConfigurationError(
                f"{key}={value}: keytoken.kernels.head=fused computes log-probs of whole answers and no "
                f"logits, and needs {key}={str(needed).lower()}. Set that, or keytoken.kernels.head=verl and "
                "keytoken.prefix=separate."
            )


def _prefix(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    """What keeps answers from sharing a prompt."""
    if keytoken.prefix != "shared":
        return
    if keytoken.kernels.head != "fused":
        raise ConfigurationError(
            f"keytoken.kernels.head={keytoken.kernels.head} computes a prompt for every answer, and the "
            "attribution passes would not; set keytoken.prefix=separate, or keytoken.kernels.head=fused."
        )
    chosen = OmegaConf.select(config, ATTENTION)
    if chosen is not None and not str(chosen).startswith(SHARING_ATTENTION):
        raise ConfigurationError(
            f"{ATTENTION}={chosen} cannot compute one prompt for several answers; set "
            f"{', '.join(SHARING_ATTENTION)}, or keytoken.prefix=separate."
        )


def _reuse(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    """Steps without passes come after one with passes, also after a resume, and need nothing but scores."""
    every, method = keytoken.attribution.every_steps, keytoken.method
    key = f"keytoken.attribution.every_steps={every}"
    if every == 1:
        return
    needed = list(measures_of(method))
    needed += ["the perception term of the loss"] if method.loss.perception_coef > 0 else []
    needed += ["keytoken.diagnostics.every_steps"] if keytoken.diagnostics.every_steps else []
    if needed or not method.views:
        reason = f"needs passes in between, for {', '.join(needed)}" if needed else "has none"
        raise ConfigurationError(
            f"{key} remembers the scores of views, and {method.name} {reason}. Set every_steps=1."
        )
    save = config.trainer.save_freq
    if save > 0 and save % every:
        raise ConfigurationError(
            f"trainer.save_freq={save} must be a multiple of {key}: a resumed run starts with a step "
            f"that has passes. Set trainer.save_freq={every * -(-save // every)}."
        )


def _on_failure(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    """The actor's workers can stand in if they need nothing that died with the attribution group."""
    attribution = keytoken.attribution
    key = "keytoken.attribution.on_failure=actor"
    if attribution.on_failure == "stop":
        return
    if attribution.placement == "actor":
        raise ConfigurationError(
            f"{key} is for a group of its own, and with keytoken.attribution.placement=actor the actor's "
            "workers run the passes anyway; set keytoken.attribution.on_failure=stop."
        )
    if attribution.every_steps > 1:
        raise ConfigurationError(
            f"{key}: with keytoken.attribution.every_steps={attribution.every_steps} the group remembers the "
            "scores of the last passes, which are lost with it. Set on_failure=stop, or every_steps=1."
        )
    engine = config.actor_rollout_ref.rollout.checkpoint_engine
    options = (engine.get("engine_kwargs") or {}).get(engine.backend) or {}
    if engine.backend != "keytoken_gloo" and not options.get("rebuild_group", False):
        where = f"actor_rollout_ref.rollout.checkpoint_engine.engine_kwargs.{engine.backend}.rebuild_group"
        raise ConfigurationError(
            f"{key} gives the group a weight broadcast of its own, and backend={engine.backend} keeps the "
            f"process group of the first; set ++{where}=true."
        )


RULES: tuple[Callable[[DictConfig, KeyTokenConfig], None], ...] = (
    _no_secrets,
    _method,
    _views,
    _sampling,
    _clip_check,
    _mode,
    _weight_transport,
    _advantage,
    *BATCH_RULES,
    *LOSS_RULES,
    _rollout_correction,
    _rollout,
    _model,
    _kernels,
    _head,
    _prefix,
    _reuse,
    _on_failure,
)
