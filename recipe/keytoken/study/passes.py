"""From a batch of answers to the signals of a method: the real pass, the counterfactual ones, the measures.

Axes: B answers, T tokens of the longest one, N answer tokens of all, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keytoken.attribution.methods import measures_of
from keytoken.attribution.types import Outcomes, Signals
from keytoken.attribution.views import VIEWS, ModelInput, ViewContext, VisionFormat
from keytoken.schema import MethodConfig
from keytoken.study.policy import Model, answer_ids, answer_logits
from keytoken.study.prompts import processor
from keytoken_kernels.logprob import differentiable_log_probs, token_log_probs, truncated_entropy

MAX_LOG_RATIO = 11.0  # TW-GRPO's


@dataclass(frozen=True, slots=True)
class RealPass:
    """The policy on the real input.

    Attributes:
        log_prob: [B, T] nats, with a gradient; 0 in the padding.
        entropy: [B, T] nats, without one.
        mask: [B, T] bool, answer tokens.
        logits: [N, V] without a gradient.
    """

    log_prob: Tensor
    entropy: Tensor
    mask: Tensor
    logits: Tensor


def real_pass(model: Model, rows: Sequence[ModelInput], temperature: float) -> RealPass:
    """Score the answers under their real input, keeping what the backward pass needs."""
    logits = answer_logits(model, rows)
    log_prob, entropy = differentiable_log_probs(logits, answer_ids(rows), temperature)
    mask = answer_mask(rows)
    return RealPass(padded(log_prob, mask), padded(entropy.detach(), mask), mask, logits.detach())


@torch.no_grad()
def log_probs(model: Model, rows: Sequence[ModelInput], temperature: float) -> Tensor:
    """[N] log-probs of the answer tokens in nats, row after row."""
    return token_log_probs(answer_logits(model, rows), answer_ids(rows), temperature).log_prob


def answer_mask(rows: Sequence[ModelInput]) -> Tensor:
    """[B, T] bool, true on answer tokens."""
    lengths = torch.tensor([row.input_ids.numel() - row.prompt_length for row in rows])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def padded(values: Tensor, mask: Tensor) -> Tensor:
    """[N] values of answer tokens as [B, T], 0 in the padding; differentiable."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def view_context(model: Model, method: MethodConfig, seed: int) -> ViewContext:
    """What the views of a run depend on besides the input."""
    return ViewContext(
        vision=VisionFormat.of(model.config, processor()),
        seed=seed,
        positions=method.positions,
        options=method.view,
    )


def view_pass(
    model: Model, rows: Sequence[ModelInput], name: str, context: ViewContext, temperature: float
) -> tuple[Tensor, Tensor, int]:
    """Score the answers under a view.

    Returns:
        [B, T] log-probs, 0 in rows that have no such view; [B] bool, whether a row has it; and the number of
        tokens that the pass read.
    """
    views = [VIEWS[name].build(row, context) for row in rows]
    built = [view for view in views if view is not None]
    mask = answer_mask(rows)
    applies = torch.tensor([view is not None for view in views])
    if not built:
        return torch.zeros(mask.shape), applies, 0
    scored = padded(log_probs(model, built, temperature), mask & applies[:, None])
    return scored, applies, sum(view.input_ids.numel() for view in built)


def signals_of(
    real: RealPass,
    views: dict[str, tuple[Tensor, Tensor]],
    method: MethodConfig,
    *,
    group: Tensor,
    outcomes: Outcomes,
    temperature: float,
    seed: int,
    step: int,
) -> Signals:
    """The signals of a batch.

    Args:
        real: The real pass.
        views: For each view that ran its log-probs [B, T] and the rows that have it [B].
        method: Which views are behind which signal, and what is measured.
        group: [B] number of each answer's prompt.
        outcomes: Rewards.
        temperature: Of the measures.
        seed: Of ties and draws, another one every step.
        step: Training step, from 1.
    """
    log_prob = real.log_prob.detach()
    none = torch.zeros(log_prob.shape[0], dtype=torch.bool)
    masked, has_visual = views.get(method.view.visual, (None, none))
    shuffled, has_temporal = views.get(method.view.temporal, (None, none))
    measures = measures_of(method)
    truncated = disagreement = None
    if "truncated_entropy" in measures:
        assert method.selection is not None and method.selection.entropy_top_p is not None
        entropy = truncated_entropy(real.logits, method.selection.entropy_top_p, temperature)
        truncated = padded(entropy, real.mask)
    if "disagreement" in measures:
        disagreement = group_disagreement(real.logits, real.mask, group, temperature)
    return Signals(
        logp=log_prob,
        logp_masked=masked,
        logp_shuffled=shuffled,
        entropy=real.entropy,
        mask=real.mask,
        group=group,
        has_visual=has_visual,
        has_temporal=has_temporal,
        outcomes=outcomes,
        truncated_entropy=truncated,
        disagreement=disagreement,
        row_keys=torch.arange(len(group)),
        seed=seed,
        step=step,
    )


def group_disagreement(logits: Tensor, mask: Tensor, group: Tensor, temperature: float) -> Tensor:
    """How far the answers to one prompt disagree at each position (TW-GRPO), [B, T] nats, 0 in the padding.

        D_t = 1/G sum_g sum_v (e^d - d - 1),   d = clamp(mean_g log p_g(v) - log p_g(v), +-11)

    An answer that has ended counts as uniform. All at once, for a vocabulary of some hundred tokens; the
    workers of the real stack compute the same in chunks.

    Args:
        logits: [N, V] of the answer tokens, row after row.
        mask: [B, T] bool, answer tokens.
        group: [B] number of each answer's prompt.
        temperature: Divides the logits.
    """
    vocabulary = logits.shape[1]
    uniform = logits.new_full((1, 1, vocabulary), 1.0).log_softmax(-1)
    every = uniform.repeat(*mask.shape, 1)
    every[mask] = (logits / temperature).log_softmax(-1)
    found = torch.zeros(mask.shape)
    for number in group.unique().tolist():
        members = every[group == number]  # [G, T, V]
        distance = (members.mean(dim=0) - members).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        found[group == number] = (distance.exp() - distance - 1.0).sum(dim=-1).mean(dim=0)
    return found.masked_fill(~mask, 0.0)
