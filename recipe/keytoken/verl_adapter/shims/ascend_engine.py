"""N10: every process imports vLLM and torch's compiler to find out that there is no Ascend device.

Costs: ``verl.checkpoint_engine`` tries all its transports. The one for Ascend begins with an import from
``vllm.distributed``, which loads torch's inductor: about two seconds of processor time in each of the ten
processes of a run that do not need vLLM, and then it does not work without ``torch_npu``.
Where: verl 0.9.1, checkpoint_engine/__init__.py:47-53 and hccl_checkpoint_engine.py:23.
Bound: installations without ``torch_npu``.
Does: answers the attempt with the ImportError that verl is ready for, before anything is imported.
"""

import importlib.util

from keytoken.verl_adapter.shims.hooks import before_import

ENGINE = "verl.checkpoint_engine.hccl_checkpoint_engine"


def install() -> None:
    """Arrange it; to be called before verl's transports are imported."""
    before_import(ENGINE, _require_ascend)


def _require_ascend() -> None:
    if importlib.util.find_spec("torch_npu") is None:
        raise ImportError(f"{ENGINE} needs torch_npu, which is not installed")
