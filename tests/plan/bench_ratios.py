"""Predicted against measured: ``python tests/plan/bench_ratios.py [ROUNDS]``.

The passes of a step, in plain torch on one thread, with random models of nine million parameters: how long
each takes over the pass on the real input, and how long the plan's operations say. Passes take turns; times
are the processor's, which do not depend on what else the machine does; medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from keytoken.verl_adapter.shims.torch_extensions import install

install()  # transformers imports torchvision

from keytoken.demo.model import model_config  # noqa: E402
from keytoken.demo.tokenizer import build_tokenizer  # noqa: E402
from keytoken.plan.architecture import Architecture  # noqa: E402
from keytoken.plan.flops import Flops, forward, training  # noqa: E402
from keytoken.workers.answer_head import AnswerHead  # noqa: E402
from keytoken_kernels.head import differentiable_head  # noqa: E402

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
GRIDS = ((4, 12, 12), (4, 24, 24))
ROWS, TEXT, ANSWER = 4, 48, 64


def build(family: str) -> Any:
    """A model wide enough that products are most of its time."""
    from transformers import AutoModelForImageTextToText

    config: Any = model_config(build_tokenizer(family), family)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 256, 1024, 8
    text.num_attention_heads, text.layer_types = 8, ["full_attention"] * 8
    vision.hidden_size, vision.intermediate_size, vision.depth, vision.num_heads = 128, 256, 4, 4
    vision.out_hidden_size = 256
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")


def inputs(model: Any, grid: tuple[int, int, int], with_clip: bool) -> dict[str, torch.Tensor]:
    """``ROWS`` sequences of equal length."""
    frames, height, width = grid
    patches = frames * height * width
    ids = [1] * (TEXT + ANSWER)
    found: dict[str, torch.Tensor] = {}
    if with_clip:
        ids = [model.config.video_token_id] * (patches // 4) + ids
        values = 3 * 2 * model.config.vision_config.patch_size**2
        found["video_grid_thw"] = torch.tensor([grid] * ROWS)
        found["pixel_values_videos"] = torch.randn(ROWS * patches, values)
    positions = torch.arange(len(ids)).expand(3, ROWS, -1)
    return {"input_ids": torch.tensor([ids] * ROWS), "position_ids": positions, **found}


def run(model: Any, given: dict[str, torch.Tensor], backward: bool) -> None:
    """A pass with the head at the answers."""
    length = given["input_ids"].shape[1]
    rows = torch.arange(ROWS)[:, None] * length + torch.arange(length - ANSWER - 1, length - 1)

    def score(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return differentiable_head(hidden, weight, torch.ones(len(hidden), dtype=torch.long), 1.0)

    with torch.set_grad_enabled(backward), AnswerHead(model, rows.flatten(), score) as head:
        log_probs, _ = head.read(model(**given, use_cache=False))
    if backward:
        log_probs.sum().backward()
        model.zero_grad()


def predicted(shape: Architecture, grid: tuple[int, int, int], with_clip: bool) -> Flops:
    """What the plan says of such a pass; torch computes the whole square of attention or half of it."""
    length = TEXT + ANSWER + (grid[0] * grid[1] * grid[2] // 4 if with_clip else 0)
    return forward(shape, length, length**2, ANSWER, (grid,) if with_clip else ()) * ROWS


def measure(family: str, grid: tuple[int, int, int], rounds: int) -> list[str]:
    """One table row for each pass."""
    model = build(family).train()
    shape = Architecture.from_config(model.config.to_dict(), family)
    whole, masked = inputs(model, grid, True), inputs(model, grid, False)
    once = predicted(shape, grid, True)
    passes: dict[str, tuple[Callable[[], None], float]] = {
        "real": (lambda: run(model, whole, False), once.total),
        "masked": (lambda: run(model, masked, False), predicted(shape, grid, False).total),
        "update": (lambda: run(model, whole, True), training(once, False, True).total),
        "update, recomputed": (lambda: recomputed(model, whole), training(once, True, True).total),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds + 1):
        for name, (call, _) in passes.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    middle = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    lines = []
    for name, (_, flops) in passes.items():
        said, seen = flops / once.total, middle[name] / middle["real"]
        clip = "x".join(map(str, grid))
        figures = f"{middle[name]:.2f} | {seen:.2f} | {said:.2f} | {said / seen - 1:+.0%}"
        lines.append(f"| {family} | {clip} | {name} | {figures} |")
    return lines


def recomputed(model: Any, given: dict[str, torch.Tensor]) -> None:
    """An update with activation checkpointing."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run(model, given, True)
    model.gradient_checkpointing_disable()


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print("| family | clip | pass | s | over real: measured | predicted | deviation |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for family in FAMILIES:
        for grid in GRIDS:
            print("\n".join(measure(family, grid, rounds)), flush=True)


if __name__ == "__main__":
    main()
