"""Other implementations to compare with: torch itself, and installed packages through their public functions.

Every one takes ``(logits, labels)`` or ``(hidden, weight, labels)`` at temperature 1 and returns ``(log_prob,
entropy)``, differentiable; the entropy is None where an implementation has none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kernel_bench import inputs
from kernel_bench.gates_logits import truth
from kernel_bench.sizes import TEMPERATURE, Sizes
from kernel_bench.verdicts import Verdict, failures, largest_error, relative_error, within

Statistics = tuple[Tensor, Tensor | None]
FromLogits = Callable[[Tensor, Tensor], Statistics]
FromHidden = Callable[[Tensor, Tensor, Tensor], Statistics]

EAGER, COMPILED = "torch eager", "torch.compile"
VERL, LIGER, CCE = "verl linear_cross_entropy", "Liger", "cut-cross-entropy"
# Most of the others round logits to bfloat16, which costs them up to 0.03; what is off by more is broken.
LOG_PROB_ERROR, ENTROPY_ERROR, GRADIENT_ERROR = 0.1, 0.2, 0.1
OFFSET = -150.0
GATE_ROWS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """One implementation.

    Attributes:
        name: As the table shows it.
        remark: What it leaves out or does differently.
        from_logits: Logits to statistics, if it has that.
        from_hidden: Hidden states and head to statistics, if it has that.
        slow_start: Compiles for a long time for every new shape; only some cases have it.
        from_logits_has_gradient: Whether that one can be differentiated.
    """

    name: str
    remark: str = ""
    from_logits: FromLogits | None = None
    from_hidden: FromHidden | None = None
    slow_start: bool = False
    from_logits_has_gradient: bool = True


def eager_log_probs(logits: Tensor, labels: Tensor) -> Statistics:
    """The textbook form in float32, as trainers write it."""
    logits = logits.float()
    log_prob = logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
    return log_prob, entropy


def eager_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Statistics:
    """All logits at once, in the type of the operands, then :func:`eager_log_probs`."""
    return eager_log_probs(hidden @ weight.t(), labels)


def find_anchors(device: torch.device) -> tuple[list[Anchor], dict[str, str]]:
    """What can be compared with on ``device``, and why not what cannot."""
    found = [Anchor(name=EAGER, from_logits=eager_log_probs, from_hidden=eager_head)]
    missing = {}
    if device.type != "cuda":
        packages = {COMPILED: "torch", **{name: package for name, (package, _) in _PACKAGES.items()}}
        for name, package in packages.items():
            missing[name] = "needs a GPU" if importlib.util.find_spec(package) else _absent(package)
        return found, missing
    found.append(
        Anchor(
            name=COMPILED,
            from_logits=torch.compile(eager_log_probs, dynamic=False),
            from_hidden=torch.compile(eager_head, dynamic=False),
            slow_start=True,
        )
    )
    for name, (package, make) in _PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            missing[name] = _absent(package)
            continue
        try:
            found.append(make())
        except failures() as error:
            missing[name] = f"cannot be imported: {_first_line(error)}"
    return found, missing


def check_anchor(anchor: Anchor, sizes: Sizes, device: torch.device) -> tuple[Anchor, list[Verdict]]:
    """The anchor without what gives wrong numbers, and the verdicts on it.

    Logits about -150 are a known weakness of others: told, but no reason to leave them out.
    """
    if anchor.slow_start:
        return anchor, []
    of_logits = _tried(f"{anchor.name}: from logits", partial(_check_logits, anchor, sizes, device))
    of_hidden = _tried(f"{anchor.name}: from hidden states", partial(_check_hidden, anchor, sizes, device))
    if of_logits and not of_logits[0].passed:
        anchor = replace(anchor, from_logits=None)
    if of_hidden and not of_hidden[0].passed:
        anchor = replace(anchor, from_hidden=None)
    far_off = partial(_check_hidden, anchor, sizes, device, OFFSET)
    return anchor, [*of_logits, *of_hidden, *_tried(f"{anchor.name}: logits about {OFFSET:.0f}", far_off)]


def _tried(name: str, check: Callable[[], list[Verdict]]) -> list[Verdict]:
    try:
        return check()
    except failures() as error:
        return [Verdict(name, False, _first_line(error))]


def _check_logits(anchor: Anchor, sizes: Sizes, device: torch.device) -> list[Verdict]:
    if anchor.from_logits is None:
        return []
    generator = inputs.generator_of(device, 8)
    logits = inputs.random_logits(GATE_ROWS, sizes.gate_vocabulary, torch.float32, generator)
    labels = inputs.random_labels(GATE_ROWS, sizes.gate_vocabulary, generator)
    found = anchor.from_logits(logits, labels)[0]
    error = largest_error(found, truth(logits, labels, TEMPERATURE)[0][: len(found)])
    return [within(f"{anchor.name}: log-prob from logits", error, LOG_PROB_ERROR)]


def _check_hidden(anchor: Anchor, sizes: Sizes, device: torch.device, offset: float = 0.0) -> list[Verdict]:
    if anchor.from_hidden is None:
        return []
    generator = inputs.generator_of(device, 7)
    shape = (sizes.gate_hidden, sizes.dtype, generator)
    operands = [
        inputs.hidden_states(GATE_ROWS, *shape),
        inputs.head_weight(sizes.gate_vocabulary, *shape, offset=offset),
    ]
    labels = inputs.random_labels(GATE_ROWS, sizes.gate_vocabulary, generator)
    upstream = inputs.sparse_gradient(GATE_ROWS, 1.0, generator)
    exact = [operand.double().requires_grad_() for operand in operands]
    log_prob, entropy = truth(exact[0] @ exact[1].t(), labels, TEMPERATURE)
    true = torch.autograd.grad(log_prob, exact, upstream.double())
    del exact
    for operand in operands:
        operand.requires_grad_()
    own_log_prob, own_entropy = anchor.from_hidden(operands[0], operands[1], labels)
    own = torch.autograd.grad(own_log_prob, operands, upstream)
    about = "" if offset == 0 else f" of logits about {offset:.0f}"
    # There, bfloat16 logits are whole numbers: only what is not finite or far off is told.
    slack = 1.0 if offset == 0 else 20.0
    gradient = max(relative_error(a, b) for a, b in zip(own, true, strict=True))
    error = largest_error(own_log_prob, log_prob)
    verdicts = [within(f"{anchor.name}: log-prob{about}", error, LOG_PROB_ERROR * slack)]
    if own_entropy is not None:
        error = largest_error(own_entropy, entropy)
        verdicts.append(within(f"{anchor.name}: entropy{about}", error, ENTROPY_ERROR * slack))
    return [*verdicts, within(f"{anchor.name}: gradient{about}", gradient, GRADIENT_ERROR * slack)]


def _verl() -> Anchor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Statistics:
        log_prob, entropy = linear_cross_entropy(hidden, weight, labels, TEMPERATURE, "none")
        return log_prob, entropy

    return Anchor(name=VERL, from_hidden=head)


def _liger() -> Anchor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Statistics:
        cost, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden, weight, labels, TEMPERATURE, return_entropy=True
        )
        return -cost, entropy

    def log_probs(logits: Tensor, labels: Tensor) -> Statistics:
        # It takes sequences [B, L + 1, V] and ids [B, L] and leaves the last row of each out.
        return fused_selective_log_softmax(logits[None], labels[None, :-1], TEMPERATURE).squeeze(0), None

    remark = "from logits: log-prob only, no gradient"
    return Anchor(
        name=LIGER,
        remark=remark,
        from_hidden=head,
        from_logits=log_probs,
        from_logits_has_gradient=False,
    )


def _cut_cross_entropy() -> Anchor:
    from cut_cross_entropy import linear_cross_entropy

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Statistics:
        return -linear_cross_entropy(hidden, weight, labels, reduction="none"), None

    return Anchor(name=CCE, remark="log-prob only; its gradient leaves small terms out", from_hidden=head)


_PACKAGES: dict[str, tuple[str, Callable[[], Anchor]]] = {
    VERL: ("verl", _verl),
    LIGER: ("liger_kernel", _liger),
    CCE: ("cut_cross_entropy", _cut_cross_entropy),
}


def _absent(package: str) -> str:
    return f"not installed (package {package})"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
