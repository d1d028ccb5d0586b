"""Rules about the loss and what feeds it: its keys and verl's, the groups, what is added to rewards.

:mod:`keytoken.validate` runs them among its own.
"""

from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

from keytoken.errors import ConfigurationError
from keytoken.schema import KeyTokenConfig

SEPARATE = "keytoken_separate"
AGENT_LOOP = "keytoken_single_turn"
PENALTY = "reward.reward_kwargs.overlong_buffer_cfg"
# Reward managers that read its keys: ours and verl's.
PENALIZING_MANAGERS = ("LengthAwareRewardManager", "dapo")

# Keys that verl's own loss and trainers read and KeyToken's do not: verl's default, and what to set instead.
_CLIP = "set keytoken.method.loss.clip_low and keytoken.method.loss.clip_high"
_AGGREGATION = "set keytoken.method.loss.normalizer and keytoken.method.loss.level"
INERT = {
    "actor_rollout_ref.actor.clip_ratio": (0.2, _CLIP),
    "actor_rollout_ref.actor.clip_ratio_low": (0.2, _CLIP),
    "actor_rollout_ref.actor.clip_ratio_high": (0.2, _CLIP),
    "actor_rollout_ref.actor.clip_ratio_c": (3.0, "set keytoken.method.loss.dual_clip"),
    "actor_rollout_ref.actor.kl_loss_coef": (0.001, "set keytoken.method.loss.kl_coef"),
    "actor_rollout_ref.actor.kl_loss_type": ("low_var_kl", "set keytoken.method.loss.kl_clamp"),
    "actor_rollout_ref.actor.loss_agg_mode": ("token-mean", _AGGREGATION),
    "actor_rollout_ref.actor.loss_scale_factor": (None, "set keytoken.method.loss.constant_length"),
    "actor_rollout_ref.actor.policy_loss.loss_mode": (
        "vanilla",
        "set keytoken.method.loss.objective, or choose a method=...",
    ),
    "actor_rollout_ref.actor.entropy_coeff": (
        0,
        "KeyToken's loss has no bonus for entropy; keytoken.method.loss.entropy_penalty lowers it",
    ),
    "actor_rollout_ref.actor.ppo_micro_batch_size": (
        None,
        "set actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    ),
    "algorithm.filter_groups.max_num_gen_batches": (
        0,
        "a dropped prompt is replaced until the batch is full",
    ),
    "algorithm.filter_groups.max_inflight_gen_batches": (
        1,
        "as many prompts are in flight as the batch lacks",
    ),
    "critic.enable": (False, "none of its estimators has a critic"),
    "trainer.v1.separate_async.hybrid_rollout.enable_switch": (False, "the pools of a run keep their GPUs"),
}


def updates_of_a_batch(config: DictConfig) -> int:
    """Optimizer steps that a batch of prompts is divided into."""
    if config.trainer.v1.trainer_mode == SEPARATE:
        return int(config.trainer.v1.separate_async.parameter_sync_step)
    return 1


def loss(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    """The reference is there if it is needed, and nothing is unclipped where the ratio leaves 1."""
    actor, options = config.actor_rollout_ref.actor, keytoken.method.loss
    if bool(actor.use_kl_loss) != (options.kl_coef > 0):
        raise ConfigurationError(
            "actor_rollout_ref.actor.use_kl_loss follows keytoken.method.loss.kl_coef; change that one "
            "instead."
        )
    steps = updates_of_a_batch(config)
    if options.clip_low is None and actor.ppo_epochs * steps > 1:
        raise ConfigurationError(
            "keytoken.method.loss.clip_low=null is for one update a batch, where the ratio is 1; with "
            f"actor_rollout_ref.actor.ppo_epochs={actor.ppo_epochs} and "
            f"trainer.v1.separate_async.parameter_sync_step={steps} set clip_low and clip_high, such as 0.2."
        )


def inert_keys(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    """No key is set that nobody reads."""
    for key, (default, instead) in INERT.items():
        value = OmegaConf.select(config, key)
        if value != default:
            raise ConfigurationError(
                f"{key}={value} has no effect on KeyToken's training: {instead}. Leave the key at {default}."
            )


def dynamic_sampling(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    """DAPO's filter, run by verl's replay buffer: it replaces groups whose answers all score the same."""
    options = config.algorithm.get("filter_groups") or {}
    if not options.get("enable"):
        return
    group = config.actor_rollout_ref.rollout.n
    if group < 2:
        raise ConfigurationError(
            f"algorithm.filter_groups.enable=true drops groups whose answers all score the same, and "
            f"actor_rollout_ref.rollout.n={group} leaves nothing to compare. Use 2 or more answers a prompt, "
            "such as actor_rollout_ref.rollout.n=8, or algorithm.filter_groups.enable=false."
        )
    if not options.get("metric"):
        raise ConfigurationError(
            "algorithm.filter_groups.enable=true needs algorithm.filter_groups.metric: acc, or any other "
            "value that the reward function returns, or reward for the whole reward."
        )


def overlong_penalty(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    """Length, buffer and factor of the penalty make sense, and the reward manager reads them."""
    options = OmegaConf.select(config, PENALTY) or {}
    if not options.get("enable"):
        return
    longest, buffer = config.reward.reward_kwargs.get("max_resp_len"), options.get("len")
    limit, factor = config.data.max_response_length, options.get("penalty_factor")
    if not isinstance(longest, int) or not 1 <= longest <= limit:
        raise ConfigurationError(
            f"reward.reward_kwargs.max_resp_len is {longest!r}: the length at which the whole penalty is due "
            f"lies between 1 and data.max_response_length={limit}, where answers are cut off."
        )
    if not isinstance(buffer, int) or not 1 <= buffer <= longest:
        raise ConfigurationError(
            f"{PENALTY}.len is {buffer!r}; use 1 to reward.reward_kwargs.max_resp_len={longest} tokens, "
            f"such as a fifth, {max(longest // 5, 1)}."
        )
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not factor > 0:
        raise ConfigurationError(
            f"{PENALTY}.penalty_factor is {factor!r}; use a number above 0, such as 1.0."
        )
    manager = config.reward.reward_manager.name
    if manager not in PENALIZING_MANAGERS:
        raise ConfigurationError(
            f"{PENALTY}.enable=true has no effect on reward.reward_manager.name={manager}; use "
            f"{PENALIZING_MANAGERS[0]}, or {PENALTY}.enable=false."
        )


def order_bonus(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    """Shuffled answers can be had and scored: one beside each of a prompt's first answers."""
    bonus, rollout = keytoken.method.order_bonus, config.actor_rollout_ref.rollout
    if bonus is None:
        return
    where = "keytoken.method.order_bonus"
    if rollout.n < 2:
        raise ConfigurationError(
            f"{where} compares answers to one prompt, and actor_rollout_ref.rollout.n={rollout.n} leaves "
            "nothing to compare. Use 2 or more answers a prompt, such as actor_rollout_ref.rollout.n=8, or "
            f"{where}=null."
        )
    if bonus.shuffled_answers is not None and bonus.shuffled_answers > rollout.n:
        raise ConfigurationError(
            f"{where}.shuffled_answers={bonus.shuffled_answers}: each is sampled beside one of the "
            f"actor_rollout_ref.rollout.n={rollout.n} answers to a prompt; use at most so many, or null for "
            "half of them."
        )
    loop = rollout.agent.default_agent_loop
    if loop != AGENT_LOOP:
        raise ConfigurationError(
            f"actor_rollout_ref.rollout.agent.default_agent_loop={loop} samples no answers on shuffled "
            f"frames; set it to {AGENT_LOOP}, or {where}=null."
        )
    model = config.reward.reward_model
    if model.enable and not model.enable_resource_pool:
        raise ConfigurationError(
            "reward.reward_model.enable_resource_pool=false scores answers when the rollout is over, and "
            f"shuffled answers are scored within it; set it to true, or {where}=null."
        )


LOSS_RULES: tuple[Callable[[DictConfig, KeyTokenConfig], None], ...] = (
    loss,
    inert_keys,
    dynamic_sampling,
    overlong_penalty,
    order_bonus,
)
