"""Cases of the head: views without a gradient, updates with sparse gradients, and the worked example."""

from __future__ import annotations

from functools import partial
from math import ceil

import torch
from torch import Tensor

from kernel_bench import inputs
from kernel_bench.anchors import EAGER, VERL, FromHidden
from kernel_bench.cases import OURS, Case, Setting, Target, Work
from kernel_bench.sizes import ANSWER_SHARE, NUM_SETS, SELECTED_SHARE, TEMPERATURE, Sizes
from kernel_bench.timing import Call

VIEWS = 3
WHOLE, ANSWERS = "whole sequence", "answers only"
WORKED_TARGET = Target(provider=f"{OURS}, {ANSWERS}", against=f"{VERL}, {WHOLE}", times=6.0)


def views(sizes: Sizes, tokens: int, *, slow: bool = False) -> Case:
    """One view without a gradient."""
    return Case(
        name=f"K4 forward, N={tokens}",
        tokens=tokens,
        prepare=partial(_prepare_views, tokens=tokens, slow=slow),
        work=Work(flops=_product(sizes, tokens), tokens=tokens),
        needs_bytes=_operand_bytes(sizes, tokens),
        seconds=sizes.seconds,
    )


def update(sizes: Sizes, tokens: int, share: float, *, slow: bool = False) -> Case:
    """Forward of all rows and gradients of the selected share of them.

    The work is one product for every row and two for every selected one; multiplying the logits again, as
    all of these heads do, is their own affair.
    """
    return Case(
        name=f"K4 update, N={tokens}, selected {share:g}",
        tokens=tokens,
        prepare=partial(_prepare_update, tokens=tokens, share=share, slow=slow),
        work=Work(flops=_product(sizes, tokens) * (1 + 2 * share), tokens=tokens),
        needs_bytes=_operand_bytes(sizes, tokens) + 8 * sizes.vocabulary * sizes.hidden,
        seconds=sizes.seconds,
    )


def update_of_selected(sizes: Sizes, tokens: int, share: float) -> Case:
    """The same gradients where nothing else is needed: the rows are picked before the head."""
    picked = max(round(share * tokens), 1)
    return Case(
        name=f"K4 update of selected rows only, N={tokens}, selected {share:g}",
        tokens=tokens,
        prepare=partial(_prepare_update, tokens=picked, share=1.0, slow=False),
        work=Work(flops=3 * _product(sizes, picked), tokens=picked),
        needs_bytes=_operand_bytes(sizes, picked) + 8 * sizes.vocabulary * sizes.hidden,
        seconds=sizes.seconds,
    )


def chunks(sizes: Sizes, tokens: int) -> Case:
    """Our forward by the number of rows of a chunk."""
    return Case(
        name=f"K4 forward by rows of a chunk, N={tokens}",
        tokens=tokens,
        prepare=partial(_prepare_chunks, tokens=tokens),
        work=Work(flops=_product(sizes, tokens), tokens=tokens),
        needs_bytes=_operand_bytes(sizes, tokens) + 4 * 4096 * sizes.vocabulary,
        seconds=sizes.seconds,
    )


def worked_example(sizes: Sizes, tokens: int) -> Case:
    """Three views without a gradient and one update, for a batch packed into one sequence.

    ``whole sequence`` multiplies every position, prompts and videos too, as a fused head within a model
    does; ``answers only`` picks the rows first. The update has a gradient at the selected answer tokens.
    """
    answers = round(ANSWER_SHARE * tokens)
    flops = _product(sizes, answers) * (VIEWS + 1 + 2 * SELECTED_SHARE)
    return Case(
        name=(
            f"worked example: {VIEWS} views and update, N={tokens}, answers {ANSWER_SHARE:g}, "
            f"selected {SELECTED_SHARE:g}"
        ),
        tokens=tokens,
        prepare=partial(_prepare_worked, tokens=tokens, answers=answers),
        work=Work(flops=flops, tokens=answers),
        needs_bytes=(VIEWS + 1) * _operand_bytes(sizes, tokens) + 8 * sizes.vocabulary * sizes.hidden,
        targets=(WORKED_TARGET,),
        seconds=2 * sizes.seconds,
    )


def _product(sizes: Sizes, tokens: int) -> float:
    """Operations of hidden states times weight."""
    return 2.0 * tokens * sizes.vocabulary * sizes.hidden


def _operand_bytes(sizes: Sizes, tokens: int) -> float:
    """Hidden states of all sets, and one chunk of logits with its gradient."""
    operands = NUM_SETS * tokens * sizes.hidden * sizes.dtype.itemsize
    return operands + 6 * min(tokens, 1024) * sizes.vocabulary


def _draw(setting: Setting, tokens: int, count: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Hidden states and labels of ``count`` sets, and a leaf of the weight that they share."""
    sizes = setting.sizes
    generator = inputs.generator_of(setting.machine.device, 400 + tokens)
    shape = (sizes.hidden, sizes.dtype, generator)
    hidden = [inputs.hidden_states(tokens, *shape) for _ in range(count)]
    labels = [inputs.random_labels(tokens, sizes.vocabulary, generator) for _ in range(count)]
    return hidden, setting.weight.detach().requires_grad_(), labels


def _heads(setting: Setting, slow: bool) -> dict[str, tuple[FromHidden, FromHidden]]:
    """By provider: the head without and the one with a gradient."""

    def without(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return setting.operators.head_log_probs(hidden, weight, labels, TEMPERATURE)

    def with_gradient(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return setting.operators.differentiable_head(hidden, weight, labels, TEMPERATURE)

    others = {
        anchor.name: (anchor.from_hidden, anchor.from_hidden)
        for anchor in setting.anchors
        if anchor.from_hidden is not None and (slow or not anchor.slow_start)
    }
    return {OURS: (without, with_gradient), **others}


def _prepare_views(setting: Setting, tokens: int, slow: bool) -> dict[str, Call]:
    hidden, weight, labels = _draw(setting, tokens, NUM_SETS)

    def call(head: FromHidden, i: int) -> object:
        with torch.no_grad():
            return head(hidden[i], weight, labels[i])

    return {name: partial(call, head) for name, (head, _) in _heads(setting, slow).items()}


def _prepare_update(setting: Setting, tokens: int, share: float, slow: bool) -> dict[str, Call]:
    hidden, weight, labels = _draw(setting, tokens, NUM_SETS)
    generator = inputs.generator_of(setting.machine.device, 500)
    upstream = [inputs.sparse_gradient(tokens, share, generator) for _ in range(NUM_SETS)]

    def call(head: FromHidden, i: int) -> object:
        leaf = hidden[i].detach().requires_grad_()
        return torch.autograd.grad(head(leaf, weight, labels[i])[0], (leaf, weight), upstream[i])

    return {name: partial(call, head) for name, (_, head) in _heads(setting, slow).items()}


def _prepare_chunks(setting: Setting, tokens: int) -> dict[str, Call]:
    hidden, weight, labels = _draw(setting, tokens, NUM_SETS)

    def call(rows: int, i: int) -> object:
        return setting.operators.head_log_probs(hidden[i], weight, labels[i], TEMPERATURE, chunk_rows=rows)

    sizes = [ceil(tokens / parts) for parts in (16, 8, 4, 2)]
    return {f"{OURS}, {rows} rows": partial(call, rows) for rows in sizes}


def _prepare_worked(setting: Setting, tokens: int, answers: int) -> dict[str, Call]:
    hidden, weight, labels = _draw(setting, tokens, VIEWS * NUM_SETS)
    generator = inputs.generator_of(setting.machine.device, 600)
    device = setting.machine.device
    rows = torch.randperm(tokens, device=device, generator=generator)[:answers].sort().values
    upstream = torch.zeros(tokens, device=device)
    upstream[rows] = inputs.sparse_gradient(answers, SELECTED_SHARE, generator)

    def call(heads: tuple[FromHidden, FromHidden], picked: Tensor | None, i: int) -> object:
        def pick(tensor: Tensor) -> Tensor:
            return tensor if picked is None else tensor[picked]

        views = hidden[VIEWS * i : VIEWS * (i + 1)]
        own_labels, own_upstream = pick(labels[i]), pick(upstream)
        with torch.no_grad():
            for view in views:
                heads[0](pick(view), weight, own_labels)
        leaf = views[0].detach().requires_grad_()
        log_prob, _ = heads[1](pick(leaf), weight, own_labels)
        return torch.autograd.grad(log_prob, (leaf, weight), own_upstream)

    known = _heads(setting, slow=False)
    # A GPU compares with fused heads: dense logits of a whole sequence take over 100 GB.
    others = [name for name in known if name not in (OURS, EAGER)] or [EAGER]
    calls: dict[str, Call] = {f"{OURS}, {ANSWERS}": partial(call, known[OURS], rows)}
    for name in others:
        calls[f"{name}, {WHOLE}"] = partial(call, known[name], None)
        calls[f"{name}, {ANSWERS}"] = partial(call, known[name], rows)
    return calls
