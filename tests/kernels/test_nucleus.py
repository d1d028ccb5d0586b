"""Entropy of the nucleus, of both implementations, against a sort in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from keytoken_kernels.logprob import token_log_probs, truncated_entropy

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
QWEN = 151_936
TOLERANCE = 2e-5


def true_entropies(logits, top_p, temperature=1.0):
    """Per row the entropies that may be right: more than one where mass and ``top_p`` agree to 2e-6."""
    return [_of_row(row, top_p) for row in logits.double().cpu().numpy() / temperature]


def _of_row(row, top_p):
    p = np.exp(row - row.max())
    p = np.sort(p / p.sum())[::-1]
    mass = np.cumsum(p)
    counts = {int(np.searchsorted(mass, top_p * (1 - slack))) + 1 for slack in (0.0, 1e-6, 2e-6)}
    found = []
    for count in counts:
        q = p[: min(count, (p > 0).sum())]
        q = q / q.sum()
        found.append(-(q * np.log(q)).sum())
    return found


def assert_right(found, logits, top_p, temperature=1.0):
    for row, (entropy, right) in enumerate(
        zip(found.tolist(), true_entropies(logits, top_p, temperature), strict=True)
    ):
        error = min(abs(entropy - true) for true in right)
        assert error <= TOLERANCE, f"row {row}: {entropy}, not one of {right}"


def log_of(*probabilities):
    return torch.tensor(probabilities).log()[None]


@pytest.mark.parametrize("vocab", [2, 451, 5003])
@pytest.mark.parametrize("top_p", [0.05, 0.95, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_rows(impl, device, vocab, top_p, dtype):
    """Peaked to flat, at offsets from -200 to 300; bfloat16 makes many ties."""
    spread = torch.tensor([0.01, 0.3, 1.0, 3.0, 10.0, 30.0])
    offset = torch.tensor([0.0, 300.0, -200.0, -150.0, 0.0, 50.0])
    logits = (torch.randn(6, vocab) * spread[:, None] + offset[:, None]).to(device, dtype)
    assert_right(truncated_entropy(logits, top_p, impl=impl), logits, top_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_width_of_qwen(impl, device, dtype, monkeypatch):
    if impl == "triton" and device.type == "cpu":  # the interpreter's time goes by the number of tiles
        monkeypatch.setattr("keytoken_kernels.logprob.nucleus.LANES", 8192)
    spread = torch.tensor([0.01, 4.0])
    logits = (torch.randn(2, QWEN) * spread[:, None] - 20).to(device, dtype)
    assert_right(truncated_entropy(logits, 0.95, 0.9, impl=impl), logits, 0.95, 0.9)


# 25 * 0.6 is above 15 in float32, 100 * 0.07 above 7 in float64: the stated slack makes it 15 and 7.
@pytest.mark.parametrize("top_p,vocab", [(0.95, 20), (0.6, 25), (0.07, 100), (0.95, 1000), (0.95, 20_000)])
def test_uniform_rows_hold_a_share_of_the_tokens(impl, device, top_p, vocab):
    logits = torch.tensor([[0.0], [-7.3]], device=device).repeat(1, vocab)
    found = truncated_entropy(logits, top_p, impl=impl)
    assert found.tolist() == pytest.approx([math.log(round(top_p * vocab))] * 2, abs=TOLERANCE)


def test_powers_of_two(impl, device):
    """Exponents that are whole numbers lie on the kernel's thresholds. The temperature makes the base 2."""
    logits = -torch.arange(12.0, device=device)[None]
    for top_p in (0.5, 0.74, 0.75, 0.8, 0.97, 0.999):
        assert_right(
            truncated_entropy(logits, top_p, math.log2(math.e), impl=impl), logits * math.log(2), top_p
        )


def test_tokens_that_are_almost_equal_are_told_apart(impl, device):
    """2^-1 and then two tokens that differ by 2e-4 of their probability: the first of them just suffices."""
    logits = torch.tensor([[-1.0 - 2**-11, 0.0, -1.0 - 2**-12]], device=device)
    p = torch.tensor([1.0, 0.499915, 0.499831]).double()
    top_p = (1 + 0.49988) / p.sum().item()
    true = (p[:2] / p[:2].sum()).log().mul(p[:2] / p[:2].sum()).sum().neg().item()
    found = truncated_entropy(logits, top_p, math.log2(math.e), impl=impl)
    assert found.item() == pytest.approx(true, abs=TOLERANCE)


def test_two_spikes(impl, device):
    rows = torch.cat(
        [log_of(0.6, 0.3, 0.06, 0.04), log_of(0.5, 0.5, 1e-30, 1e-30), log_of(0.96, 0.02, 0.01, 0.01)]
    )
    found = truncated_entropy(rows.to(device), 0.95, impl=impl)
    three = torch.tensor([0.6, 0.3, 0.06]) / 0.96
    true = [-(three * three.log()).sum().item(), math.log(2), 0.0]
    assert found.tolist() == pytest.approx(true, abs=TOLERANCE)


def test_ties_at_the_threshold_are_taken_as_needed(impl, device):
    """0.5 and then tokens of 0.1: five of them reach 0.95 (0.5 + 5 * 0.1), four do not."""
    found = truncated_entropy(log_of(0.1, 0.1, 0.5, 0.1, 0.1, 0.1).to(device), 0.95, impl=impl)
    assert found.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(10), abs=TOLERANCE)
    found = truncated_entropy(log_of(0.1, 0.1, 0.5, 0.1, 0.1, 0.1).to(device), 0.65, impl=impl)
    of_seven = -(5 / 7 * math.log(5 / 7) + 2 / 7 * math.log(1 / 7))
    assert found.item() == pytest.approx(of_seven, abs=TOLERANCE)


def test_almost_equal_tokens(impl, device):
    """Thousands of tokens within a few roundings of each other: more than any bracket can separate."""
    logits = 5 + 1e-6 * torch.randn(2, 5003, device=device)
    assert_right(truncated_entropy(logits, 0.95, impl=impl), logits, 0.95)


def test_all_of_the_mass_is_the_whole_entropy(impl, device):
    logits = 3 * torch.randn(4, 451, device=device)
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    whole = token_log_probs(logits, labels, 0.8, impl=impl).entropy
    assert torch.equal(truncated_entropy(logits, 1.0, 0.8, impl=impl), whole)
    almost = truncated_entropy(logits, 1 - 1e-9, 0.8, impl=impl)
    torch.testing.assert_close(almost, whole, rtol=0, atol=5e-5)


def test_a_tiny_share_is_the_most_probable_token(impl, device):
    found = truncated_entropy(torch.randn(4, 451, device=device), 1e-6, impl=impl)
    assert found.abs().max() < 1e-6


def test_bounds_and_order(impl, device):
    """Within [0, log V], and the same bits in any order and at any time."""
    logits = 4 * torch.randn(8, 451, device=device)
    logits[:2, 17] = 40.0 + logits[:2, 0]
    found = truncated_entropy(logits, 0.95, impl=impl)
    assert (found >= 0).all() and (found <= math.log(451)).all()
    order = torch.randperm(8, device=device)
    assert torch.equal(truncated_entropy(logits, 0.95, impl=impl), found)
    assert torch.equal(truncated_entropy(logits[order], 0.95, impl=impl), found[order])


def test_banned_tokens_and_nan(impl, device):
    logits = torch.randn(4, 451, device=device)
    logits[0, ::2] = -math.inf
    logits[1] = -math.inf
    logits[2, 450] = math.nan
    found = truncated_entropy(logits, 0.95, impl=impl)
    assert found.isnan().tolist() == [False, True, True, False]
    assert_right(found[[0, 3]], logits[[0, 3]], 0.95)


def test_listed_rows_and_rows_that_lie_apart(impl, device):
    logits = torch.full((6, 500), torch.nan, device=device)[:, 9:460]
    logits.copy_(torch.randn(6, 451))
    rows = torch.tensor([5, 0, 0], device=device)
    found = truncated_entropy(logits, 0.9, rows=rows, impl=impl)
    assert torch.equal(found, truncated_entropy(logits[rows].contiguous(), 0.9, impl=impl))
    assert truncated_entropy(logits, 0.9, rows=rows[:0], impl=impl).shape == (0,)


def test_a_row_outside(impl, device):
    logits, rows = torch.randn(3, 9, device=device), torch.tensor([0, 3], device=device)
    if impl == "reference":
        with pytest.raises(ValueError, match=r"rows must lie in \[0, 3\)"):
            truncated_entropy(logits, 0.9, rows=rows, impl=impl)
    else:
        assert truncated_entropy(logits, 0.9, rows=rows, impl=impl).isnan().tolist() == [False, True]


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.01, math.nan])
def test_bad_share(impl, top_p):
    with pytest.raises(ValueError, match=r"top_p must lie in \(0, 1\]"):
        truncated_entropy(torch.zeros(2, 3), top_p, impl=impl)
