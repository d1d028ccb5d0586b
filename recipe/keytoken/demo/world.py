"""The demo's little world: seeded questions about short clips of moving shapes.

Seven families of questions. Some need the order of the frames (``order``, ``event``, ``motion``), some
only their appearance (``color``, ``shape``, ``count``), one needs no clip (``text``). Every question
has four options with shuffled letters, and a reference answer that names what is seen, repeats the
answer word and puts its letter right behind it, where a small model can look it up::

    <think> the red square moves left . so the answer is left B . </think> <answer> B </answer>

The ``text`` family has 25 sums in all, so its held-out questions differ from the training ones only in
the order of their options; clips never repeat.
"""

from dataclasses import dataclass

import numpy as np

NUM_FRAMES = 8
FRAME_SIZE = 56

COLORS = {"red": (225, 45, 45), "green": (40, 190, 70), "blue": (60, 90, 235), "yellow": (230, 210, 50)}
SHAPES = ("square", "circle", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
EVENTS = ("grows", "shrinks", "brightens", "fades")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LETTERS = ("A", "B", "C", "D")

FAMILIES = ("motion", "order", "event", "color", "shape", "count", "text")
VIDEO_FAMILIES = FAMILIES[:-1]


@dataclass(frozen=True)
class Body:
    """One shape of a clip: what it looks like and where it is in each frame.

    Attributes:
        shape: One of ``SHAPES``.
        color: One of ``COLORS``.
        center: Pixels, (x, y) for each frame, [T, 2].
        radius: Half extent in pixels for each frame, [T].
        light: Opacity from 0 (invisible) to 1 for each frame, [T].
    """

    shape: str
    color: str
    center: np.ndarray
    radius: np.ndarray
    light: np.ndarray


@dataclass(frozen=True)
class Question:
    """One question with its clip (``bodies``, empty for the text family) and reference answer.

    Attributes:
        family: One of ``FAMILIES``.
        question: The question without options.
        options: Four answer words; option i has letter ``LETTERS[i]``.
        caption: What a perfect observer says about the clip.
        answer: The right word, one of ``options``.
        bodies: What the clip shows.
    """

    family: str
    question: str
    options: tuple[str, ...]
    caption: str
    answer: str
    bodies: tuple[Body, ...] = ()

    @property
    def letter(self) -> str:
        """Letter of the right option."""
        return LETTERS[self.options.index(self.answer)]

    @property
    def prompt(self) -> str:
        """Question and options as the user asks them, without the clip."""
        listed = " ".join(f"{letter} {word}" for letter, word in zip(LETTERS, self.options, strict=True))
        return f"{self.question} {listed}"

    @property
    def response(self) -> str:
        """The reference answer."""
        return response(self.caption, self.answer, self.letter)


def response(caption: str, answer: str, letter: str) -> str:
    """An answer in the demo's format from its three parts."""
    return f"<think> {caption} . so the answer is {answer} {letter} . </think> <answer> {letter} </answer>"


def make_question(family: str, rng: np.random.Generator) -> Question:
    """Draw one question of a family; all randomness comes from ``rng``."""
    return _MAKERS[family](rng)


def _shuffled(words: tuple[str, ...], rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(str(word) for word in rng.permutation(words))


def _body(
    rng: np.random.Generator,
    shape: str,
    color: str,
    *,
    center: np.ndarray | None = None,
    radius: float | np.ndarray | None = None,
    light: np.ndarray | float = 1.0,
) -> Body:
    """A body at a random place and of random size where these are not given."""
    if center is None:
        center = rng.uniform(18, FRAME_SIZE - 18, 2)
    if radius is None:
        radius = rng.uniform(11, 14)
    return Body(
        shape,
        color,
        np.broadcast_to(np.asarray(center, dtype=np.float64), (NUM_FRAMES, 2)),
        np.broadcast_to(np.asarray(radius, dtype=np.float64), (NUM_FRAMES,)),
        np.broadcast_to(np.asarray(light, dtype=np.float64), (NUM_FRAMES,)),
    )


def _motion(rng: np.random.Generator) -> Question:
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(tuple(COLORS)))
    direction = str(rng.choice(tuple(DIRECTIONS)))
    axis = np.array(DIRECTIONS[direction], dtype=np.float64)
    travel = rng.uniform(28, 34) * np.linspace(-0.5, 0.5, NUM_FRAMES)
    drift = rng.uniform(-5, 5) * np.abs(axis[::-1])  # off-centre, across the direction of travel
    center = FRAME_SIZE / 2 + drift + travel[:, None] * axis
    body = _body(rng, shape, color, center=center, radius=rng.uniform(9, 11))
    options = _shuffled(tuple(DIRECTIONS), rng)
    caption = f"the {color} {shape} moves {direction}"
    return Question("motion", "which way does the shape move ?", options, caption, direction, (body,))


def _order(rng: np.random.Generator) -> Question:
    first, second = (str(color) for color in rng.choice(tuple(COLORS), 2, replace=False))
    early = (np.arange(NUM_FRAMES) < NUM_FRAMES // 2).astype(np.float64)
    bodies = (
        _body(rng, str(rng.choice(SHAPES)), first, light=early),
        _body(rng, str(rng.choice(SHAPES)), second, light=1 - early),
    )
    options = _shuffled(tuple(COLORS), rng)
    caption = f"first {first} then {second}"
    return Question("order", "which color comes first ?", options, caption, first, bodies)


def _event(rng: np.random.Generator) -> Question:
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(tuple(COLORS)))
    event = str(rng.choice(EVENTS))
    ramp = np.linspace(0, 1, NUM_FRAMES)
    small, large = rng.uniform(4, 6), rng.uniform(15, 18)
    dim = rng.uniform(0.15, 0.25)
    radius = {"grows": small + (large - small) * ramp, "shrinks": large + (small - large) * ramp}
    light = {"brightens": dim + (1 - dim) * ramp, "fades": 1 + (dim - 1) * ramp}
    body = _body(rng, shape, color, radius=radius.get(event), light=light.get(event, 1.0))
    caption = f"the {color} {shape} {event}"
    return Question("event", "what happens ?", _shuffled(EVENTS, rng), caption, event, (body,))


def _color(rng: np.random.Generator) -> Question:
    shape, other_shape = (str(name) for name in rng.choice(SHAPES, 2, replace=False))
    color, other_color = (str(name) for name in rng.choice(tuple(COLORS), 2, replace=False))
    places = _two_places(rng)
    bodies = (
        _body(rng, shape, color, center=places[0], radius=rng.uniform(10, 12)),
        _body(rng, other_shape, other_color, center=places[1], radius=rng.uniform(10, 12)),
    )
    options = _shuffled(tuple(COLORS), rng)
    caption = f"the {shape} is {color}"
    return Question("color", f"what color is the {shape} ?", options, caption, color, bodies)


def _shape(rng: np.random.Generator) -> Question:
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(tuple(COLORS)))
    body = _body(rng, shape, color, radius=rng.uniform(13, 17))
    caption = f"the {color} shape is {shape}"
    return Question("shape", "what shape is it ?", _shuffled(SHAPES, rng), caption, shape, (body,))


def _count(rng: np.random.Generator) -> Question:
    number = int(rng.integers(1, 5))
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(tuple(COLORS)))
    quarters = rng.permutation(4)[:number]
    bodies = tuple(
        _body(
            rng,
            shape,
            color,
            center=np.array([14 + 28 * (quarter % 2), 14 + 28 * (quarter // 2)]) + rng.uniform(-3, 3, 2),
            radius=rng.uniform(7, 9),
        )
        for quarter in quarters
    )
    answer = NUMBERS[number]
    caption = f"there are {answer} {color} shapes"
    return Question("count", "how many shapes ?", _shuffled(NUMBERS[1:5], rng), caption, answer, bodies)


def _text(rng: np.random.Generator) -> Question:
    left, right = (int(number) for number in rng.integers(1, 6, 2))
    answer = NUMBERS[left + right]
    others = [number for number in NUMBERS[2:11] if number != answer]
    options = _shuffled((answer, *(str(word) for word in rng.choice(others, 3, replace=False))), rng)
    caption = f"{NUMBERS[left]} plus {NUMBERS[right]} is {answer}"
    return Question("text", f"what is {NUMBERS[left]} plus {NUMBERS[right]} ?", options, caption, answer)


def _two_places(rng: np.random.Generator) -> np.ndarray:
    """Two centres on opposite sides of the frame, [2, 2]; nothing overlaps."""
    along, across = rng.uniform(13, 15, 2), rng.uniform(16, FRAME_SIZE - 16, 2)
    places = np.stack([[along[0], across[0]], [FRAME_SIZE - along[1], across[1]]])
    if rng.random() < 0.5:
        places = places[:, ::-1]
    return places[rng.permutation(2)]


_MAKERS = {
    "motion": _motion,
    "order": _order,
    "event": _event,
    "color": _color,
    "shape": _shape,
    "count": _count,
    "text": _text,
}
