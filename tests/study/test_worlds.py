from collections import Counter

import numpy as np
import pytest

from keytoken.demo.render import draw_clip
from keytoken.demo.world import COLORS, FAMILIES, NUM_FRAMES, NUMBERS, Question
from keytoken.study.prompts import processor, split_question
from keytoken.study.warm import answered, text_example
from keytoken.study.worlds import KEPT, KEPT_LOOKS, KEPT_SUMS, WORLDS, sum_of, travel_of

EVERY_FAMILY = sorted({family for world in WORLDS.values() for family in world.families})


def world_of(family: str) -> str:
    return next(name for name, world in WORLDS.items() if family in world.families)


def draw(family: str, kept: bool, count: int = 60) -> list[Question]:
    world, rng = WORLDS[world_of(family)], np.random.default_rng(0)
    return [world.question(family, rng, kept=kept) for _ in range(count)]


def parameters(question: Question) -> tuple[object, ...]:
    """What is held out of each family, written down once more."""
    bodies = question.bodies
    return {
        "motion": lambda: (np.abs(bodies[0].center[-1] - bodies[0].center[0]).max() >= 32.5,),
        "order": lambda: (bodies[0].shape, bodies[1].shape),
        "event": lambda: (bodies[0].color, bodies[0].shape),
        "color": lambda: (bodies[0].shape, bodies[1].shape),
        "shape": lambda: (bodies[0].radius[0] >= 16,),
        "count": lambda: (bodies[0].color, bodies[0].shape),
        "text": lambda: tuple(sorted(question.question.split()[2:5:2])),
        "sequence": lambda: (bodies[0].shape, bodies[1].shape),
        "changes": lambda: (bodies[0].color, bodies[0].shape),
        "counts": lambda: (bodies[0].color, bodies[0].shape),
    }[question.family]()


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_no_parameter_of_the_test_is_trained_on(family: str) -> None:
    train, test = ({parameters(q) for q in draw(family, kept)} for kept in (False, True))
    assert train and test and not train & test


@pytest.mark.parametrize("world", WORLDS)
def test_splits_keep_to_their_parameters_and_share_no_clip(world: str) -> None:
    seen: dict[str, set[bytes]] = {}
    for split in ("train", "tuning", "familiar", "test"):
        questions = [split_question(world, split, index) for index in range(42)]
        assert all(KEPT[question.family](question) == (split == "test") for question, _ in questions)
        clips = {draw_clip(question.bodies, rng).tobytes() for question, rng in questions if question.bodies}
        seen[split] = clips
    assert len(set.union(*seen.values())) == sum(map(len, seen.values()))
    first, again = (split_question(world, "test", 3)[0] for _ in range(2))
    assert (first.prompt, first.response) == (again.prompt, again.response)


def test_sums_of_the_test_are_never_shown_not_even_as_text() -> None:
    """Warm start included: its questions, captions and drills."""
    rng = np.random.default_rng(0)
    world = WORLDS["standard"]
    told = []
    for _ in range(700):
        for example in (text_example(world, rng, 0.5), answered(world, rng, 0.3)):
            told.append(f"{example.prompt} {example.response}")
    words = [text.split() for text in told if " plus " in text]
    shown = {
        frozenset((NUMBERS.index(text[place - 1]), NUMBERS.index(text[place + 1])))
        for text in words
        for place, word in enumerate(text)
        if word == "plus"
    }
    assert len(words) > 100 and not shown & KEPT_SUMS
    assert {sum_of(question) for question in draw("text", True)} == KEPT_SUMS
    answers = {sum(pair) if len(pair) == 2 else 2 * next(iter(pair)) for pair in shown}
    assert {sum(pair) for pair in KEPT_SUMS} <= answers, "every held-out answer can still be named"


@pytest.mark.parametrize("family", [family for family in EVERY_FAMILY if family != "text"])
def test_what_is_held_out_does_not_give_the_answer_away(family: str) -> None:
    """Each answer word comes about as often with the held-out parameters as without them."""
    for kept in (False, True):
        shares = Counter(question.answer for question in draw(family, kept, 400))
        assert len(shares) == 4 and min(shares.values()) > 65, (kept, shares)


def test_held_out_travel_and_looks() -> None:
    assert all(32.5 <= travel_of(question) <= 34 for question in draw("motion", True))
    assert all(28 <= travel_of(question) < 32.5 for question in draw("motion", False))
    assert len(KEPT_LOOKS) == len(COLORS)


@pytest.mark.parametrize("family", [family for family in EVERY_FAMILY if family not in FAMILIES])
def test_new_families_speak_in_words_of_the_demo(family: str) -> None:
    """One token a word, as for the demo's own families, and a prompt that names its answer."""
    tokenizer = processor().tokenizer
    for question in draw(family, False, 20):
        text = f" {question.prompt} {question.response}"
        assert len(tokenizer(text)["input_ids"]) == len(text.split())
        assert question.answer in question.options and question.answer in question.caption.split()
        assert len(set(question.options)) == 4


def test_a_sequence_shows_its_colors_in_their_order() -> None:
    for question in draw("sequence", False, 20):
        words = question.caption.split()
        assert words[::2] == ["one", "two", "three", "four"]
        frames = draw_clip(question.bodies, np.random.default_rng(0)).astype(int)
        for place, color in enumerate(words[1::2]):
            part = frames[2 * place : 2 * place + 2].reshape(-1, 3)
            lit = part[part.max(axis=1) > 150].mean(axis=0)
            nearest = min(COLORS, key=lambda name: float(np.abs(lit - COLORS[name]).sum()))
            assert nearest == color
        asked = question.question.split()[3]
        assert question.answer == words[words.index(asked) + 1]


def test_changes_happen_in_their_halves() -> None:
    rising = {"grows": "radius", "brightens": "light", "shrinks": "radius", "fades": "light"}
    for question in draw("changes", False, 60):
        _, first, _, second = question.caption.split()
        body = question.bodies[0]
        for half, event in ((slice(0, 4), first), (slice(4, 8), second)):
            values = getattr(body, rising[event])[half]
            assert values[-1] > values[0] if event in ("grows", "brightens") else values[-1] < values[0]
            other = body.light if rising[event] == "radius" else body.radius
            assert np.ptp(other[half]) == 0
        assert question.answer == (first if "first" in question.question else second)


def test_counts_are_counted_in_their_halves() -> None:
    for question in draw("counts", False, 30):
        _, first, _, second, *_ = question.caption.split()
        lit = np.stack([body.light for body in question.bodies]).sum(axis=0)
        half = NUM_FRAMES // 2
        assert lit.tolist() == [NUMBERS.index(first)] * half + [NUMBERS.index(second)] * half
        assert question.answer == (first if "first" in question.question else second)
