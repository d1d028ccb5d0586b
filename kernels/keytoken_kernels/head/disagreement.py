"""How much the answers to one prompt disagree about the next token, position by position.

Source: TW-GRPO (arXiv 2505.24718 and its published code). At position t, counted from the start of every
answer, with log p_g of answer g over the vocabulary of V tokens, and G answers to the prompt::

    m_t = 1/G sum_g log p_{g,t}
    D_t = 1/G sum_g sum_v (exp(d) - d - 1),    d = clamp(m_{t,v} - log p_{g,t,v}, -11, 11)

An answer that has ended before t counts as the uniform distribution, log p = -log V. D_t is 0 where all
agree. It is no divergence in nats: exp(m) does not sum to 1, and every token counts alike, likely or not.

Departure: p is the distribution that answers are sampled from, after the temperature. The answers of a group
need not run through the model together; the published code takes the G answers of one forward pass.

No ``[N, V]`` array is needed: positions are independent of each other, so a chunk of logits has to hold all
answers at its positions, and no more. Plain torch: a handful of passes over a chunk that a matrix product has
just filled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 11.0  # of d, in nats: TW-GRPO's


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows are one answer, and which answers are to one prompt.

    Example: two answers of 3 and 1 tokens to prompt 7 and one of 2 tokens to prompt 9 are
    ``Groups(lengths=tensor([3, 1, 2]), prompts=tensor([7, 7, 9]))``, with 6 rows, answer after answer.

    Attributes:
        lengths: [B] int64 on the CPU, tokens of each answer; an empty answer counts as one that has ended.
        prompts: [B] integers on the CPU, equal for the answers to one prompt.
    """

    lengths: Tensor
    prompts: Tensor


@dataclass(frozen=True, slots=True)
class Positions:
    """Positions of groups that equally many answers reach.

    Attributes:
        rows: [P, S] int64 on the CPU, the rows of the S answers that reach each of the P positions.
        answers: [P] int64 on the CPU, answers of the group, ended ones included.
    """

    rows: Tensor
    answers: Tensor


def positions_of(groups: Groups, max_rows: int) -> Iterator[Positions]:
    """Every position of every group once, in pieces of at most ``max_rows`` rows, or of one position."""
    answer = torch.arange(len(groups.lengths)).repeat_interleave(groups.lengths)
    first = groups.lengths.cumsum(0) - groups.lengths
    position = torch.arange(len(answer)) - first[answer]
    _, prompt, answers = groups.prompts.unique(return_inverse=True, return_counts=True)
    # Rows in the order of prompt, then position, then answer: those of one position follow one another.
    by_position = prompt[answer] * (len(answer) + 1) + position
    order = by_position.argsort(stable=True)
    _, reached = by_position[order].unique_consecutive(return_counts=True)
    start = reached.cumsum(0) - reached
    for size in reached.unique().tolist():
        here = start[reached == size]
        rows = order[here[:, None] + torch.arange(size)]
        for part in rows.split(max(max_rows // size, 1)):
            yield Positions(part, answers[prompt[answer[part[:, 0]]]])


def disagreement(log_probs: Tensor, answers: Tensor) -> Tensor:
    """D_t of some positions.

    Args:
        log_probs: [P, S, V] log-probs of the S answers that reach each position; overwritten.
        answers: [P] answers of the group, at least S.

    Returns:
        [P], of the dtype of ``log_probs``; NaN where one of them is NaN or infinite.
    """
    uniform = -math.log(log_probs.shape[-1])
    ended = (answers - log_probs.shape[1]).to(log_probs.dtype)
    mean = log_probs.sum(dim=1).add_(ended[:, None], alpha=uniform).div_(answers[:, None])
    of_ended = _excess(mean - uniform).sum(dim=-1) * ended
    gaps = log_probs.neg_().add_(mean[:, None])
    return (_excess(gaps).sum(dim=(1, 2)) + of_ended) / answers


def _excess(gaps: Tensor) -> Tensor:
    """exp(d) - d - 1 of clamped gaps, which are overwritten; expm1 keeps what is left of small ones."""
    gaps.clamp_(-LIMIT, LIMIT)
    return torch.expm1(gaps).sub_(gaps)
