"""The benchmark on a CPU, in tiny sizes: its figures, its gates, its time limit and its table."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from keytoken_kernels.logprob import LogProbs

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    from kernel_bench import anchors, cases, gates, inputs, machine, matrix, matrix_selection, report, runner
    from kernel_bench.ceilings import Ceilings
    from kernel_bench.command import main
    from kernel_bench.operators import Operators
    from kernel_bench.sizes import SMALL
    from kernel_bench.timing import Budget, Timing, measure, percentile, summarise, turn_order
    from kernel_bench.verdicts import run_gates

CPU = torch.device("cpu")
OWN = Operators.of("reference")


def silent(text: str) -> None:
    """Progress that nobody reads."""


# --- figures ---


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 3.0], [1.0, 1.0, 7.0, 2.0]])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_percentile_is_the_linear_quantile(values, share):
    truth = torch.quantile(torch.tensor(values, dtype=torch.float64), share)
    assert percentile(values, share) == pytest.approx(float(truth))


def test_a_summary_pools_the_repeats_and_calls_their_difference_noise():
    found = summarise([[1.0, 2.0, 9.0], [3.0, 4.0, 4.0]])
    pooled = [1.0, 2.0, 3.0, 4.0, 4.0, 9.0]
    assert found.median_ms == statistics.median(pooled) and found.samples == 6
    assert (found.p20_ms, found.p80_ms) == (percentile(pooled, 0.2), percentile(pooled, 0.8))
    assert found.noise == pytest.approx((4.0 - 2.0) / 3.0)


def test_every_turn_starts_with_another_provider():
    turns = [turn_order(["a", "b", "c"], turn) for turn in range(4)]
    assert turns == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


class Clock:
    """Time that passes only when something is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def timed(clock, calls, seconds, limit):
    """Runs measure with a clock that every call advances by what it returns, in seconds."""

    def time_ms(call):
        spent = call()
        clock.now += spent
        return spent * 1000

    return measure(calls, time_ms, num_sets=3, seconds=seconds, budget=Budget(limit, clock))


def test_providers_take_turns_on_rotating_inputs():
    seen = []

    def provider(name, spent, number):
        seen.append((name, number))
        return spent

    calls = {"a": partial(provider, "a", 1.0), "b": partial(provider, "b", 3.0)}
    found = timed(Clock(), calls, seconds=40.0, limit=1000.0)
    assert found is not None
    assert (found["a"].median_ms, found["b"].median_ms) == (1000.0, 3000.0)
    assert found["a"].samples == found["b"].samples == 10  # 40 s in rounds of 4 s
    turns = [seen[i : i + 2] for i in range(2, len(seen), 2)]  # the first round is an estimate
    assert [sorted(name for name, _ in turn) for turn in turns] == [["a", "b"]] * 10
    assert [turn[0][0] for turn in turns] == ["a", "b"] * 5
    assert [{number for _, number in turn} for turn in turns] == [{turn % 3} for turn in range(10)]


def test_the_fewest_rounds_are_run_or_nothing():
    calls = {"a": lambda number: 2.0}
    assert timed(Clock(), calls, seconds=1.0, limit=14.0)["a"].samples == 6
    assert timed(Clock(), calls, seconds=1.0, limit=13.0) is None


def test_operators_and_arrays_are_counted_without_views():
    x = torch.ones(8, 4)
    cpu = machine.Cpu()
    assert cpu.launches(lambda: (x.t() + 1).t().sum()) == 2  # the addition and the sum
    assert cpu.peak_bytes(lambda: x.add_(1).view(4, 8).double()) == 8 * 4 * 8


def test_work_is_a_rate_and_a_share_of_the_ceiling():
    timing = Timing(2.0, 2.0, 2.0, 0.0, 6)
    ceilings = Ceilings(copy=1000.0, products={}, by_tokens={10: 4.0, 1000: 8.0})
    assert cases.Work(bytes=1e9).rate(timing) == (500.0, "GB/s")
    assert cases.Work(bytes=1e9).of_ceiling(timing, ceilings) == 0.5
    assert cases.Work(flops=4e9, tokens=600).rate(timing) == (2.0, "TFLOP/s")
    assert cases.Work(flops=4e9, tokens=600).of_ceiling(timing, ceilings) == 0.25
    assert cases.Work().rate(timing) is None


def test_targets_compare_with_ceiling_time_and_others():
    ceilings = Ceilings(copy=1000.0, products={}, by_tokens={})
    work, own, other = cases.Work(bytes=9e8), "keytoken", "slow"
    timings = {own: Timing(1.0, 1.0, 1.0, 0.0, 6), other: Timing(3.0, 3.0, 3.0, 0.0, 6)}
    for target, expected in (
        (cases.Target(of_ceiling=0.9), ("0.90", True)),
        (cases.Target(of_ceiling=0.91), ("0.90", False)),
        (cases.Target(against=other, times=3.0), ("3.00 times", True)),
        (cases.Target(against=other, times=4.0), ("3.00 times", False)),
        (cases.Target(against="absent", times=4.0), None),
        (cases.Target(at_most_us=1000.0), ("1000.0 us", True)),
        (cases.Target(at_most_us=999.0), ("1000.0 us", False)),
        (cases.Target(provider="absent", at_most_us=999.0), None),
    ):
        assert target.reached(work, timings, ceilings) == expected


# --- gates ---


def test_the_reference_passes_every_gate():
    verdicts = run_gates(gates.GATES, OWN, SMALL, CPU, silent)
    assert len(verdicts) > 60
    assert not [verdict for verdict in verdicts if not verdict.passed]


def flipped_entropy(*arguments, **options):
    found = OWN.token_log_probs(*arguments, **options)
    return LogProbs(found.log_prob, -found.entropy, found.log_sum_exp)


def maximum_from_zero(logits, labels, temperature, rows=None):
    """A running maximum that starts at 0 instead of -inf."""
    x = (logits if rows is None else logits[rows]).float() / temperature
    top = x.amax(1).clamp(min=0)
    weights = (x - top[:, None]).exp()
    total = weights.sum(1)
    log_sum_exp = top + total.log()
    mean = (weights * x.clamp(min=-1e30)).sum(1) / total
    return LogProbs(x.gather(1, labels[:, None]).squeeze(1) - log_sum_exp, log_sum_exp - mean, log_sum_exp)


def drifting_log_probs(*arguments, **options):
    found = OWN.token_log_probs(*arguments, **options)
    place = torch.arange(len(found.log_prob))
    return LogProbs(found.log_prob * (1 + 1e-6 * place), found.entropy, found.log_sum_exp)


def flipped_gradient(*arguments, **options):
    return OWN.token_log_probs_gradient(*arguments, **options).neg_()


def unwritten_rows(logits, labels, found, upstream, *more, out=None):
    """Leaves rows without a gradient as they are."""
    result = OWN.token_log_probs_gradient(logits, labels, found, upstream, *more)
    out = torch.empty_like(result) if out is None else out
    active = (upstream != 0) | (more[0] != 0)
    out[active] = result[active].to(out.dtype)
    return out


def head_with_rounded_logits(hidden, weight, labels, temperature, chunk_rows):
    logits = (hidden @ weight.t()).bfloat16()
    found = OWN.token_log_probs(logits, labels, temperature)
    return found.log_prob, found.entropy


def head_for_any_loss(*arguments, expected_rows, **options):
    return OWN.differentiable_head(*arguments, **options)


def head_without_half_a_gradient(hidden, *arguments, **options):
    return OWN.differentiable_head(hidden.detach() * 0.5 + hidden * 0.5, *arguments, **options)


def exclusive_threshold(signals, mask, segments, *, rule="quantile", **options):
    """Selects above the threshold, not at it."""
    found = OWN.select(signals, mask, segments, rule=rule, **options)
    at = found.scores == found.thresholds[segments.number.long()].T[..., None]
    return replace(found, selected=found.selected & ~at)


def one_too_many(signals, mask, segments, *, rule="quantile", **options):
    found = OWN.select(signals, mask, segments, rule=rule, **options)
    first = (found.valid & ~found.selected).flatten().nonzero()[0]
    selected = found.selected.clone()
    selected.view(-1)[first] = True
    return replace(found, selected=selected)


def select_by_place(signals, mask, segments, *, row_keys=None, **options):
    """Ties broken by the place in the batch."""
    return OWN.select(signals, mask, segments, row_keys=torch.arange(len(mask)), **options)


def flipped_advantages(*arguments, **options):
    found = OWN.select(*arguments, **options)
    return replace(found, advantages=-found.advantages)


WRONG = [
    ("K1 forward", "token_log_probs", flipped_entropy),
    ("K1 forward", "token_log_probs", maximum_from_zero),
    ("K1 bits", "token_log_probs", drifting_log_probs),
    ("K1 gradient", "token_log_probs_gradient", flipped_gradient),
    ("K1 gradient", "token_log_probs_gradient", unwritten_rows),
    ("K1 nucleus", "truncated_entropy", lambda z, p, t: OWN.truncated_entropy(z, 0.94, t)),
    ("K4 forward", "head_log_probs", head_with_rounded_logits),
    ("K4 update", "differentiable_head", head_for_any_loss),
    ("K4 update", "differentiable_head", head_without_half_a_gradient),
    ("K2 selected", "select", exclusive_threshold),
    ("K2 selected", "select", flipped_advantages),
    ("K2 counts", "select", one_too_many),
    ("K2 bits", "select", select_by_place),
]


@pytest.mark.parametrize("gate,operator,wrong", WRONG, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_operator_fails_its_gate(gate, operator, wrong):
    verdicts = run_gates({gate: gates.GATES[gate]}, replace(OWN, **{operator: wrong}), SMALL, CPU, silent)
    assert any(not verdict.passed for verdict in verdicts)


def test_a_gate_that_raises_has_failed(capsys):
    def broken(*arguments, **options):
        raise RuntimeError("no kernel image")

    verdicts = run_gates(gates.GATES, replace(OWN, truncated_entropy=broken), SMALL, CPU, silent)
    failed = [verdict for verdict in verdicts if not verdict.passed]
    assert [(v.name, v.detail) for v in failed] == [("K1 nucleus", "RuntimeError: no kernel image")]
    assert "Traceback" in capsys.readouterr().err


# --- the command ---


def only_file(folder, suffix):
    (path,) = folder.glob(f"kernels-*{suffix}")
    return path.read_text()


def test_the_command_on_a_cpu(tmp_path, capsys):
    code = main(["--device", "cpu", "--sizes", "small", "--limit", "60", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    table, data = only_file(tmp_path, ".md"), json.loads(only_file(tmp_path, ".json"))
    assert code == 0 and printed.out == table
    assert "K4 forward" in printed.err  # progress

    head = table.split("## ")[0]
    assert head.startswith("# Kernels on CPU") and data["environment"]["date"][:10] in head
    for name in ("device", "date", "torch", "triton", "commit"):
        assert f"| {name} | {data['environment'][name]} |" in head
    assert torch.__version__ in head

    expected = {case.name for case in matrix.cpu_cases(SMALL)}
    assert {row["case"] for row in data["rows"]} == expected and not data["skipped"]
    for row in data["rows"]:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["samples"] >= 6
        assert row["launches"] > 0 and row["peak_bytes"] > 0
    of_k1 = next(row for row in data["rows"] if row["case"].startswith("K1 forward"))
    rate = 4 * 1003 * of_k1["tokens"] / of_k1["median_ms"] / 1e6
    assert of_k1["rate"] == pytest.approx(rate) and of_k1["unit"] == "GB/s"
    assert of_k1["of_ceiling"] == pytest.approx(rate / data["ceilings"]["copy"])

    # No figure is claimed for a GPU, and every case of one is named.
    assert all(target["reached"] == "not measured" for target in data["targets"])
    assert "## What a GPU would add" in table and "## Targets" not in table
    assert all(f"| {name} |" in table for name in data["only on a GPU"])
    assert "K1 forward, bf16, N=16384" in data["only on a GPU"]
    assert {"torch.compile", "Liger", "cut-cross-entropy"} <= set(data["anchors"]["missing"])


def test_no_times_when_a_gate_fails(tmp_path, capsys):
    wrong = replace(OWN, token_log_probs=flipped_entropy)
    code = main(["--device", "cpu", "--sizes", "small", "--out", str(tmp_path)], wrong)
    table, data = only_file(tmp_path, ".md"), json.loads(only_file(tmp_path, ".json"))
    assert code == 1 and capsys.readouterr().out == table
    assert not data["rows"] and data["ceilings"] is None
    assert " ms" not in table and "## Times" not in table and "## Ceilings" not in table
    assert "No timings" in table and "K1 forward, fp32: entropy" in table


def test_what_does_not_fit_the_time_is_named(tmp_path):
    setting = small_setting()
    rows = []
    skipped = runner.run_cases(matrix.cpu_cases(SMALL), setting, Budget(0.0), silent, rows.extend)
    assert not rows and skipped == {case.name: "no time left" for case in matrix.cpu_cases(SMALL)}


def test_what_does_not_fit_the_memory_is_named():
    case = replace(matrix.cpu_cases(SMALL)[0], needs_bytes=1e18)
    skipped = runner.run_cases([case], small_setting(), Budget(60.0), silent, lambda rows: None)
    assert "GiB of memory" in skipped[case.name]


def test_gates_alone(tmp_path):
    assert main(["--device", "cpu", "--sizes", "small", "--gates-only", "--out", str(tmp_path)]) == 0
    data = json.loads(only_file(tmp_path, ".json"))
    assert data["gates"] and not data["rows"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "finds no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_memcheck_needs_the_sanitizer(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--memcheck", "--out", str(tmp_path)]) == 2
    assert "compute-sanitizer is not on PATH" in capsys.readouterr().err


@pytest.mark.parametrize("code,expected", [(0, 0), (99, 1)])
def test_memcheck_runs_the_gates_under_the_sanitizer(tmp_path, monkeypatch, code, expected):
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" > {tmp_path}/called\nexit {code}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert main(["--memcheck", "--out", str(tmp_path / "out")]) == expected
    called = (tmp_path / "called").read_text()
    assert called.startswith("1 --tool memcheck --error-exitcode 99")
    assert f"{BENCHMARKS / 'gpu.py'} --device cuda --gates-only --sizes memcheck" in called


# --- what a GPU runs, as far as a CPU can ---


def small_setting(others=()):
    weight = inputs.head_weight(SMALL.vocabulary, SMALL.hidden, SMALL.dtype, inputs.generator_of(CPU, 0))
    return cases.Setting(
        operators=OWN, sizes=SMALL, machine=machine.Cpu(), anchors=tuple(others), weight=weight
    )


def stand_ins():
    """Anchors with the names of the packages, which torch computes."""
    eager = anchors.Anchor(
        name=anchors.EAGER, from_logits=anchors.eager_log_probs, from_hidden=anchors.eager_head
    )
    liger = replace(eager, name=anchors.LIGER, from_logits_has_gradient=False)
    verl = replace(eager, name=anchors.VERL, from_logits=None)
    return [eager, replace(eager, name=anchors.COMPILED, slow_start=True), liger, verl]


def test_every_case_of_a_gpu_runs_and_every_target_finds_its_figures():
    setting = small_setting(stand_ins())
    found = report.Report({"device": "CPU", "date": "2000-01-01"}, "launches", "MiB")
    found.ceilings = Ceilings(copy=1.0, products={}, by_tokens={1: 1.0})
    timing = Timing(1.0, 1.0, 1.0, 0.0, 6)
    for case in matrix.gpu_cases(SMALL):
        calls = case.prepare(setting)
        assert len(calls) > 0
        for number in range(3):
            for call in calls.values():
                call(number)
        found.rows += [runner.Row(case, provider, timing) for provider in calls]
    names = [row.case.name for row in found.rows]
    assert len({(row.case.name, row.provider) for row in found.rows}) == len(names)
    # The times of a selection on the device come from a recorded graph, which a CPU does not have.
    absent = {name for name in names if name.startswith("K2")}
    unmet = [line for line in report.as_json(found)["targets"] if line["reached"] == "not measured"]
    assert {line["case"] for line in unmet} <= absent
    assert len(report.as_json(found)["targets"]) == 10


def test_every_asked_target_is_in_the_matrix():
    asked = [target.asked() for case in matrix.gpu_cases(SMALL) for target in case.targets]
    for text in (">= 0.90 of the ceiling", ">= 0.88 of the ceiling", ">= 4 times", "<= 12 us", "<= 25 us"):
        assert any(target.startswith(text) for target in asked)
    for text in ("<= 60 us", ">= 50 times", ">= 6 times faster than verl linear_cross_entropy, whole"):
        assert any(target.startswith(text) for target in asked)
    assert set(matrix_selection.TARGETS) == set(inputs.SCOPES)


def test_a_wrong_anchor_is_told_and_not_timed():
    def wrong(hidden, weight, labels):
        log_prob, entropy = anchors.eager_head(hidden, weight, labels)
        return log_prob * 2, entropy

    good = stand_ins()[0]
    bad = replace(good, from_hidden=wrong)
    assert anchors.check_anchor(good, SMALL, CPU)[0] == good
    usable, verdicts = anchors.check_anchor(bad, SMALL, CPU)
    assert usable.from_hidden is None and usable.from_logits is not None
    assert next(v.name for v in verdicts if not v.passed) == "torch eager: log-prob"


def test_an_anchor_that_loses_far_logits_is_told_and_timed():
    def from_zero(hidden, weight, labels):
        found = maximum_from_zero(hidden @ weight.t(), labels, 1.0)
        return found.log_prob, found.entropy

    usable, verdicts = anchors.check_anchor(
        replace(stand_ins()[0], name="other", from_hidden=from_zero), SMALL, CPU
    )
    assert usable.from_hidden is from_zero
    assert "other: log-prob of logits about -150" in [v.name for v in verdicts if not v.passed]


def test_an_anchor_that_cannot_run_is_named_in_the_row():
    def broken(hidden, weight, labels):
        raise RuntimeError("needs another GPU\nand more")

    anchor = replace(stand_ins()[0], name="other", from_hidden=broken)
    rows = []
    case = matrix.cpu_cases(SMALL)[1]
    runner.run_cases([case], small_setting([anchor]), Budget(60.0), silent, rows.extend)
    assert [(row.provider, row.remark) for row in rows] == [
        ("keytoken", ""),
        ("other", "RuntimeError: needs another GPU"),
    ]
    assert rows[0].timing is not None and rows[1].timing is None


def test_hard_inputs_are_hard():
    logits, labels = inputs.hard_logits(SMALL.gate_rows, SMALL.gate_vocabulary, inputs.generator_of(CPU, 1))
    assert logits.min() == -math.inf and logits.max() > 290
    assert logits.gather(1, labels[:, None]).isfinite().all()
    given = inputs.selection_inputs(16, 48, "group", inputs.generator_of(CPU, 1), hard=True)
    lengths = given.mask.sum(1)
    assert lengths[0] == 0 and lengths[1] == 1
    scores = given.signals[1].values - given.signals[1].baseline
    assert len(scores.unique()) < scores.numel() / 4  # ties
    gradient = inputs.sparse_gradient(40, 0.45, inputs.generator_of(CPU, 1))
    assert (gradient != 0).sum() == 18
