"""What the stand-alone programs of two ranks share: two processes, one process group, a result of each rank.

A program is called with INPUTS, a torch file, and OUTPUT_FOLDER, where rank r writes ``rank<r>.pt``.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORLD_SIZE = 2

Compute = Callable[[int, dict[str, Any]], Any]


def run_ranks(compute: Compute, limit_s: float) -> int:
    """Run ``compute(rank, inputs)`` in a process for each rank; 0 if all ended well within the limit."""
    inputs = torch.load(sys.argv[1], weights_only=False)
    fork = multiprocessing.get_context("fork")
    arguments = [(compute, rank, inputs, Path(sys.argv[2])) for rank in range(WORLD_SIZE)]
    ranks = [fork.Process(target=_rank_main, args=own) for own in arguments]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(limit_s)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return 0 if codes == [0] * WORLD_SIZE else 1


def _rank_main(compute: Compute, rank: int, inputs: dict[str, Any], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        WORLD_SIZE=str(WORLD_SIZE),
        RANK=str(rank),
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        DIST_INIT_METHOD=f"file://{folder / 'store'}",
    )
    torch.save(compute(rank, inputs), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
