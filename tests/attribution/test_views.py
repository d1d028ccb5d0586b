"""Views against what they stand for: a forward pass with hidden tokens, and the processor on other frames."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import pytest
import torch

from keytoken.attribution.views import (
    drop_vision_tokens,
    frame_permutation,
    is_static,
    masked_views,
    permute_frames,
)
from keytoken.errors import DataError, InertViewError

START, END, IMAGE, VIDEO = 3, 4, 5, 6  # ids of the tiny vocabulary
PADS = {IMAGE, VIDEO}
GOLDEN_ORDER = (7, 6, 1, 3, 4, 0, 2, 5)  # frame_permutation(8, 0, "clip-17")


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


@pytest.mark.parametrize("num_frames", [2, 3, 4, 16])
def test_permutations_are_stable_and_never_the_identity(num_frames: int) -> None:
    orders = [frame_permutation(num_frames, 7, f"prompt-{key}") for key in range(300)]
    assert orders == [frame_permutation(num_frames, 7, f"prompt-{key}") for key in range(300)]
    identity = tuple(range(num_frames))
    for order in orders:
        assert order is not None and order != identity and tuple(sorted(order)) == identity


def test_permutations_do_not_depend_on_the_process() -> None:
    """Python randomises hash() of strings for each process; these values must not move."""
    assert frame_permutation(8, 0, "clip-17") == GOLDEN_ORDER
    assert frame_permutation(8, 1, "clip-17") != GOLDEN_ORDER
    assert frame_permutation(8, 0, "clip-18") != GOLDEN_ORDER


def test_permutations_are_uniform_over_all_but_the_identity() -> None:
    counts = collections.Counter(frame_permutation(3, 0, key) for key in range(5000))
    assert len(counts) == 5
    assert all(abs(count - 1000) < 5 * 28.3 for count in counts.values())  # 5 standard deviations


@pytest.mark.parametrize("num_frames", [0, 1])
def test_clips_without_an_order_have_no_permutation(num_frames: int) -> None:
    assert frame_permutation(num_frames, 0, "clip") is None


def process(clips: list[torch.Tensor], temporal_patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and grid by the processor of Hugging Face; frames are multiples of 28 already."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.Qwen2VLVideoProcessor(
        temporal_patch_size=temporal_patch_size, min_pixels=28 * 28, max_pixels=56 * 84
    )
    output = processor(videos=clips, do_sample_frames=False, return_tensors="pt")
    return output["pixel_values_videos"], output["video_grid_thw"]


@pytest.mark.parametrize("temporal_patch_size", [2, 3])
@pytest.mark.parametrize("num_frames", [2, 3, 4, 7, 8])
def test_permuting_patches_equals_processing_permuted_frames(
    num_frames: int, temporal_patch_size: int
) -> None:
    """Bit for bit, for even and odd frame counts, two clips of different sizes in one batch."""
    clips = [
        torch.randint(0, 256, (num_frames, 3, 56, 84), dtype=torch.uint8),
        torch.randint(0, 256, (5, 3, 28, 56), dtype=torch.uint8),
    ]
    orders = [frame_permutation(len(clip), 0, key) for key, clip in enumerate(clips)]
    shuffled = [clip[list(order)] for clip, order in zip(clips, orders, strict=True) if order is not None]
    pixels, grid = process(clips, temporal_patch_size)
    expected, _ = process(shuffled, temporal_patch_size)
    ours = permute_frames(pixels, grid, orders, temporal_patch_size)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, pixels)
    first = int(grid[0].prod())
    only_second = permute_frames(pixels, grid, [None, orders[1]], temporal_patch_size)
    assert torch.equal(only_second[:first], pixels[:first])
    assert torch.equal(only_second[first:], expected[first:])


def test_a_clip_of_equal_frames_is_static_but_not_an_error() -> None:
    pixels, grid = process(
        [torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8).expand(4, -1, -1, -1)], 2
    )
    assert is_static(pixels, permute_frames(pixels, grid, [(1, 0, 3, 2)]))
    moving, grid = process([torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8)], 2)
    assert not is_static(moving, permute_frames(moving, grid, [(1, 0, 3, 2)]))


@pytest.mark.parametrize(
    ("orders", "error", "message"),
    [
        ([(0, 1, 2, 3)], InertViewError, "identity"),
        ([None], InertViewError, "has_temporal=False"),
        ([(1, 0)], DataError, "does not fit video 0"),
        ([(1, 0, 2, 3, 4)], DataError, "does not fit video 0"),
        ([(1, 1, 2, 3)], DataError, "does not fit video 0"),
        ([(1, 0, 2, 3), (1, 0)], DataError, "2 frame orders"),
    ],
)
def test_orders_that_cannot_work_are_refused(orders: Any, error: type[Exception], message: str) -> None:
    pixels = torch.randn(2 * 16, 1176)
    with pytest.raises(error, match=message):
        permute_frames(pixels, torch.tensor([[2, 4, 4]]), orders)


def test_pixels_of_another_batch_are_refused() -> None:
    with pytest.raises(DataError, match="33 patches"):
        permute_frames(torch.randn(33, 1176), torch.tensor([[2, 4, 4]]), [(1, 0, 2, 3)])
    with pytest.raises(DataError, match="1175 values"):
        permute_frames(torch.randn(32, 1175), torch.tensor([[2, 4, 4]]), [(1, 0, 2, 3)])
