"""Scores in steps without passes: what a token's id scored on average when it was last looked at.

Source: none. The reviews of ToR ask what the passes cost; this pays for them in every k-th step only
(``keytoken.attribution.every_steps``). In between, the difference between the real input and a view is taken
to be the mean difference of the same token id in the last scored batch, and 0 for an id that did not occur
there. So a word that depended on the video keeps counting as one that does; what a score says of this one
answer is lost.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from keytoken.attribution.types import Signals
from keytoken.errors import ConfigurationError

# Log-probs under a view, and the rows that have it.
VIEWS = {"logp_masked": "has_visual", "logp_shuffled": "has_temporal"}


class ScoreMemory:
    """Mean differences by token id, one table for each view, as the last scored batch left them."""

    def __init__(self) -> None:
        self._tables: dict[str, torch.Tensor] = {}

    def complete(self, signals: Signals) -> Signals:
        """Remember the views that were scored, and fill in those that were not but are remembered.

        Args:
            signals: A batch with ``tokens``; the log-probs under a view are None where its pass did not run.

        Returns:
            The same with ``logp - mean difference of the token's id`` in the place of a view that is missing
            and that some row has.

        Raises:
            ConfigurationError: A view is missing and no earlier batch held it.
        """
        found: dict[str, Any] = {}
        for view, has in VIEWS.items():
            rows: torch.Tensor = getattr(signals, has)
            if not bool(rows.any()):
                continue
            scored: torch.Tensor | None = getattr(signals, view)
            if scored is not None:
                self._tables[view] = _means(signals, scored, signals.mask & rows[:, None])
            elif view in self._tables:
                found[view] = signals.logp - self._recall(view, signals)
            else:
                raise ConfigurationError(
                    f"Step {signals.step} runs no passes (keytoken.attribution.every_steps) and no earlier "
                    "step of this run has scored anything it could use: resume from a checkpoint whose step "
                    "is a multiple of every_steps, or set every_steps=1."
                )
        return dataclasses.replace(signals, **found)

    def _recall(self, view: str, signals: Signals) -> torch.Tensor:
        """[B, T] remembered differences, 0 for what was never seen."""
        assert signals.tokens is not None
        table = self._tables[view].to(signals.logp.device)
        known = signals.mask & (signals.tokens < len(table))
        return torch.where(known, table[signals.tokens.masked_fill(~known, 0)], 0.0)


def _means(signals: Signals, logp_view: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[largest id + 1] mean of logp - logp_view by token id, float32; 0 for an id that does not occur."""
    assert signals.tokens is not None
    ids = signals.tokens[valid]
    differences = (signals.logp[valid].float() - logp_view[valid].float()).double()
    size = int(ids.max()) + 1 if len(ids) else 0
    sums = differences.new_zeros(size).index_add_(0, ids, differences)
    counts = torch.bincount(ids, minlength=size)
    return (sums / counts.clamp(min=1)).float()
