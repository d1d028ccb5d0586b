"""A micro-batch as one sequence, each prompt once (:mod:`keytoken.prefix`): what a model is given, and back.

The order of rows and their values is that of the micro-batch; where an answer lies in the pack is known here
only. All ranks of FSDP run their models equally often, so there is one pack for every micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from keytoken.prefix.attention import Plan
from keytoken.prefix.packs import Pack, build_pack, groups_of
from keytoken.workers.rows import Row, model_input


class PackedRows:
    """The rows of a micro-batch in one pack.

    Args:
        rows: At least one; in any order, with answers to any prompts.

    Attributes:
        rows: Those.
        pack: Their pack. Legend: ``N`` answer tokens of all rows, in the pack's order.
        in_order: The rows in that order, those with an empty answer last.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        if not any(row.response_length for row in rows):  # the model has to run all the same, see above
            rows = [_with_an_answer(rows[0])]
        self.pack: Pack = build_pack(groups_of([model_input(row) for row in rows]))
        ended = [row for row in rows if not row.response_length]
        self.in_order = [*(rows[place] for place in self.pack.places), *ended]

    def model_inputs(self, device: torch.device | str) -> dict[str, Any]:
        """Keyword arguments of one forward pass; ``[1, L]`` ids, ``[R, 1, L]`` positions."""
        pack = self.pack
        return {
            "input_ids": pack.input_ids[None].to(device),
            "attention_mask": None,
            "position_ids": pack.position_ids[:, None].to(device),
            "prefix_plan": Plan(pack.trees, device),
            **{name: value.to(device) for name, value in pack.media.items()},
        }

    def by_row(self, values: Tensor) -> list[Tensor]:
        """Values ``[..., N]`` as ``[..., R]`` of each row; with nothing in it for an empty answer."""
        found = self.pack.by_place(values)
        nothing = values[..., :0]
        return [found.get(place, nothing)[..., : row.response_length] for place, row in enumerate(self.rows)]

    def over_sequences(self, values: Tensor) -> Tensor:
        """Values ``[N]`` where verl has them: ``[sum(L)]`` over prompts and answers, row after row.

        A token's value lies at the place that predicts it, 0 lies at all others.
        """
        parts = []
        for row, own in zip(self.rows, self.by_row(values), strict=True):
            start = len(row) - row.response_length - 1
            parts += [own.new_zeros(start), own, own.new_zeros(1)]
        return torch.cat(parts)


def _with_an_answer(row: Row) -> Row:
    """The row with one token for an answer, whose value nobody reads."""
    return replace(
        row,
        input_ids=torch.cat([row.input_ids, row.input_ids[-1:]]),
        position_ids=torch.cat([row.position_ids, row.position_ids[:, -1:] + 1], dim=1),
        response_length=1,
    )
