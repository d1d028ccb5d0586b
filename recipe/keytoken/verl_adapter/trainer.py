"""The two trainer modes: verl's separate and sync trainers with attribution between their steps.

Every override says "super, then ours"; what both modes need lives in :class:`AttributionSteps`, which
defines no loop of its own. One step of verl becomes::

    sample -> balance -> old log-probs | attribution passes -> reference
           -> advantages, token weights -> update
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from keytoken import fields
from keytoken.attribution.methods import measures_of, needs_passes
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.errors import ClusterError, NonFiniteError, WeightSyncError
from keytoken.resources import num_slots
from keytoken.schema import KeyTokenConfig
from keytoken.verl_adapter import advantage as advantages
from keytoken.verl_adapter import balance, diagnostics, export, media, order, placement, pools, trackers
from keytoken.verl_adapter import batch as batches
from keytoken.verl_adapter.answers import AnswerWatch
from keytoken.verl_adapter.bounded import begun, bounded
from keytoken.verl_adapter.checkpointing import Checkpointing
from keytoken.verl_adapter.compat import (
    PPOTrainerSeparateAsync,
    PPOTrainerSync,
    Role,
    quiet_separate_async_logger,
    register_trainer,
    tensordict_utils,
)
from keytoken.verl_adapter.data_plane import named_as_the_cause
from keytoken.verl_adapter.drift import check_drift
from keytoken.verl_adapter.loss import token_weighted_loss
from keytoken.verl_adapter.parity import ParityGate, use_probed_engine
from keytoken.verl_adapter.poison import SkippedUpdates, require_finite_batch
from keytoken.verl_adapter.stand_in import StandIn
from keytoken.verl_adapter.stopping import Stopping
from keytoken.workers.actors import SeparateActorWorker, SyncActorWorker

# verl polls for finished answers every two seconds, which is most of a step of a small model.
POLL_INTERVAL_S = 0.05

if TYPE_CHECKING:
    from keytoken.verl_adapter.compat import PPOTrainer as _Trainer
else:
    _Trainer = object  # a mixin: which of verl's trainers comes next is the subclass's choice


class AttributionSteps(Checkpointing, Stopping, StandIn, _Trainer):
    """Overrides that both modes share; mixed in before verl's trainer class."""

    keytoken: KeyTokenConfig
    config: DictConfig
    train_dataset: Any
    actor_worker_cls: type
    _begun_group: Callable[[], Any] | None = None  # waits for the start of the attribution group
    _parity: ParityGate | None = None
    _parity_metrics: dict[str, float] = {}  # noqa: RUF012 - replaced, never changed

    def __init__(self, config: DictConfig) -> None:
        block: Any = OmegaConf.to_container(config.keytoken, resolve=True)
        self.keytoken = KeyTokenConfig.from_mapping(block)
        self._skipped_updates = SkippedUpdates()
        super().__init__(config)

    @property
    def _own_pool(self) -> bool:
        return needs_passes(self.keytoken.method) and self.keytoken.attribution.placement == "pool"

    def _save_checkpoint(self) -> None:
        """verl's, if there is something worth to be saved."""
        bad = next((name for name in self.actor_rollout_wg.non_finite_weight() if name is not None), None)
        if bad is not None:
            raise NonFiniteError(
                f"Step {self.global_steps}: the weight {bad} holds NaN or infinity, and is not saved. The "
                "same command goes on from the last checkpoint; lower actor_rollout_ref.actor.optim.lr."
            )
        super()._save_checkpoint()

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = POLL_INTERVAL_S
        AnswerWatch(buffer, self._answerers, self.keytoken.cluster.answers_timeout_s)
        return buffer

    def _answerers(self) -> Sequence[Any]:
        return self.agent_loop_manager.agent_loop_workers

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        pools.require_slots(num_slots(self.config))
        placement.require_hosts(self.config, self.keytoken.cluster)
        behind = {"rollout": self._begin_attribution_group} if self._own_pool else {}
        placement.place_pools(self.config, self.keytoken.cluster, behind)
        for role in (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef, Role.RefPolicy):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(self.actor_worker_cls)
        if self._own_pool:
            workers, per_node = self.keytoken.attribution.num_workers, self.config.trainer.n_gpus_per_node
            pools.add_pool(self.resource_pool_manager, workers, per_node)

    def _setup(self) -> None:
        if self.keytoken.parity.prompts:
            use_probed_engine()
        super()._setup()
        self.attribution_wg = self.actor_rollout_wg
        if self._own_pool:
            self.attribution_wg = (self._begun_group or self._begin_attribution_group())()
            self._join_broadcast()
        self._hand_over_method()

    def fit(self, agent_loop_manager: Any) -> None:
        """verl's; a loss of the data plane is said to be one."""
        with named_as_the_cause():
            super().fit(agent_loop_manager)

    @contextmanager
    def _engine_at_rest(self, step: int) -> Iterator[None]:
        """While the passes of the parity gate run; the engine has a pool of its own and needs no rest."""
        yield

    def _pass_gate_once(self, step: int) -> None:
        """The parity gate before anything else is asked of the engine; logged with the first step."""
        if self._parity is None and self.keytoken.parity.prompts:
            self._parity = ParityGate(self)
            self._parity_metrics = self._parity.check(step)

    def _hand_over_method(self) -> None:
        """Tell the running groups by which method they score, select and train."""
        method = self.keytoken.method
        advantages.install_estimator(method.advantage_epsilon)
        for group in self._groups():
            group.set_keytoken(self.keytoken)
        self.actor_rollout_wg.set_loss_fn(
            partial(token_weighted_loss, config=method.loss, view=method.view.visual)
        )

    def _groups(self) -> list[Any]:
        """The worker groups, each once: a run may have one group in several places."""
        groups = [self.actor_rollout_wg, self.attribution_wg]
        groups += [self.ref_policy_wg] if self.use_reference_policy else []
        return list({id(group): group for group in groups}.values())

    def _begin_attribution_group(self) -> Callable[[], Any]:
        """Beside the engines, which take longest to start, once they have the place that it could take."""
        workers = self.keytoken.attribution.num_workers
        self._begun_group = begun(
            lambda: pools.start_group(self.resource_pool_manager, self.config, self.keytoken),
            self.keytoken.cluster.start_timeout_s,
            f"The start of the attribution group ({workers} workers)",
            "The cluster has no room for it or a worker died: compare `ray status` with the pools of the run "
            "(keytoken.attribution.num_workers, trainer.n_gpus_per_node, "
            "actor_rollout_ref.rollout.n_gpus_per_node).",
            ClusterError,
        )
        return self._begun_group

    def _fetch_one_gen_batch(self) -> TensorDict:
        """Prompts with ids that do not depend on chance: they seed sampling and order the batch."""
        batch = super()._fetch_one_gen_batch()
        first = getattr(self, "_num_fetched", {}).get(self.global_steps, 0)
        names = [f"{self.global_steps:07d}-{first + number:05d}" for number in range(len(batch))]
        self._num_fetched = {self.global_steps: first + len(batch)}
        tensordict_utils.assign_non_tensor_stack(batch, "uid", names)
        if self.keytoken.method.order_bonus is not None:
            group_size = self.config.actor_rollout_ref.rollout.n
            order.request(batch, self.keytoken.method.order_bonus, group_size)
        return batch

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> KVBatchMeta:
        """verl's; then nobody needs the pixels of the step, and no checkpoint need hold them.

        Metrics: ``data/media_got_bytes`` of pixels that the workers fetched in this step, each prompt once
        for a process; ``data/media_held_bytes`` of prompts that are not trained on yet.
        """
        batch = super().step(metrics, timing_raw)
        got = self._ask(lambda: [group.release_media() for group in self._groups()])
        metrics["data/media_got_bytes"] = float(sum(map(sum, got)))
        metrics["data/media_held_bytes"] = float(media.clear_finished())
        return batch

    def _balance_batch(
        self, batch: KVBatchMeta, metrics: dict[str, Any], *args: Any, **kwargs: Any
    ) -> KVBatchMeta:
        """verl's; answers that share a prompt's computation then come to one rank of the actor."""
        balance.canonical_order(batch)
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        if self.keytoken.prefix == "shared":
            ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
            metrics.update(balance.gather_groups(batch, ranks))
        return batch

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        workers = self.keytoken.attribution.num_workers if self._own_pool else 1
        return math.lcm(super()._get_required_batch_multiple(dp_size), workers)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Launch the passes, let the actor compute its own log-probs beside them, then wait."""
        asked, launched = batch, []
        if _passes_of(self.keytoken, self.global_steps):
            launched.append(self._launch_passes(asked))
        batch = super()._compute_old_log_prob(batch, metrics)
        if launched:
            start = time.perf_counter()
            # A second launch is that of the workers that stand in for those that were lost.
            self._ask(lambda: self._passes_end(launched.pop() if launched else self._launch_passes(asked)))
            metrics["attribution/wait_s"] = time.perf_counter() - start
            metrics.update(self._stand_in_metrics())
        return batch

    def _launch_passes(self, batch: KVBatchMeta) -> Any:
        compared = "disagreement" in measures_of(self.keytoken.method)
        together = compared or self.keytoken.prefix == "shared"
        num_ranks = self.attribution_wg.world_size if together else None
        request = batches.pass_request(batch, self.global_steps, num_ranks, strict=compared)
        return self.attribution_wg.compute_attribution(request)

    def _passes_end(self, passes: Any) -> None:
        self._result_of(passes.futures, "attribution passes")

    def _result_of(self, futures: Any, what: str) -> Any:
        limit = self.keytoken.attribution.pass_timeout_s
        try:
            return ray.get(futures, timeout=limit)
        except ray.exceptions.GetTimeoutError as slow:
            raise ClusterError(
                f"The {what} of step {self.global_steps} did not end within {limit:g} s. Raise "
                "keytoken.attribution.pass_timeout_s, or give the group more workers "
                "(keytoken.attribution.num_workers) or smaller micro-batches."
            ) from slow

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Advantages by verl, then the method: token weights, and with them the same advantages again."""
        if self.keytoken.method.order_bonus is not None:
            metrics.update(order.raise_rewards(batch, self.keytoken.method.order_bonus))
        batch = super()._compute_advantage(batch, metrics)
        outputs = _outputs_of(self.keytoken, self.global_steps)
        algorithm = self.config.algorithm
        by_std = bool(algorithm.get("norm_adv_by_std_in_grpo", True))
        view, reward = self.keytoken.method.view, _reward_field(algorithm)
        seed, step = self.keytoken.seed, self.global_steps
        signals, data = batches.read_signals(batch, outputs, view, reward, by_std, run_seed=seed, step=step)
        require_finite_batch(batch, data, step)
        metrics["data/quarantined_rows"] = len(self.train_dataset.quarantined)
        metrics.update(batches.batch_metrics(batch, signals, data))
        metrics.update(check_drift(self, batch, data["old_log_probs"].to_padded_tensor(0.0), signals.mask))
        if outputs:
            self._check_passes(signals, data, metrics)
        result = self._select(signals, data, metrics)
        weighted = batches.write_weights(batch, result, signals.mask, data["response_mask"])
        batch.fields = weighted.fields
        metrics.update(result.metrics)
        exported = export.maybe_write(self, batch, signals, result)
        metrics.update(trackers.maybe_log(self, exported))
        metrics.update(diagnostics.maybe_write(self, batch, signals, result, data))
        return batch

    def _select(self, signals: Signals, data: TensorDict, metrics: dict[str, Any]) -> TokenWeights:
        """On the device of rank 0 of the group that runs the passes."""
        start = time.perf_counter()
        result = self._ask(
            lambda: self._result_of(self.attribution_wg.select_tokens(signals), "selection of tokens")
        )
        metrics["attribution/select_s"] = time.perf_counter() - start
        if result.advantages is not None:
            estimated = data["advantages"].to_padded_tensor(0.0)
            gap = advantages.require_same(result.advantages, estimated, signals)
            metrics["kernels/advantage_gap_max"] = gap
        return result

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """verl's; the metrics of the kernels go by their own name, as in every other step."""
        batch = super()._update_actor(batch, metrics)
        self._skipped_updates.note(self.global_steps, metrics)
        for name in [name for name in metrics if name.startswith("actor/kernels/")]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        return batch

    def _check_passes(self, signals: Any, data: TensorDict, metrics: dict[str, Any]) -> None:
        batches.require_version(data, self.global_steps)
        metrics.update(batches.pass_metrics(data))
        scored = self.keytoken.attribution.scores(self.global_steps)
        metrics["attribution/scored"] = float(scored)
        if not (self.keytoken.attribution.check_base and scored):
            return
        gap, bound = batches.base_gap(signals, data), self.keytoken.attribution.base_tolerance
        metrics["attribution/base_gap_max"] = gap
        if not gap <= bound:
            raise WeightSyncError(
                f"Step {self.global_steps}: the attribution group's log-probs of the real input differ from "
                f"the actor's by {gap:.3g} nats, more than keytoken.attribution.base_tolerance={bound:g}. "
                "Either their weights differ (a missed sync) or the bound is too tight for the precision."
            )

    def _bounded_sync(self, sync: Any) -> None:
        limit = self.keytoken.attribution.sync_timeout_s
        bounded(
            sync,
            limit,
            f"The weight sync of step {self.global_steps}",
            "A receiver has died or cannot be reached: look for the first error above. Restart the run "
            "(trainer.resume_mode=auto continues from the last checkpoint), or raise "
            "keytoken.attribution.sync_timeout_s for a very large model.",
            WeightSyncError,
        )

    def on_init_end(self) -> None:
        self._bounded_sync(super().on_init_end)
        self._sync_attribution()

    def on_step_end(self) -> None:
        """verl's weight sync; behind it, in some steps, the parity gate."""
        self._bounded_sync(super().on_step_end)
        self._sync_attribution()
        if self._parity is not None and self.keytoken.parity.due(self.global_steps):
            self._parity_metrics = self._ask(partial(self._parity.check, self.global_steps))

    def on_validate_begin(self) -> None:
        """verl's; a validation before training comes first of all."""
        super().on_validate_begin()
        self._pass_gate_once(self.global_steps)

    def on_train_begin(self) -> None:
        """verl's, which sends out the first prompts; it has counted the first step already."""
        self._pass_gate_once(self.global_steps - 1)
        super().on_train_begin()

    def _consume_sync_metrics(self) -> dict[str, float]:
        found, self._parity_metrics = self._parity_metrics, {}
        return {**super()._consume_sync_metrics(), **found}


@register_trainer("keytoken_separate")
class SeparateTrainer(AttributionSteps, PPOTrainerSeparateAsync):
    """Rollout, actor and attribution on pools of their own."""

    actor_worker_cls = SeparateActorWorker

    def _setup(self) -> None:
        with quiet_separate_async_logger():
            super()._setup()


@register_trainer("keytoken_sync")
class SyncTrainer(AttributionSteps, PPOTrainerSync):
    """Everything on the same devices, for one-GPU machines; needs ``attribution.placement=actor``."""

    actor_worker_cls = SyncActorWorker

    @contextmanager
    def _engine_at_rest(self, step: int) -> Iterator[None]:
        """The engine gives its memory to the passes, as between sampling and update, then gets weights."""
        self.checkpoint_manager.sleep_replicas()
        yield
        self._bounded_sync(partial(self.checkpoint_manager.update_weights, step))


def _passes_of(keytoken: KeyTokenConfig, step: int) -> tuple[str, ...]:
    """The passes of a step: views, after "real" if the real input is scored as well."""
    diagnosed = keytoken.diagnostics.due(step)
    if not needs_passes(keytoken.method) and not diagnosed:
        return ()
    real = keytoken.attribution.check_base or diagnosed or measures_of(keytoken.method)
    return (*(("real",) if real else ()), *keytoken.method.views)


def _outputs_of(keytoken: KeyTokenConfig, step: int) -> tuple[str, ...]:
    """The fields that the passes of a step write."""
    passes = _passes_of(keytoken, step)
    if not passes:
        return ()
    if not keytoken.attribution.scores(step):  # no log-probs, and of each view whether a row has it
        applies = (fields.view_outputs(view)[1] for view in keytoken.method.views)
        return (fields.VERSION, fields.STATIC_CLIP, fields.PASS_SECONDS, *applies)
    real = (fields.REAL_LOG_PROB,) if keytoken.attribution.check_base else ()
    collision = ("collision",) if keytoken.diagnostics.due(step) else ()
    measures = (fields.MEASURES[name] for name in (*measures_of(keytoken.method), *collision))
    views = (name for view in keytoken.method.views for name in fields.view_outputs(view))
    seconds = (fields.PASS_SECONDS, *map(fields.pass_seconds, passes))
    return (fields.VERSION, fields.STATIC_CLIP, *seconds, *real, *measures, *views)


def _reward_field(algorithm: DictConfig) -> str | None:
    """Where the rewards lie that become advantages; None for estimators that are verl's own."""
    if algorithm.adv_estimator != advantages.NAME:
        return None
    return "token_level_rewards" if algorithm.use_kl_in_reward else "rm_scores"
