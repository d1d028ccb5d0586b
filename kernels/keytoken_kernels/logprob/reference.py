"""Log-prob, entropy and their gradient in plain torch, in chunks of rows.

The formulas are those of the kernels (README.md). Everything runs in float32, or in float64 where the logits
are float64, and no temporary is larger than a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from keytoken_kernels.logprob.types import LogProbs

# 32 MiB of float32: large enough to keep torch's threads busy, small beside the logits of a batch.
CHUNK_ELEMENTS = 2**23
# A logit at or below this one counts as -inf. Finite, so that 0 * -inf appears nowhere.
BANNED = -1e30
# A set of tokens that misses top_p by less than this share counts as reaching it (see truncated_entropy).
MASS_SLACK = 1e-6


def token_log_probs(logits: Tensor, labels: Tensor, temperature: float, rows: Tensor | None) -> LogProbs:
    """See :func:`keytoken_kernels.logprob.token_log_probs`."""
    _check_inside(labels, logits.shape[1], "labels", "the vocabulary")
    log_prob, entropy, log_sum_exp = (
        torch.empty(labels.shape[0], dtype=_working_dtype(logits), device=logits.device) for _ in range(3)
    )
    for chunk, x in _chunks(logits, rows):
        of_label = x.gather(1, labels[chunk, None]).squeeze(1)
        highest, shifted = _shift(x, temperature)
        weights = shifted.exp()
        total = weights.sum(1)
        log_total = total.log()
        log_prob[chunk] = (of_label - highest) / temperature - log_total
        entropy[chunk] = log_total - weights.mul_(shifted).sum(1) / total
        log_sum_exp[chunk] = highest / temperature + log_total
    return LogProbs(log_prob, entropy, log_sum_exp)


def token_log_probs_gradient(
    logits: Tensor,
    labels: Tensor,
    found: LogProbs,
    grad_log_prob: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    rows: Tensor | None,
    out: Tensor,
) -> Tensor:
    """See :func:`keytoken_kernels.logprob.token_log_probs_gradient`."""
    active = grad_log_prob != 0
    if grad_entropy is not None:
        active = active | (grad_entropy != 0)
    out.index_fill_(0, (~active).nonzero().squeeze(1), 0)
    wanted = active.nonzero().squeeze(1)
    _check_inside(labels[wanted], logits.shape[1], "labels", "the vocabulary")
    for chunk, x in _chunks(logits, wanted if rows is None else rows[wanted]):
        item = wanted[chunk]
        log_p = x.div_(temperature).sub_(found.log_sum_exp[item, None]).clamp_(min=BANNED)
        p = log_p.exp()
        # d log_prob / d logit = (1{j = y} - p_j) / T and d entropy / d logit = -p_j (log p_j + H) / T.
        slope = grad_log_prob[item, None].expand_as(p)
        if grad_entropy is not None:
            slope = slope + grad_entropy[item, None] * log_p.add_(found.entropy[item, None])
        gradient = p.mul_(slope).neg_()
        gradient.scatter_add_(1, labels[item, None], grad_log_prob[item, None])
        out[item] = gradient.div_(temperature).to(out.dtype)
    return out


def truncated_entropy(logits: Tensor, top_p: float, temperature: float, rows: Tensor | None) -> Tensor:
    """See :func:`keytoken_kernels.logprob.truncated_entropy`; by sorting, with sums in float64."""
    count = logits.shape[0] if rows is None else rows.shape[0]
    entropy = torch.empty(count, dtype=_working_dtype(logits), device=logits.device)
    for chunk, x in _chunks(logits, rows):
        _, shifted = _shift(x, temperature)
        shifted = shifted.sort(dim=1, descending=True).values.double()
        weights = shifted.exp()
        mass = weights.cumsum(1)
        # A token belongs to the nucleus if the tokens before it do not yet hold top_p.
        before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
        inside = before < top_p * (1 - MASS_SLACK) * mass[:, -1:]
        # A row of NaN or of banned tokens only has no nucleus: 0 / 0 below is the NaN it should be.
        weights = weights.where(inside, 0)
        total = weights.sum(1)
        entropy[chunk] = (total.log() - (weights * shifted).sum(1) / total).to(entropy.dtype)
    return entropy


def _working_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: Tensor, rows: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Positions in the output, and a copy of their rows of logits that the caller may overwrite."""
    if rows is not None:
        _check_inside(rows, logits.shape[0], "rows", "the logits")
    count = logits.shape[0] if rows is None else rows.shape[0]
    size = max(1, CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, count, size):
        chunk = slice(start, start + size)
        part = logits[chunk] if rows is None else logits[rows[chunk]]
        yield chunk, part.to(_working_dtype(logits), copy=rows is None)


def _shift(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Highest logit of every row and ``(x - highest) / temperature``, in place of ``x``."""
    highest = x.amax(1).clamp_(min=BANNED)
    return highest, x.sub_(highest[:, None]).div_(temperature).clamp_(min=BANNED)


def _check_inside(ids: Tensor, size: int, name: str, of: str) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
        raise ValueError(
            f"{name} must lie in [0, {size}), the size of {of}; got [{int(ids.min())}, {int(ids.max())}]"
        )
