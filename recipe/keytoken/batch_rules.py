"""Rules about the sizes of batches: what divides what, over ranks, updates and micro-batches.

:mod:`keytoken.validate` runs them among its own.
"""

from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

from keytoken.attribution.methods import measures_of, needs_passes
from keytoken.errors import ConfigurationError
from keytoken.loss_rules import updates_of_a_batch
from keytoken.schema import KeyTokenConfig


def _mini_batch(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    actor, data = config.actor_rollout_ref.actor, config.data
    steps = updates_of_a_batch(config)
    if actor.ppo_mini_batch_size * steps != data.train_batch_size:
        raise ConfigurationError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} must be the prompts "
            f"of one update, data.train_batch_size={data.train_batch_size} over {steps}: the loss divides "
            "by counts of the whole mini-batch. Set one of them, such as "
            f"data.train_batch_size={actor.ppo_mini_batch_size * steps}."
        )


def _micro_batches(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    actor = config.actor_rollout_ref.actor
    rows = actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node // actor.ulysses_sequence_parallel_size
    if ranks < 1 or rows % ranks:
        raise ConfigurationError(
            f"{rows} answers of an update do not divide over {ranks} actor ranks. Change "
            "data.train_batch_size, actor_rollout_ref.rollout.n or trainer.n_gpus_per_node."
        )
    if actor.use_dynamic_bsz:
        longest = config.data.max_prompt_length + config.data.max_response_length
        room = actor.ppo_max_token_len_per_gpu * actor.ulysses_sequence_parallel_size
        if room < longest:
            raise ConfigurationError(
                f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={actor.ppo_max_token_len_per_gpu} has "
                f"no room for one answer of data.max_prompt_length + data.max_response_length = {longest} "
                "tokens; raise it."
            )
        return
    share = rows // ranks
    _divides(config, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", share)
    # The passes without gradients take a whole batch, not the part of one update.
    whole = share * updates_of_a_batch(config)
    _divides(config, "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu", whole)
    if actor.use_kl_loss:
        _divides(config, "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu", whole)


def _divides(config: DictConfig, key: str, rows: int) -> None:
    """verl cuts a rank's answers into equal micro-batches, and stops in the first step if it cannot."""
    size = OmegaConf.select(config, key)
    if size is None or not 0 < size <= rows or rows % size:
        raise ConfigurationError(
            f"{key}={size} does not divide the {rows} answers of an actor rank. Change it, or set "
            "actor_rollout_ref.actor.use_dynamic_bsz=true."
        )


def _attribution_rows(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    rows = config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    workers, in_pool = keytoken.attribution.num_workers, keytoken.attribution.placement == "pool"
    if needs_passes(keytoken.method) and in_pool and rows % workers:
        raise ConfigurationError(
            f"keytoken.attribution.num_workers={workers} does not divide the {rows} answers of an update; "
            "change it, or data.train_batch_size."
        )


def _whole_groups(config: DictConfig, keytoken: KeyTokenConfig) -> None:
    """A method that compares the answers to a prompt: all of them on one rank, in one micro-batch."""
    if "disagreement" not in measures_of(keytoken.method):
        return
    attribution, answers = keytoken.attribution, config.actor_rollout_ref.rollout.n
    why = f"keytoken.method.name={keytoken.method.name} compares the answers to a prompt"
    if attribution.micro_batch_size < answers:
        raise ConfigurationError(
            f"keytoken.attribution.micro_batch_size={attribution.micro_batch_size} has no room for the "
            f"actor_rollout_ref.rollout.n={answers} answers to a prompt. {why}, so all of them must be in "
            f"one forward pass; set it to a multiple of that number, such as {answers}."
        )
    key, ranks = "keytoken.attribution.num_workers", attribution.num_workers
    if attribution.placement == "actor":
        key = "trainer.nnodes x trainer.n_gpus_per_node"
        ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    prompts = config.actor_rollout_ref.actor.ppo_mini_batch_size
    if prompts % ranks:
        raise ConfigurationError(
            f"{key}={ranks} does not divide the {prompts} prompts of an update. {why}, so all of them must "
            "be on one rank; change it, or data.train_batch_size."
        )


BATCH_RULES: tuple[Callable[[DictConfig, KeyTokenConfig], None], ...] = (
    _mini_batch,
    _micro_batches,
    _attribution_rows,
    _whole_groups,
)
