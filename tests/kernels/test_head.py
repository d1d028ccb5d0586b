"""The head's reference against float64 and against torch's own cross entropy."""

import pytest
import torch

from keytoken_kernels.head import head_log_probs


def float64_truth(hidden, weight, labels, temperature):
    logits = (hidden.double() @ weight.double().T) / temperature
    log_p = logits - torch.logsumexp(logits, -1, keepdim=True)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("num_rows,vocab,chunk", [(1, 7, 256), (13, 451, 4), (64, 1000, 64), (65, 33, 64)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_matches_float64(num_rows, vocab, chunk, temperature):
    generator = torch.Generator().manual_seed(num_rows * vocab)
    hidden = torch.randn(num_rows, 24, generator=generator)
    weight = torch.randn(vocab, 24, generator=generator)
    labels = torch.randint(0, vocab, (num_rows,), generator=generator)
    log_prob, entropy = head_log_probs(hidden, weight, labels, temperature, chunk_rows=chunk)
    true_log_prob, true_entropy = float64_truth(hidden, weight, labels, temperature)
    assert (log_prob - true_log_prob).abs().max() < 2e-5
    assert (entropy - true_entropy).abs().max() < 2e-5


def test_large_offsets_do_not_cancel():
    hidden = torch.tensor([[300.0], [-200.0]])
    weight = torch.tensor([[1.0], [1.001], [0.999]])
    labels = torch.tensor([1, 2])
    log_prob, entropy = head_log_probs(hidden, weight, labels)
    true_log_prob, true_entropy = float64_truth(hidden, weight, labels, 1.0)
    assert (log_prob - true_log_prob).abs().max() < 5e-5
    assert (entropy - true_entropy).abs().max() < 5e-5


def test_bfloat16_inputs_are_multiplied_in_float32():
    hidden = torch.randn(9, 64).bfloat16()
    weight = torch.randn(50, 64).bfloat16()
    labels = torch.randint(0, 50, (9,))
    log_prob, _ = head_log_probs(hidden, weight, labels)
    true_log_prob, _ = float64_truth(hidden, weight, labels, 1.0)
    assert (log_prob - true_log_prob).abs().max() < 2e-5


def test_no_rows():
    log_prob, entropy = head_log_probs(torch.zeros(0, 4), torch.zeros(5, 4), torch.zeros(0, dtype=torch.long))
    assert log_prob.shape == entropy.shape == (0,)


@pytest.mark.parametrize(
    "hidden,weight,labels,temperature,match",
    [
        (torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long), 1.0, "must be"),
        (torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(3, dtype=torch.long), 1.0, "labels must be"),
        (torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 5]), 1.0, "must lie in"),
        (torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long), 0.0, "temperature"),
    ],
)
def test_bad_input_is_named(hidden, weight, labels, temperature, match):
    with pytest.raises(ValueError, match=match):
        head_log_probs(hidden, weight, labels, temperature)
