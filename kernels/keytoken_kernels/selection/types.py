"""What goes into a selection and what comes out of it.

Legend: ``n`` signals (1 to 3), ``B`` rows (responses), ``T`` tokens of a row, ``S`` segments: sets of rows
that share one threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["quantile", "count"]

MAX_SIGNALS = 3
# Columns of Selection.counts and of Selection.totals.
COUNTS = ("valid", "selected", "non_finite", "notable")
TOTALS = ("tokens", "selected", "responses", "unselected_responses")


@dataclass(frozen=True, kw_only=True, slots=True)
class Signal:
    """One score of every token, and how much of it to select.

    Attributes:
        values: [B, T] float.
        baseline: [B, T] float of any type; the score is ``values - baseline``. None: ``values`` alone.
        absolute: Whether the score is the magnitude of that.
        applies: [B] bool, rows in which the signal exists; None for all. Other rows are never read.
        ratio: Share of the valid tokens of a segment to select, in [0, 1]. 0 selects nothing.
        weight: Weight of a token that this signal is the first to select; above 0.
    """

    values: Tensor
    baseline: Tensor | None = None
    absolute: bool = False
    applies: Tensor | None = None
    ratio: float
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """Rows that belong together: they share one threshold, or one baseline of rewards.

    Made on the CPU of ids that live there, so that a launch can be planned without asking the GPU anything.

    Attributes:
        rows: int32 [B], the rows sorted by segment, in ascending order within each.
        starts: int32 [S + 1], where each segment starts in ``rows``.
        number: int32 [B], the segment of each row.
        widest: Rows of the largest segment.

    Example:
        The ids ``[7, 3, 7]`` give two segments, numbered in the order of their ids: ``rows = [1, 0, 2]``,
        ``starts = [0, 1, 3]``, ``number = [1, 0, 1]`` and ``widest = 2``.
    """

    rows: Tensor
    starts: Tensor
    number: Tensor
    widest: int

    @classmethod
    def of(cls, ids: Tensor) -> Segments:
        """Group rows by id.

        Args:
            ids: [B] integer, on the CPU; rows with equal ids form a segment.

        Raises:
            ValueError: ids on another device, of another shape, or not integers.
        """
        if ids.device.type != "cpu" or ids.ndim != 1 or ids.dtype.is_floating_point:
            raise ValueError(
                "the ids of segments must be integers [B] on the CPU, where launches are planned; got "
                f"{ids.dtype} {list(ids.shape)} on {ids.device}"
            )
        number, sizes = torch.unique(ids, return_inverse=True, return_counts=True)[1:]
        return cls(
            rows=number.argsort(stable=True).int(),
            starts=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int(),
            number=number.int(),
            widest=int(sizes.max()) if len(sizes) else 0,
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def to(self, device: torch.device) -> Segments:
        """The same segments on another device."""
        return Segments(
            rows=self.rows.to(device, non_blocking=True),
            starts=self.starts.to(device, non_blocking=True),
            number=self.number.to(device, non_blocking=True),
            widest=self.widest,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What was selected, and why.

    Attributes:
        scores: [n, B, T] float, 0 where a signal does not exist.
        valid: [n, B, T] bool, tokens for which each signal exists.
        selected: [n, B, T] bool, the selection of each signal by itself.
        weights: [B, T] float32: the weight of the first signal that selected a token, else 0.
        response_advantages: [B] group-normalised advantage; None without rewards.
        advantages: [B, T] ``weights`` times the advantage of the row; None without rewards.
        thresholds: [S, n] the score that a selected token reaches, before any floor; NaN where nothing was
            selected: a ratio of 0, no valid token, or a NaN among the scores.
        counts: int32 [S, n, 4], columns :data:`COUNTS`: tokens for which the signal exists, that it selected,
            whose score is NaN or infinite, and whose magnitude is above ``notable``.
        totals: int32 [S, 4], columns :data:`TOTALS`: tokens, tokens that any signal selected, rows with
            tokens, and how many of these have none selected.
    """

    scores: Tensor
    valid: Tensor
    selected: Tensor
    weights: Tensor
    response_advantages: Tensor | None
    advantages: Tensor | None
    thresholds: Tensor
    counts: Tensor
    totals: Tensor

    def count(self, name: str) -> Tensor:
        """[S, n] one column of ``counts``."""
        return self.counts[..., COUNTS.index(name)]

    def total(self, name: str) -> Tensor:
        """[S] one column of ``totals``."""
        return self.totals[..., TOTALS.index(name)]
