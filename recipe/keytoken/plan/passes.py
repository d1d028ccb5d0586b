"""Operations of every part of a step, for the whole batch."""

from __future__ import annotations

import dataclasses

from keytoken.data.positions import Grid
from keytoken.plan.architecture import Architecture
from keytoken.plan.batches import Batches, StepBatches
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
    def scoring(self) -> Flops:
        """All passes without gradient."""
        return self.old + self.reference + self.attribution

    @property
    def total(self) -> float:
        """Of the step."""
        parts = (self.prefill, self.decode, self.old, self.reference, self.attribution, self.update)
        return sum(part.total for part in parts)


def step_flops(model: Architecture, work: Workload, prefills: int, batches: StepBatches) -> StepFlops:
    """Operations of a step.

    Args:
        model: Its shape.
        work: What a step does.
        prefills: How often a prompt is computed by the engines.
        batches: Into which its answers are put, which says how often a prompt is computed.
    """
    old = _with_head(work, _whole(model, work, batches.score))
    once_updated = _with_head(work, _whole(model, work, batches.update, hidden=work.hides))
    views = {name: _view(model, work, batches, name) for name in work.passes}
    once = forward(model, work.prompt_tokens, causal_pairs(work.prompt_tokens), 1, (work.grid,))
    decode = forward(
        model, work.answer_tokens, causal_pairs(work.answer_tokens, work.prompt_tokens), work.answer_tokens
    )
    clips = work.answers * batches.update.prompts / batches.update.answers
    vision = forward(model, 0, 0, 0, (work.grid,)) * clips
    update = training(once_updated, work.recompute, chunked_head=work.answer_head)
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


def _with_head(work: Workload, found: Flops) -> Flops:
    """verl's own head computes logits for prompts too."""
    if work.answer_head:
        return found
    return dataclasses.replace(found, head=found.head * work.row_tokens / work.answer_tokens)


def _whole(model: Architecture, work: Workload, batches: Batches, hidden: bool = False) -> Flops:
    return _score(model, work, batches, work.prompt_tokens, (work.grid,), hidden)


def _view(model: Architecture, work: Workload, batches: StepBatches, name: str) -> Flops:
    of = batches.per_answer if name in work.per_answer else batches.view
    return _score(model, work, of, work.text_tokens, ()) if name == WITHOUT_CLIP else _whole(model, work, of)


def _score(
    model: Architecture,
    work: Workload,
    batches: Batches,
    prompt: int,
    grids: tuple[Grid, ...],
    hidden: bool = False,
) -> Flops:
    if not work.shared:
        return _separate(model, work, prompt, grids)
    return _shared(model, work, batches, prompt, grids, hidden)


def _separate(model: Architecture, work: Workload, prompt: int, grids: tuple[Grid, ...]) -> Flops:
    """A pass that computes each answer with its prompt."""
    length = (prompt + work.answer_tokens) * work.padding
    pairs = causal_pairs(round(length)) if work.packed else length**2
    return forward(model, length, pairs, work.answer_tokens, grids) * work.answers


def _shared(
    model: Architecture,
    work: Workload,
    batches: Batches,
    prompt: int,
    grids: tuple[Grid, ...],
    hidden: bool,
) -> Flops:
    """A pass over packs: each copy of a prompt, and behind it its answers (:mod:`keytoken.prefix.layout`).

    With ``hidden`` attention computes the pairs between answers as well.
    """
    found = Flops()
    for answers, times in batches.copies.items():
        cost = cost_of([Tree(prompt - 1, (work.answer_tokens,) * answers)])
        scored = answers * work.answer_tokens
        found = found + forward(model, cost.tokens, cost.attended(hidden), scored, grids) * times
    return found * (work.answers / batches.answers)
