"""The head for chosen rows, with measures of whole distributions: one product serves all of them.

Beside log-prob and entropy (:mod:`keytoken_kernels.head.chunked`) a chunk of logits can give the entropy of
its nucleus, which ToR selects by, the disagreement within groups of answers, which TW-GRPO weighs by, and the
collision probability, which the norm of a token's gradient needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from keytoken_kernels.dispatch import Impl
from keytoken_kernels.head.chunked import ChunkedLogits, check_inputs, default_chunk_rows
from keytoken_kernels.head.disagreement import Groups, Positions, disagreement, positions_of
from keytoken_kernels.logprob import token_log_probs, truncated_entropy


@dataclass(frozen=True, slots=True)
class HeadMeasures:
    """What was measured of every row.

    Attributes:
        log_prob: [N] nats.
        entropy: [N] nats, of the whole distribution.
        truncated_entropy: [N] nats, of the nucleus; None unless asked for.
        disagreement: [N], the same for all answers of a group at one position; None unless asked for.
        collision: [N] sum of the squared probabilities, that two draws are equal; None unless asked for.
    """

    log_prob: Tensor
    entropy: Tensor
    truncated_entropy: Tensor | None
    disagreement: Tensor | None
    collision: Tensor | None = None


@torch.no_grad()
def head_measures(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    top_p: float | None = None,
    groups: Groups | None = None,
    collision: bool = False,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> HeadMeasures:
    """Log-prob of ``labels``, entropy, and what else is asked for; no gradient.

    With ``groups`` a second chunk, of differences, is alive beside the logits, and the means of a position.

    Args:
        hidden: ``[N, H]`` last hidden states, as in :func:`keytoken_kernels.head.head_log_probs`.
        weight: ``[V, H]`` weight of the language-model head.
        labels: ``[N]`` int64 token ids.
        temperature: divides the logits; must be positive.
        top_p: mass of the nucleus, for :func:`keytoken_kernels.logprob.truncated_entropy`.
        groups: rows of one answer and answers of one prompt, for
            :func:`keytoken_kernels.head.disagreement.disagreement`. Every group must be whole.
        collision: whether ``sum_v p_v^2`` is measured, as exp(logsumexp(2 z) - 2 logsumexp(z)): one more
            reduction of the same logits, at half the temperature.
        chunk_rows: rows of logits alive at a time, though never fewer than the answers at a position.
        impl: see :func:`keytoken_kernels.dispatch.resolve`. The disagreement has one implementation.

    Raises:
        ValueError: as :func:`keytoken_kernels.head.head_log_probs`; a ``top_p`` outside (0, 1]; groups of
            another number of rows.
    """
    check_inputs(hidden, weight, labels, temperature, chunk_rows)
    num_rows = len(hidden)
    if groups is not None and (
        len(groups.lengths) != len(groups.prompts) or int(groups.lengths.sum()) != num_rows
    ):
        raise ValueError(
            f"groups of {len(groups.prompts)} answers with {groups.lengths.tolist()} rows do not describe "
            f"{num_rows} rows"
        )
    wanted = default_chunk_rows(len(weight), weight.device) if chunk_rows is None else chunk_rows
    chunks = list(_chunks(num_rows, groups, wanted))
    widest = max((chunk.rows.numel() for chunk in chunks), default=1)
    logits_of = ChunkedLogits(hidden, weight, widest, widest)

    def column(asked_for: bool) -> Tensor | None:
        return hidden.new_empty(num_rows, dtype=logits_of.dtype) if asked_for else None

    log_prob, entropy = (hidden.new_empty(num_rows, dtype=logits_of.dtype) for _ in range(2))
    found = HeadMeasures(
        log_prob, entropy, column(top_p is not None), column(groups is not None), column(collision)
    )
    for chunk in chunks:
        rows = chunk.rows.flatten().to(hidden.device)
        logits = logits_of(hidden.index_select(0, rows))
        ids = labels.index_select(0, rows)
        part = token_log_probs(logits, ids, temperature, impl=impl)
        log_prob[rows], entropy[rows] = part.log_prob, part.entropy
        if found.truncated_entropy is not None and top_p is not None:
            found.truncated_entropy[rows] = truncated_entropy(logits, top_p, temperature, impl=impl)
        if found.collision is not None:
            doubled = token_log_probs(logits, ids, temperature / 2, impl=impl).log_sum_exp
            found.collision[rows] = (doubled - 2 * part.log_sum_exp).exp().clamp(max=1.0)
        if found.disagreement is not None:  # last, because it works in the logits' memory
            log_probs = logits.div_(temperature).sub_(part.log_sum_exp[:, None])
            values = disagreement(log_probs.unflatten(0, chunk.rows.shape), chunk.answers.to(hidden.device))
            found.disagreement[rows] = values.repeat_interleave(chunk.rows.shape[1])
    return found


def _chunks(num_rows: int, groups: Groups | None, max_rows: int) -> Iterator[Positions]:
    """All rows once; without groups in their order, each a group of its own."""
    if groups is not None:
        yield from positions_of(groups, max_rows)
        return
    for rows in torch.arange(num_rows)[:, None].split(max_rows):
        yield Positions(rows, torch.ones(len(rows), dtype=torch.int64))
