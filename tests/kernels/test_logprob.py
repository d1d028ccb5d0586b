"""Log-prob, entropy and gradient, of both implementations, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from keytoken_kernels.logprob import (
    LogProbs,
    differentiable_log_probs,
    token_log_probs,
    token_log_probs_gradient,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy, where the interpreter meets NaN
]
# Vocabularies: less than one lane, no multiple of anything, several tiles, a whole number of tiles.
VOCABS = [7, 451, 5003, 8192]
QWEN = 151_936
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def truth(logits, labels, temperature=1.0):
    """Float64 ``(log_prob, entropy, log_sum_exp)`` of the logits as they are stored."""
    x = logits.double() / temperature
    log_sum_exp = x.logsumexp(1)
    log_p = x - log_sum_exp[:, None]
    entropy = -torch.where(log_p.exp() == 0, 0.0, log_p.exp() * log_p).sum(1)
    return log_p.gather(1, labels[:, None])[:, 0], entropy, log_sum_exp


def true_gradient(logits, labels, grad_log_prob, grad_entropy, temperature=1.0):
    """Float64 gradient by autograd through :func:`truth`."""
    z = logits.double().requires_grad_()
    log_prob, entropy, _ = truth(z, labels, temperature)
    loss = (log_prob * grad_log_prob.double()).sum()
    if grad_entropy is not None:
        loss = loss + (entropy * grad_entropy.double()).sum()
    return torch.autograd.grad(loss, z)[0]


def make(vocab, dtype, device, count=5):
    """Rows about 0, -200 and +300, around -150 almost uniform, and one that is almost one-hot."""
    spread = torch.tensor([3.0, 3.0, 3.0, 0.01, 20.0]).repeat(count // 5 + 1)[:count, None]
    offset = torch.tensor([0.0, -200.0, 300.0, -150.0, 0.0]).repeat(count // 5 + 1)[:count, None]
    logits = (torch.randn(count, vocab) * spread + offset).to(device, dtype)
    return logits, torch.randint(0, vocab, (count,), device=device)


def assert_close(found, logits, labels, temperature=1.0):
    """To a few roundings of float32: absolute for what is relative to the maximum, relative for the rest."""
    log_prob, entropy, log_sum_exp = truth(logits, labels, temperature)
    torch.testing.assert_close(found.log_prob.double(), log_prob, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.log_sum_exp.double(), log_sum_exp, rtol=2e-7, atol=5e-6)


def bf16_rounding(impl, device):
    """Relative error of a bf16 gradient: half a unit in the last place; Triton's interpreter truncates."""
    return 2**-7 if impl == "triton" and device.type == "cpu" else 2**-8


def bits(found):
    return torch.stack([found.log_prob, found.entropy, found.log_sum_exp]).view(torch.int32)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward(impl, device, vocab, dtype, temperature):
    logits, labels = make(vocab, dtype, device)
    found = token_log_probs(logits, labels, temperature, impl=impl)
    assert {t.dtype for t in (found.log_prob, found.entropy, found.log_sum_exp)} == {torch.float32}
    assert_close(found, logits, labels, temperature)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_forward_and_gradient_at_the_width_of_qwen(impl, device, dtype):
    logits, labels = make(QWEN, dtype, device)
    found = token_log_probs(logits, labels, impl=impl)
    assert_close(found, logits, labels)
    upstream = torch.tensor([0.7, 0.0, -1.3, 0.2, 0.0], device=device)
    gradient = token_log_probs_gradient(logits, labels, found, upstream, impl=impl)
    true = true_gradient(logits, labels, upstream, None)
    tolerance = 5e-5 if dtype == torch.float32 else 1.02 * bf16_rounding(impl, device)
    torch.testing.assert_close(gradient.double(), true, rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.02, 50.0])
def test_extreme_temperatures(impl, device, temperature):
    logits, labels = make(451, torch.float32, device)
    assert_close(token_log_probs(logits, labels, temperature, impl=impl), logits, labels, temperature)


@pytest.mark.parametrize("vocab", [448, 449, 705])
def test_many_small_tiles(device, monkeypatch, vocab):
    """The maximum rises over many tiles of 64, and the last tile may hold a single element."""
    monkeypatch.setattr(pytest.importorskip("keytoken_kernels.logprob.tiles"), "LANES", 16)
    logits, labels = make(vocab, torch.float32, device)
    for ordered in (logits, logits.sort(1).values, logits.sort(1, descending=True).values):
        found = token_log_probs(ordered, labels, impl="triton")
        assert_close(found, ordered, labels)
        upstream = torch.randn(5, device=device)
        gradient = token_log_probs_gradient(ordered, labels, found, upstream, upstream, impl="triton")
        true = true_gradient(ordered, labels, upstream, upstream)
        torch.testing.assert_close(gradient.double(), true, rtol=2e-4, atol=1e-6)


def test_banned_tokens_count_nothing(impl, device):
    logits, labels = make(5003, torch.float32, device)
    banned = torch.rand(5, 5003, device=device) < 0.5
    banned[0, :5000] = True  # whole tiles and lanes
    banned.scatter_(1, labels[:, None], False)
    for value in (-math.inf, torch.finfo(torch.float32).min):
        found = token_log_probs(logits.masked_fill(banned, value), labels, impl=impl)
        assert_close(found, logits.masked_fill(banned, -math.inf), labels)
    banned_label = torch.where(banned, 1.0, 0.0).argmax(1)
    found = token_log_probs(logits.masked_fill(banned, -math.inf), banned_label, impl=impl)
    assert (found.log_prob == -math.inf).all()
    assert found.entropy.isfinite().all()


def test_gradient_with_banned_tokens_is_zero_there(impl, device):
    logits, labels = make(451, torch.float32, device)
    banned = torch.rand(5, 451, device=device) < 0.5
    banned.scatter_(1, labels[:, None], False)
    logits = logits.masked_fill(banned, -math.inf)
    found = token_log_probs(logits, labels, impl=impl)
    ones = torch.ones(5, device=device)
    gradient = token_log_probs_gradient(logits, labels, found, ones, ones, impl=impl)
    assert (gradient[banned] == 0).all()
    true = true_gradient(logits.clamp(min=-1e4), labels, ones, ones)
    torch.testing.assert_close(gradient.double(), true, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 3, 4999, 5002])
def test_nan_is_never_swallowed(impl, device, value, column):
    logits, labels = make(5003, torch.float32, device)
    clean = token_log_probs(logits, labels, impl=impl)
    logits[1, column] = value
    found = token_log_probs(logits, labels, impl=impl)
    assert found.log_prob[1].isnan() and found.entropy[1].isnan() and not found.log_sum_exp[1].isfinite()
    others = [0, 2, 3, 4]
    assert torch.equal(bits(found)[:, others], bits(clean)[:, others])
    ones = torch.ones(5, device=device)
    gradient = token_log_probs_gradient(logits, labels, found, ones, impl=impl)
    assert gradient[1].isnan().all() and gradient[others].isfinite().all()


def test_rows_without_any_value(impl, device):
    logits = torch.tensor([[-math.inf] * 9, [math.nan] * 9, [1.0] * 9], device=device)
    found = token_log_probs(logits, torch.zeros(3, dtype=torch.int64, device=device), impl=impl)
    assert found.log_prob[:2].isnan().all() and found.entropy[:2].isnan().all()
    assert found.entropy[2].item() == pytest.approx(math.log(9), abs=1e-6)


def test_listed_rows(impl, device):
    logits, _ = make(451, torch.float32, device, count=9)
    rows = torch.tensor([8, 0, 3, 3], device=device)
    labels = torch.randint(0, 451, (4,), device=device)
    found = token_log_probs(logits, labels, 0.9, rows=rows, impl=impl)
    assert torch.equal(bits(found), bits(token_log_probs(logits[rows], labels, 0.9, impl=impl)))
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.5], device=device)
    gradient = token_log_probs_gradient(logits, labels, found, upstream, None, 0.9, rows=rows, impl=impl)
    whole = token_log_probs_gradient(logits[rows], labels, found, upstream, None, 0.9, impl=impl)
    assert torch.equal(gradient, whole)


@pytest.mark.parametrize("vocab", [451, 5003])
def test_rows_that_lie_apart(impl, device, vocab):
    dense, labels = make(vocab, torch.bfloat16, device)
    wide = torch.full((11, vocab + 13), torch.nan, device=device, dtype=torch.bfloat16)
    logits = wide[1::2, 5 : 5 + vocab]
    logits.copy_(dense)
    found = token_log_probs(logits, labels, impl=impl)
    assert torch.equal(bits(found), bits(token_log_probs(dense, labels, impl=impl)))
    ones = torch.ones(5, device=device)
    true = token_log_probs_gradient(dense, labels, found, ones, impl=impl)
    target = torch.full((5, 2 * vocab), torch.nan, device=device)[:, 3 : 3 + vocab]
    token_log_probs_gradient(logits, labels, found, ones, out=target, impl=impl)
    torch.testing.assert_close(target, true.float(), rtol=1.02 * bf16_rounding(impl, device), atol=1e-9)
    assert token_log_probs_gradient(logits, labels, found, ones, out=logits, impl=impl) is logits
    assert torch.equal(logits, true)
    assert wide[0::2].isnan().all() and wide[:, :5].isnan().all() and wide[:, 5 + vocab :].isnan().all()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient(impl, device, vocab, with_entropy, temperature):
    logits, labels = make(vocab, torch.float32, device)
    found = token_log_probs(logits, labels, temperature, impl=impl)
    upstream = torch.randn(2, 5, device=device)
    grad_entropy = upstream[1] if with_entropy else None
    gradient = token_log_probs_gradient(
        logits, labels, found, upstream[0], grad_entropy, temperature, impl=impl
    )
    true = true_gradient(logits, labels, upstream[0], grad_entropy, temperature)
    # p = exp(x - log_sum_exp) inherits the rounding of a log-sum-exp of 430: 1.5e-5 of p.
    torch.testing.assert_close(gradient.double(), true, rtol=5e-5, atol=2e-6)


def test_gradient_in_place_and_in_bf16_equal_the_plain_one(impl, device):
    logits, labels = make(5003, torch.float32, device)
    found = token_log_probs(logits, labels, impl=impl)
    upstream = torch.tensor([1.0, 0.0, -0.5, 2.0, 0.0], device=device)
    plain = token_log_probs_gradient(logits, labels, found, upstream, upstream, impl=impl)
    narrow = torch.full((5, 5003), torch.nan, dtype=torch.bfloat16, device=device)
    token_log_probs_gradient(logits, labels, found, upstream, upstream, out=narrow, impl=impl)
    torch.testing.assert_close(narrow.float(), plain, rtol=bf16_rounding(impl, device), atol=1e-30)
    assert (
        token_log_probs_gradient(logits, labels, found, upstream, upstream, out=logits, impl=impl) is logits
    )
    assert torch.equal(logits, plain)


def test_rows_without_upstream_are_written_but_not_read(impl, device):
    logits, labels = make(451, torch.float32, device)
    idle = torch.tensor([1, 3], device=device)
    logits[idle] = torch.nan
    labels[idle] = -100
    found = token_log_probs(logits, labels.clamp(min=0), impl=impl)
    upstream = torch.tensor([0.3, 0.0, 1.0, -0.0, -2.0], device=device)
    for grad_entropy in (None, upstream):
        out = torch.full_like(logits, torch.nan)
        token_log_probs_gradient(logits, labels, found, upstream, grad_entropy, out=out, impl=impl)
        assert (out[idle] == 0).all()
        assert out.isfinite().all() and (out[[0, 2, 4]] != 0).any(1).all()


def test_an_entropy_gradient_alone_makes_a_row_active(impl, device):
    logits, labels = make(451, torch.float32, device)
    found = token_log_probs(logits, labels, impl=impl)
    zero, upstream = torch.zeros(5, device=device), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], device=device)
    gradient = token_log_probs_gradient(logits, labels, found, zero, upstream, impl=impl)
    true = true_gradient(logits, labels, zero, upstream)
    torch.testing.assert_close(gradient.double(), true, rtol=5e-5, atol=2e-6)
    assert (gradient[[0, 2]] == 0).all()


@pytest.mark.parametrize("used", ["log_prob", "entropy", "both"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_autograd(impl, device, used, dtype):
    logits, labels = make(451, dtype, device)
    leaf = logits.clone().requires_grad_()
    log_prob, entropy = differentiable_log_probs(leaf, labels, 0.8, impl=impl)
    weights = torch.randn(2, 5, device=device)
    grad_log_prob = weights[0] if used != "entropy" else torch.zeros(5, device=device)
    grad_entropy = weights[1] if used != "log_prob" else None
    loss = (log_prob * grad_log_prob).sum() if used != "entropy" else 0.0
    if grad_entropy is not None:
        loss = loss + (entropy * grad_entropy).sum()
    loss.backward()
    true = true_gradient(logits, labels, grad_log_prob, grad_entropy, 0.8)
    tolerance = 5e-5 if dtype == torch.float32 else 1.02 * bf16_rounding(impl, device)
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad.double(), true, rtol=tolerance, atol=2e-6)


def test_gradcheck_of_the_reference():
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 10, 4])
    assert torch.autograd.gradcheck(lambda z: differentiable_log_probs(z, labels, 0.7), (logits,))


@pytest.mark.parametrize("vocab", VOCABS)
def test_properties(impl, device, vocab):
    logits, labels = make(vocab, torch.float32, device, count=40)
    labels[:20] = logits[:20].argmax(1)
    logits[:10].scatter_add_(1, labels[:10, None], torch.full((10, 1), 40.0, device=device))  # one-hot
    found = token_log_probs(logits, labels, 0.9, impl=impl)
    assert (found.log_prob <= 0).all()
    assert (found.entropy >= 0).all() and (found.entropy <= math.log(vocab) + 1e-5).all()


def test_order_of_rows_and_repetition_change_no_bit(impl, device):
    logits, labels = make(5003, torch.float32, device, count=12)
    order = torch.randperm(12, device=device)
    found = token_log_probs(logits, labels, impl=impl)
    assert torch.equal(bits(token_log_probs(logits, labels, impl=impl)), bits(found))
    shuffled = token_log_probs(logits[order], labels[order], impl=impl)
    assert torch.equal(bits(shuffled), bits(found)[:, order])
    upstream = torch.randn(12, device=device)
    gradient = token_log_probs_gradient(logits, labels, found, upstream, upstream, impl=impl)
    again = token_log_probs_gradient(
        logits[order], labels[order], shuffled, upstream[order], upstream[order], impl=impl
    )
    assert torch.equal(again, gradient[order])


def test_chunks_of_the_reference_change_no_bit(monkeypatch):
    logits, labels = make(451, torch.float32, "cpu", count=12)
    whole = token_log_probs(logits, labels, impl="reference")
    monkeypatch.setattr("keytoken_kernels.logprob.reference.CHUNK_ELEMENTS", 1000)
    parts = token_log_probs(logits, labels, impl="reference")
    assert torch.equal(bits(parts), bits(whole))
    upstream = torch.randn(12)
    gradient = token_log_probs_gradient(logits, labels, whole, upstream, upstream, impl="reference")
    torch.testing.assert_close(
        gradient.double(), true_gradient(logits, labels, upstream, upstream), rtol=5e-5, atol=2e-6
    )


def test_no_rows(impl, device):
    logits, labels = torch.zeros(0, 5, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    found = token_log_probs(logits, labels, impl=impl)
    assert found.log_prob.shape == found.entropy.shape == found.log_sum_exp.shape == (0,)
    assert token_log_probs_gradient(logits, labels, found, found.entropy, impl=impl).shape == (0, 5)


def test_the_reference_keeps_float64():
    logits, labels = make(451, torch.float64, "cpu")
    found = token_log_probs(logits, labels)
    for ours, true in zip((found.log_prob, found.entropy), truth(logits, labels)[:2], strict=True):
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-11)


@pytest.mark.parametrize("wrong", [-1, 451, -100])
def test_ids_outside(impl, device, wrong):
    """An error in the reference, NaN from the kernels, and nothing for the other rows."""
    logits, labels = make(451, torch.float32, device)
    ones, rows = torch.ones(5, device=device), torch.arange(5, device=device)
    good = token_log_probs(logits, labels, impl=impl)
    labels_outside, rows_outside = labels.clone(), rows.clone()
    labels_outside[2], rows_outside[2] = wrong, wrong
    if impl == "reference":
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 451\)"):
            token_log_probs(logits, labels_outside, impl=impl)
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 451\)"):
            token_log_probs_gradient(logits, labels_outside, good, ones, impl=impl)
        with pytest.raises(ValueError, match=r"rows must lie in \[0, 5\)"):
            token_log_probs(logits, labels, rows=rows_outside, impl=impl)
        return
    for found in (
        token_log_probs(logits, labels_outside, impl=impl),
        token_log_probs(logits, labels, rows=rows_outside, impl=impl),
    ):
        assert found.log_prob.isnan().tolist() == [False, False, True, False, False]
    for arguments in ({"labels": labels_outside}, {"labels": labels, "rows": rows_outside}):
        gradient = token_log_probs_gradient(logits, found=good, grad_log_prob=ones, impl=impl, **arguments)
        assert gradient.isnan().all(1).tolist() == [False, False, True, False, False]


BAD_FORWARD = {
    "logits must be of a float type": {"logits": torch.zeros(3, 8, dtype=torch.int32)},
    "logits must be .N, V.": {"logits": torch.zeros(3, 8, 2)},
    "V > 0": {"logits": torch.zeros(3, 0)},
    "last dimension of logits must be contiguous": {"logits": torch.zeros(8, 3).T},
    "labels must be torch.int64": {"labels": torch.zeros(3, dtype=torch.int32)},
    "labels must be .3., one entry per row": {"labels": torch.zeros(2, dtype=torch.int64)},
    "one entry per row; got .3, 1.": {"labels": torch.zeros(3, 1, dtype=torch.int64)},
    "labels must be on cpu; got meta": {"labels": torch.zeros(3, dtype=torch.int64, device="meta")},
    "rows must be torch.int64": {"rows": torch.zeros(3)},
    "labels must be .2.": {"rows": torch.zeros(2, dtype=torch.int64)},
    "temperature must be positive; got 0": {"temperature": 0.0},
    "temperature must be positive; got -1": {"temperature": -1.0},
    "temperature must be positive; got nan": {"temperature": math.nan},
    "temperature must be positive; got inf": {"temperature": math.inf},
}


@pytest.mark.parametrize("message", BAD_FORWARD)
def test_bad_input(impl, message):
    good = {"logits": torch.zeros(3, 8), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        token_log_probs(**{**good, **BAD_FORWARD[message]}, impl=impl)


def test_kernels_refuse_float64(device):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"not torch\.float64: use impl='reference'"):
        token_log_probs(
            torch.zeros(3, 8, dtype=torch.float64, device=device),
            torch.zeros(3, dtype=torch.int64, device=device),
            impl="triton",
        )


BUFFER = torch.zeros(64)
BAD_GRADIENT = {
    "upstream gradients must be torch.float32": {"grad_log_prob": torch.zeros(3, dtype=torch.bfloat16)},
    "upstream gradients must be .3.": {"grad_entropy": torch.zeros(4)},
    "out must be a float tensor of shape .3, 8.": {"out": torch.zeros(3, 9)},
    "got torch.int64": {"out": torch.zeros(3, 8, dtype=torch.int64)},
    "rows of out must be contiguous": {"out": torch.zeros(8, 3).T},
    "not overlap; got strides .0, 1.": {"out": torch.zeros(1, 8).expand(3, 8)},
    "out overlaps with logits": {"logits": BUFFER[:24].view(3, 8), "out": BUFFER[8:32].view(3, 8)},
    "be logits itself and rows left out": {
        "logits": BUFFER[:24].view(3, 8),
        "out": BUFFER[:24].view(3, 8),
        "rows": torch.arange(3),
    },
}


@pytest.mark.parametrize("message", BAD_GRADIENT)
def test_bad_input_of_the_gradient(impl, message):
    good = {
        "logits": torch.zeros(3, 8),
        "labels": torch.zeros(3, dtype=torch.int64),
        "found": LogProbs(torch.zeros(3), torch.zeros(3), torch.zeros(3)),
        "grad_log_prob": torch.ones(3),
    }
    with pytest.raises(ValueError, match=message):
        token_log_probs_gradient(**{**good, **BAD_GRADIENT[message]}, impl=impl)
