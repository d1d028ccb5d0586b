"""The masked view against a forward pass whose attention mask hides the vision tokens."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from keytoken.attribution.views import drop_vision_tokens, masked_views
from keytoken.errors import InertViewError

START, END, IMAGE, VIDEO = 3, 4, 5, 6  # ids of the tiny vocabulary
PADS = {IMAGE, VIDEO}


def sequence() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Text, a video of 2 x 2 x 2 tokens, text, an answer of 3; M-RoPE positions jump at the video."""
    input_ids = torch.tensor([9, 10, START, *[VIDEO] * 8, END, 11, 12, 13, 14, 15])
    video = torch.tensor([[t * 5, h, w] for t, h, w in itertools.product(range(2), repeat=3)]).T + 3
    head = torch.arange(3).expand(3, 3)
    tail = torch.arange(6).expand(3, 6) + 12
    rope = torch.cat([head, video, tail], dim=1)
    return input_ids, torch.cat([torch.arange(17)[None], rope]), 14


def test_masked_view_keeps_rope_positions_and_renumbers_the_text_row() -> None:
    input_ids, position_ids, prompt_length = sequence()
    view = drop_vision_tokens(input_ids, position_ids, PADS, prompt_length)
    assert view.kept.tolist() == [0, 1, 2, 11, 12, 13, 14, 15, 16]
    assert view.input_ids.tolist() == [9, 10, START, END, 11, 12, 13, 14, 15]
    assert view.position_ids[0].tolist() == list(range(9))
    assert view.position_ids[1:].tolist() == [[0, 1, 2, 12, 13, 14, 15, 16, 17]] * 3
    three_rows = drop_vision_tokens(input_ids, position_ids[1:], PADS, prompt_length)
    assert torch.equal(three_rows.position_ids, view.position_ids[1:])


def test_compressed_positions_are_those_of_plain_text() -> None:
    input_ids, position_ids, prompt_length = sequence()
    view = drop_vision_tokens(input_ids, position_ids, PADS, prompt_length, "compressed")
    assert view.position_ids.tolist() == [list(range(9))] * 4


def test_inputs_are_left_alone() -> None:
    input_ids, position_ids, prompt_length = sequence()
    before = input_ids.clone(), position_ids.clone()
    drop_vision_tokens(input_ids, position_ids, PADS, prompt_length, "compressed")
    assert torch.equal(input_ids, before[0]) and torch.equal(position_ids, before[1])


def test_a_placeholder_in_the_answer_stays_an_answer_token() -> None:
    input_ids, position_ids, prompt_length = sequence()
    input_ids[15] = VIDEO
    view = drop_vision_tokens(input_ids, position_ids, PADS, prompt_length)
    assert view.input_ids[-3:].tolist() == [13, VIDEO, 15]


def test_a_view_that_drops_nothing_is_refused() -> None:
    input_ids, position_ids, prompt_length = sequence()
    with pytest.raises(InertViewError, match="has_visual=False"):
        drop_vision_tokens(input_ids, position_ids, {IMAGE}, prompt_length)
    input_ids[3:11] = 9
    input_ids[15] = VIDEO  # only in the answer
    with pytest.raises(InertViewError):
        drop_vision_tokens(input_ids, position_ids, PADS, prompt_length)


def test_text_prompts_of_a_batch_have_no_masked_view() -> None:
    input_ids, position_ids, prompt_length = sequence()
    text = torch.arange(9, 14)
    views = masked_views(
        [text, input_ids],
        [torch.arange(5).expand(4, 5), position_ids],
        PADS,
        [3, prompt_length],
        [False, True],
    )
    assert views[0] is None
    assert views[1] is not None and views[1].kept.numel() == 9


def tiny_model(rope_theta: float = 100.0) -> Any:
    """A random Qwen2.5-VL of two layers; a small theta makes positions matter."""
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": rope_theta},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [0],
        "window_size": 28,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def test_masked_view_equals_a_forward_with_hidden_vision_tokens() -> None:
    """The truth: pixels encoded, vision keys hidden by an attention mask, positions given."""
    model = tiny_model()
    input_ids, position_ids, prompt_length = sequence()
    view = drop_vision_tokens(input_ids, position_ids, PADS, prompt_length)
    visible = torch.ones_like(input_ids)
    visible[3:11] = 0
    video = {"pixel_values_videos": torch.randn(32, 1176), "video_grid_thw": torch.tensor([[2, 4, 4]])}

    def answer_logits(ids: torch.Tensor, positions: torch.Tensor, **inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=ids[None], position_ids=positions[:, None], **inputs).logits
        return logits[0, -4:-1]

    hidden = answer_logits(input_ids, position_ids, attention_mask=visible[None], **video)
    seen = answer_logits(input_ids, position_ids, attention_mask=torch.ones_like(visible)[None], **video)
    dropped = answer_logits(view.input_ids, view.position_ids)
    compressed = drop_vision_tokens(input_ids, position_ids, PADS, prompt_length, "compressed")
    moved = answer_logits(compressed.input_ids, compressed.position_ids)

    torch.testing.assert_close(dropped, hidden, rtol=1e-5, atol=1e-5)
    assert float((seen - hidden).abs().max()) > 1e-2  # the video matters to this model
    assert float((moved - hidden).abs().max()) > 1e-2  # and so do positions
