"""How many machines a run asks for: its pools, laid onto nodes of equal size."""

import dataclasses

from omegaconf import DictConfig

from keytoken.block import require
from keytoken.resources import needs_attribution


@dataclasses.dataclass(frozen=True)
class Shape:
    """A cluster.

    Attributes:
        nodes: How many.
        slots: GPUs of each of them; logical slots of Ray's for a run on CPUs.
        gpus: Whether the slots are GPUs.
    """

    nodes: int
    slots: int
    gpus: bool


def shape_of(config: DictConfig, gpus_per_node: int) -> Shape:
    """The fewest nodes onto which the pools of a run can be laid, a pool's share of a node never split.

    Args:
        config: The run's composed configuration.
        gpus_per_node: GPUs that a node has; a run that fits into fewer takes no more than it needs.

    Raises:
        ConfigurationError: a pool asks for more GPUs of one node than a node has.
    """
    pieces = sorted(_pieces(config), reverse=True)
    require(
        max(pieces) <= gpus_per_node,
        f"--gpus-per-node {gpus_per_node}: a pool of this run wants {max(pieces)} GPUs on one node; make it "
        "smaller (trainer.n_gpus_per_node, actor_rollout_ref.rollout.n_gpus_per_node), or name larger nodes.",
    )
    free: list[int] = []
    for piece in pieces:  # the largest first, each onto the first node that has room
        place = next((number for number, room in enumerate(free) if room >= piece), None)
        if place is None:
            free.append(gpus_per_node)
            place = len(free) - 1
        free[place] -= piece
    slots = sum(pieces) if len(free) == 1 else gpus_per_node
    return Shape(len(free), slots, config.trainer.device != "cpu")


def _pieces(config: DictConfig) -> list[int]:
    """GPUs that have to lie on one node together, pool by pool."""
    rollout = config.actor_rollout_ref.rollout
    pieces = [config.trainer.n_gpus_per_node] * config.trainer.nnodes
    if not config.actor_rollout_ref.hybrid_engine:
        pieces += [rollout.n_gpus_per_node] * rollout.nnodes
    if config.keytoken.attribution.placement == "pool" and needs_attribution(config):
        pieces += [1] * config.keytoken.attribution.num_workers  # wherever there is room
    return [int(piece) for piece in pieces]
