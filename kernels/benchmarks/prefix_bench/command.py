"""The command: gates, times, memory and a table, written after every case."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_bench.machine import machine_for
from kernel_bench.timing import turn_order

from keytoken.prefix.attention import share_prefix
from keytoken.prefix.layout import HIDING_ATTENTION, apart, cost_of
from prefix_bench.cases import SHAPES, Shape, build_model, flops, group, under
from prefix_bench.passes import (
    packs_of,
    peak_bytes,
    score,
    seconds,
    separate,
    shared,
    stock_score,
    stock_update,
    update,
)
from prefix_bench.picture import draw
from prefix_bench.steps import PLAIN, SEPARATE, SHARED, steps_of

MIB = 1 << 20
# Largest difference of a log-prob in nats, and relative difference of the gradient's norm, that is let pass.
GATES = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.2, 0.05)}
SIZES = (4, 8, 16)


def main(arguments: Sequence[str]) -> int:
    """Measure; 0 if both ways agree in every case, 1 if not."""
    options = _options(arguments)
    device = machine_for(options.device).device
    shape = SHAPES[options.shape or ("7b" if device.type == "cuda" else "middle")]
    shape = dataclasses.replace(shape, checkpointing=shape.checkpointing or options.checkpointing)
    attention = options.attention or _attention(device)
    model = build_model(shape, device, attention)
    share_prefix(model)
    report = {"about": _about(options, device, attention, shape), "cases": list[dict[str, Any]]()}
    path = Path(options.out) / f"prefix-{date.today()}-{device.type}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for grid, size in itertools.product(shape.grids, options.sizes):
        if time.monotonic() - start > options.limit:
            report["about"]["left out"] = "cases from here on, for want of time"
            break
        if options.prompts and shape.prompt_tokens(grid) not in options.prompts:
            continue
        report["cases"].append(_case(model, shape, grid, size, device, options.rounds))
        path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        path.write_text(as_markdown(report), encoding="utf-8")
        draw(report, path.with_suffix(".png"))
    print(as_markdown(report), end="")
    print(f"written to {path}", file=sys.stderr)
    return int(not all(case["agree"] for case in report["cases"]))


def _case(
    model: Any, shape: Shape, grid: tuple[int, int, int], size: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    """All figures of one prompt length and group size; no times where the two ways disagree."""
    real = group(shape, grid, size, device)
    views = [real, under("shuffled", real), under("masked", real)]
    calls: dict[str, Callable[[], object]] = {
        "score_separate": partial(score, model, real, separate),
        "score_shared": partial(score, model, real, shared),
        "update_separate": partial(update, model, real, False),
        "update_shared": partial(update, model, real, True),
        "views_shared": lambda: [score(model, view, shared) for view in views],
        "views_separate": lambda: [score(model, view, separate) for view in views],
        "score_stock": partial(stock_score, model, real),
        "update_stock": partial(stock_update, model, real),
    }
    trees = [tree for pack in packs_of(real) for tree in pack.trees]
    separately, cost = flops(model, real, cost_of(apart(trees))), cost_of(trees)
    case: dict[str, Any] = {
        "prompt": shape.prompt_tokens(grid),
        "size": size,
        "model": {
            "score": separately / flops(model, real, cost),
            "update": separately / flops(model, real, cost, hidden=_hides(model)),
        },
        **_gates(calls, shape.dtype),
    }
    if not case["agree"]:
        return case
    case["peak_mib"] = {
        name: peak_bytes(call, device) / MIB for name, call in calls.items() if not name.startswith("views")
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in turn_order(list(calls), turn):
            samples[name].append(seconds(calls[name], device))
    case["seconds"] = {name: statistics.median(values) for name, values in samples.items()}
    case["samples"] = samples
    case["load"] = os.getloadavg()[0]
    return case


def _gates(calls: dict[str, Callable[[], Any]], dtype: torch.dtype) -> dict[str, Any]:
    """Whether all ways give the same; also the first call of each, which is not timed."""
    exact, *others = (calls[f"score_{name}"]() for name in ("separate", "shared", "stock"))
    views = zip(calls["views_separate"](), calls["views_shared"](), strict=True)
    gap = max(_gap(*pair) for pair in [*((exact, other) for other in others), *views])
    norm, *norms = (calls[f"update_{name}"]() for name in ("separate", "shared", "stock"))
    relative = max(abs(norm - other) / norm for other in norms)
    nats, share = GATES[dtype]
    return {"gap_nats": gap, "gap_gradient": relative, "agree": gap <= nats and relative <= share}


def _gap(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Largest difference of a log-prob in nats."""
    return max(float((mine - its).abs().max()) for mine, its in zip(one, other, strict=True))


def as_markdown(report: dict[str, Any]) -> str:
    """The table."""
    lines = ["# One prompt for a whole group: what it saves", ""]
    lines += [f"- {name}: {value}" for name, value in report["about"].items()]
    names = (
        "prompt, tokens",
        "answers",
        "scoring: separate, s",
        "shared, s",
        "ratio",
        "by the model",
        "forward and backward: separate, s",
        "shared, s",
        "ratio",
        "by the model",
        "three views shared / one separate",
        "step: plain GRPO, stock, s",
        "Video-KTR separate / that",
        "Video-KTR shared / that",
        "scoring: peak MiB, one at a time",
        "shared",
        "forward and backward: peak MiB, one at a time",
        "shared",
        "largest difference, nats",
        "load",
    )
    lines += ["", f"| {' | '.join(names)} |", f"|{' ---: |' * len(names)}"]
    lines += [f"| {' | '.join(_cells(case))} |" for case in report["cases"]]
    return "\n".join(lines) + "\n"


def _cells(case: dict[str, Any]) -> list[str]:
    head = [f"{case['prompt']:,}", str(case["size"])]
    if not case["agree"]:
        return [*head, *[""] * 16, f"**{case['gap_nats']:.1e}: the two ways disagree**", ""]
    time_of, peak = case["seconds"], case["peak_mib"]
    steps = steps_of(time_of)
    plain = steps[PLAIN]

    def compared(kind: str) -> list[str]:
        one, other = time_of[f"{kind}_separate"], time_of[f"{kind}_shared"]
        return [f"{one:.2f}", f"{other:.2f}", f"**{one / other:.2f}**", f"{case['model'][kind]:.2f}"]

    return [
        *head,
        *compared("score"),
        *compared("update"),
        f"**{time_of['views_shared'] / time_of['score_separate']:.2f}**",
        f"{plain:.2f}",
        f"{steps[SEPARATE] / plain:.2f}",
        f"**{steps[SHARED] / plain:.2f}**",
        *(f"{peak[name]:.0f}" for name in calls_in_order(peak)),
        f"{case['gap_nats']:.1e}",
        f"{case['load']:.1f}",
    ]


def calls_in_order(peak: dict[str, float]) -> list[str]:
    """The columns of memory."""
    return [
        name
        for name in ("score_separate", "score_shared", "update_separate", "update_shared")
        if name in peak
    ]


def _about(options: argparse.Namespace, device: torch.device, attention: str, shape: Shape) -> dict[str, str]:
    clock = (
        "of the device"
        if device.type == "cuda"
        else "of the process on the CPU (other work adds little to it)"
    )
    return {
        "date": str(date.today()),
        **machine_for(options.device).describe(),
        "torch": torch.__version__,
        "model": f"{shape.text}, random weights, {shape.dtype}".replace("'", ""),
        "attention": attention,
        "answers": "{} to {} tokens, all of them scored; loss on a quarter".format(*shape.answers),
        "activation checkpointing": str(shape.checkpointing),
        "times": f"median seconds {clock} of {options.rounds} rounds, all passes in turn within a round",
        "step": "old log-probs, views (real, shuffled, masked) of Video-KTR, forward and backward",
        "stock": "log-probs from logits of whole sequences, one answer at a time, as verl computes them",
        "by the model": "operations of text model, vision tower and head, from lengths alone"
        + (", with a gradient also of hidden pairs" if attention == HIDING_ATTENTION else ""),
        "load": "processes that wanted a core, one-minute mean at the end of the case",
    }


def _hides(model: Any) -> bool:
    return bool(model.config.get_text_config()._attn_implementation == HIDING_ATTENTION)


def _attention(device: torch.device) -> str:
    installed = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if installed else "sdpa"


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="outputs/bench", help="folder of the table")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="7b on a GPU, else middle")
    parser.add_argument("--attention", help="attn_implementation of the model")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="answers to a prompt")
    parser.add_argument("--prompts", type=int, nargs="+", help="only prompts of these lengths")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the update")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which no case is begun")
    return parser.parse_args(arguments)
