"""Stand-alone program: an attribution worker of two ranks, each in a process of its own.

Usage: two_ranks.py INPUTS OUTPUT_FOLDER. INPUTS is a torch file with the configuration (``config``), for each
rank its batch (``batches``) and what to score it with (``micro_batch_size``), and new weights (``weights``).
Rank r writes ``rank<r>.pt``: pass outputs before and after the weights arrived, the shape of every local
shard and its full tensor, and the messages of two broadcasts that do not fit.
"""

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator
from typing import Any

import torch
from omegaconf import OmegaConf
from rank_processes import run_ranks

from keytoken.errors import WeightSyncError
from keytoken.schema import KeyTokenConfig
from keytoken.workers.actors import AttributionWorker

LIMIT_S = 200.0


class Feed:
    """Stands where a checkpoint engine does: yields the same full tensors on every rank."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    async def receive_weights(self, global_steps: int) -> AsyncIterator[tuple[str, torch.Tensor]]:
        for name, weight in self.weights.items():
            yield name, weight


def refused(worker: Any, weights: dict[str, torch.Tensor]) -> str:
    worker.checkpoint_engine = Feed(weights)
    try:
        asyncio.run(worker.update_weights(global_steps=9))
    except WeightSyncError as problem:
        return str(problem)
    return ""


def scored(worker: Any, batch: Any) -> dict[str, list[Any]]:
    return {
        name: [row.tolist() for row in value.unbind()]
        for name, value in worker.compute_attribution(batch).items()
    }


def score(rank: int, inputs: dict[str, Any]) -> dict[str, Any]:
    config = inputs["config"]
    keytoken = KeyTokenConfig.from_mapping(OmegaConf.to_container(config.keytoken))
    worker = AttributionWorker(config.actor_rollout_ref, keytoken)
    worker.settings = dataclasses.replace(worker.settings, micro_batch_size=inputs["micro_batch_size"])
    batch, weights = inputs["batches"][rank], inputs["weights"]
    result: dict[str, Any] = {"before": scored(worker, batch)}
    worker.checkpoint_engine = Feed(weights)
    asyncio.run(worker.update_weights(global_steps=3))
    own = worker._parameters_by_name()
    result["local"] = {name: tuple(value.to_local().shape) for name, value in own.items()}
    result["full"] = {name: value.full_tensor() for name, value in own.items()}
    result["after"] = scored(worker, batch)
    first = sorted(weights)[0]
    result["missing"] = refused(worker, {name: value for name, value in weights.items() if name != first})
    result["unknown"] = refused(worker, {**weights, "no.such.weight": weights[first]})
    result["version"] = worker.version
    return result


if __name__ == "__main__":
    sys.exit(run_ranks(score, LIMIT_S))
