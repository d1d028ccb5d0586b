"""The Ray workers: an attribution group of its own, and actor workers that can run the passes themselves."""

from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from keytoken.attribution.reuse import ScoreMemory
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.errors import WeightSyncError
from keytoken.schema import KeyTokenConfig
from keytoken.verl_adapter.compat import (
    ActorRolloutRefWorker,
    CheckpointEngineRegistry,
    DetachActorWorker,
    Dispatch,
    Execute,
    HeadSettings,
    TrainingWorker,
    TrainingWorkerConfig,
    convert_weight_keys,
    get_device_name,
    import_external_libs,
    make_nd_compute_dataproto_dispatch_fn,
    omega_conf_to_dataclass,
    register_worker_method,
    release_media,
    set_head,
    set_media_cache,
    use_answer_head_engine,
    use_resident_engine,
)
from keytoken.workers.attribution import score_views
from keytoken.workers.parity import read_rows
from keytoken.workers.passes import PassSettings
from keytoken.workers.selection import select_on

if TYPE_CHECKING:
    from keytoken.verl_adapter.compat import ActorRolloutRefWorker as _ActorWorker
else:
    _ActorWorker = object  # a mixin: which of verl's workers comes next is the subclass's choice


def pass_settings(actor_config: DictConfig, keytoken: KeyTokenConfig) -> PassSettings:
    """Pass settings from ``actor_rollout_ref``: the temperature of the rollout, the padding of the model."""
    return PassSettings(
        micro_batch_size=keytoken.attribution.micro_batch_size,
        temperature=float(actor_config.rollout.temperature),
        use_remove_padding=bool(actor_config.model.use_remove_padding),
        impl=keytoken.kernels.impl,
        shared=keytoken.prefix == "shared",
    )


class _SelectingWorker:
    """Selects tokens: one worker is enough, because the whole batch fits on its device.

    All ranks fetch the pixels of their own prompts, and hold them for a step.
    """

    keytoken: KeyTokenConfig
    memory: ScoreMemory | None

    @register_worker_method(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_keytoken(self, keytoken: KeyTokenConfig) -> None:
        """Hand over the method and how its passes run, after the models are built."""
        self.keytoken = keytoken
        set_media_cache(keytoken.media.cache_gb)
        self.memory = ScoreMemory() if keytoken.attribution.every_steps > 1 else None

    @register_worker_method(dispatch_mode=Dispatch.ONE_TO_ALL)
    def release_media(self) -> int:
        """Forget the pixels of a step; returns the bytes that this process fetched in it."""
        return release_media()

    @register_worker_method(dispatch_mode=Dispatch.ALL_TO_ALL, execute_mode=Execute.RANK_ZERO, blocking=False)
    def select_tokens(self, signals: Signals) -> TokenWeights:
        """See :func:`keytoken.workers.selection.select_on`; rank 0 alone runs it."""
        device = torch.device(get_device_name())
        return select_on(device, signals, self.keytoken.method, self.keytoken.kernels.impl, self.memory)


class AttributionWorker(_SelectingWorker, TrainingWorker):
    """One rank of the attribution group: a forward-only FSDP2 copy of the policy.

    It receives the same weight broadcast as the rollout workers, so it offers the two methods that
    verl's checkpoint manager calls on a receiver (verl/checkpoint_engine/base.py, CheckpointEngineWorker).
    """

    def __init__(self, config: DictConfig, keytoken: KeyTokenConfig) -> None:
        self._run = config
        self.set_keytoken(keytoken)
        self.version = -1
        # Built here and not in the trainer: unpickling a model config does not import external_lib again.
        with use_resident_engine():
            super().__init__(_forward_only_config(config))
        self.reset()
        self.checkpoint_engine = _checkpoint_engine(config.rollout.checkpoint_engine)

    @register_worker_method(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_keytoken(self, keytoken: KeyTokenConfig) -> None:
        """The same, and the settings of the passes."""
        super().set_keytoken(keytoken)
        self.settings = pass_settings(self._run, keytoken)

    @register_worker_method(
        dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False
    )
    def compute_attribution(self, data: TensorDict) -> TensorDict:
        """See :func:`keytoken.workers.attribution.score_views`."""
        with self.engine.eval_mode():
            return score_views(
                self.engine,
                data,
                self.keytoken.method,
                self.keytoken.attribution,
                self.settings,
                self.version,
                collision=self.keytoken.diagnostics.due(self.version + 1),
            )

    @register_worker_method(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"))
    def read_parity(self, data: TensorDict) -> TensorDict:
        """See :func:`keytoken.workers.parity.read_rows`; ``data`` says which pass."""
        with self.engine.eval_mode():
            return read_rows(
                self.engine,
                data,
                self.keytoken.method,
                self.keytoken.attribution,
                self.settings,
                self.version,
                run=str(data["parity_pass"]),
            )

    @register_worker_method(dispatch_mode=Dispatch.DP_COMPUTE, blocking=False)
    def execute_checkpoint_engine(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """One step of verl's weight-sync protocol: ``prepare``, ``init_process_group`` or ``finalize``."""
        return getattr(self.checkpoint_engine, method)(*args, **kwargs)

    @register_worker_method(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int) -> None:
        """Take over the broadcast weights and remember which step they belong to.

        Raises:
            WeightSyncError: the broadcast held other names than this model has.
        """
        received = await self._receive(global_steps)
        missing = sorted(set(self._parameters_by_name()) - received)
        if missing:
            raise WeightSyncError(
                f"The weight broadcast of step {global_steps} lacked {len(missing)} tensors of the "
                f"attribution model, first {missing[0]!r}: the actor and the attribution group load "
                "different models. Use one actor_rollout_ref.model.path for all groups."
            )
        self.version = global_steps

    async def _receive(self, global_steps: int) -> set[str]:
        own = self._parameters_by_name()
        received = set()
        async for name, tensor in self.checkpoint_engine.receive_weights(global_steps=global_steps):
            if name not in own:
                raise WeightSyncError(
                    f"The weight broadcast of step {global_steps} held {name!r}, which the attribution model "
                    "does not have. Use one actor_rollout_ref.model.path for all groups."
                )
            _copy_full_tensor(own[name], tensor)
            received.add(name)
        return received

    def _parameters_by_name(self) -> dict[str, Tensor]:
        return convert_weight_keys(self.engine.module.state_dict(), self.engine.module)


class _KeyTokenWorker(_SelectingWorker, _ActorWorker):
    """What verl's workers of the actor and the reference gain.

    The head of ``keytoken.kernels.head``, and the passes of ``attribution.placement=actor``, which run in the
    actor's own workers with its weights.
    """

    keytoken: KeyTokenConfig
    actor: Any  # verl's TrainingWorker, or None in a worker that holds the other model only
    ref: Any
    config: DictConfig

    @register_worker_method(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """verl's, with engines whose head can be chosen."""
        with use_answer_head_engine():
            super().init_model()

    @register_worker_method(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_keytoken(self, keytoken: KeyTokenConfig) -> None:
        """The same, and the head of the engines."""
        super().set_keytoken(keytoken)
        for worker in (self.actor, self.ref):
            if worker is not None:
                set_head(worker.engine, HeadSettings.of(keytoken))

    @register_worker_method(dispatch_mode=Dispatch.ONE_TO_ALL)
    def non_finite_weight(self) -> str | None:
        """The first weight of the actor that holds NaN or infinity in this rank's part; None for none."""
        for name, weight in self.actor.engine.module.named_parameters():
            own = weight.to_local() if isinstance(weight, DTensor) else weight
            if not bool(own.isfinite().all()):
                return name
        return None

    @register_worker_method(
        dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"), blocking=False
    )
    def compute_attribution(self, data: TensorDict) -> TensorDict:
        """See :func:`keytoken.workers.attribution.score_views`; the weights are always the current ones."""
        settings = pass_settings(self.config, self.keytoken)
        version = int(data["global_step"]) - 1
        with self.actor.engine.eval_mode():
            return score_views(
                self.actor.engine,
                data,
                self.keytoken.method,
                self.keytoken.attribution,
                settings,
                version,
                collision=self.keytoken.diagnostics.due(version + 1),
            )

    @register_worker_method(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def read_parity(self, data: TensorDict) -> TensorDict:
        """See :func:`keytoken.workers.parity.read_rows`; ``data`` says which pass."""
        settings, version = pass_settings(self.config, self.keytoken), int(data["global_step"]) - 1
        with self.actor.engine.eval_mode():
            return read_rows(
                self.actor.engine,
                data,
                self.keytoken.method,
                self.keytoken.attribution,
                settings,
                version,
                run=str(data["parity_pass"]),
            )


class SyncActorWorker(_KeyTokenWorker, ActorRolloutRefWorker):
    """verl's colocated actor, rollout and reference worker, with head and attribution passes."""


class SeparateActorWorker(_KeyTokenWorker, DetachActorWorker):
    """verl's actor or reference worker of the separate mode, with head and attribution passes."""


def _forward_only_config(config: DictConfig) -> TrainingWorkerConfig:
    """The actor's engine configuration without optimizer state and gradients."""
    actor = omega_conf_to_dataclass(config.actor)
    engine = actor.engine
    engine.forward_only = True
    engine.param_offload = False
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=omega_conf_to_dataclass(config.model),
        engine_config=engine,
        optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint,
    )


def _checkpoint_engine(config: DictConfig) -> Any:
    settings = omega_conf_to_dataclass(config)
    import_external_libs(settings.custom_backend_module or None)
    return CheckpointEngineRegistry.new(
        settings.backend,
        bucket_size=settings.update_weights_bucket_megabytes << 20,
        **settings.engine_kwargs.get(settings.backend, {}),
    )


@torch.no_grad()
def _copy_full_tensor(parameter: Tensor, full: Tensor) -> None:
    """Write a full tensor into a parameter, cutting out the local shard where it is sharded."""
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device, parameter.dtype)
        # src_data_rank=None: every rank holds the full tensor already, so nothing is sent.
        shard = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(full)
