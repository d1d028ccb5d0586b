"""What goes into a method and what comes out of it.

Axes: B responses of the batch, T response positions, padded on the right. Log-probs and entropies are in
nats. All tensors of one object lie on one device, except the prompts of :class:`Signals`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """What the answers earned, for a method that hands their advantages back with the weights.

    Attributes:
        rewards: [B] float, the sum of an answer's token-level rewards.
        divide_by_std: Whether an advantage is divided by the standard deviation of its group.
    """

    rewards: torch.Tensor
    divide_by_std: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Signals:
    """Everything a method may look at, for one batch of responses.

    Attributes:
        logp: [B, T] log-prob of each answer token under the real input.
        logp_masked: [B, T] the same without the vision tokens; None if that pass did not run.
        logp_shuffled: [B, T] the same with the frames in another order; None if that pass did not run.
        entropy: [B, T] entropy of the policy's next-token distribution under the real input.
        mask: [B, T] bool, true on answer tokens.
        group: [B] integer, equal for answers to the same prompt; always on the CPU, where work is planned.
        has_visual: [B] bool, false for text-only prompts.
        has_temporal: [B] bool, true for videos of at least two frames.
        outcomes: What the answers earned; None where somebody else computes the advantages.
        truncated_entropy: [B, T] entropy of the smallest set of next tokens that holds a given mass
            (``selection.entropy_top_p``); None if it was not measured.
        disagreement: [B, T] how far the answers to one prompt disagree at each position (TW-GRPO), the same
            for all of them; None if it was not measured.
        collision: [B, T] sum of the squared probabilities of the policy's next-token distribution under the
            real input; None but in steps with diagnostics.
        tokens: [B, T] int64 ids of the answer tokens; None where nobody looks at them.
        row_keys: [B] integer on the CPU, all different: what ties and draws know an answer by, wherever it
            stands in the batch. None for the number of the row.
        seed: Of ties and draws; another one every step.
        step: Training step, from 1.

    Rows of a view that do not apply (``has_visual`` or ``has_temporal`` false) are never read.

    Example:
        Two answers to one video prompt, of 3 and 2 tokens::

            Signals(
                logp=tensor([[-0.1, -1.2, -0.3], [-0.2, -0.9, 0.0]]),
                logp_masked=tensor([[-0.1, -3.0, -0.3], [-0.2, -0.8, 0.0]]),
                logp_shuffled=tensor([[-0.1, -1.3, -0.3], [-0.2, -2.0, 0.0]]),
                entropy=tensor([[0.3, 1.1, 0.2], [0.5, 1.0, 0.0]]),
                mask=tensor([[True, True, True], [True, True, False]]),
                group=tensor([7, 7]),
                has_visual=tensor([True, True]),
                has_temporal=tensor([True, True]),
            )

        The second token of the first answer has a visual score of -1.2 + 3.0 = 1.8 nats: the video made it
        exp(1.8) = 6 times as likely.
    """

    logp: torch.Tensor
    logp_masked: torch.Tensor | None
    logp_shuffled: torch.Tensor | None
    entropy: torch.Tensor
    mask: torch.Tensor
    group: torch.Tensor
    has_visual: torch.Tensor
    has_temporal: torch.Tensor
    outcomes: Outcomes | None = None
    truncated_entropy: torch.Tensor | None = None
    disagreement: torch.Tensor | None = None
    collision: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    row_keys: torch.Tensor | None = None
    seed: int = 0
    step: int = 1

    def to(self, device: torch.device) -> Signals:
        """The same signals on another device; ``group`` and ``row_keys`` stay on the CPU."""
        moved = _moved(self, device) | {"group": self.group, "row_keys": self.row_keys}
        if self.outcomes is not None:
            moved["outcomes"] = dataclasses.replace(self.outcomes, **_moved(self.outcomes, device))
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenWeights:
    """A method's answer: how much each token counts in the policy loss, and why.

    Attributes:
        weights: [B, T] float, 0 outside the response mask.
        selected: [B, T] bool, weights > 0.
        masks: For each signal in use ("visual", "temporal", "entropy") its own selection, [B, T] bool.
        scores: For each signal in use its scores, [B, T] float in nats, 0 where the signal does not apply.
        metrics: Plain floats, names start with ``attribution/`` or ``kernels/``.
        advantages: [B] advantage of each response, if the signals hold outcomes and the method selects.

    Example:
        With the signals above, ratios of 0.2 and group scope, each signal keeps the best of 5 tokens::

            weights = tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
            masks["visual"] = tensor([[False, True, False], [False, False, False]])
            masks["temporal"] = tensor([[False, False, False], [False, True, False]])
            masks["entropy"] = tensor([[False, True, False], [False, False, False]])
            metrics["attribution/selected_share"] = 0.4
    """

    weights: torch.Tensor
    selected: torch.Tensor
    masks: dict[str, torch.Tensor]
    scores: dict[str, torch.Tensor]
    metrics: dict[str, float]
    advantages: torch.Tensor | None = None

    def to(self, device: torch.device) -> TokenWeights:
        """The same weights on another device."""
        return dataclasses.replace(
            self,
            masks={name: mask.to(device) for name, mask in self.masks.items()},
            scores={name: score.to(device) for name, score in self.scores.items()},
            **_moved(self, device),
        )


def _moved(holder: Signals | Outcomes | TokenWeights, device: torch.device) -> dict[str, Any]:
    """Its tensors, by field, on another device."""
    values = {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}
    return {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
