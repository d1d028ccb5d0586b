"""Measures of whole distributions against float64 transcriptions of the definitions of ToR and TW-GRPO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keytoken_kernels.head import Groups, head_log_probs, head_measures

# Buffers start as NaN: what is not written shows.
pytestmark = pytest.mark.usefixtures("poisoned_memory")
WIDTH = 24
# Answers to prompts 3, 1 and 5 in no order: ragged, one empty, one prompt with a single answer.
LENGTHS, PROMPTS = [4, 0, 6, 2, 9, 1, 3], [3, 1, 1, 3, 5, 3, 1]


def operands(vocab: int, rows: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels; distributions from nearly certain to broad."""
    draw = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(rows, WIDTH, generator=draw) * torch.linspace(0.1, 2.0, rows)[:, None]
    weight = torch.randn(vocab, WIDTH, generator=draw)
    labels = torch.randint(0, vocab, (rows,), generator=draw)
    return hidden.to(device), weight.to(device), labels.to(device)


def distributions(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[N, V] log-probs in float64."""
    return (hidden.double() @ weight.double().T / temperature).log_softmax(-1).cpu()


def nucleus_entropy(log_probs: list[float], top_p: float) -> float:
    """Of the fewest most probable tokens whose probabilities sum to ``top_p``, made to sum to 1."""
    kept: list[float] = []
    for p in sorted(map(math.exp, log_probs), reverse=True):
        if sum(kept) >= top_p:
            break
        kept.append(p)
    total = sum(kept)
    return -sum(p / total * math.log(p / total) for p in kept)


def tw_grpo(answers: list[Tensor]) -> list[float]:
    """D_t of one group, from the [R, V] log-probs of each answer, one token of the vocabulary at a time."""
    vocab, longest = max(part.shape[1] for part in answers), max(map(len, answers))
    found = []
    for t in range(longest):
        log_p = [part[t].tolist() if t < len(part) else [-math.log(vocab)] * vocab for part in answers]
        mean = [sum(column) / len(answers) for column in zip(*log_p, strict=True)]
        total = 0.0
        for own in log_p:
            for m, p in zip(mean, own, strict=True):
                d = min(max(m - p, -11.0), 11.0)
                total += math.exp(d) - d - 1.0
        found.append(total / len(answers))
    return found


def true_disagreement(log_probs: Tensor, lengths: list[int], prompts: list[int]) -> Tensor:
    """[N] by the transcription, group by group."""
    parts = log_probs.split(lengths)
    rows: list[float] = []
    for length, prompt in zip(lengths, prompts, strict=True):
        group = [part for part, other in zip(parts, prompts, strict=True) if other == prompt]
        rows += tw_grpo(group)[:length]
    return torch.tensor(rows, dtype=torch.float64)


def groups_of(lengths: list[int], prompts: list[int]) -> Groups:
    return Groups(torch.tensor(lengths), torch.tensor(prompts))


@pytest.mark.parametrize(("vocab", "chunk"), [(7, None), (301, 5), (451, 2)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_matches_the_definitions(
    vocab: int, chunk: int | None, temperature: float, impl: Any, device: torch.device
) -> None:
    hidden, weight, labels = operands(vocab, sum(LENGTHS), device)
    found = head_measures(
        hidden,
        weight,
        labels,
        temperature,
        top_p=0.95,
        groups=groups_of(LENGTHS, PROMPTS),
        chunk_rows=chunk,
        impl=impl,
    )
    true = distributions(hidden, weight, temperature)
    assert found.truncated_entropy is not None and found.disagreement is not None
    nucleus = torch.tensor([nucleus_entropy(row, 0.95) for row in true.tolist()])
    assert (found.truncated_entropy.cpu() - nucleus).abs().max() < 2e-5
    assert nucleus.min() < 0.05 < 1.0 < nucleus.max()  # else the comparison would show little
    wanted = true_disagreement(true, LENGTHS, PROMPTS)
    torch.testing.assert_close(found.disagreement.double().cpu(), wanted, rtol=1e-5, atol=1e-4)
    plain = head_log_probs(hidden, weight, labels, temperature, impl=impl)
    # Float32 logits of other chunks: how a matrix product rounds depends on its size and on the processor.
    torch.testing.assert_close(found.log_prob, plain[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.entropy, plain[1], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("vocab", "chunk"), [(7, None), (301, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_collision_is_the_sum_of_squared_probabilities(
    vocab: int, chunk: int | None, temperature: float, impl: Any, device: torch.device
) -> None:
    hidden, weight, labels = operands(vocab, 40, device)
    groups = groups_of([10, 30], [0, 0])  # which writes into the logits
    found = head_measures(
        hidden, weight, labels, temperature, collision=True, groups=groups, chunk_rows=chunk, impl=impl
    )
    true = distributions(hidden, weight, temperature).exp().square().sum(dim=-1)
    assert found.collision is not None and found.collision.max() <= 1.0
    assert true.min() < 0.05 or vocab == 7
    assert true.max() > 0.5
    torch.testing.assert_close(found.collision.double().cpu(), true, rtol=2e-5, atol=0.0)


def test_the_collision_of_float64_and_of_certain_rows() -> None:
    weight = torch.eye(5, dtype=torch.float64)
    hidden = torch.stack([torch.zeros(5), torch.tensor([400.0, 0, 0, 0, 0]), torch.arange(5.0)]).double()
    found = head_measures(hidden, weight, torch.tensor([0, 0, 4]), collision=True).collision
    assert found is not None
    squares = hidden[2].softmax(-1).square().sum()
    assert found.tolist() == pytest.approx([0.2, 1.0, float(squares)], rel=1e-14)


def test_what_is_not_asked_for_is_not_computed() -> None:
    hidden, weight, labels = operands(33, 6)
    found = head_measures(hidden, weight, labels, chunk_rows=4)
    assert found.truncated_entropy is None and found.disagreement is None and found.collision is None
    log_prob, entropy = head_log_probs(hidden, weight, labels, chunk_rows=4)
    assert torch.equal(found.log_prob, log_prob) and torch.equal(found.entropy, entropy)


def test_the_clamp_holds_on_both_sides() -> None:
    """Two certain answers that contradict each other: gaps of 100 nats, cut at 11."""
    hidden, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 200.0 * torch.eye(2)
    found = head_measures(hidden, weight, torch.tensor([0, 1]), groups=groups_of([1, 1], [0, 0]))
    one = (math.exp(11.0) - 11.0 - 1.0) + (math.exp(-11.0) + 11.0 - 1.0)
    assert found.disagreement is not None
    assert found.disagreement.tolist() == pytest.approx([one, one], rel=1e-6)


def test_small_disagreements_do_not_vanish() -> None:
    """exp(d) - d - 1 of gaps around 5e-5 lies below the rounding of its first term."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(101, WIDTH, generator=draw)
    hidden = torch.randn(1, WIDTH, generator=draw) + 1e-5 * torch.randn(4, WIDTH, generator=draw)
    groups = ([1, 1, 1, 1], [0, 0, 0, 0])
    found = head_measures(hidden, weight, torch.zeros(4, dtype=torch.int64), groups=groups_of(*groups))
    wanted = true_disagreement(distributions(hidden, weight, 1.0), *groups)
    assert found.disagreement is not None and 1e-8 < float(wanted[0]) < 1e-6
    torch.testing.assert_close(found.disagreement.double(), wanted, rtol=5e-2, atol=0.0)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_answers_that_agree(size: int) -> None:
    hidden, weight, labels = operands(57, 5)
    found = head_measures(
        hidden.repeat(size, 1), weight, labels.repeat(size), groups=groups_of([5] * size, [0] * size)
    )
    assert found.disagreement is not None
    assert found.disagreement.abs().max() < 1e-9


def test_an_ended_answer_counts_as_uniform() -> None:
    """A policy that is uniform itself agrees with those that have ended; any other does not."""
    weight, labels = operands(19, 3)[1:]
    groups = groups_of([3, 0, 0], [4, 4, 4])
    flat = head_measures(torch.zeros(3, WIDTH), weight, labels, groups=groups).disagreement
    sharp = head_measures(torch.ones(3, WIDTH), weight, labels, groups=groups).disagreement
    assert flat is not None and sharp is not None
    assert flat.abs().max() < 1e-9
    assert sharp.min() > 1.0


def test_order_of_answers_and_chunks_do_not_matter() -> None:
    """Any order of the answers, any chunk, and any split into whole groups gives the same numbers."""
    hidden, weight, labels = operands(83, sum(LENGTHS))
    parts = hidden.split(LENGTHS), labels.split(LENGTHS)

    def measured(answers: list[int], chunk: int | None) -> dict[int, Tensor]:
        chosen = (torch.cat([part[answer] for answer in answers]) for part in parts)
        lengths = [LENGTHS[answer] for answer in answers]
        groups = groups_of(lengths, [PROMPTS[answer] for answer in answers])
        found = head_measures(
            *(next(chosen), weight, next(chosen)), top_p=0.9, groups=groups, chunk_rows=chunk
        )
        assert found.disagreement is not None and found.truncated_entropy is not None
        values = torch.stack([found.log_prob, found.truncated_entropy, found.disagreement], dim=-1)
        return dict(zip(answers, values.split(lengths), strict=True))

    whole = measured(list(range(len(LENGTHS))), None)
    others = [measured([6, 2, 5, 0, 3, 4, 1], 1), measured([5, 3, 0, 4], 3) | measured([1, 6, 2], None)]
    for other in others:
        for answer, values in whole.items():
            torch.testing.assert_close(other[answer], values, rtol=1e-6, atol=1e-6)


def test_no_rows() -> None:
    for groups in (None, groups_of([0, 0], [1, 2])):
        found = head_measures(
            torch.zeros(0, 4), torch.zeros(5, 4), torch.zeros(0, dtype=torch.int64), top_p=0.9, groups=groups
        )
        assert found.log_prob.shape == (0,) and found.truncated_entropy is not None
        assert found.truncated_entropy.shape == (0,)
        assert groups is None or (found.disagreement is not None and found.disagreement.shape == (0,))


def test_a_broken_weight_shows() -> None:
    hidden, weight, labels = operands(11, 4)
    weight[3] = torch.nan
    found = head_measures(hidden, weight, labels, top_p=0.9, groups=groups_of([2, 2], [0, 0]))
    assert found.truncated_entropy is not None and found.disagreement is not None
    assert found.truncated_entropy.isnan().all() and found.disagreement.isnan().all()


def test_groups_of_other_rows_are_refused() -> None:
    hidden, weight, labels = operands(11, 4)
    with pytest.raises(ValueError, match=r"groups of 2 answers with \[2, 3\] rows do not describe 4 rows"):
        head_measures(hidden, weight, labels, groups=groups_of([2, 3], [0, 0]))
    with pytest.raises(ValueError, match=r"groups of 1 answers with \[2, 2\] rows"):
        head_measures(hidden, weight, labels, groups=groups_of([2, 2], [0]))


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_array_is_larger_than_a_chunk() -> None:
    vocab, rows, chunk = 500, 96, 32
    hidden, weight, labels = operands(vocab, rows)
    groups = groups_of([24, 20, 30, 22], [0, 0, 1, 1])
    with _Largest() as seen:
        head_measures(hidden, weight, labels, top_p=0.9, groups=groups, chunk_rows=chunk)
    assert vocab * WIDTH < seen.elements <= vocab * chunk
