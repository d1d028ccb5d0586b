"""The passes that are compared, all with the head for answers, and what is measured of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from keytoken.attribution.views import ModelInput
from keytoken.prefix.attention import Plan
from keytoken.prefix.packs import Pack, pack_inputs
from keytoken.workers.answer_head import AnswerHead
from keytoken_kernels.head import differentiable_head, head_log_probs

WEIGHTED = 0.25  # share of tokens with a weight in the loss of the update


def packs_of(inputs: Sequence[ModelInput]) -> tuple[Pack, ...]:
    """One pack for each group, however long."""
    return pack_inputs(inputs, max_tokens=1 << 62).packs


def separate(model: Any, inputs: Sequence[ModelInput], head: Any) -> list[Tensor]:
    """Log-probs [R] of each answer, by a pass of its own."""
    return [_separate_one(model, one, head) for one in inputs]


def shared(model: Any, inputs: Sequence[ModelInput], head: Any) -> list[Tensor]:
    """The same from packs; making them is part of it."""
    found: dict[int, Tensor] = {}
    for pack in packs_of(inputs):
        found.update(pack.by_place(_pack(model, pack, head)))
    return [found[place] for place in range(len(inputs))]


def score(model: Any, inputs: Sequence[ModelInput], run: Callable[..., list[Tensor]]) -> list[Tensor]:
    """Log-probs without a gradient."""
    model.eval()
    with torch.no_grad():
        return run(model, inputs, head_log_probs)


def update(model: Any, inputs: Sequence[ModelInput], share: bool) -> float:
    """Forward and backward of a weighted policy gradient; leaves the gradients and gives their norm.

    Without sharing each answer is a micro-batch of its own.
    """
    model.train()
    run = shared if share else separate
    for part in [inputs] if share else [[one] for one in inputs]:
        log_prob = torch.cat(run(model, part, differentiable_head))
        (_weights(part) * log_prob).sum().backward()
    return _norm_of_gradients(model)


def _norm_of_gradients(model: Any) -> float:
    norms = [value.grad.norm() for value in model.parameters() if value.grad is not None]
    norm = float(torch.stack(norms).norm())
    model.zero_grad(set_to_none=True)  # so that the next call allocates its own
    return norm


def stock_score(model: Any, inputs: Sequence[ModelInput]) -> list[Tensor]:
    """Log-probs and entropies as verl has them without any of this: from logits of whole sequences."""
    model.eval()
    with torch.no_grad():
        return [_stock_one(model, one, entropy=True) for one in inputs]


def stock_update(model: Any, inputs: Sequence[ModelInput]) -> float:
    """:func:`update` with log-probs from logits of whole sequences, an answer at a time."""
    model.train()
    for one in inputs:
        (_weights([one]) * _stock_one(model, one, entropy=False)).sum().backward()
    return _norm_of_gradients(model)


def _stock_one(model: Any, one: ModelInput, entropy: bool) -> Tensor:
    output = model(
        input_ids=one.input_ids[None], position_ids=one.position_ids[:, None], **one.media, use_cache=False
    )
    logits = output.logits[0].float()
    if entropy:
        (logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)).sum()
    log_probs = logits.log_softmax(-1).gather(1, one.input_ids.roll(-1)[:, None])[:, 0]
    return log_probs[one.prompt_length - 1 : -1]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """A GPU's time; on a CPU that of this process's processor, which other processes do not lengthen much."""
    if device.type != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most memory alive at a time that the call has allocated."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    results = seen.profiler.kineto_results.events()
    sizes = sorted((event.start_ns(), event.nbytes()) for event in results if event.name() == "[memory]")
    live = peak = 0
    for _, size in sizes:
        live += size
        peak = max(peak, live)
    return peak


def _weights(inputs: Sequence[ModelInput]) -> Tensor:
    """[N] the same for a token however it is batched."""
    parts = []
    for one in inputs:
        length = len(one.input_ids) - one.prompt_length
        generator = torch.Generator().manual_seed(length)
        parts.append((torch.rand(length, generator=generator) < WEIGHTED).float())
    return torch.cat(parts).to(inputs[0].input_ids.device)


def _separate_one(model: Any, one: ModelInput, head: Any) -> Tensor:
    answer = one.input_ids[one.prompt_length :]
    rows = torch.arange(one.prompt_length - 1, len(one.input_ids) - 1, device=answer.device)
    return _forward(model, one.input_ids, one.position_ids, one.media, rows, answer, head)


def _pack(model: Any, pack: Pack, head: Any) -> Tensor:
    plan = Plan(pack.trees, pack.input_ids.device)
    return _forward(
        model, pack.input_ids, pack.position_ids, pack.media, pack.rows, pack.labels, head, prefix_plan=plan
    )


def _forward(
    model: Any,
    ids: Tensor,
    positions: Tensor,
    media: Any,
    rows: Tensor,
    labels: Tensor,
    head: Any,
    **plan: Any,
) -> Tensor:
    with AnswerHead(model, rows, partial(head, labels=labels)) as answers:
        output = model(input_ids=ids[None], position_ids=positions[:, None], **media, use_cache=False, **plan)
        log_prob, _ = answers.read(output)
    return log_prob.flatten()[rows]
