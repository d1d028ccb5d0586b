"""S4, S6, N9: an FSDP2 engine that keeps its parameters where they compute.

S4 breaks: the FSDP engines are registered for the devices "cuda" and "npu" only.
   Where: verl 0.9.1, workers/engine/fsdp/transformer_impl.py:1143.
S6 breaks: a forward-only FSDP2 engine (reference policy) gets ``CPUOffloadPolicy(pin_memory=True)``;
   pinned memory needs an accelerator. Where: transformer_impl.py:459-463.
N9 breaks nothing but costs: the same lines make an attribution engine on a GPU stream all parameters
   from host memory in every pass.
Bound: verl==0.9.1.
Does: registers a subclass that builds without an offload policy: for "cpu" as the engine, and for "cuda"
under a vendor name of its own, which :func:`use_resident_engine` selects. Under a second vendor name,
for :func:`use_answer_head_engine`, "cuda" gets the engine that differs from verl's in its head alone.
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from verl.workers.engine.base import EngineRegistry

from keytoken.errors import ConfigurationError
from keytoken.verl_adapter.answer_engine import AnswerHeadEngine

_VENDOR_VARIABLE = "VERL_ENGINE_VENDOR"
_ANSWER_HEAD, _RESIDENT = "keytoken", "keytoken_resident"


class ResidentFSDPEngine(AnswerHeadEngine):
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


def use_resident_engine() -> Any:
    """Make verl's engine registry pick :class:`ResidentFSDPEngine` inside the block, on any device."""
    return _vendor(_RESIDENT)


def use_answer_head_engine() -> Any:
    """Make it pick :class:`AnswerHeadEngine` inside the block; on a CPU its subclass, as always there."""
    return _vendor(_ANSWER_HEAD)


@contextmanager
def _vendor(name: str) -> Iterator[None]:
    before = os.environ.get(_VENDOR_VARIABLE)
    os.environ[_VENDOR_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VENDOR_VARIABLE]
        else:
            os.environ[_VENDOR_VARIABLE] = before


def apply(_: Any) -> None:
    """Register the engines."""
    register = EngineRegistry.register
    register(model_type="language_model", backend="fsdp2", device="cpu")(ResidentFSDPEngine)
    for vendor, engine in ((_RESIDENT, ResidentFSDPEngine), (_ANSWER_HEAD, AnswerHeadEngine)):
        register(model_type="language_model", backend="fsdp2", device="cuda", vendor=vendor)(engine)
