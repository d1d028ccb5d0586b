"""Which inputs have which view, and what every view leaves alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from keytoken.attribution.views import VIEWS, ModelInput, ViewContext, VisionFormat, shows_one_picture
from keytoken.attribution.views.base import pixel_view
from keytoken.errors import InertViewError

VISUAL = {"masked", "blank", "blackened"}
TEMPORAL = {"shuffled", "tubelets", "reversed", "frozen"}
PIXELS = ("pixel_values_videos", "pixel_values")

Prompts = dict[str, ModelInput]


def noise(num_frames: int) -> torch.Tensor:
    return torch.randint(1, 256, (num_frames, 3, 28, 28), dtype=torch.uint8)


@pytest.fixture
def context(vision: VisionFormat) -> ViewContext:
    return ViewContext(vision=vision, seed=0)


@pytest.fixture
def prompts(media: Callable[..., dict[str, torch.Tensor]], prompt_with: Callable[..., ModelInput]) -> Prompts:
    """A prompt of every kind."""
    a, b, c, d = noise(4)
    black = torch.zeros(3, 28, 28, dtype=torch.uint8)
    walk, still = torch.stack([a, b, c, d]), a.expand(4, -1, -1, -1)
    made = {
        "text": media(),
        "image": media(images=[a]),
        "black image": media(images=[black]),
        "video": media([walk]),
        "one frame": media([a[None]]),
        "one tubelet": media([walk[:2]]),
        "static": media([still]),
        "palindrome": media([torch.stack([a, b, b, a])]),
        "equal tubelets": media([torch.stack([a, b, a, b])]),
        "static and moving": media([still, walk]),
        "moving and static": media([walk, still]),
        "image and video": media([walk], [a]),
        "image and static": media([still], [a]),
    }
    return {name: prompt_with(tensors, prompt=name) for name, tensors in made.items()}


LACKING = {
    "text": VISUAL | TEMPORAL,
    "image": TEMPORAL,
    "black image": TEMPORAL | {"blackened"},
    "video": set(),
    "one frame": TEMPORAL,
    "one tubelet": {"tubelets"},
    "static": TEMPORAL,
    "palindrome": {"reversed"},
    "equal tubelets": {"tubelets"},
    "static and moving": set(),
    "moving and static": set(),
    "image and video": set(),
    "image and static": TEMPORAL,
}


def test_the_kinds() -> None:
    assert {VIEWS[name].kind for name in VISUAL} == {"visual"}
    assert {VIEWS[name].kind for name in TEMPORAL} == {"temporal"}


@pytest.mark.parametrize("name", sorted(VISUAL | TEMPORAL))
def test_inputs_have_the_views_that_change_them(name: str, prompts: Prompts, context: ViewContext) -> None:
    """Text has none, images no temporal ones, and nobody one that would show the same picture again."""
    lacking = {kind for kind, inputs in prompts.items() if VIEWS[name].build(inputs, context) is None}
    assert lacking == {kind for kind, views in LACKING.items() if name in views}


def test_a_picture_of_the_mean_colour_has_no_blank_view(prompts: Prompts, context: ViewContext) -> None:
    image = prompts["image"]
    grey = {**image.media, "pixel_values": torch.zeros_like(image.media["pixel_values"])}
    assert VIEWS["blank"].build(dataclasses.replace(image, media=grey), context) is None


@pytest.mark.parametrize("name", sorted(set(VIEWS) - {"masked"}))
def test_a_view_of_pixels_changes_pixels_only(name: str, prompts: Prompts, context: ViewContext) -> None:
    """Tokens, positions and grids stay; the tensors of the real pass are not written to."""
    for kind, inputs in prompts.items():
        before = {key: value.clone() for key, value in inputs.media.items()}
        view = VIEWS[name].build(inputs, context)
        assert inputs.media.keys() == before.keys()
        for key, value in before.items():
            assert torch.equal(inputs.media[key], value), (kind, key)
        if view is None:
            continue
        assert view.input_ids is inputs.input_ids and view.position_ids is inputs.position_ids
        changed = {key for key, value in view.media.items() if not torch.equal(value, before[key])}
        assert changed and changed <= set(PIXELS), kind
        if VIEWS[name].kind == "temporal":
            assert changed == {"pixel_values_videos"}, kind
        for key in changed:
            assert view.media[key].shape == before[key].shape and view.media[key].dtype == before[key].dtype


def test_a_temporal_view_leaves_images_alone(prompts: Prompts, context: ViewContext) -> None:
    """Whatever it would do to them."""
    darken = pixel_view("temporal", lambda clip: clip.patches - 1.0)
    assert darken.build(prompts["image"], context) is None
    view = darken.build(prompts["image and video"], context)
    assert view is not None
    before = prompts["image and video"].media
    assert torch.equal(view.media["pixel_values"], before["pixel_values"])
    assert torch.equal(view.media["pixel_values_videos"], before["pixel_values_videos"] - 1.0)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_depends_on_prompt_and_seed_only(
    name: str, prompts: Prompts, prompt_with: Callable[..., ModelInput], context: ViewContext
) -> None:
    """Built again from copies, in another order, it is the same; answers to a prompt share their frames."""
    video = prompts["video"]
    copy = dataclasses.replace(
        video,
        input_ids=video.input_ids.clone(),
        media={key: value.clone() for key, value in video.media.items()},
    )
    other = prompt_with(video.media, prompt=video.prompt, answer=(20, 21, 22))
    first = VIEWS[name].build(video, context)
    for inputs in reversed(list(prompts.values())):
        VIEWS[name].build(inputs, context)
    again, sibling = VIEWS[name].build(copy, context), VIEWS[name].build(other, context)
    assert first is not None and again is not None and sibling is not None
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.position_ids, again.position_ids)
    assert first.media.keys() == again.media.keys()
    for key, value in first.media.items():
        assert torch.equal(value, again.media[key])
        assert torch.equal(value, sibling.media[key]) or name == "blackened"


@pytest.mark.parametrize("name", ["shuffled", "tubelets"])
def test_orders_depend_on_the_prompt_and_on_the_seed(
    name: str,
    media: Callable[..., dict[str, torch.Tensor]],
    prompt_with: Callable[..., ModelInput],
    context: ViewContext,
) -> None:
    """Sixteen tubelets: two orders are equal by chance less than once in 10 ** 13."""
    made = media([noise(32)])

    def pixels(prompt: str, seed: int) -> torch.Tensor:
        view = VIEWS[name].build(prompt_with(made, prompt), dataclasses.replace(context, seed=seed))
        assert view is not None
        return view.media["pixel_values_videos"]

    assert torch.equal(pixels("a", 0), pixels("a", 0))
    assert not torch.equal(pixels("a", 0), pixels("b", 0))
    assert not torch.equal(pixels("a", 0), pixels("a", 1))


@pytest.mark.parametrize("name", ["shuffled", "tubelets"])
def test_an_order_is_never_the_identity(
    name: str,
    media: Callable[..., dict[str, torch.Tensor]],
    prompt_with: Callable[..., ModelInput],
    context: ViewContext,
) -> None:
    """Two tubelets of which one is repeated: of six orders only three show something else."""
    a, b, c, d = noise(4)
    made = media([torch.stack([a, b, a, b, c, d])])
    for number in range(60):
        view = VIEWS[name].build(prompt_with(made, prompt=str(number)), context)
        assert view is not None
        assert not torch.equal(view.media["pixel_values_videos"], made["pixel_values_videos"])


def test_the_masked_view_has_no_pixels_and_no_placeholders(prompts: Prompts, context: ViewContext) -> None:
    for kind, inputs in prompts.items():
        view = VIEWS["masked"].build(inputs, context)
        if view is not None:
            assert view.media == {} and view.input_ids.tolist() == [9, 10, 20, 21], kind
            assert view.position_ids[0].tolist() == [0, 1, 2, 3]
            assert view.input_ids[view.prompt_length :].tolist() == [20, 21]


def test_pixels_without_placeholders_are_refused(prompts: Prompts, context: ViewContext) -> None:
    bare = dataclasses.replace(prompts["text"], media=prompts["video"].media)
    with pytest.raises(InertViewError, match="dropped nothing"):
        VIEWS["masked"].build(bare, context)


def test_inputs_that_show_one_picture(prompts: Prompts, context: ViewContext) -> None:
    static = {kind for kind, inputs in prompts.items() if shows_one_picture(inputs, context)}
    assert static == {"one frame", "static", "image and static"}
