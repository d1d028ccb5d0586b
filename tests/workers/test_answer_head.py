"""The head for answer positions, in a model of our own that is small enough to compute everything twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from keytoken.errors import ConfigurationError
from keytoken.workers.answer_head import AnswerHead
from keytoken.workers.rows import answer_places
from keytoken_kernels.head import differentiable_head, head_log_probs

WIDTH, VOCABULARY = 8, 19


class Model(torch.nn.Module):
    """Hidden states in, logits out; ``after`` is what some models do to their logits."""

    def __init__(self, after: Callable[[Tensor], Tensor] = lambda logits: logits, bias: bool = False) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias)
        self.after = after

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, hidden: Tensor) -> Any:
        return SimpleNamespace(logits=self.after(self.lm_head(hidden)))


LENGTHS, ANSWERS = torch.tensor([5, 3, 6]), torch.tensor([2, 0, 4])


def batch(packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, L, H], places and labels of the answers."""
    shape = (1, int(LENGTHS.sum())) if packed else (len(LENGTHS), int(LENGTHS.max()))
    hidden = torch.randn(*shape, WIDTH)
    index = answer_places(LENGTHS, ANSWERS, packed)
    return hidden, index, torch.randint(0, VOCABULARY, (len(index),))


@pytest.mark.parametrize("packed", [True, False])
def test_the_answers_are_scored_and_nothing_else(packed: bool) -> None:
    model, (hidden, index, labels) = Model(), batch(packed)
    with AnswerHead(model, index, partial(head_log_probs, labels=labels, temperature=0.7)) as head:
        log_prob, entropy = head.read(model(hidden))
    assert log_prob.shape == entropy.shape == hidden.shape[:-1]
    dense = (model(hidden).logits.flatten(0, 1)[index] / 0.7).double().log_softmax(-1)
    places = torch.zeros(log_prob.numel(), dtype=torch.bool)
    places[index] = True
    wanted = dense.gather(1, labels[:, None]).squeeze(1).float()
    torch.testing.assert_close(log_prob.flatten()[index], wanted, atol=2e-6, rtol=0)
    wanted = -(dense.exp() * dense).sum(1).float()
    torch.testing.assert_close(entropy.flatten()[index], wanted, atol=2e-6, rtol=0)
    assert (log_prob.flatten()[~places] == 0).all()
    assert (entropy.flatten()[~places] == 0).all()


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_flow_through_the_models_output(packed: bool) -> None:
    model, (hidden, index, labels) = Model(), batch(packed)
    hidden.requires_grad_()
    with AnswerHead(model, index, partial(differentiable_head, labels=labels)) as head:
        log_prob, entropy = head.read(model(hidden))
    upstream = torch.randn(2, *log_prob.shape)
    (log_prob * upstream[0] + entropy * upstream[1]).sum().backward()
    found = (hidden.grad, model.lm_head.weight.grad)
    hidden.grad = model.lm_head.weight.grad = None
    dense = model(hidden).logits.flatten(0, 1)[index].log_softmax(-1)
    by_place = upstream.flatten(1)[:, index]
    of_label = dense.gather(1, labels[:, None]).squeeze(1)
    (of_label * by_place[0] - (dense.exp() * dense).sum(1) * by_place[1]).sum().backward()
    for gradient, wanted in zip(found, (hidden.grad, model.lm_head.weight.grad), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=2e-6, rtol=1e-5)


def test_a_batch_without_answers_has_gradients_of_zero() -> None:
    """Every rank takes part in the exchange of gradients, also one whose answers are all empty."""
    model, hidden = Model(), torch.randn(2, 4, WIDTH, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    with AnswerHead(model, nothing, partial(differentiable_head, labels=nothing)) as head:
        log_prob, _ = head.read(model(hidden))
    assert log_prob.shape == (2, 4)
    log_prob.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(model.lm_head.weight.grad, torch.zeros_like(model.lm_head.weight))


def test_the_head_is_itself_again_afterwards() -> None:
    model, (hidden, index, labels) = Model(), batch(packed=True)
    before, score = model(hidden).logits, partial(head_log_probs, labels=labels)
    with AnswerHead(model, index, score):
        assert model(hidden).logits.shape == (*hidden.shape[:-1], 2)
    assert torch.equal(model(hidden).logits, before)
    with pytest.raises(KeyError), AnswerHead(model, index, score):
        raise KeyError
    assert torch.equal(model(hidden).logits, before)
    model.lm_head.forward = lambda hidden: hidden[..., :1]  # as libraries that wrap modules do
    with AnswerHead(model, index, score):
        pass
    assert model(hidden).logits.shape == (*hidden.shape[:-1], 1)


@pytest.mark.parametrize("count", [1, 3])
def test_a_score_may_have_any_number_of_values(count: int) -> None:
    model, (hidden, index, _) = Model(), batch(packed=False)

    def score(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return tuple((rows @ weight.T)[:, column] for column in range(count))

    with AnswerHead(model, index, score) as head:
        found = head.read(model(hidden))
    logits, answers = model(hidden).logits, torch.zeros(hidden.shape[:-1])
    answers.view(-1)[index] = 1.0
    assert len(found) == count
    for column, values in enumerate(found):
        torch.testing.assert_close(values, logits[..., column] * answers, atol=1e-6, rtol=0)


def test_autocast_does_not_reach_the_products() -> None:
    model, (hidden, index, labels) = Model(), batch(packed=True)
    score = partial(head_log_probs, labels=labels)
    with AnswerHead(model, index, score) as head:
        plain, _ = head.read(model(hidden))
    with AnswerHead(model, index, score) as head, torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob, _ = head.read(model(hidden))
    assert torch.equal(log_prob, plain)


def test_a_head_that_does_not_run_once_is_an_error() -> None:
    model, (hidden, index, labels) = Model(), batch(packed=True)
    score = partial(head_log_probs, labels=labels)
    message = r"ran {} times in one forward pass .*use_fused_kernels=false"
    with AnswerHead(model, index, score) as head, pytest.raises(ConfigurationError, match=message.format(0)):
        head.read(SimpleNamespace(logits=None))
    with AnswerHead(model, index, score) as head, pytest.raises(ConfigurationError, match=message.format(2)):
        model(hidden)
        head.read(model(hidden))


def test_logits_that_the_model_changes_are_an_error() -> None:
    """A soft cap or a scale would be applied to log-probs."""
    model, (hidden, index, labels) = Model(after=torch.tanh), batch(packed=True)
    with (
        AnswerHead(model, index, partial(head_log_probs, labels=labels)) as head,
        pytest.raises(ConfigurationError, match=r"changes its logits after the head.*kernels\.head=verl"),
    ):
        head.read(model(hidden))


def test_a_head_with_a_bias_or_of_another_kind_is_refused() -> None:
    nothing = torch.zeros(0, dtype=torch.long)
    other = Model()
    other.lm_head = torch.nn.Identity()
    for model in (Model(bias=True), other):
        with pytest.raises(ConfigurationError, match=r"output embedding of Model.*linear layer without bias"):
            AnswerHead(model, nothing, head_log_probs)


def test_places_against_a_table_of_who_predicts_whom() -> None:
    lengths, answers = torch.tensor([5, 3, 4]), torch.tensor([2, 0, 3])
    assert answer_places(lengths, answers, use_remove_padding=False).tolist() == [2, 3, 10, 11, 12]
    assert answer_places(lengths, answers, use_remove_padding=True).tolist() == [2, 3, 8, 9, 10]
    assert answer_places(lengths, torch.zeros_like(answers), use_remove_padding=True).tolist() == []


def test_an_answer_without_a_prompt_is_an_error() -> None:
    with pytest.raises(ValueError, match="Row 1 of the batch has 3 tokens, 3 of them in its answer"):
        answer_places(torch.tensor([5, 3]), torch.tensor([2, 3]), use_remove_padding=True)
