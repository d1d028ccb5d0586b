"""Random inputs, never zeros, always the same for the same seed and device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_bench.sizes import GROUP
from keytoken_kernels.selection import Segments, Signal

SPREAD = 3.0  # standard deviation of the logits: entropies of about 7 nats at a vocabulary of 152k
SCOPES = ("sequence", "group", "batch")
RATIO = 0.2
# Rows of hard_logits by kind, in turn.
KINDS = (
    "plain",
    "about -200",
    "about -150",
    "about +300",
    "certain",
    "surprised",
    "uniform",
    "mostly banned",
)


def generator_of(device: torch.device, seed: int) -> torch.Generator:
    """A random state of its own on the device."""
    return torch.Generator(device).manual_seed(seed)


def random_logits(rows: int, vocabulary: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[rows, vocabulary], normal."""
    device = generator.device
    logits = torch.randn(rows, vocabulary, dtype=dtype, device=device, generator=generator)
    return logits.mul_(SPREAD)


def random_labels(rows: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """int64 [rows]."""
    return torch.randint(vocabulary, (rows,), device=generator.device, generator=generator)


def hard_logits(rows: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Float32 logits [rows, vocabulary] of all KINDS, and labels that are not banned."""
    logits = random_logits(rows, vocabulary, torch.float32, generator)
    labels = random_labels(rows, vocabulary, generator)
    for row in range(rows):
        kind = KINDS[row % len(KINDS)]
        if kind.startswith("about"):
            logits[row] += float(kind.split()[1])
        elif kind == "certain":
            logits[row, labels[row]] += 40.0
        elif kind == "surprised":
            logits[row, (labels[row] + row) % vocabulary] += 40.0
        elif kind == "uniform":
            logits[row] = 0.25
        elif kind == "mostly banned":
            banned = torch.rand(vocabulary, device=logits.device, generator=generator) < 0.9
            banned[labels[row]] = False
            logits[row, banned] = -torch.inf
    return logits, labels


def head_weight(
    vocabulary: int, hidden: int, dtype: torch.dtype, generator: torch.Generator, offset: float = 0.0
) -> Tensor:
    """[vocabulary, hidden]; with :func:`hidden_states`, logits are about ``offset`` and spread by SPREAD."""
    weight = torch.randn(vocabulary, hidden, dtype=dtype, device=generator.device, generator=generator)
    weight.mul_(SPREAD / hidden**0.5)
    weight[:, 0] = offset
    return weight


def hidden_states(rows: int, hidden: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[rows, hidden], normal; the first column is 1, so that the weight's first column is an offset."""
    states = torch.randn(rows, hidden, dtype=dtype, device=generator.device, generator=generator)
    states[:, 0] = 1.0
    return states


def sparse_gradient(rows: int, share: float, generator: torch.Generator) -> Tensor:
    """Float32 [rows], normal where selected: exactly ``round(share * rows)`` rows, at least one; else 0."""
    kept = max(round(share * rows), 1)
    chosen = torch.randperm(rows, device=generator.device, generator=generator)[:kept]
    gradient = torch.zeros(rows, device=generator.device)
    drawn = torch.randn(kept, device=generator.device, generator=generator)
    gradient[chosen] = torch.where(drawn == 0, 1.0, drawn)
    return gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionInputs:
    """Arguments of ``select``, and the ids [B] that the segments and groups are made of (on the CPU)."""

    signals: tuple[Signal, ...]
    mask: Tensor
    segment_ids: Tensor
    segments: Segments
    row_keys: Tensor
    rewards: Tensor
    group_ids: Tensor
    groups: Segments

    def permuted(self, order: Tensor) -> SelectionInputs:
        """The same rows in another order (int64 [B] on the CPU)."""
        there = order.to(self.mask.device)
        segment_ids, group_ids = self.segment_ids[order], self.group_ids[order]
        return SelectionInputs(
            signals=tuple(_rows_of(signal, there) for signal in self.signals),
            mask=self.mask[there],
            segment_ids=segment_ids,
            segments=Segments.of(segment_ids).to(self.mask.device),
            row_keys=self.row_keys[order],
            rewards=self.rewards[there],
            group_ids=group_ids,
            groups=Segments.of(group_ids).to(self.mask.device),
        )


def selection_inputs(
    batch: int, width: int, scope: str, generator: torch.Generator, *, hard: bool = False
) -> SelectionInputs:
    """Three signals of answers of random lengths, in groups of GROUP.

    ``hard`` adds ties, infinities, an empty answer, one of a single token, and (except at batch scope, where
    it would leave nothing to compare) a NaN in one answer.
    """
    device = generator.device
    lengths = torch.randint(width // 4, width + 1, (batch,), device=device, generator=generator)
    if hard:
        lengths[0], lengths[1] = 0, 1
    mask = torch.arange(width, device=device) < lengths[:, None]
    base, masked, shuffled, entropy = (
        torch.randn(batch, width, device=device, generator=generator) for _ in range(4)
    )
    late = base
    if hard:
        late, shuffled = (base * 4).round() / 4, (shuffled * 4).round() / 4  # their differences are exact
        entropy[2, : width // 8] = torch.inf
        if scope != "batch":
            masked[3, 0] = torch.nan
    rows = torch.arange(batch)
    ids = {"sequence": rows, "group": rows // GROUP, "batch": rows * 0}
    return SelectionInputs(
        signals=(
            Signal(values=base, baseline=masked, absolute=True, ratio=RATIO),
            Signal(values=late, baseline=shuffled, ratio=RATIO),
            Signal(values=entropy.abs(), ratio=RATIO, weight=0.5),
        ),
        mask=mask,
        segment_ids=ids[scope],
        segments=Segments.of(ids[scope]).to(device),
        row_keys=rows,
        rewards=torch.randint(2, (batch,), device=device, generator=generator).float(),
        group_ids=ids["group"],
        groups=Segments.of(ids["group"]).to(device),
    )


def _rows_of(signal: Signal, order: Tensor) -> Signal:
    return Signal(
        values=signal.values[order],
        baseline=None if signal.baseline is None else signal.baseline[order],
        absolute=signal.absolute,
        applies=None if signal.applies is None else signal.applies[order],
        ratio=signal.ratio,
        weight=signal.weight,
    )
