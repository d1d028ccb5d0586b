"""N3: a snapshot of the policy that is no copy.

Breaks: the snapshot of the old policy is taken with ``.detach().cpu()``, which on CPU returns the live
storage: restoring it does nothing, and with ``parameter_sync_step > 1`` old log-probs are those of the
new policy. Silent.
Where: verl 0.9.1, utils/fsdp_utils.py:1146-1182 (lines 1165 and 1180).
Bound: verl==0.9.1.
Does: copies what shares storage with a parameter.
"""

import functools
from typing import Any

import torch


def apply(fsdp_utils: Any) -> None:
    """Make ``fsdp2_sharded_save_to_cpu`` return tensors of its own."""
    original = fsdp_utils.fsdp2_sharded_save_to_cpu

    @functools.wraps(original)
    def save(model: torch.nn.Module) -> tuple[dict[str, tuple[torch.Tensor, Any]], Any]:
        shards, spec = original(model)
        return {name: (tensor.clone(), shard_spec) for name, (tensor, shard_spec) in shards.items()}, spec

    fsdp_utils.fsdp2_sharded_save_to_cpu = save
