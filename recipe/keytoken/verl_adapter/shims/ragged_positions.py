"""B1: the ragged axis of M-RoPE positions in a batch of equal lengths.

Breaks: a jagged tensor of position rows [4, L] is ragged along L, unless all L are equal: then torch
takes the first axis (all 4 long) as the ragged one. verl declares axis 2 ragged in either case, and the
next access to such a batch raises.
Where: verl 0.9.1, utils/tensordict_utils.py:910-915.
Bound: verl==0.9.1.
Does: rebuilds such a tensor with axis 2 ragged; leaves every other to verl.
"""

import functools
from typing import Any

from tensordict import TensorDict


def apply(utils: Any) -> None:
    """Repair ``maybe_fix_3d_position_ids``."""
    original = utils.maybe_fix_3d_position_ids

    @functools.wraps(original)
    def fix(data: TensorDict) -> None:
        positions = data.get("position_ids", None)
        if positions is None or not positions.is_nested or positions.dim() != 3:
            return
        values, offsets = positions.values(), positions.offsets()
        ragged_along_sequence = values.shape[1] == int(offsets[-1])
        if ragged_along_sequence:
            original(data)
        else:
            rows = list(values.split(offsets.diff().tolist()))
            data["position_ids"] = utils.nested_tensor_from_tensor_list(rows, ragged_idx=2)

    utils.maybe_fix_3d_position_ids = fix
