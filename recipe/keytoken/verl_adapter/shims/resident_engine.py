"""S4, S6, N9: an FSDP2 engine that keeps its parameters where they compute.

S4 breaks: the FSDP engines are registered for the devices "cuda" and "npu" only.
   Where: verl 0.9.1, workers/engine/fsdp/transformer_impl.py:1143.
S6 breaks: a forward-only FSDP2 engine (reference policy) gets ``CPUOffloadPolicy(pin_memory=True)``;
   pinned memory needs an accelerator. Where: transformer_impl.py:459-463.
N9 breaks nothing but costs: the same lines make an attribution engine on a GPU stream all parameters
   from host memory in every pass.
Bound: verl==0.9.1.
Does: registers a subclass that builds without an offload policy: for "cpu" as the engine, and for every
other device under the vendor name "keytoken", which :func:`use_resident_engine` selects.
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from keytoken.errors import ConfigurationError

_VENDOR_VARIABLE = "VERL_ENGINE_VENDOR"
_VENDOR = "keytoken"


class ResidentFSDPEngine(FSDPEngineWithLMHead):
    """verl's FSDP2 language-model engine without parameter offload."""

    engine_config: Any

    def _build_fsdp_module(self, module: Any) -> Any:
        config = self.engine_config
        if config.strategy != "fsdp2":
            raise ConfigurationError(
                f"engine strategy {config.strategy!r}: this engine wraps with FSDP2 only; "
                "set the actor's and the reference's strategy to fsdp2"
            )
        self.engine_config = dataclasses.replace(config, forward_only=False, offload_policy=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = config


@contextmanager
def use_resident_engine() -> Iterator[None]:
    """Make verl's engine registry pick :class:`ResidentFSDPEngine` inside the block, on any device."""
    before = os.environ.get(_VENDOR_VARIABLE)
    os.environ[_VENDOR_VARIABLE] = _VENDOR
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VENDOR_VARIABLE]
        else:
            os.environ[_VENDOR_VARIABLE] = before


def apply(_: Any) -> None:
    """Register the engine."""
    register = EngineRegistry.register
    register(model_type="language_model", backend="fsdp2", device="cpu")(ResidentFSDPEngine)
    register(model_type="language_model", backend="fsdp2", device="cuda", vendor=_VENDOR)(ResidentFSDPEngine)
