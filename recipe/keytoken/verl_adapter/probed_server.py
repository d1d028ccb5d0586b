"""verl's vLLM server and replica with workers that tell what the engine saw (:mod:`.engine_probe`).

verl's own server drops what its workers return. Registered under verl's name of the engine, before verl looks
it up: verl tells engines apart by that name in many places (verl 0.9.1, workers/rollout/replica.py). Imported
when verl asks for the class, because it imports vLLM's server; and verl directly, for the same reason.
"""

from typing import Any

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from keytoken.verl_adapter.engine_probe import EXTENSION


class ProbedServer(vLLMHttpServer):
    """verl's server, whose workers can be asked."""

    node_rank: int
    engine: Any

    def _get_worker_extension_cls(self) -> str:
        return EXTENSION

    async def keytoken_watch(self, seeds: list[int]) -> None:
        """See :class:`keytoken.verl_adapter.engine_probe.ProbedWorkerExtension`."""
        if self.node_rank == 0:
            await self.engine.collective_rpc("keytoken_watch", args=(seeds,))

    async def keytoken_seen(self) -> list[dict[str, Any]]:
        """What its first worker has seen; the others of a tensor-parallel group see the same."""
        if self.node_rank != 0:
            return []
        workers: list[list[dict[str, Any]]] = await self.engine.collective_rpc("keytoken_seen")
        return next((seen for seen in workers if seen), [])


class ProbedReplica(vLLMReplica):
    """verl's replica of such servers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(ProbedServer)
