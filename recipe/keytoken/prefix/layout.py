"""Trees: where a prompt and its answers lie in one sequence, which token sees which, and what that costs.

A tree is a stem, the prompt without its last token, and one branch for each answer: that last token, then
the answer without its own last one. So every place of a branch predicts one token of its answer, and none
predicts two::

    prompt  p q r    answers  a b c   and  d e       (r is the prompt's last token)

    place      0 1 | 2 3 4 | 5 6
    token      p q | r a b | r d
    predicts       | a b c | d e
    sees       causally itself and p q; places 5 and 6 nothing of 2 to 4

A sequence is a row of trees, none of which sees another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# How the names of implementations of attention begin that can compute trees (keytoken.prefix.attention).
SHARING_ATTENTION = ("sdpa", "flash_attention", "flex_attention")
# The one of them that in a pass with a gradient computes pairs of answers and hides them.
HIDING_ATTENTION = "sdpa"


@dataclass(frozen=True, slots=True)
class Tree:
    """Lengths of one tree.

    Attributes:
        stem: Tokens that all branches see; 0 for a prompt of one token.
        branches: Tokens of each branch.
    """

    stem: int
    branches: tuple[int, ...]

    def __len__(self) -> int:
        return self.stem + sum(self.branches)

    @property
    def segments(self) -> tuple[int, ...]:
        """Lengths of the stem and its branches, in their order."""
        return (self.stem, *self.branches)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a forward pass computes.

    Attributes:
        tokens: Places in the transformer, to which the work of all its weights is proportional.
        pairs: Query and key pairs, to which the work of attention is proportional.
        prompts: Prompts computed, with their images and videos.
        hidden: Pairs between branches that are computed as well and then hidden, if all branches of a tree
            are one call with a mask (:data:`HIDING_ATTENTION`).
    """

    tokens: int
    pairs: int
    prompts: int
    hidden: int

    def attended(self, hidden: bool) -> int:
        """Pairs that attention computes, with those it hides or without."""
        return self.pairs + self.hidden * hidden

    def flops(self, weights: int, layers: int, width: int, hidden: bool = False) -> int:
        """Floating-point operations of one forward pass over the text model.

        Args:
            weights: Parameters that every token is multiplied with.
            layers: Number of attention layers.
            width: Query heads times their size.
            hidden: Whether attention computes the hidden pairs.
        """
        return 2 * weights * self.tokens + 4 * layers * width * self.attended(hidden)


def cost_of(trees: Iterable[Tree]) -> Cost:
    """What a pass over these trees computes."""
    trees = list(trees)
    pairs = sum(
        _triangle(tree.stem) + sum(branch * tree.stem + _triangle(branch) for branch in tree.branches)
        for tree in trees
    )
    hidden = sum(sum(tree.branches) ** 2 - sum(branch**2 for branch in tree.branches) for tree in trees)
    return Cost(tokens=sum(map(len, trees)), pairs=pairs, prompts=len(trees), hidden=hidden)


def apart(trees: Iterable[Tree]) -> list[Tree]:
    """The same answers, each with a copy of its prompt: what a pass without sharing computes."""
    return [Tree(tree.stem, (branch,)) for tree in trees for branch in tree.branches]


def bundled(trees: Sequence[Tree], max_tokens: int) -> list[list[tuple[int, range]]]:
    """Which branches of which trees go into one sequence: as many as have room, in their order.

    A tree that does not fit is cut, and each part has a copy of its stem; one branch that is too long by
    itself gets a sequence of its own.

    Returns:
        For each sequence the numbers of its trees, each with the numbers of its branches.
    """
    bundles: list[list[tuple[int, range]]] = []
    room = 0
    for number, tree in enumerate(trees):
        for part in _parts(tree, max_tokens):
            length = tree.stem + sum(tree.branches[place] for place in part)
            if length > room:
                bundles.append([])
                room = max_tokens
            bundles[-1].append((number, part))
            room -= length
    return bundles


def _parts(tree: Tree, max_tokens: int) -> list[range]:
    """Consecutive branches that fit behind one copy of the stem."""
    parts, start, length = list[range](), 0, tree.stem
    for place, branch in enumerate(tree.branches):
        if place > start and length + branch > max_tokens:
            parts.append(range(start, place))
            start, length = place, tree.stem
        length += branch
    return [*parts, range(start, len(tree.branches))]


def branch_rows(trees: Sequence[Tree]) -> Tensor:
    """``[N]`` int64 places of all branches, in their order: those that predict something."""
    parts, start = [torch.empty(0, dtype=torch.int64)], 0
    for tree in trees:
        parts.append(torch.arange(start + tree.stem, start + len(tree)))
        start += len(tree)
    return torch.cat(parts)


def families(trees: Sequence[Tree]) -> tuple[Tensor, Tensor]:
    """What the tree mask is made of: a place sees those up to itself in its own segment and in its stem.

    Returns:
        ``[L]`` int64 numbers of each place's segment, and ``[L]`` numbers of its stem's.
    """
    lengths, stems, number = list[int](), list[int](), 0
    for tree in trees:
        lengths += tree.segments
        stems += [number] * len(tree.segments)
        number += len(tree.segments)
    repeats = torch.tensor(lengths, dtype=torch.int64)
    return torch.arange(number).repeat_interleave(repeats), torch.tensor(stems).repeat_interleave(repeats)


def seen_by_branches(tree: Tree) -> Tensor:
    """``[sum(branches), len(tree)]`` bool: what each place of the branches sees of its tree."""
    own, _ = families([tree])
    places = torch.arange(len(tree))
    rows = slice(tree.stem, None)
    branch = (own[rows, None] == own) & (places[rows, None] >= places)
    return branch | (places < tree.stem)


@dataclass(frozen=True, slots=True)
class KeySegments:
    """The queries' segments, each with its keys, for attention over segments of unequal length.

    With queries and keys aligned at their ends a causal kernel computes exactly the tree: the last query of a
    segment sees all of its keys, the one before all but one.

    Attributes:
        index: ``[K]`` int64 places of the keys of one segment after another.
        query_lengths: Queries of each segment; they are the places of the sequence in order.
        key_lengths: Keys of each segment.
    """

    index: Tensor
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


def key_segments(trees: Sequence[Tree]) -> KeySegments:
    """See :class:`KeySegments`. Segments without queries are left out."""
    parts, queries, keys = [], list[int](), list[int]()
    for own, stem in _segments(trees):
        if own:
            parts.append(torch.tensor([*stem, *own]))
            queries.append(len(own))
            keys.append(len(stem) + len(own))
    return KeySegments(torch.cat(parts), tuple(queries), tuple(keys))


def _segments(trees: Sequence[Tree]) -> Iterator[tuple[range, range]]:
    """Places of every segment, and of the stem that it sees beside itself."""
    start = 0
    for tree in trees:
        stem = range(start, start + tree.stem)
        yield stem, range(0)
        start = stem.stop
        for length in tree.branches:
            yield range(start, start + length), stem
            start += length


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
