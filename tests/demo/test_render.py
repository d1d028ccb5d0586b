from pathlib import Path

import numpy as np
import pytest

from keytoken.demo.render import draw_clip, write_clip
from keytoken.demo.world import COLORS, DIRECTIONS, Question, make_question


def _draw(family: str, seed: int) -> tuple[Question, np.ndarray]:
    rng = np.random.default_rng(seed)
    question = make_question(family, rng)
    return question, draw_clip(question.bodies, rng).astype(np.float64)


def _lit(frames: np.ndarray) -> np.ndarray:
    """Pixels that are clearly brighter than the background, [T, H, W]."""
    return frames.max(-1) > 45


def test_same_seed_same_pixels() -> None:
    for family in ("motion", "order", "event", "color", "shape", "count"):
        assert np.array_equal(_draw(family, 5)[1], _draw(family, 5)[1])


def test_motion_goes_where_the_answer_says() -> None:
    for seed in range(40):
        question, frames = _draw("motion", seed)
        ends = [np.argwhere(_lit(frames)[index]).mean(0)[::-1] for index in (0, -1)]
        travel = ends[1] - ends[0]
        assert np.dot(travel, DIRECTIONS[question.answer]) > 15, (seed, question.answer, travel)


def test_events_change_size_or_light_as_named() -> None:
    for seed in range(60):
        question, frames = _draw("event", seed)
        area, light = _lit(frames).sum((1, 2)), frames.max(-1).max((1, 2))
        if question.answer in ("grows", "shrinks"):
            assert (area[-1] > 2 * area[0]) == (question.answer == "grows")
            assert (area[0] > 2 * area[-1]) == (question.answer == "shrinks")
        else:
            assert (light[-1] > 1.5 * light[0]) == (question.answer == "brightens")
            assert (light[0] > 1.5 * light[-1]) == (question.answer == "fades")


def test_colors_on_screen_are_the_named_ones() -> None:
    for seed in range(30):
        question, frames = _draw("order", seed)
        pixels = frames[0][_lit(frames)[0]]
        nearest = [
            min(COLORS, key=lambda name: np.abs(np.array(COLORS[name]) - pixel).sum()) for pixel in pixels
        ]
        assert max(set(nearest), key=nearest.count) == question.answer


def test_static_families_do_not_move() -> None:
    for family in ("color", "shape", "count"):
        _, frames = _draw(family, 1)
        assert np.abs(frames - frames[0]).max() <= 13  # the noise alone


@pytest.mark.parametrize("family", ["motion", "color", "shape", "count", "event", "order"])
def test_bodies_stay_inside_the_frame(family: str) -> None:
    for seed in range(30):
        border = _lit(_draw(family, seed)[1])
        touched = border[:, 0].any() + border[:, -1].any() + border[:, :, 0].any() + border[:, :, -1].any()
        assert touched <= 1  # a large shape may brush one side


def test_files_are_the_same_bytes_and_leave_no_partial(tmp_path: Path) -> None:
    frames = _draw("count", 2)[1].astype(np.uint8)
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, frames)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
