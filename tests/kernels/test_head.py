"""The head for chosen rows against float64: values, gradients of a masked loss, memory, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keytoken_kernels.head import (
    BackwardRecord,
    chunked,
    default_chunk_rows,
    differentiable_head,
    head_log_probs,
)
from keytoken_kernels.head.reference import dense_head

# Buffers start as NaN: what is not written shows.
pytestmark = pytest.mark.usefixtures("poisoned_memory")
NUM_ROWS, VOCABULARY, WIDTH = 37, 301, 24


def float64_truth(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    return dense_head(hidden.double(), weight.double(), labels, temperature)


@pytest.mark.parametrize("num_rows,vocab,chunk", [(1, 7, 256), (13, 451, 4), (64, 1000, 64), (65, 33, 64)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_matches_float64(
    num_rows: int, vocab: int, chunk: int, temperature: float, impl: Any, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(num_rows * vocab)
    hidden = torch.randn(num_rows, 24, generator=generator).to(device)
    weight = torch.randn(vocab, 24, generator=generator).to(device)
    labels = torch.randint(0, vocab, (num_rows,), generator=generator).to(device)
    log_prob, entropy = head_log_probs(hidden, weight, labels, temperature, chunk_rows=chunk, impl=impl)
    true_log_prob, true_entropy = float64_truth(hidden, weight, labels, temperature)
    assert (log_prob - true_log_prob).abs().max() < 2e-5
    assert (entropy - true_entropy).abs().max() < 2e-5


def test_large_offsets_do_not_cancel() -> None:
    hidden = torch.tensor([[300.0], [-200.0]])
    weight = torch.tensor([[1.0], [1.001], [0.999]])
    labels = torch.tensor([1, 2])
    log_prob, entropy = head_log_probs(hidden, weight, labels)
    true_log_prob, true_entropy = float64_truth(hidden, weight, labels)
    assert (log_prob - true_log_prob).abs().max() < 5e-5
    assert (entropy - true_entropy).abs().max() < 5e-5


def test_bfloat16_inputs_are_multiplied_in_float32() -> None:
    hidden = torch.randn(9, 64).bfloat16()
    weight = torch.randn(50, 64).bfloat16()
    labels = torch.randint(0, 50, (9,))
    log_prob, _ = head_log_probs(hidden, weight, labels)
    assert log_prob.dtype == torch.float32
    true_log_prob, _ = float64_truth(hidden, weight, labels)
    assert (log_prob - true_log_prob).abs().max() < 2e-5


def test_autocast_around_it_changes_nothing() -> None:
    hidden, weight, labels = torch.randn(9, 64), torch.randn(50, 64), torch.randint(0, 50, (9,))
    hidden.requires_grad_()
    plain = differentiable_head(hidden, weight, labels)
    (wanted,) = torch.autograd.grad(plain[0].sum(), hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob, entropy = differentiable_head(hidden, weight, labels)
        (gradient,) = torch.autograd.grad(log_prob.sum(), hidden)
    assert torch.equal(log_prob, plain[0])
    assert torch.equal(entropy, plain[1])
    assert torch.equal(gradient, wanted)


def test_no_rows() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    log_prob, entropy = head_log_probs(torch.zeros(0, 4), torch.zeros(5, 4), empty)
    assert log_prob.shape == entropy.shape == (0,)
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(5, 4, requires_grad=True)
    differentiable_head(hidden, weight, empty)[0].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(5, 4))


def test_chunks_keep_to_their_budget() -> None:
    """256 rows on a CPU and 1024 on a GPU at the vocabulary of Qwen2.5-VL; whole tiles; never none."""
    assert default_chunk_rows(151_936, torch.device("cpu")) == 256
    assert default_chunk_rows(151_936, torch.device("cuda")) == 1024
    for vocab in (451, 32_000, 151_936, 262_144):
        for device, budget in (("cpu", 160 << 20), ("cuda", 640 << 20)):
            rows = default_chunk_rows(vocab, torch.device(device))
            assert rows % 128 == 0
            assert budget / 2 < 4 * vocab * rows <= budget
    assert default_chunk_rows(1 << 40, torch.device("cpu")) == 1


# --- gradients -----------------------------------------------------------------------------------


class Case:
    """Random operands and a masked PPO loss with an optional entropy term, in any dtype."""

    def __init__(
        self,
        selected: Tensor,
        entropy_coef: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        draw = torch.Generator().manual_seed(5)
        self.hidden = torch.randn(NUM_ROWS, WIDTH, generator=draw).to(device, dtype)
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=draw).to(device, dtype)
        self.labels = torch.randint(0, VOCABULARY, (NUM_ROWS,), generator=draw).to(device)
        self.advantages = torch.randn(NUM_ROWS, generator=draw).to(device)
        self.noise = 0.3 * torch.randn(NUM_ROWS, generator=draw).to(device)
        self.selected, self.entropy_coef = selected.to(device), entropy_coef

    def loss(self, log_prob: Tensor, entropy: Tensor) -> Tensor:
        old = log_prob.detach() + self.noise
        ratio = (log_prob - old).exp()
        terms = torch.minimum(ratio * self.advantages, ratio.clamp(0.8, 1.2) * self.advantages)
        terms = terms + self.entropy_coef * entropy
        return -(terms * self.selected).sum() / self.selected.sum().clamp(min=1)

    def truth(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Gradients by autograd through dense float64 logits."""
        hidden = self.hidden.double().requires_grad_()
        weight = self.weight.double().requires_grad_()
        self.loss(*float64_truth(hidden, weight, self.labels, temperature)).backward()
        return hidden.grad, weight.grad

    def gradients(self, temperature: float, **options: Any) -> tuple[Tensor, Tensor]:
        hidden = self.hidden.clone().requires_grad_()
        weight = self.weight.clone().requires_grad_()
        self.loss(*differentiable_head(hidden, weight, self.labels, temperature, **options)).backward()
        assert hidden.grad.dtype == self.hidden.dtype
        assert weight.grad.dtype == self.weight.dtype
        return hidden.grad, weight.grad


def ragged() -> Tensor:
    return torch.rand(NUM_ROWS, generator=torch.Generator().manual_seed(3)) < 0.4


SELECTIONS = {
    "ragged": ragged(),
    "all": torch.ones(NUM_ROWS, dtype=torch.bool),
    "last": torch.arange(NUM_ROWS) == NUM_ROWS - 1,
}


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("chunk_rows", [None, 1, 5, 64])
@pytest.mark.parametrize(("temperature", "entropy_coef"), [(1.0, 0.0), (0.6, 0.0), (1.3, 0.02)])
def test_gradients_of_a_masked_loss(
    selection: str,
    chunk_rows: int | None,
    temperature: float,
    entropy_coef: float,
    impl: Any,
    device: torch.device,
) -> None:
    case = Case(SELECTIONS[selection], entropy_coef, device=device)
    record = BackwardRecord()
    options = {"chunk_rows": chunk_rows, "expected_rows": case.selected, "record": record, "impl": impl}
    found, wanted = case.gradients(temperature, **options), case.truth(temperature)
    for gradient, true_gradient in zip(found, wanted, strict=True):
        assert_close(gradient, true_gradient, 3e-6)
    untouched = (wanted[0] == 0).all(1)  # unselected, or clipped
    assert (found[0][untouched] == 0).all()
    assert record.rows == NUM_ROWS
    assert record.touched == int((~untouched).sum())
    assert record.share == record.touched / NUM_ROWS


def test_a_loss_that_selects_nothing_gives_zeros() -> None:
    """Zeros and not None: ranks that average gradients with each other must all have one."""
    record = BackwardRecord()
    nothing = torch.zeros(NUM_ROWS, dtype=torch.bool)
    gradients = Case(nothing).gradients(1.0, expected_rows=nothing, record=record)
    assert all((gradient == 0).all() for gradient in gradients)
    assert (record.rows, record.touched, record.share) == (NUM_ROWS, 0, 0.0)


def test_the_gradient_of_the_entropy_alone() -> None:
    case = Case(SELECTIONS["ragged"])
    hidden = case.hidden.clone().requires_grad_()
    record = BackwardRecord()
    _, entropy = differentiable_head(hidden, case.weight, case.labels, 0.9, record=record)
    entropy[case.selected].sum().backward()
    dense = case.hidden.double().requires_grad_()
    float64_truth(dense, case.weight, case.labels, 0.9)[1][case.selected].sum().backward()
    assert_close(hidden.grad, dense.grad, 3e-6)
    assert record.touched == int(case.selected.sum())


def test_gradcheck() -> None:
    """Finite differences in float64, through both results."""
    case = Case(SELECTIONS["all"])
    hidden = case.hidden[:6].double().requires_grad_()
    weight = case.weight[:11].double().requires_grad_()
    labels = case.labels[:6] % 11
    assert torch.autograd.gradcheck(
        lambda h, w: differentiable_head(h, w, labels, 0.8, chunk_rows=4), (hidden, weight)
    )


@pytest.mark.parametrize("selection", ["ragged", "all"])
def test_bfloat16_operands(selection: str, impl: Any) -> None:
    """As exact as their own rounding: 2^-9 of the largest gradient."""
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("test_on_a_gpu")
    case = Case(SELECTIONS[selection], 0.01, torch.bfloat16)
    for gradient, wanted in zip(case.gradients(0.8, chunk_rows=4, impl=impl), case.truth(0.8), strict=True):
        assert_close(gradient, wanted, 2**-8)


def test_what_is_frozen_gets_no_gradient_and_no_product() -> None:
    case = Case(SELECTIONS["ragged"])
    wanted = case.truth(1.0)
    for index, (hidden, weight) in enumerate(
        [
            (case.hidden.clone().requires_grad_(), case.weight),
            (case.hidden, case.weight.clone().requires_grad_()),
        ]
    ):
        with Observer() as seen:
            case.loss(*differentiable_head(hidden, weight, case.labels)).backward()
        assert_close((hidden, weight)[index].grad, wanted[index], 3e-6)
        assert (hidden, weight)[1 - index].grad is None
        assert seen.products == 3  # logits, logits again, one gradient


def test_a_gradient_outside_the_expected_rows_is_an_error() -> None:
    case = Case(SELECTIONS["ragged"])
    expected = case.selected.clone()
    first = int(expected.nonzero()[0])
    expected[first] = False
    with pytest.raises(ValueError, match=rf"1 of 37 rows .* first row {first}: .* not masked"):
        case.gradients(1.0, expected_rows=expected)
    everything = Case(SELECTIONS["all"])
    with pytest.raises(ValueError, match="not masked by the selection"):
        everything.gradients(1.0, expected_rows=SELECTIONS["ragged"])


def test_an_upstream_nan_reaches_the_gradients() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    log_prob, _ = differentiable_head(hidden, weight, torch.tensor([1, 2, 3, 4]))
    log_prob.backward(torch.tensor([0.0, torch.nan, 0.0, 0.0]))
    assert torch.isnan(hidden.grad).all(1).tolist() == [False, True, False, False]
    assert torch.isnan(weight.grad).all()


def test_rows_may_come_in_any_order() -> None:
    case = Case(SELECTIONS["ragged"])
    order = torch.randperm(NUM_ROWS)
    straight = differentiable_head(case.hidden, case.weight, case.labels, chunk_rows=8)
    mixed = differentiable_head(case.hidden[order], case.weight, case.labels[order], chunk_rows=8)
    for one, other in zip(straight, mixed, strict=True):
        torch.testing.assert_close(one[order], other, atol=2e-6, rtol=0)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has CUDA's overloads: 16-bit operands, float32 output, accumulated in float32."""
    plain_mm, plain_addmm = torch.mm, torch.addmm

    def mm(a: Tensor, b: Tensor, out_dtype: Any = None, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return plain_mm(a, b, out=out)
        assert a.dtype == b.dtype == torch.bfloat16
        assert out is not None
        assert out.dtype == out_dtype == torch.float32
        return plain_mm(a.float(), b.float(), out=out)

    def addmm(c: Tensor, a: Tensor, b: Tensor, out_dtype: Any, out: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        assert c.dtype == out.dtype == out_dtype == torch.float32
        return plain_addmm(c, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(chunked, "multiplied_as_they_are", lambda hidden, weight: True)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("chunk_rows", [4, None])
def test_the_way_of_a_gpu(chunk_rows: int | None) -> None:
    """What is 16 bits and what is 32 where the products are a GPU's; d logits are rounded as well."""
    case = Case(SELECTIONS["ragged"], 0.01, torch.bfloat16)
    log_prob, entropy = head_log_probs(case.hidden, case.weight, case.labels, 0.8, chunk_rows=chunk_rows)
    true_log_prob, true_entropy = float64_truth(case.hidden, case.weight, case.labels, 0.8)
    assert (log_prob - true_log_prob).abs().max() < 2e-5
    assert (entropy - true_entropy).abs().max() < 2e-5
    found = case.gradients(0.8, chunk_rows=chunk_rows, expected_rows=case.selected)
    for gradient, wanted in zip(found, case.truth(0.8), strict=True):
        assert_close(gradient, wanted, 2**-7)


# --- memory and work -----------------------------------------------------------------------------


class Observer(TorchDispatchMode):
    """Sees every operation: the largest tensor, the number of products, and how many rows of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = self.logit_rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products += 1
            if result.shape[1] == VOCABULARY:
                self.logit_rows += result.shape[0]
        return result


def test_no_tensor_of_all_rows_and_the_whole_vocabulary() -> None:
    case = Case(SELECTIONS["all"])
    with Observer() as seen:
        case.gradients(1.0, chunk_rows=5)
    assert seen.largest == max(5 * VOCABULARY, VOCABULARY * WIDTH, NUM_ROWS * WIDTH)
    with Observer() as dense:
        case.truth(1.0)
    assert dense.largest == NUM_ROWS * VOCABULARY  # what the observer sees where there is one


def test_the_backward_pass_multiplies_touched_rows_only() -> None:
    case = Case(SELECTIONS["ragged"])
    record = BackwardRecord()
    with Observer() as seen:
        case.gradients(1.0, chunk_rows=4, record=record)
    assert 0 < record.touched < NUM_ROWS / 2
    assert seen.logit_rows == NUM_ROWS + record.touched
    with Observer() as none:
        Case(torch.zeros(NUM_ROWS, dtype=torch.bool)).gradients(1.0, chunk_rows=4)
    assert none.logit_rows == NUM_ROWS


# --- refusals ------------------------------------------------------------------------------------


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


@pytest.mark.parametrize("operation", [head_log_probs, differentiable_head])
@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "options", "match"),
    [
        (torch.zeros(2, 3), torch.zeros(5, 4), ids(0, 0), {}, "must be"),
        (torch.zeros(3), torch.zeros(5, 3), ids(0), {}, "must be"),
        (torch.zeros(2, 3), torch.zeros(5, 3), ids(0, 0, 0), {}, "labels must be"),
        (torch.zeros(2, 3), torch.zeros(5, 3), ids(0, 0).int(), {}, "labels must be int64"),
        (torch.zeros(2, 3), torch.zeros(5, 3), ids(0, 5), {}, "must lie in"),
        (torch.zeros(2, 3), torch.zeros(5, 3), ids(-1, 4), {}, "must lie in"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(5, 3), ids(0, 0), {}, "must be floats"),
        (torch.zeros(2, 3), torch.zeros(5, 3, device="meta"), ids(0, 0), {}, "on one device"),
        (torch.zeros(2, 3), torch.zeros(5, 3), ids(0, 0), {"temperature": 0.0}, "temperature"),
        (torch.zeros(2, 3), torch.zeros(5, 3), ids(0, 0), {"temperature": float("nan")}, "temperature"),
        (torch.zeros(2, 3), torch.zeros(5, 3), ids(0, 0), {"chunk_rows": 0}, "chunk_rows"),
        (torch.zeros(2, 3), torch.zeros(5, 3), ids(0, 0), {"impl": "fast"}, "impl must be one of"),
    ],
)
def test_bad_input_is_named(
    operation: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        operation(hidden, weight, labels, **options)


@pytest.mark.parametrize("expected", [torch.ones(3, dtype=torch.bool), torch.ones(2)])
def test_expected_rows_of_another_kind(expected: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected_rows must be bool \[N\] = \[2\]"):
        differentiable_head(torch.zeros(2, 3), torch.zeros(5, 3), ids(0, 0), expected_rows=expected)


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """16-bit operands are multiplied as they are, into float32 logits."""
    draw = torch.Generator("cuda").manual_seed(1)
    hidden = torch.randn(300, 256, device="cuda", generator=draw).to(dtype).requires_grad_()
    weight = (torch.randn(5003, 256, device="cuda", generator=draw) / 8).to(dtype).requires_grad_()
    labels = torch.randint(0, 5003, (300,), device="cuda", generator=draw)
    chosen = torch.rand(300, device="cuda", generator=draw) < 0.45
    log_prob, entropy = differentiable_head(hidden, weight, labels, 0.9, chunk_rows=128, expected_rows=chosen)
    dense_hidden, dense_weight = (part.detach().double().requires_grad_() for part in (hidden, weight))
    truth = float64_truth(dense_hidden, dense_weight, labels, 0.9)
    torch.testing.assert_close(log_prob.double(), truth[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(entropy.double(), truth[1], atol=1e-4, rtol=0)
    for found in ((log_prob, entropy), truth):
        ((found[0] + 0.1 * found[1]) * chosen).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for part, dense in ((hidden, dense_hidden), (weight, dense_weight)):
        assert_close(part.grad, dense.grad, tolerance)
