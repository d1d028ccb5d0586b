"""Operations of each pass, against torch's own count of what the tiny models run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from keytoken.demo.model import build_model
from keytoken.demo.tokenizer import build_tokenizer
from keytoken.plan.architecture import Architecture, Vision, architecture_of
from keytoken.plan.flops import causal_pairs, forward, training, vision_flops
from keytoken.workers.answer_head import AnswerHead
from keytoken_kernels.head import differentiable_head

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
GRID = (3, 10, 14)  # patches: windows of 8 are cut at both edges
TEXT, ANSWER = 37, 60
CLOSE = 0.05


def attention_on_a_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """torch has the rule and does not apply it to the operator of CPUs."""
    return int(sdpa_flop_count(query, key, value))


def its_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


RULES = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_on_a_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: its_backward,
}


def counter_of_all() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=RULES)


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model and its shape as it is read from its config.json."""
    folder = tmp_path_factory.mktemp(request.param)
    model: Any = build_model(build_tokenizer(request.param), seed=0, family=request.param)
    model.config.save_pretrained(folder)
    return model, architecture_of(str(folder))


def inputs(model: Any, with_clip: bool) -> dict[str, torch.Tensor]:
    """One sequence of a clip, text and an answer; the positions do not matter to the count."""
    vision = model.config.vision_config
    frames, height, width = GRID
    count = frames * height * width
    ids = [1] * (TEXT + ANSWER)
    found: dict[str, torch.Tensor] = {}
    if with_clip:
        ids = [model.config.video_token_id] * (count // 4) + ids
        found["video_grid_thw"] = torch.tensor([GRID])
        found["pixel_values_videos"] = torch.randn(count, 3 * 2 * vision.patch_size**2)
    positions = torch.arange(len(ids)).expand(3, 1, -1)
    return {"input_ids": torch.tensor([ids]), "position_ids": positions, **found}


def scored(model: Any, length: int) -> AnswerHead:
    """The head at the answer alone, as the passes and the update have it."""

    def score(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        labels = torch.ones(len(hidden), dtype=torch.long)
        return differentiable_head(hidden, weight, labels, 1.0, impl="reference")

    return AnswerHead(model, torch.arange(length - ANSWER - 1, length - 1), score)


def counted(model: Any, given: dict[str, torch.Tensor], backward: bool) -> float:
    length = given["input_ids"].shape[1]
    with counter_of_all() as counter, torch.set_grad_enabled(backward):
        with scored(model, length) as head:
            log_probs, _ = head.read(model(**given, use_cache=False))
        if backward:
            log_probs.sum().backward()
    model.zero_grad()
    return float(counter.get_total_flops())


def shape_of_pass(length: int) -> dict[str, float]:
    """torch counts the whole square of attention."""
    return {"tokens": length, "pairs": length**2, "head_rows": ANSWER}


@pytest.mark.parametrize("with_clip", [True, False], ids=["clip", "masked"])
def test_forward(models: tuple[Any, Architecture], with_clip: bool) -> None:
    model, shape = models
    given = inputs(model, with_clip)
    grids = (GRID,) if with_clip else ()
    expected = forward(shape, **shape_of_pass(given["input_ids"].shape[1]), grids=grids)
    assert counted(model.eval(), given, backward=False) == pytest.approx(expected.total, rel=1e-3)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_forward_and_backward(models: tuple[Any, Architecture], recompute: bool) -> None:
    model, shape = models
    given = inputs(model, with_clip=True)
    model.train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    once = forward(shape, **shape_of_pass(given["input_ids"].shape[1]), grids=(GRID,))
    expected = training(once, recompute, chunked_head=True)
    found = counted(model, given, backward=True)
    if recompute:
        model.gradient_checkpointing_disable()
    assert found == pytest.approx(expected.total, rel=CLOSE)


def test_vision_alone(models: tuple[Any, Architecture]) -> None:
    model, shape = models
    given = inputs(model, with_clip=True)
    tower = model.model.visual.eval()
    with counter_of_all() as counter, torch.no_grad():
        tower(given["pixel_values_videos"], grid_thw=given["video_grid_thw"])
    assert counter.get_total_flops() == pytest.approx(vision_flops(shape.vision, GRID).total, rel=1e-3)


def test_windows_of_a_real_frame() -> None:
    """A frame of 308 x 336 pixels in windows of 112: three rows and three columns, the last row of 84."""
    vision: Vision = architecture_of("Qwen/Qwen2.5-VL-7B-Instruct").vision
    windows = 2 * 3 * (8 * 8) ** 2 + 3 * (6 * 8) ** 2
    pairs = 4 * (22 * 24) ** 2 + 28 * windows
    assert vision_flops(vision, (1, 22, 24)).attention == 4 * pairs * 1280


def test_pairs() -> None:
    assert causal_pairs(5) == 15
    assert causal_pairs(3, prefix=10) == 30 + 6
    assert causal_pairs(2, prefix=3) + causal_pairs(3) == causal_pairs(5)


def test_seven_billion_by_hand(tmp_path: Path) -> None:
    """Two operations a parameter and token: the layers of the 7B hold 6.53 of its 8.29 billion."""
    model = architecture_of("Qwen/Qwen2.5-VL-7B-Instruct")
    found = forward(model, tokens=1000, pairs=0, head_rows=1000)
    assert found.linear + found.ends == pytest.approx(2 * 6.526e9 * 1000, rel=1e-3)
    assert found.head == pytest.approx(2 * 152064 * 3584 * 1000)
