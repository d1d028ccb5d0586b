"""Packs: answers with one copy of their prompt in one sequence (:mod:`keytoken.prefix.layout`).

A pack is made of what the model reads for each answer (:class:`keytoken.attribution.views.ModelInput`), so it
is the same for the real input and for every view: whatever a view did to the prompt, answers that still
share all of it, its tokens, positions and pixels, share a stem. Positions come with the answers, so they
start again after the prompt in every branch, by the rule of the model's own family.

Axes: P tokens of a prompt, S scored tokens of an answer, L tokens of a pack, N scored tokens of all its
answers, R position rows (verl has 4, a text row and three of M-RoPE; transformers takes those 3 as well).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keytoken.attribution.views.base import ModelInput
from keytoken.attribution.views.masked import TEXT_ROW_COUNT
from keytoken.errors import ConfigurationError, DataError
from keytoken.prefix.layout import Cost, Tree, apart, branch_rows, bundled, cost_of


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One answer behind a stem.

    Attributes:
        place: Of the answer among the inputs.
        input_ids: [S] the prompt's last token, then the answer without the last token that is scored.
        position_ids: [R, S].
        labels: [S] the tokens that are scored, the first ones of the answer.
    """

    place: int
    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Answers that share a prompt.

    Attributes:
        prompt: Its name.
        input_ids: [P - 1] the stem, the prompt without its last token.
        position_ids: [R, P - 1].
        media: Its pixel tensors and grids.
        branches: At least one.
    """

    prompt: str
    input_ids: Tensor
    position_ids: Tensor
    media: Mapping[str, Tensor]
    branches: tuple[Branch, ...]

    @property
    def tree(self) -> Tree:
        """Lengths of stem and branches."""
        return Tree(len(self.input_ids), tuple(len(branch.labels) for branch in self.branches))


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """One sequence for the model, and where its answers are in it.

    Attributes:
        input_ids: [L].
        position_ids: [R, L]. A text row numbers the places of the pack: no rotary embedding reads it, and
            transformers would take a number that falls for the start of another sequence.
        media: Pixel tensors and grids of all prompts, in their order.
        trees: Where stems and branches lie.
        rows: [N] places of the hidden states that predict the scored tokens, answer after answer.
        labels: [N] those tokens.
        places: Of the answers among the inputs, in the order of ``rows``.
    """

    input_ids: Tensor
    position_ids: Tensor
    media: Mapping[str, Tensor]
    trees: tuple[Tree, ...]
    rows: Tensor
    labels: Tensor
    places: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    def by_place(self, values: Tensor) -> dict[int, Tensor]:
        """Values [..., N] at ``rows``, as [..., S] for each answer by its place among the inputs."""
        lengths = [branch for tree in self.trees for branch in tree.branches]
        return dict(zip(self.places, values.split(lengths, dim=-1), strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """The packs of a batch, and what they cost beside what they might.

    Attributes:
        packs: In the order of the inputs.
        cost: Of these packs.
        whole: If no group had been split; less than ``cost`` where the token budget split one.
        separate: If every answer had a copy of its prompt.
    """

    packs: tuple[Pack, ...]
    cost: Cost
    whole: Cost
    separate: Cost


def pack_inputs(
    inputs: Sequence[ModelInput], max_tokens: int, scored: Sequence[int] | None = None
) -> Packing:
    """Pack answers, each prompt once as far as the token budget allows.

    Args:
        inputs: What the model reads for each answer, in any order.
        max_tokens: Most tokens of a pack. A group with more is split, and each part has a copy of the prompt;
            groups with fewer are put together.
        scored: How many tokens of each answer are scored, from its first; None for all. See
            :func:`last_weighted`.

    Raises:
        ConfigurationError: A prompt with one answer to it has more than ``max_tokens``.
        DataError: An answer without a prompt, or fewer tokens than are to be scored.
    """
    groups = groups_of(inputs, scored)
    bundles = arrange(groups, max_tokens)
    whole = [group.tree for group in groups]
    return Packing(
        packs=tuple(build_pack(bundle) for bundle in bundles),
        cost=cost_of(group.tree for bundle in bundles for group in bundle),
        whole=cost_of(whole),
        separate=cost_of(apart(whole)),
    )


def last_weighted(weights: Iterable[Tensor]) -> list[int]:
    """How many tokens of each answer a loss needs, if a token of weight 0 adds nothing to it.

    Example: weights 0, 1, 0.5, 0, 0 need the first three tokens; what follows is neither scored nor seen.
    """
    return [int(kept[-1]) + 1 if len(kept := row.nonzero()[:, 0]) else 0 for row in weights]


def groups_of(inputs: Sequence[ModelInput], scored: Sequence[int] | None = None) -> list[Group]:
    """The groups of a batch, in the order of their first answers; answers without a scored token have none.

    Equal names are not enough: a view may draw anew for each answer (``blackened`` with ``per=response``).
    Such answers are groups of one.

    Raises:
        DataError: See :func:`pack_inputs`.
    """
    counts = [_answer_length(one) for one in inputs] if scored is None else scored
    found: list[tuple[ModelInput, list[Branch]]] = []
    named: dict[str, list[int]] = {}
    for place, (one, count) in enumerate(zip(inputs, counts, strict=True)):
        _check(one, count)
        if not count:
            continue
        alike = named.setdefault(one.prompt, [])
        number = next((number for number in alike if _same_prompt(found[number][0], one)), None)
        if number is None:
            number = len(found)
            alike.append(number)
            found.append((one, []))
        found[number][1].append(_branch(one, place, count))
    return [_group(first, branches) for first, branches in found]


def arrange(groups: Iterable[Group], max_tokens: int) -> list[list[Group]]:
    """Which groups, or parts of groups, go into which pack.

    Raises:
        ConfigurationError: See :func:`pack_inputs`.
    """
    groups = list(groups)
    for group in groups:
        longest = max(group.tree.branches)
        if group.tree.stem + longest > max_tokens:
            raise ConfigurationError(
                f"prompt {group.prompt} has {group.tree.stem + 1} tokens and an answer with {longest} to "
                f"score: more than the {max_tokens} that a pack may have. Allow more tokens in a pack, or "
                "shorten the prompt."
            )
    return [
        [
            replace(groups[number], branches=tuple(groups[number].branches[place] for place in part))
            for number, part in bundle
        ]
        for bundle in bundled([group.tree for group in groups], max_tokens)
    ]


def build_pack(groups: Sequence[Group]) -> Pack:
    """One sequence of some groups."""
    pieces = list[Group | Branch]()
    for group in groups:
        pieces += (group, *group.branches)
    branches = [branch for group in groups for branch in group.branches]
    trees = tuple(group.tree for group in groups)
    labels = torch.cat([branch.labels for branch in branches])
    positions = torch.cat([piece.position_ids for piece in pieces], dim=-1)
    if len(positions) == TEXT_ROW_COUNT:
        positions[0] = torch.arange(positions.shape[1])
    names = {name: None for group in groups for name in group.media}
    return Pack(
        input_ids=torch.cat([piece.input_ids for piece in pieces]),
        position_ids=positions,
        media={
            name: _joined([group.media[name] for group in groups if name in group.media]) for name in names
        },
        trees=trees,
        rows=branch_rows(trees).to(labels.device),
        labels=labels,
        places=tuple(branch.place for branch in branches),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One after the other; of one part no copy, since pixels are most of a small pass's memory."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _group(first: ModelInput, branches: Sequence[Branch]) -> Group:
    stem = slice(first.prompt_length - 1)
    return Group(
        prompt=first.prompt,
        input_ids=first.input_ids[stem],
        position_ids=first.position_ids[:, stem],
        media=first.media,
        branches=tuple(branches),
    )


def _branch(one: ModelInput, place: int, count: int) -> Branch:
    start = one.prompt_length
    seen = slice(start - 1, start - 1 + count)
    return Branch(
        place=place,
        input_ids=one.input_ids[seen],
        position_ids=one.position_ids[:, seen],
        labels=one.input_ids[start : start + count],
    )


def _same_prompt(one: ModelInput, other: ModelInput) -> bool:
    prompt = slice(one.prompt_length)
    return (
        one.prompt_length == other.prompt_length
        and torch.equal(one.input_ids[prompt], other.input_ids[prompt])
        and torch.equal(one.position_ids[:, prompt], other.position_ids[:, prompt])
        and same_media(one.media, other.media)
    )


def same_media(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two prompts show the same, pixel by pixel where they are not one object."""
    if one is other:
        return True
    return one.keys() == other.keys() and all(
        value is other[name] or torch.equal(value, other[name]) for name, value in one.items()
    )


def _check(one: ModelInput, count: int) -> None:
    length = _answer_length(one)
    if one.prompt_length < 1 and length:
        raise DataError(
            f"prompt {one.prompt} has no token, so nothing predicts the first of its answer's {length}; give "
            "it a prompt."
        )
    if not 0 <= count <= length:
        raise DataError(
            f"{count} tokens of an answer to prompt {one.prompt} are to be scored, and it has {length}; pass "
            "the weights of the same batch."
        )


def _answer_length(one: ModelInput) -> int:
    return len(one.input_ids) - one.prompt_length
