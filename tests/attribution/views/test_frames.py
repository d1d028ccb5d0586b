"""Frames moved inside a pixel tensor, against the processor on moved frames."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch

from keytoken.attribution.views import frame_permutation, permute_frames
from keytoken.attribution.views.frames import appearances, changing_order, join_frames, split_frames
from keytoken.errors import DataError, InertViewError

GOLDEN_ORDER = (7, 6, 1, 3, 4, 0, 2, 5)  # frame_permutation(8, 0, "clip-17")
Process = Callable[..., tuple[torch.Tensor, torch.Tensor]]


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


@pytest.mark.parametrize("temporal_patch_size", [2, 3])
@pytest.mark.parametrize("num_frames", [2, 3, 4, 7, 8])
def test_permuting_patches_equals_processing_permuted_frames(
    process: Process, num_frames: int, temporal_patch_size: int
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


def noise(num_frames: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_frames, 3, 28, 28), dtype=torch.uint8)


def test_frames_are_the_pictures_that_the_processor_was_shown(process: Process) -> None:
    """Frame f of the split is the processor's output for a clip that shows frame f only."""
    clip = noise(6)
    pixels, grid = process([clip])
    frames = split_frames(pixels, int(grid[0, 0]), 2)
    assert frames.shape == (6, 4, 3, 14 * 14)
    assert torch.equal(join_frames(frames, 2), pixels)
    for number, frame in enumerate(clip):
        still, _ = process([frame.expand(2, -1, -1, -1)])
        assert torch.equal(split_frames(still, 1, 2)[0], frames[number])


def test_equal_frames_have_equal_appearances(process: Process) -> None:
    a, b, c = noise(3)
    pixels, grid = process([torch.stack([a, b, a, c, b, b])])
    frames = split_frames(pixels, int(grid[0, 0]), 2)
    assert appearances(frames) == [0, 1, 0, 3, 1, 1]
    assert appearances(frames[:0]) == []


def test_every_order_changes_a_clip_that_can_change() -> None:
    """Three equal frames and another: of 24 orders only 18 change anything."""
    units = torch.tensor([[5.0], [5.0], [5.0], [7.0]])
    for number in range(40):
        order = changing_order(units, seed=0, key=f"p{number}")
        assert order is not None
        assert order[3] != 3


def test_a_last_frame_that_fills_its_patch_is_no_order(process: Process) -> None:
    """The processor repeats the third frame of three; to exchange the two is to do nothing."""
    pixels, grid = process([noise(3)])
    frames = split_frames(pixels, int(grid[0, 0]), 2)
    orders = {changing_order(frames, seed=0, key=f"p{number}") for number in range(200)}
    assert (0, 1, 3, 2) not in orders
    assert len(orders) == 22  # 24 but the identity and that one


@pytest.mark.parametrize("num_frames", [1, 2, 6])
def test_frames_that_are_all_alike_have_no_order(num_frames: int) -> None:
    assert changing_order(torch.ones(num_frames, 4), seed=0, key="p") is None
