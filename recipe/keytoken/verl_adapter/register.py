"""Applies the shims; named in ``VERL_USE_EXTERNAL_MODULES``, so verl imports it in every process.

verl's ``__init__`` imports the modules of that variable and lets their errors through (verl 0.9.1,
__init__.py:49-52). Ray workers inherit the variable from the driver's environment when Ray is started
by it, or from the runtime_env of a submitted job; vLLM's engine processes inherit the environment of
their Ray actor and import verl through verl's worker extension. Only light modules are imported here:
each shim file is loaded when the module it patches is.
"""

import importlib
import os
from types import ModuleType
from typing import NamedTuple

from keytoken.verl_adapter.owner import watch_owner
from keytoken.verl_adapter.shims import ascend_engine, torch_extensions
from keytoken.verl_adapter.shims.hooks import on_cpu, when_imported
from keytoken.verl_adapter.versions import check_versions


class Shim(NamedTuple):
    """One workaround: when ``target`` has been imported, ``shims.<file>.apply(target)`` patches it."""

    number: str
    file: str
    target: str
    cpu_only: bool


SHIMS = (
    Shim("S1", "cpu_platform", "verl.plugin.platform.platform_manager", True),
    Shim("S2", "gloo_backend", "verl.utils.distributed", True),
    Shim("S3", "vllm_distribution", "importlib.metadata", True),
    Shim("S4 S6 N9", "resident_engine", "verl.workers.engine.fsdp.transformer_impl", False),
    Shim("N12", "shared_micro_batches", "verl.workers.engine.fsdp.transformer_impl", False),
    Shim("S5", "vllm_prepack", "vllm._custom_ops", True),
    Shim("N3", "cpu_snapshot", "verl.utils.fsdp_utils", True),
    Shim("B1", "ragged_positions", "verl.utils.tensordict_utils", False),
    Shim("B4", "vision_tokens", "verl.workers.rollout.utils", False),
    Shim("B5 N5", "vision_free_batch", "verl.models.transformers.qwen2_vl", False),
    Shim("N13", "data_plane", "transfer_queue.client", False),
    Shim("N14", "own_data_plane", "transfer_queue.interface", False),
    Shim("N11", "prefix_attention", "verl.models.transformers.qwen2_vl", False),
    Shim("N5", "qwen3_vision", "verl.models.transformers.qwen3_vl", False),
)


def _arrange(shim: Shim) -> None:
    def apply(target: ModuleType) -> None:
        importlib.import_module(f"keytoken.verl_adapter.shims.{shim.file}").apply(target)

    when_imported(shim.target, apply)


# A package that vLLM's server imports (model_hosting_container_standards, logging_config.py) puts the root
# logger to this level, by default ERROR: no warning of the process would be seen any more.
os.environ.setdefault("SAGEMAKER_CONTAINER_LOG_LEVEL", "WARNING")
check_versions()
watch_owner()
torch_extensions.install()
ascend_engine.install()
for _shim in SHIMS:
    if on_cpu() or not _shim.cpu_only:
        _arrange(_shim)
