"""Gates of logprob and head: float64 truth, bounds, gradients, identical bits, offsets, unwritten memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernel_bench import inputs
from kernel_bench.operators import Operators
from kernel_bench.sizes import GATE_TEMPERATURE as TEMPERATURE
from kernel_bench.sizes import SELECTED_SHARE, Sizes
from kernel_bench.verdicts import Verdict, holds, largest_error, relative_error, same_bits, within

LOG_PROB_ERROR = 2e-5  # plus the next, relative to the row's largest logit
LOG_PROB_ROUNDING = 1e-6
ENTROPY_ERROR = 5e-5
GRADIENT_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
# Sums of the tensor cores over H are coarser than float32, in proportion to their size. Logits rounded to
# bfloat16 would be off by 3e-2, and about -150 by 0.5.
HEAD_ERROR, HEAD_ROUNDING = 2e-3, 5e-5
HEAD_OFFSET = -150.0  # a maximum that starts at 0 loses every such row


def truth(logits: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
    """Float64 (log_prob, entropy) of the logits as they are stored; differentiable where they are float64."""
    x = logits.double() / temperature
    log_p = x - x.logsumexp(1, keepdim=True)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(1)
    return log_p.gather(1, labels[:, None]).squeeze(1), entropy


def log_prob_forward(operators: Operators, sizes: Sizes, device: torch.device) -> Iterator[Verdict]:
    """Against float64 on rows of all kinds, and the bounds that hold for every distribution."""
    generator = inputs.generator_of(device, 1)
    logits, labels = inputs.hard_logits(sizes.gate_rows, sizes.gate_vocabulary, generator)
    for stored in (logits, logits.bfloat16()):
        name = f"K1 forward, {_short(stored.dtype)}"
        found = operators.token_log_probs(stored, labels, TEMPERATURE)
        log_prob, entropy = truth(stored, labels)
        size = stored.masked_fill(stored.isinf(), 0).abs().amax(1).double() / TEMPERATURE
        allowed = LOG_PROB_ERROR + LOG_PROB_ROUNDING * size
        yield within(f"{name}: log-prob", largest_error(found.log_prob, log_prob, allowed), 1.0)
        yield within(f"{name}: entropy", largest_error(found.entropy, entropy), ENTROPY_ERROR)
        yield from _bounds(name, found.log_prob, found.entropy, sizes.gate_vocabulary)
        low = [row for row in range(len(labels)) if inputs.KINDS[row % len(inputs.KINDS)] == "about -150"]
        error = largest_error(found.entropy[low], entropy[low])
        yield within(f"{name}: entropy of rows about -150", error, ENTROPY_ERROR)


def log_prob_bits(operators: Operators, sizes: Sizes, device: torch.device) -> Iterator[Verdict]:
    """The same row gives the same bits in any order, in any run, and picked by number."""
    generator = inputs.generator_of(device, 2)
    logits, labels = inputs.hard_logits(sizes.gate_rows, sizes.gate_vocabulary, generator)
    order = torch.randperm(len(labels), device=device, generator=generator)

    def run(rows: Tensor) -> list[Tensor]:
        found = operators.token_log_probs(logits[rows], labels[rows], TEMPERATURE)
        upstream = torch.linspace(-1, 1, len(labels), device=device)[rows]
        gradient = operators.token_log_probs_gradient(
            logits[rows], labels[rows], found, upstream, upstream * 0.5, TEMPERATURE
        )
        return [found.log_prob, found.entropy, found.log_sum_exp, gradient]

    straight = run(torch.arange(len(labels), device=device))
    yield same_bits("K1: two runs, same bits", run(torch.arange(len(labels), device=device)), straight)
    yield same_bits("K1: rows permuted, same bits", run(order), [result[order] for result in straight])
    picked = operators.token_log_probs(logits, labels[order], TEMPERATURE, rows=order)
    yield same_bits("K1: rows by number, same bits", [picked.log_prob], [straight[0][order]])


def log_prob_gradient(operators: Operators, sizes: Sizes, device: torch.device) -> Iterator[Verdict]:
    """Gradients of log-prob and entropy against autograd in float64; rows without one are written as 0."""
    generator = inputs.generator_of(device, 3)
    logits, labels = inputs.hard_logits(sizes.gate_rows, sizes.gate_vocabulary, generator)
    upstream = [inputs.sparse_gradient(len(labels), SELECTED_SHARE, generator) for _ in range(2)]
    exact = logits.double().requires_grad_()
    (true,) = torch.autograd.grad(truth(exact, labels), exact, [each.double() for each in upstream])
    del exact
    found = operators.token_log_probs(logits, labels, TEMPERATURE)
    untouched = (upstream[0] == 0) & (upstream[1] == 0)
    for dtype, allowed in GRADIENT_ERROR.items():
        out = torch.full_like(logits, math.nan, dtype=dtype)
        operators.token_log_probs_gradient(logits, labels, found, *upstream, TEMPERATURE, out=out)
        name = f"K1 gradient, {_short(dtype)}"
        yield within(name, relative_error(out, true), allowed)
        yield holds(f"{name}: rows without upstream gradient are 0", out[untouched] != 0)
    place = logits.clone()
    operators.token_log_probs_gradient(place, labels, found, *upstream, TEMPERATURE, out=place)
    yield within("K1 gradient, in place", relative_error(place, true), GRADIENT_ERROR[torch.float32])


def nucleus(operators: Operators, sizes: Sizes, device: torch.device) -> Iterator[Verdict]:
    """Entropy of the top-p part against a sort in float64."""
    generator = inputs.generator_of(device, 4)
    logits = inputs.random_logits(sizes.gate_rows, sizes.gate_vocabulary, torch.float32, generator)
    p = (logits.double() / TEMPERATURE).softmax(1).sort(1, descending=True).values
    p = p.masked_fill(p.cumsum(1) - p >= 0.95, 0.0)
    p = p / p.sum(1, keepdim=True)
    true = torch.special.entr(p).sum(1)
    found = operators.truncated_entropy(logits, 0.95, TEMPERATURE)
    yield within("K1 nucleus entropy", largest_error(found, true), ENTROPY_ERROR)


def head_forward(operators: Operators, sizes: Sizes, device: torch.device) -> Iterator[Verdict]:
    """Log-prob and entropy from hidden states, in chunks that do not divide the rows."""
    for offset in (0.0, HEAD_OFFSET):
        hidden, weight, labels = _head_operands(sizes, device, offset)
        name = "K4 forward" if offset == 0 else f"K4 forward, logits about {offset:.0f}"
        runs = [
            operators.head_log_probs(hidden, weight, labels, TEMPERATURE, chunk_rows=_chunk(labels))
            for _ in range(2)
        ]
        log_prob, entropy = truth(_exact_logits(hidden, weight), labels)
        allowed = HEAD_ERROR + HEAD_ROUNDING * abs(offset)
        yield within(f"{name}: log-prob", largest_error(runs[0][0], log_prob), allowed)
        yield within(f"{name}: entropy", largest_error(runs[0][1], entropy), allowed)
        yield from _bounds(name, runs[0][0], runs[0][1], sizes.gate_vocabulary)
        yield same_bits(f"{name}: two runs, same bits", list(runs[0]), list(runs[1]))


def head_update(operators: Operators, sizes: Sizes, device: torch.device) -> Iterator[Verdict]:
    """Gradients of a loss that is masked by a selection; a loss that is not masked is noticed."""
    hidden, weight, labels = _head_operands(sizes, device)
    generator = inputs.generator_of(device, 6)
    upstream = inputs.sparse_gradient(len(labels), SELECTED_SHARE, generator)
    selected = upstream != 0
    both = [upstream, 0.1 * upstream]
    exact = [operand.double().requires_grad_() for operand in (hidden, weight)]
    true = torch.autograd.grad(truth(_exact_logits(*exact), labels), exact, [each.double() for each in both])
    del exact

    def run(gradients: list[Tensor]) -> list[Tensor]:
        operands = [operand.detach().requires_grad_() for operand in (hidden, weight)]
        results = operators.differentiable_head(
            *operands, labels, TEMPERATURE, chunk_rows=_chunk(labels), expected_rows=selected
        )
        return list(torch.autograd.grad(results, operands, gradients))

    found = run(both)
    allowed = GRADIENT_ERROR[sizes.dtype]
    yield within("K4 gradient of hidden", relative_error(found[0], true[0]), allowed)
    yield within("K4 gradient of weight", relative_error(found[1], true[1]), allowed)
    yield holds("K4 gradient: rows without upstream gradient are 0", found[0][~selected] != 0)
    yield same_bits("K4 gradient: two runs, same bits", found, run(both))
    try:
        run([torch.ones_like(upstream), both[1]])
    except ValueError:
        yield Verdict("K4 gradient: notices a loss that is not masked", True, "refused")
    else:
        yield Verdict("K4 gradient: notices a loss that is not masked", False, "accepted")


def _head_operands(sizes: Sizes, device: torch.device, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = inputs.generator_of(device, 5)
    shape = (sizes.gate_hidden, sizes.dtype, generator)
    hidden = inputs.hidden_states(sizes.gate_rows, *shape)
    weight = inputs.head_weight(sizes.gate_vocabulary, *shape, offset=offset)
    return hidden, weight, inputs.random_labels(len(hidden), len(weight), generator)


def _exact_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.double() @ weight.double().t()


def _chunk(labels: Tensor) -> int:
    return max(len(labels) // 2 - 1, 1)


def _bounds(name: str, log_prob: Tensor, entropy: Tensor, vocabulary: int) -> Iterator[Verdict]:
    """NaN breaks every bound."""
    yield holds(f"{name}: log-prob <= 0", ~(log_prob <= 0))
    ceiling = math.log(vocabulary) + ENTROPY_ERROR
    yield holds(f"{name}: 0 <= entropy <= log V", ~((entropy >= 0) & (entropy <= ceiling)))


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
