"""The one module that imports names of verl which are not public.

Everything else in KeyToken says ``from keytoken.verl_adapter.compat import ...``, so that a verl
release that moves a name breaks exactly here. Importing it checks the versions of the whole stack and
applies the shims first (:mod:`keytoken.verl_adapter.register`). Cost: about ten seconds, since verl's
trainers import vLLM, transformers and Ray; the command line must not import it before it has to.
"""

from keytoken.verl_adapter import register as _register  # noqa: F401  (first: applies the shims)

# isort: split
from verl.checkpoint_engine.base import (
    CheckpointEngine,
    CheckpointEngineManager,
    CheckpointEngineRegistry,
    CheckpointEngineWorker,
    TensorMeta,
    merge_weight_chunks,
    split_weight_chunks,
)
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopBase,
    AgentLoopManager,
    AgentLoopMetrics,
    AgentLoopOutput,
    AgentLoopWorker,
)
from verl.experimental.agent_loop.agent_loop import register as register_agent_loop
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, Execute, make_nd_compute_dataproto_dispatch_fn
from verl.single_controller.base.decorator import register as register_worker_method
from verl.single_controller.ray.base import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    ResourcePoolManager,
)
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, agg_loss, register_adv_est
from verl.trainer.ppo.utils import Role, need_critic, need_reference_policy
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ as _AgentLoopWorkerActor
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, get_trainer_cls, register_trainer
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils
from verl.utils.checkpoint.checkpoint_manager import get_checkpoint_tracker_filename
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.dataset.rl_dataset import collate_fn as collate_rows
from verl.utils.device import get_device_id, get_device_name, get_torch_device
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.import_utils import import_external_libs
from verl.utils.metric import AggregationType, Metric
from verl.utils.model import convert_weight_keys, extract_multi_modal_inputs
from verl.utils.profiler import simple_timer
from verl.utils.seqlen_balancing import log_seqlen_unbalance
from verl.utils.tokenizer import hf_processor, hf_tokenizer
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
from verl.workers.config import FSDPEngineConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.engine.base import BaseEngine, EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry
from verl.workers.rollout.utils import get_vision_placeholder_token_ids
from verl.workers.rollout.utils import qwen2_5_vl_dedup_image_tokens as one_placeholder_for_each_picture
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import (
    build_attention_mask_from_nested,
    left_right_2_no_padding,
    no_padding_2_padding,
    response_to_nested,
)

from keytoken.verl_adapter.answer_engine import HeadSettings, set_head
from keytoken.verl_adapter.media import release_media, set_media_cache
from keytoken.verl_adapter.shims.jagged import jagged
from keytoken.verl_adapter.shims.quiet_logger import quiet_separate_async_logger
from keytoken.verl_adapter.shims.resident_engine import use_answer_head_engine, use_resident_engine

# The class under the Ray actor class: Ray refuses to subclass the actor class itself.
AgentLoopWorkerTQ: type = _AgentLoopWorkerActor.__ray_metadata__.modified_class

__all__ = [
    "ADV_ESTIMATOR_REGISTRY",
    "ActorRolloutRefWorker",
    "AgentLoopBase",
    "AgentLoopManager",
    "AgentLoopManagerTQ",
    "AgentLoopMetrics",
    "AgentLoopOutput",
    "AgentLoopWorker",
    "AgentLoopWorkerTQ",
    "AggregationType",
    "BaseEngine",
    "CheckpointCallback",
    "CheckpointEngine",
    "CheckpointEngineManager",
    "CheckpointEngineRegistry",
    "CheckpointEngineWorker",
    "DetachActorWorker",
    "Dispatch",
    "EngineRegistry",
    "Execute",
    "FSDPEngineConfig",
    "FSDPEngineWithLMHead",
    "HFModelConfig",
    "HeadSettings",
    "Metric",
    "NaiveRewardManager",
    "PPOTrainer",
    "PPOTrainerSeparateAsync",
    "PPOTrainerSync",
    "RLHFDataset",
    "RayClassWithInitArgs",
    "RayResourcePool",
    "RayWorkerGroup",
    "ReplayBuffer",
    "ResourcePoolManager",
    "Role",
    "RolloutReplica",
    "RolloutReplicaRegistry",
    "SingleTurnAgentLoop",
    "TaskRunnerV1",
    "TensorMeta",
    "TrainingWorker",
    "TrainingWorkerConfig",
    "agg_loss",
    "build_attention_mask_from_nested",
    "collate_rows",
    "convert_weight_keys",
    "create_continuous_token_builder",
    "extract_multi_modal_inputs",
    "get_checkpoint_tracker_filename",
    "get_device_id",
    "get_device_name",
    "get_torch_device",
    "get_trainer_cls",
    "get_vision_placeholder_token_ids",
    "hf_processor",
    "hf_tokenizer",
    "import_external_libs",
    "initialize_global_process_group_ray",
    "jagged",
    "left_right_2_no_padding",
    "log_seqlen_unbalance",
    "make_nd_compute_dataproto_dispatch_fn",
    "merge_weight_chunks",
    "need_critic",
    "need_reference_policy",
    "no_padding_2_padding",
    "omega_conf_to_dataclass",
    "one_placeholder_for_each_picture",
    "ppo_loss",
    "quiet_separate_async_logger",
    "register_adv_est",
    "register_agent_loop",
    "register_trainer",
    "register_worker_method",
    "release_media",
    "response_to_nested",
    "run_ppo",
    "set_head",
    "set_media_cache",
    "simple_timer",
    "split_weight_chunks",
    "tensordict_utils",
    "use_answer_head_engine",
    "use_resident_engine",
    "validate_config",
]
