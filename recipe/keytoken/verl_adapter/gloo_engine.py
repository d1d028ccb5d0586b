"""Weight transport over gloo: what carries the actor's weights where there is no NCCL.

verl's "separate" trainers refuse the in-process transport and ship none that runs without a GPU. This
one has the interface of its NCCL engine: actor rank 0 broadcasts buckets of bytes to every receiver
(vLLM workers and attribution workers alike), the other actor ranks only walk the generator, because
producing a full tensor is itself a collective of theirs. The group is rebuilt for every sync, so a
receiver that died is a time-out with a name and not a hang.
"""

import dataclasses
import json
import socket
from collections.abc import AsyncGenerator, Iterable
from datetime import timedelta
from typing import Any

import ray
import torch
from torch import Tensor

from keytoken.verl_adapter.compat import (
    CheckpointEngine,
    CheckpointEngineRegistry,
    TensorMeta,
    merge_weight_chunks,
    split_weight_chunks,
)

BACKEND = "keytoken_gloo"


@dataclasses.dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of one sync meet."""

    host: str
    port: int


@CheckpointEngineRegistry.register(BACKEND)
class GlooCheckpointEngine(CheckpointEngine):
    """Broadcast of named tensors from actor rank 0 in buckets of at most ``bucket_size`` bytes.

    Args:
        bucket_size: bytes sent at a time; a larger tensor is cut.
        is_master: true in actor rank 0 alone.
        timeout_s: bound on the rendezvous and on every broadcast.
    """

    def __init__(self, bucket_size: int, is_master: bool = False, timeout_s: float = 120.0) -> None:
        self.bucket_size = bucket_size
        self.is_master = is_master
        self.timeout = timedelta(seconds=timeout_s)
        self.rank: int | None = None
        self._store: Any = None
        self._group: Any = None

    def prepare(self) -> Rendezvous | None:
        """Open the store in the master and say where it listens."""
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        # Port 0: the system picks a free one, so two runs on one host cannot collide. A socket of ours,
        # because the store's own would listen on all interfaces.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, 0), family=family)
        port = listening.getsockname()[1]
        self._store = torch.distributed.TCPStore(
            *(host, port),
            is_master=True,
            wait_for_workers=False,
            timeout=self.timeout,
            master_listen_fd=listening.detach(),
        )
        return Rendezvous(host, self._store.port)

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Rendezvous | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Rank 0 is the first actor, ranks 1.. are the receivers, the other actors get rank -1."""
        world_size = 1 + rollout_world_size

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            return {
                "rank": ranks,
                "world_size": [world_size] * len(ranks),
                "rendezvous": [metadata[0]] * len(ranks),
            }

        senders = [0] + [-1] * (actor_wg_world_size - 1)
        return arguments(senders), arguments(list(range(1, world_size)))

    def init_process_group(self, rank: int, world_size: int, rendezvous: Rendezvous) -> None:
        """Join the group of this sync; actors of rank -1 stay out."""
        self.rank = rank
        if rank < 0:
            return
        if self._store is None:
            self._store = torch.distributed.TCPStore(
                rendezvous.host, rendezvous.port, is_master=False, timeout=self.timeout
            )
        self._group = torch.distributed.ProcessGroupGloo(self._store, rank, world_size, self.timeout)

    def finalize(self) -> None:
        """Leave the group and close the store."""
        self._group = None
        self._store = None
        self.rank = None

    @torch.no_grad()
    async def send_weights(
        self, weights: Iterable[tuple[str, Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """Broadcast all weights; returns the bytes sent, as a metric."""
        if self.rank is None or self.rank < 0:
            for _ in weights:
                pass
            return {}
        bucket: list[tuple[TensorMeta, Tensor]] = []
        filled = sent = 0
        async for meta, chunk in split_weight_chunks(weights, self.bucket_size):
            if bucket and filled + meta.chunk_size > self.bucket_size:
                self._send_bucket(bucket)
                bucket, filled = [], 0
            # On the CPU a chunk aliases the live parameter: it must leave before the generator moves on
            # only if the next bucket could see it changed, which no_grad and the blocked trainer rule out.
            bucket.append((meta, chunk))
            filled += meta.chunk_size
            sent += meta.chunk_size
        if bucket:
            self._send_bucket(bucket)
        self._send_bucket([])
        return {"weight_sync/bytes": float(sent)}

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncGenerator[tuple[str, Tensor], None]:
        """Yield the named tensors of the broadcast, each in fresh memory."""
        async for named in merge_weight_chunks(self._received_chunks(), self.bucket_size):
            yield named

    async def _received_chunks(self) -> AsyncGenerator[tuple[TensorMeta, Tensor], None]:
        while True:
            metas = self._receive_header()
            if not metas:
                return
            payload = torch.empty(sum(meta.chunk_size for meta in metas), dtype=torch.uint8)
            self._broadcast(payload)
            offset = 0
            for meta in metas:
                # A copy: views of other dtypes need an aligned start, and the bucket is dropped whole.
                yield meta, payload[offset : offset + meta.chunk_size].clone()
                offset += meta.chunk_size

    def _send_bucket(self, bucket: list[tuple[TensorMeta, Tensor]]) -> None:
        header = torch.frombuffer(bytearray(_to_json([meta for meta, _ in bucket])), dtype=torch.uint8)
        self._broadcast(torch.tensor([header.numel()]))
        self._broadcast(header)
        if bucket:
            self._broadcast(torch.cat([chunk.cpu() for _, chunk in bucket]))

    def _receive_header(self) -> list[TensorMeta]:
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        header = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(header)
        return _from_json(header.numpy().tobytes())

    def _broadcast(self, tensor: Tensor) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        self._group.broadcast([tensor], options).wait(self.timeout)


def _to_json(metas: list[TensorMeta]) -> bytes:
    """Not a pickle: whoever got into the group could run a program by one."""
    plain = [{**dataclasses.asdict(meta), "dtype": str(meta.dtype).removeprefix("torch.")} for meta in metas]
    return json.dumps(plain).encode()


def _from_json(header: bytes) -> list[TensorMeta]:
    return [
        TensorMeta(**{**meta, "shape": torch.Size(meta["shape"]), "dtype": getattr(torch, meta["dtype"])})
        for meta in json.loads(header)
    ]
