"""N10: processes that only look for Ascend's transport do not pay for vLLM and a compiler."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable

import pytest

LOOK = (
    "import sys, verl.checkpoint_engine\n"
    "from verl.checkpoint_engine.base import CheckpointEngineRegistry as registry\n"
    "print([name in sys.modules for name in ('vllm', 'torch._inductor.lowering')])\n"
    "print(registry._import_errors)\n"
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is not None, reason="there is an Ascend stack, which stays as it is"
)


def test_verl_alone_imports_vllm_and_the_compiler_to_find_no_device(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    assert python(LOOK).stdout.splitlines()[0] == "[True, True]"


def test_with_the_shim_neither_is_imported_and_the_reason_is_on_record(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    result = python(LOOK, VERL_USE_EXTERNAL_MODULES="keytoken.verl_adapter.register")
    loaded, errors = result.stdout.splitlines()
    assert loaded == "[False, False]", result.stderr
    assert "hccl_checkpoint_engine needs torch_npu" in errors
