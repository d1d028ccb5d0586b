"""N4: jagged tensors that do not know their longest row.

Breaks: ``torch.nested.nested_tensor_from_jagged(values, offsets)`` leaves ``max_seqlen`` unset, and
padding such a tensor gives as many columns as there are values in all rows together.
Where: torch 2.11 to 2.13, torch/nested/__init__.py (``nested_tensor_from_jagged``).
Does: one constructor that sets it; use it instead of torch's.
"""

import torch


def jagged(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """A jagged tensor that pads to its longest row.

    Args:
        values: [N, ...], the rows one after the other.
        offsets: [B + 1], where each row starts, and N.
    """
    lengths = offsets.diff()
    return torch.nested.nested_tensor_from_jagged(values, offsets, max_seqlen=int(lengths.max()))
