"""The typed configuration of the parity gate, ``keytoken.parity``."""

from __future__ import annotations

import dataclasses
import math

from keytoken.block import ROOT, Block, require


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParityConfig(Block):
    """What engine, actor and attribution group have to agree on before a run may train.

    Attributes:
        prompts: So many prompts of the training data are asked; 0 switches the gate off, and with it the
            bound on drift.
        every_steps: The same prompts are asked again behind the weight sync of every so many steps; null for
            before the first step only.
        answer_tokens: Length of the answers that are compared, at most ``data.max_response_length``.
        log_prob_tolerance: Largest allowed mean difference of an answer's log-probs between engine and actor,
            in nats; a single token may differ by :data:`keytoken.parity.SPREAD` times as much. Null for the
            bound of the run's precision (:func:`keytoken.parity.bounds_for`).
    """

    prompts: int = 2
    every_steps: int | None = 50
    answer_tokens: int = 32
    log_prob_tolerance: float | None = None

    def __post_init__(self) -> None:
        where = f"{ROOT}.parity"
        require(
            self.prompts >= 0, f"{where}.prompts is {self.prompts}; use a count such as 2, or 0 for none."
        )
        require(
            self.every_steps is None or self.every_steps >= 1,
            f"{where}.every_steps is {self.every_steps}; use 1 or more, or null for none.",
        )
        require(
            self.answer_tokens >= 1,
            f"{where}.answer_tokens is {self.answer_tokens}; use 1 or more, such as 32.",
        )
        require(
            self.log_prob_tolerance is None or 0.0 < self.log_prob_tolerance < math.inf,
            f"{where}.log_prob_tolerance is {self.log_prob_tolerance}; use nats above 0, or null for the "
            "bound of the precision.",
        )

    def due(self, step: int) -> bool:
        """Whether the prompts are asked again behind a step."""
        return self.prompts > 0 and self.every_steps is not None and step % self.every_steps == 0
