"""The worlds of studies: families of the demo world and new ones, with parameters kept for the test.

Clips of the demo's two splits differ in their random draws only, and its text family has the same sums in
both. Here every family keeps some of its parameters for the test: no training prompt, no example of the warm
start and no tuning prompt has them, and every test prompt does. What is kept is always something that does
not decide the answer (how fast the shape moves, not where to), so a model that has never seen it is not wrong
by construction. Sums are the exception: their answers can be named, but not looked up.

``standard`` has the families of the demo. ``temporal`` has families in which the order of the frames decides
most of what an answer says about the clip; their words are words of the demo, so tokenizer and model are the
demo's as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from keytoken.demo.world import (
    COLORS,
    EVENTS,
    FAMILIES,
    FRAME_SIZE,
    NUM_FRAMES,
    NUMBERS,
    SHAPES,
    Body,
    Question,
    make_question,
)

Maker = Callable[[np.random.Generator], Question]

# Sums kept for the test; each answer keeps another sum that is trained on.
KEPT_SUMS = frozenset(
    {frozenset({1, 3}), frozenset({2, 3}), frozenset({2, 4}), frozenset({3, 4}), frozenset({3, 5})}
)
# Of the 28 to 34 pixels that a shape travels, the fastest quarter; of its radius of 13 to 17, the largest.
KEPT_TRAVEL = 32.5
KEPT_RADIUS = 16.0
# One shape for each color, and for each shape the one that stands beside it or comes after it.
KEPT_LOOKS = frozenset(zip(COLORS, SHAPES, strict=True))
KEPT_NEIGHBOURS = frozenset(zip(SHAPES, (*SHAPES[1:], SHAPES[0]), strict=True))


@dataclass(frozen=True)
class World:
    """Families of questions.

    Attributes:
        makers: For each family the function that draws a question.
        kept: For each family whether a question has the parameters that are kept for the test.
    """

    makers: Mapping[str, Maker]
    kept: Mapping[str, Callable[[Question], bool]]

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families."""
        return tuple(self.makers)

    def question(self, family: str, rng: np.random.Generator, *, kept: bool = False) -> Question:
        """Draw a question, with parameters that are kept for the test or with those that are not.

        About every fourth draw has kept parameters; the others are drawn again.
        """
        draws = (self.makers[family](rng) for _ in itertools.count())
        return next(question for question in draws if self.kept[family](question) == kept)

    def any_question(self, rng: np.random.Generator) -> Question:
        """A question of any family, without kept parameters."""
        return self.question(str(rng.choice(self.families)), rng)


def _sequence(rng: np.random.Generator) -> Question:
    """Four colors, one after the other; asks for one of them by its number."""
    colors = [str(color) for color in rng.permutation(tuple(COLORS))]
    shapes = [str(rng.choice(SHAPES)) for _ in colors]
    parts = _parts(len(colors))
    bodies = tuple(
        _body(rng, shape, color, light=part) for shape, color, part in zip(shapes, colors, parts, strict=True)
    )
    asked = int(rng.integers(len(colors)))
    caption = " ".join(f"{NUMBERS[place + 1]} {color}" for place, color in enumerate(colors))
    question = f"what is color {NUMBERS[asked + 1]} ?"
    return Question("sequence", question, _shuffled(tuple(COLORS), rng), caption, colors[asked], bodies)


def _changes(rng: np.random.Generator) -> Question:
    """Two different events on one shape, one in each half of the clip; asks for one of them."""
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(tuple(COLORS)))
    events = [str(event) for event in rng.choice(EVENTS, 2, replace=False)]
    small, large, dim = rng.uniform(5, 7), rng.uniform(14, 17), rng.uniform(0.15, 0.25)
    size, light = [1.0] * NUM_FRAMES, [1.0] * NUM_FRAMES
    for kind, pair in ((size, ("grows", "shrinks")), (light, ("brightens", "fades"))):
        ramps = [(half, event == pair[0]) for half, event in enumerate(events) if event in pair]
        if ramps:
            kind[:] = _level(ramps)
    body = _body(
        rng,
        shape,
        color,
        radius=small + (large - small) * np.array(size),
        light=dim + (1 - dim) * np.array(light),
    )
    asked = int(rng.integers(2))
    question = f"what happens {('first', 'then')[asked]} ?"
    caption = f"first {events[0]} then {events[1]}"
    return Question("changes", question, _shuffled(EVENTS, rng), caption, events[asked], (body,))


def _level(ramps: list[tuple[int, bool]]) -> np.ndarray:
    """[NUM_FRAMES] from 0 to 1: ramps (half of the clip, whether it rises), level before and after them."""
    half = NUM_FRAMES // 2
    level = np.full(NUM_FRAMES, 0.0 if ramps[0][1] else 1.0)
    for place, rises in ramps:
        ramp = np.linspace(0, 1, half)
        level[place * half : (place + 1) * half] = ramp if rises else 1 - ramp
        level[(place + 1) * half :] = 1.0 if rises else 0.0
    return level


def _counts(rng: np.random.Generator) -> Question:
    """Two numbers of equal shapes, one after the other; asks for one of them."""
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(tuple(COLORS)))
    numbers = [int(number) for number in rng.choice(np.arange(1, 5), 2, replace=False)]
    bodies = tuple(
        _body(
            rng,
            shape,
            color,
            center=np.array([14 + 28 * (quarter % 2), 14 + 28 * (quarter // 2)]) + rng.uniform(-3, 3, 2),
            radius=rng.uniform(7, 9),
            light=part,
        )
        for number, part in zip(numbers, _parts(2), strict=True)
        for quarter in rng.permutation(4)[:number]
    )
    asked = int(rng.integers(2))
    question = f"how many shapes {('first', 'then')[asked]} ?"
    caption = f"first {NUMBERS[numbers[0]]} then {NUMBERS[numbers[1]]} {color} shapes"
    options = _shuffled(NUMBERS[1:5], rng)
    return Question("counts", question, options, caption, NUMBERS[numbers[asked]], bodies)


def _parts(count: int) -> Iterator[np.ndarray]:
    """For each of ``count`` equal parts of a clip the light [NUM_FRAMES] of what is seen in it alone."""
    place = np.arange(NUM_FRAMES) * count // NUM_FRAMES
    return ((place == part).astype(np.float64) for part in range(count))


def _body(
    rng: np.random.Generator,
    shape: str,
    color: str,
    *,
    center: np.ndarray | None = None,
    radius: np.ndarray | float | None = None,
    light: np.ndarray | float = 1.0,
) -> Body:
    """A body at a random place and of random size where these are not given."""
    where = rng.uniform(18, FRAME_SIZE - 18, 2) if center is None else center
    size = rng.uniform(11, 14) if radius is None else radius
    return Body(
        shape,
        color,
        np.broadcast_to(np.asarray(where, dtype=np.float64), (NUM_FRAMES, 2)),
        np.broadcast_to(np.asarray(size, dtype=np.float64), (NUM_FRAMES,)),
        np.broadcast_to(np.asarray(light, dtype=np.float64), (NUM_FRAMES,)),
    )


def _shuffled(words: tuple[str, ...], rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(str(word) for word in rng.permutation(words))


def sum_of(question: Question) -> frozenset[int]:
    """The two numbers of a text question, in any order."""
    left, _, right, *_ = question.caption.split()
    return frozenset((NUMBERS.index(left), NUMBERS.index(right)))


def travel_of(question: Question) -> float:
    """Pixels that the first body travels along its axis from the first frame to the last."""
    center = question.bodies[0].center
    return float(np.abs(center[-1] - center[0]).max())


def _kept_look(question: Question) -> bool:
    body = question.bodies[0]
    return (body.color, body.shape) in KEPT_LOOKS


def _kept_neighbours(question: Question) -> bool:
    first, second = question.bodies[:2]
    return (first.shape, second.shape) in KEPT_NEIGHBOURS


KEPT: dict[str, Callable[[Question], bool]] = {
    "motion": lambda question: travel_of(question) >= KEPT_TRAVEL,
    "order": _kept_neighbours,
    "event": _kept_look,
    "color": _kept_neighbours,
    "shape": lambda question: float(question.bodies[0].radius[0]) >= KEPT_RADIUS,
    "count": _kept_look,
    "text": lambda question: sum_of(question) in KEPT_SUMS,
    "sequence": _kept_neighbours,
    "changes": _kept_look,
    "counts": _kept_look,
}


def _demo_maker(family: str) -> Maker:
    return lambda rng: make_question(family, rng)


MAKERS: dict[str, Maker] = {
    **{family: _demo_maker(family) for family in FAMILIES},
    "sequence": _sequence,
    "changes": _changes,
    "counts": _counts,
}


def _world(*families: str) -> World:
    return World({family: MAKERS[family] for family in families}, KEPT)


WORLDS: dict[str, World] = {
    "standard": _world(*FAMILIES),
    "temporal": _world("motion", "order", "event", "sequence", "changes", "counts"),
}
