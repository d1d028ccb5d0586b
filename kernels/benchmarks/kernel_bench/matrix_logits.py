"""Cases of logprob: logits to log-prob and entropy, gradients, nucleus."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernel_bench import inputs
from kernel_bench.anchors import EAGER, Anchor
from kernel_bench.cases import OURS, Case, Setting, Target, Work
from kernel_bench.sizes import NUM_SETS, TEMPERATURE, Sizes
from kernel_bench.timing import Call

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
FORWARD_TARGETS = (Target(of_ceiling=0.90), Target(against=EAGER, times=4.0))
BACKWARD_TARGETS = (Target(of_ceiling=0.88),)


def forward(
    sizes: Sizes, tokens: int, dtype: torch.dtype, *, targets: tuple[Target, ...] = (), slow: bool = False
) -> Case:
    """Log-prob, entropy and log-sum-exp, no gradient; the logits are read once."""
    bytes_ = tokens * sizes.vocabulary * dtype.itemsize
    return Case(
        name=f"K1 forward, {SHORT[dtype]}, N={tokens}",
        tokens=tokens,
        prepare=partial(_prepare_forward, tokens=tokens, dtype=dtype, slow=slow),
        work=Work(bytes=bytes_),
        needs_bytes=NUM_SETS * bytes_,
        seconds=sizes.seconds,
        targets=targets,
    )


def backward(
    sizes: Sizes, tokens: int, dtype: torch.dtype, share: float, *, targets: tuple[Target, ...] = ()
) -> Case:
    """Gradient in bf16: rows with an upstream gradient are read, all are written."""
    elements = tokens * sizes.vocabulary
    return Case(
        name=f"K1 backward, {SHORT[dtype]} to bf16, N={tokens}, selected {share:g}",
        tokens=tokens,
        prepare=partial(_prepare_backward, tokens=tokens, dtype=dtype, share=share),
        work=Work(bytes=elements * (share * dtype.itemsize + torch.bfloat16.itemsize)),
        needs_bytes=elements * (NUM_SETS * dtype.itemsize + torch.bfloat16.itemsize),
        seconds=sizes.seconds,
        targets=targets,
    )


def both(sizes: Sizes, tokens: int, dtype: torch.dtype, *, slow: bool = False) -> Case:
    """Forward and backward by autograd: one reading, then one reading and one writing."""
    bytes_ = tokens * sizes.vocabulary * dtype.itemsize
    return Case(
        name=f"K1 forward and backward, {SHORT[dtype]}, N={tokens}",
        tokens=tokens,
        prepare=partial(_prepare_both, tokens=tokens, dtype=dtype, slow=slow),
        work=Work(bytes=3 * bytes_),
        needs_bytes=(NUM_SETS + 1) * bytes_,
        seconds=sizes.seconds,
    )


def nucleus(sizes: Sizes, tokens: int) -> Case:
    """Entropy of the top 0.95 of the mass; counted as one reading, though it takes several."""
    bytes_ = tokens * sizes.vocabulary * 4
    return Case(
        name=f"K1 nucleus entropy, fp32, N={tokens}",
        tokens=tokens,
        prepare=partial(_prepare_nucleus, tokens=tokens),
        work=Work(bytes=bytes_),
        needs_bytes=(NUM_SETS + 6) * bytes_,
        seconds=sizes.seconds,
    )


def _draw(setting: Setting, tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    generator = inputs.generator_of(setting.machine.device, 100 + tokens)
    vocabulary = setting.sizes.vocabulary
    logits = [inputs.random_logits(tokens, vocabulary, dtype, generator) for _ in range(NUM_SETS)]
    labels = [inputs.random_labels(tokens, vocabulary, generator) for _ in range(NUM_SETS)]
    return logits, labels


def _with_logits(setting: Setting, slow: bool) -> list[Anchor]:
    return [a for a in setting.anchors if a.from_logits is not None and (slow or not a.slow_start)]


def _prepare_forward(setting: Setting, tokens: int, dtype: torch.dtype, slow: bool) -> dict[str, Call]:
    logits, labels = _draw(setting, tokens, dtype)

    def ours(i: int) -> object:
        return setting.operators.token_log_probs(logits[i], labels[i], TEMPERATURE)

    def other(anchor: Anchor, i: int) -> object:
        assert anchor.from_logits is not None
        with torch.no_grad():
            return anchor.from_logits(logits[i], labels[i])

    return {OURS: ours, **{a.name: partial(other, a) for a in _with_logits(setting, slow)}}


def _prepare_backward(setting: Setting, tokens: int, dtype: torch.dtype, share: float) -> dict[str, Call]:
    logits, labels = _draw(setting, tokens, dtype)
    generator = inputs.generator_of(setting.machine.device, 200)
    upstream = [inputs.sparse_gradient(tokens, share, generator) for _ in range(NUM_SETS)]
    found = [
        setting.operators.token_log_probs(z, y, TEMPERATURE) for z, y in zip(logits, labels, strict=True)
    ]
    out = torch.empty_like(logits[0], dtype=torch.bfloat16)

    def ours(i: int) -> object:
        return setting.operators.token_log_probs_gradient(
            logits[i], labels[i], found[i], upstream[i], None, TEMPERATURE, out=out
        )

    return {OURS: ours}


def _prepare_both(setting: Setting, tokens: int, dtype: torch.dtype, slow: bool) -> dict[str, Call]:
    logits, labels = _draw(setting, tokens, dtype)
    for each in logits:
        each.requires_grad_()
    generator = inputs.generator_of(setting.machine.device, 300)
    upstream = inputs.sparse_gradient(tokens, 1.0, generator)

    def ours(i: int) -> object:
        log_prob, _ = setting.operators.differentiable_log_probs(logits[i], labels[i], TEMPERATURE)
        return torch.autograd.grad(log_prob, logits[i], upstream)

    def other(anchor: Anchor, i: int) -> object:
        assert anchor.from_logits is not None
        log_prob, _ = anchor.from_logits(logits[i], labels[i])
        return torch.autograd.grad(log_prob, logits[i], upstream)

    differentiable = [a for a in _with_logits(setting, slow) if a.from_logits_has_gradient]
    return {OURS: ours, **{a.name: partial(other, a) for a in differentiable}}


def _prepare_nucleus(setting: Setting, tokens: int) -> dict[str, Call]:
    logits, _ = _draw(setting, tokens, torch.float32)

    def ours(i: int) -> object:
        return setting.operators.truncated_entropy(logits[i], 0.95, TEMPERATURE)

    def by_sorting(i: int) -> object:
        p = logits[i].softmax(1).sort(1, descending=True).values
        p = p.masked_fill(p.cumsum(1) - p >= 0.95, 0.0)
        p = p / p.sum(1, keepdim=True)
        return torch.special.entr(p).sum(1)

    return {OURS: ours, f"{EAGER}, sorting": by_sorting}
