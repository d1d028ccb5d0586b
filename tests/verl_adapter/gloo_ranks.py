"""Stand-alone program: one sender, an idle second actor rank and two receivers, each a process of its own.

Usage: gloo_ranks.py OUTPUT_FOLDER BUCKET_BYTES TIMEOUT_S [dies]. The four engines go through verl's protocol
twice: prepare, build_topology, init_process_group, send or receive, finalize. Every rank writes
``<role>.pt``: what it sent, how many tensors an idle rank walked, what a receiver got, or its error and how
many seconds it took. With ``dies`` there is one sync, and the second receiver leaves after its first tensor.
"""

import asyncio
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from keytoken.verl_adapter.gloo_engine import GlooCheckpointEngine

ROLES = ("sender", "idle", "receiver0", "receiver1")
LIMIT_S = 60.0


def num_syncs(dies: bool) -> int:
    return 1 if dies else 2


def weights(sync: int) -> list[tuple[str, torch.Tensor]]:
    """Odd shapes and several types; the largest is 40 times a bucket of 1000 bytes."""
    generator = torch.Generator().manual_seed(sync)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return [
        ("scalar", draw()),
        ("one", draw(1).bfloat16()),
        ("odd bytes", draw(3).bfloat16()),  # 6 bytes: what follows is not aligned in its bucket
        ("after odd", draw(7, 3)),
        ("steps", torch.randint(-(2**60), 2**60, (5,), generator=generator)),
        ("large", draw(101, 99)),
        ("large half", draw(13, 11, 7).bfloat16()),
        ("special", torch.tensor([torch.nan, torch.inf, -0.0, 1e-45])),
        ("flags", torch.tensor([True, False, True])),
    ]


def walked(sync: int, count: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    for named in weights(sync):
        count.append(1)
        yield named


async def receive(engine: GlooCheckpointEngine, dies: bool) -> dict[str, torch.Tensor]:
    received = {}
    async for name, tensor in engine.receive_weights():
        if dies:
            os._exit(0)
        received[name] = tensor
    return received


def rank_main(index: int, folder: Path, bucket: int, timeout_s: float, dies: bool, pipes: Any) -> None:
    torch.set_num_threads(1)
    role, result = ROLES[index], {}
    engine = GlooCheckpointEngine(bucket, is_master=index == 0, timeout_s=timeout_s)
    start = time.monotonic()
    try:
        for sync in range(num_syncs(dies)):
            pipes[index].send(engine.prepare())
            engine.init_process_group(**pipes[index].recv())
            start = time.monotonic()
            if index < 2:
                count: list[int] = []
                metrics = asyncio.run(engine.send_weights(walked(sync, count)))
                result[sync] = {"count": len(count), "metrics": metrics}
            else:
                result[sync] = asyncio.run(receive(engine, dies and index == 3))
            engine.finalize()
    except RuntimeError as problem:
        result["error"] = f"{type(problem).__name__}: {problem}"
    result["seconds"] = time.monotonic() - start
    torch.save(result, folder / f"{role}.pt")


def heard(end: Any) -> Any:
    """What a rank says; an error when it says nothing."""
    if not end.poll(LIMIT_S):
        raise TimeoutError("a rank did not answer")
    return end.recv()


def main(folder: str, bucket: str, timeout_s: str, *options: str) -> None:
    fork = multiprocessing.get_context("fork")
    ends = [fork.Pipe() for _ in ROLES]
    theirs = [end for _, end in ends]
    ranks = [
        fork.Process(
            target=rank_main, args=(i, Path(folder), int(bucket), float(timeout_s), "dies" in options, theirs)
        )
        for i in range(len(ROLES))
    ]
    for process in ranks:
        process.start()
    for _ in range(num_syncs("dies" in options)):
        metadata = [heard(end) for end, _ in ends]
        actors, receivers = GlooCheckpointEngine.build_topology(2, 2, metadata)
        places = [(actors, 0), (actors, 1), (receivers, 0), (receivers, 1)]
        for (end, _), (arguments, place) in zip(ends, places, strict=True):
            end.send({name: values[place] for name, values in arguments.items()})
    deadline = time.monotonic() + LIMIT_S
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
