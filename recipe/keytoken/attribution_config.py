"""The typed configuration of the attribution passes, ``keytoken.attribution``."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from keytoken.block import ROOT, Block, check_choices, require


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttributionConfig(Block):
    """Where and how the counterfactual passes run.

    Attributes:
        placement: ``pool``: an own worker group on its own resource pool; ``actor``: in the actor workers.
        num_workers: World size of the attribution group. Used by ``pool`` only.
        micro_batch_size: Responses of one forward pass on one worker.
        every_steps: The views are scored in every so many steps, from the first; in between a token scores
            what its id scored on average (:mod:`keytoken.attribution.reuse`). 1 for every step.
        shuffle_seed: Seed of what views draw: orders of frames, squares to blacken.
        check_base: Score the real view in the attribution group as well, take it as the real side of every
            difference and compare it with the actor's old log-probs. When false the actor's log-probs are
            the real side, which is exact in float32 only.
        base_tolerance: Largest allowed difference of that comparison, in nats.
        on_failure: What follows when processes of the attribution group die and all others live: ``stop``
            ends the run, to be resumed with all groups; ``actor`` moves the passes to the actor workers for
            the rest of the run. Used by ``pool`` only.
        sync_timeout_s: Limit of one weight broadcast; verl itself would wait for ever.
        pass_timeout_s: Limit of one attribution pass over a batch.
    """

    placement: Literal["pool", "actor"] = "pool"
    num_workers: int = 1
    micro_batch_size: int = 8
    every_steps: int = 1
    shuffle_seed: int = 0
    check_base: bool = False
    base_tolerance: float = 1e-4
    on_failure: Literal["stop", "actor"] = "stop"
    sync_timeout_s: float = 300.0
    pass_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        where = f"{ROOT}.attribution"
        check_choices(self, where)
        for name in ("num_workers", "micro_batch_size", "every_steps"):
            count = getattr(self, name)
            require(count >= 1, f"{where}.{name} is {count}; use a count of 1 or more.")
        for name in ("base_tolerance", "sync_timeout_s", "pass_timeout_s"):
            value = getattr(self, name)
            require(0.0 < value < math.inf, f"{where}.{name} is {value}; use a finite number above 0.")

    def scores(self, step: int) -> bool:
        """Whether the passes run in a step, counted from 1."""
        return (step - 1) % self.every_steps == 0
