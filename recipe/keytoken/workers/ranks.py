"""What the ranks of a group agree on before their forward passes."""

from typing import Any

import torch


def largest_over_ranks(count: int, group: Any, device: torch.device | str) -> int:
    """The largest count of any rank. FSDP gathers parameters in each pass, so all ranks run equally many.

    Args:
        count: This rank's.
        group: Process group; None for a rank by itself.
        device: On which the group's backend exchanges tensors.
    """
    if group is None or torch.distributed.get_world_size(group) == 1:
        return count
    largest = torch.tensor(count, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(largest)
