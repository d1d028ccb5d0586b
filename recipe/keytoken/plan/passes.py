"""Operations of every part of a step, for the whole batch."""

from __future__ import annotations

import dataclasses

from keytoken.data.positions import Grid
from keytoken.plan.architecture import Architecture
from keytoken.plan.flops import Flops, causal_pairs, forward, training
from keytoken.plan.workload import WITHOUT_CLIP, Workload
from keytoken.prefix.layout import Tree, cost_of


@dataclasses.dataclass(frozen=True, slots=True)
class StepFlops:
    """Operations of one step over all GPUs.

    Attributes:
        prefill: Of prompts, computed once by each engine that gets answers to them.
        decode: Of answers, token by token.
        views: By the name of the pass.
    """

    prefill: Flops
    decode: Flops
    old: Flops
    reference: Flops
    views: dict[str, Flops]
    update: Flops

    @property
    def attribution(self) -> Flops:
        """All passes of the attribution group."""
        return sum(self.views.values(), Flops())

    @property
    def total(self) -> float:
        """Of the step."""
        parts = (self.prefill, self.decode, self.old, self.reference, self.attribution, self.update)
        return sum(part.total for part in parts)


def step_flops(model: Architecture, work: Workload, prefills: int, shared: bool = False) -> StepFlops:
    """Operations of a step.

    Args:
        model: Its shape.
        work: What a step does.
        prefills: How often a prompt is computed by the engines.
        shared: As if scoring and update computed a prompt once for all answers to it.
    """
    score = _shared if shared else _separate
    whole = score(model, work, work.prompt_tokens, (work.grid,))
    old = whole if work.answer_head else dataclasses.replace(whole, head=whole.head * _head_share(work))
    views = {
        name: score(model, work, work.text_tokens, ()) if name == WITHOUT_CLIP else whole
        for name in work.passes
    }
    once = forward(model, work.prompt_tokens, causal_pairs(work.prompt_tokens), 1, (work.grid,))
    decode = forward(
        model, work.answer_tokens, causal_pairs(work.answer_tokens, work.prompt_tokens), work.answer_tokens
    )
    vision = forward(model, 0, 0, 0, (work.grid,)) * (work.prompts if shared else work.answers)
    update = training(old, work.recompute, chunked_head=work.answer_head)
    if work.frozen_vision:
        update = update + vision + training(vision, work.recompute, chunked_head=False) * -1.0
    return StepFlops(
        prefill=once * (work.prompts * prefills),
        decode=decode * work.answers,
        old=old,
        reference=old if work.reference else Flops(),
        views=views,
        update=update * work.updates,
    )


def _head_share(work: Workload) -> float:
    """Positions that verl's own head computes logits for, over those of answers."""
    return work.row_tokens / work.answer_tokens


def _separate(model: Architecture, work: Workload, prompt: int, grids: tuple[Grid, ...]) -> Flops:
    """A pass that computes each answer with its prompt."""
    length = (prompt + work.answer_tokens) * work.padding
    pairs = causal_pairs(round(length)) if work.packed else length**2
    return forward(model, length, pairs, work.answer_tokens, grids) * work.answers


def _shared(model: Architecture, work: Workload, prompt: int, grids: tuple[Grid, ...]) -> Flops:
    """A pass that computes each prompt once, and behind it its answers (:mod:`keytoken.prefix.layout`)."""
    cost = cost_of([Tree(prompt - 1, (work.answer_tokens,) * work.group)])
    return forward(model, cost.tokens, cost.pairs, work.group * work.answer_tokens, grids) * work.prompts
