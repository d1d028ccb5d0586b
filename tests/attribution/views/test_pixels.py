"""Views of pixels against the truth: the processor of Hugging Face on frames that were changed before."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from keytoken.attribution.views import VIEWS, ModelInput, ViewContext, VisionFormat
from keytoken.attribution.views.base import black_pixel
from keytoken.errors import ConfigurationError, DataError
from keytoken.schema import ViewConfig
from keytoken.view_config import BlackenedConfig

Media = dict[str, torch.Tensor]
MakeMedia = Callable[..., Media]
MakePrompt = Callable[..., ModelInput]
PIXELS = ("pixel_values_videos", "pixel_values")
GOLDEN_SQUARES = ".X.X.X...X..XXX."  # of a white image of 4 x 4 patches, in their order in memory
SHAPES = [(2, 28, 28), (3, 56, 84), (4, 84, 28), (7, 28, 56), (8, 56, 56)]


def noise(num_frames: int, height: int = 56, width: int = 84) -> torch.Tensor:
    """Frames that are all different, without a black value."""
    return torch.randint(1, 256, (num_frames, 3, height, width), dtype=torch.uint8)


def filled(clip: torch.Tensor) -> torch.Tensor:
    """The clip with its last frame repeated to a whole patch, as the processor fills it."""
    return clip if len(clip) % 2 == 0 else torch.cat([clip, clip[-1:]])


def options(**changes: Any) -> ViewConfig:
    return ViewConfig(blackened=BlackenedConfig(**changes))


@pytest.fixture
def context(vision: VisionFormat) -> ViewContext:
    return ViewContext(vision=vision, seed=3)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("reversed", lambda clip: clip.flip(0)),
        ("frozen", lambda clip: clip[:1].expand_as(clip)),
    ],
)
def test_frames_are_those_of_a_changed_clip(
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    media: MakeMedia,
    prompt_with: MakePrompt,
    context: ViewContext,
) -> None:
    """Bit for bit; clips of all shapes in one prompt, and an image that stays as it is."""
    clips, images = [noise(*shape) for shape in SHAPES], [noise(1)[0]]
    view = VIEWS[name].build(prompt_with(media(clips, images)), context)
    assert view is not None
    expected = media([change(filled(clip)) for clip in clips], images)
    assert view.media.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(view.media[key], value), key


def test_tubelets_are_moved_whole(media: MakeMedia, prompt_with: MakePrompt, context: ViewContext) -> None:
    """The frames of a tubelet stay together and in order, and the tubelets' order is not the old one."""
    clips = [noise(*shape) for shape in SHAPES]
    real = media(clips)
    view = VIEWS["tubelets"].build(prompt_with(real), context)
    assert view is not None
    counts = real["video_grid_thw"].prod(dim=1).tolist()
    parts = zip(clips, view.media["pixel_values_videos"].split(counts), strict=True)
    for number, (clip, patches) in enumerate(parts):
        pairs = filled(clip).split(2)
        seen = patches.chunk(len(pairs))
        alone = [media([pair])["pixel_values_videos"] for pair in pairs]
        order = [next(i for i, pair in enumerate(alone) if torch.equal(pair, part)) for part in seen]
        assert sorted(order) == list(range(len(pairs)))
        # A clip of one tubelet has no order and stays as it is beside those that have.
        assert (order == list(range(len(pairs)))) == (len(pairs) == 1), number


def test_shuffled_frames_are_those_of_a_permuted_clip(
    media: MakeMedia, prompt_with: MakePrompt, context: ViewContext
) -> None:
    """Every frame of the view is one of the clip's, each once, at another place than before."""
    clip = noise(6)
    view = VIEWS["shuffled"].build(prompt_with(media([clip])), context)
    assert view is not None
    slots = [media([frame.expand(2, -1, -1, -1)])["pixel_values_videos"] for frame in clip]
    patches = view.media["pixel_values_videos"].unflatten(1, (3, 2, -1)).chunk(3)
    shown = [part[:, :, slot] for part in patches for slot in (0, 1)]
    stills = [slot.unflatten(1, (3, 2, -1))[:, :, 0] for slot in slots]
    order = [next(i for i, still in enumerate(stills) if torch.equal(still, frame)) for frame in shown]
    assert sorted(order) == list(range(6)) and order != list(range(6))
    assert torch.equal(media([clip[order]])["pixel_values_videos"], view.media["pixel_values_videos"])


def test_a_blank_picture_has_the_mean_colour(
    media: MakeMedia, prompt_with: MakePrompt, context: ViewContext
) -> None:
    """To rounding: no picture of whole numbers has exactly that colour."""
    transformers = pytest.importorskip("transformers")
    clips, images = [noise(4), noise(2, 28, 28)], [noise(1)[0], noise(1, 28, 56)[0]]
    mean = torch.tensor(transformers.image_utils.OPENAI_CLIP_MEAN)[:, None, None] * 255
    view = VIEWS["blank"].build(prompt_with(media(clips, images)), context)
    assert view is not None
    expected = media(
        [mean.expand(clip.shape).clone() for clip in clips],
        [mean.expand(image.shape).clone() for image in images],
    )
    for name in PIXELS:
        torch.testing.assert_close(view.media[name], expected[name], rtol=0.0, atol=1e-6)


def squares_of(frames: torch.Tensor, side: int) -> list[tuple[slice, slice]]:
    corners = itertools.product(range(0, frames.shape[-2], side), range(0, frames.shape[-1], side))
    return [(slice(y, y + side), slice(x, x + side)) for y, x in corners]


def blackened_squares(
    clip: torch.Tensor, patches: torch.Tensor, side: int, encode: Callable[[torch.Tensor], torch.Tensor]
) -> list[list[bool]]:
    """Which squares of each temporal patch are black, found with the processor alone.

    A square's values in the tensor are those that change when the processor is shown the clip with that
    square black.
    """
    real, found = encode(clip), []
    for start in range(0, len(clip), 2):
        found.append([])
        for square in squares_of(clip, side):
            changed = clip.clone()
            changed[(slice(start, start + 2), slice(None), *square)] = 0
            alone = encode(changed)
            own = alone != real
            assert own.any()
            black = bool((patches[own] == alone[own]).all())
            assert black or bool((patches[own] == real[own]).all())
            found[-1].append(black)
    return found


@pytest.mark.parametrize("side", [14, 28, 10, 60])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_blackened_pixels_are_those_of_a_clip_with_black_squares(
    kind: str, side: int, media: MakeMedia, prompt_with: MakePrompt, context: ViewContext
) -> None:
    """Bit for bit, with the squares that were drawn painted into the frames before they are processed."""
    clip = noise(4) if kind == "video" else noise(1).expand(2, -1, -1, -1)
    name = PIXELS[kind == "image"]

    def encode(frames: torch.Tensor) -> torch.Tensor:
        made = media([frames]) if kind == "video" else media(images=[frames[0]])
        return made[name]

    made = media([clip]) if kind == "video" else media(images=[clip[0]])
    context = dataclasses.replace(context, options=options(size=side))
    view = VIEWS["blackened"].build(prompt_with(made), context)
    assert view is not None
    black = blackened_squares(clip, view.media[name], side, encode)
    painted = clip.clone()
    for number, squares in enumerate(black):
        for square, hidden in zip(squares_of(clip, side), squares, strict=True):
            if hidden:
                painted[(slice(2 * number, 2 * number + 2), slice(None), *square)] = 0
    assert any(map(any, black)) and not torch.equal(painted, clip)
    assert torch.equal(view.media[name], encode(painted))
    if kind == "video" and side == 14:
        assert black[0] != black[1]  # every temporal patch has squares of its own


@pytest.mark.parametrize("p", [0.01, 0.5, 0.6, 1.0])
def test_squares_are_black_with_their_probability(
    p: float, media: MakeMedia, prompt_with: MakePrompt, context: ViewContext
) -> None:
    """Within five standard deviations of the binomial law, over 20 prompts of 384 squares."""
    made = media([noise(12, 112, 112)])
    context = dataclasses.replace(context, options=options(p=p))
    number = black = 0
    for prompt in range(20):
        view = VIEWS["blackened"].build(prompt_with(made, prompt=f"p{prompt}"), context)
        assert view is not None
        changed = (view.media["pixel_values_videos"] != made["pixel_values_videos"]).all(dim=1)
        number, black = number + len(changed), black + int(changed.sum())
    assert number == 20 * 384
    assert abs(black - p * number) <= 5 * (number * p * (1 - p)) ** 0.5


def test_a_draw_that_hides_nothing_is_repeated(
    media: MakeMedia, prompt_with: MakePrompt, context: ViewContext
) -> None:
    """Of one square, black once in a hundred draws; of two, one of which is black already."""
    rare = dataclasses.replace(context, options=options(p=0.01, size=28))
    half = noise(1, 28, 56)[0]
    half[:, :, :28] = 0
    for prompt in range(10):
        one = prompt_with(media(images=[noise(1, 28, 28)[0]]), prompt=str(prompt))
        two = prompt_with(media(images=[half]), prompt=str(prompt))
        for inputs in (one, two):
            view = VIEWS["blackened"].build(inputs, rare)
            assert view is not None
            assert not torch.equal(view.media["pixel_values"], inputs.media["pixel_values"])


def test_squares_are_drawn_for_answers_or_prompts(
    media: MakeMedia, prompt_with: MakePrompt, context: ViewContext
) -> None:
    made = media([noise(4)], [noise(1)[0]])

    def pixels(per: str, prompt: str, answer: tuple[int, ...], seed: int = 3) -> list[torch.Tensor]:
        chosen = dataclasses.replace(context, options=options(per=per), seed=seed)
        view = VIEWS["blackened"].build(prompt_with(made, prompt, answer), chosen)
        assert view is not None
        return [view.media[name] for name in PIXELS]

    def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> list[bool]:
        return [torch.equal(a, b) for a, b in zip(one, other, strict=True)]

    for per in ("prompt", "response"):
        first = pixels(per, "p", (7, 8))
        assert same(first, pixels(per, "p", (7, 8))) == [True, True]
        assert same(first, pixels(per, "p", (7, 9))) == [per == "prompt"] * 2
        assert same(first, pixels(per, "p", (78,))) == [per == "prompt"] * 2
        assert same(first, pixels(per, "q", (7, 8))) == [False, False]
        assert same(first, pixels(per, "p", (7, 8), seed=4)) == [False, False]


def test_clips_of_one_prompt_have_draws_of_their_own(
    media: MakeMedia, prompt_with: MakePrompt, context: ViewContext
) -> None:
    """Equal clips and an equal image, hidden at different places."""
    still = noise(1).expand(2, -1, -1, -1)
    view = VIEWS["blackened"].build(prompt_with(media([still, still], [still[0]])), context)
    assert view is not None
    one, two = view.media["pixel_values_videos"].chunk(2)
    image = view.media["pixel_values"]
    assert not torch.equal(one, two) and not torch.equal(one, image) and not torch.equal(two, image)


def test_draws_are_the_same_in_every_process(
    media: MakeMedia, prompt_with: MakePrompt, context: ViewContext
) -> None:
    """Torch's generator on the CPU gives every machine these values."""
    white = prompt_with(media(images=[torch.full((3, 56, 56), 255, dtype=torch.uint8)]), prompt="clip-17")
    view = VIEWS["blackened"].build(white, context)
    assert view is not None
    black = (view.media["pixel_values"][:, 0] < 0).tolist()
    assert "".join(".X"[hidden] for hidden in black) == GOLDEN_SQUARES


def test_black_is_what_the_processor_makes_of_it(vision: VisionFormat, media: MakeMedia) -> None:
    made = media(images=[torch.zeros(3, 28, 28, dtype=torch.uint8)])["pixel_values"].unflatten(1, (3, -1))
    assert vision.black is not None
    assert torch.equal(made, torch.tensor(vision.black)[:, None].expand_as(made))
    transformers = pytest.importorskip("transformers")
    pairs = zip(
        transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD, strict=True
    )
    assert vision.black == pytest.approx([-mean / std for mean, std in pairs], rel=1e-6)


def test_processors_that_show_black_differently_are_refused(build_processor: Callable[..., Any]) -> None:
    processor = build_processor()
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ConfigurationError, match="same image_mean and image_std"):
        black_pixel(processor)


def test_black_follows_the_processor(build_processor: Callable[..., Any]) -> None:
    assert black_pixel(build_processor(image_mean=[0.5] * 3, image_std=[0.25] * 3)) == (-2.0, -2.0, -2.0)
    assert black_pixel(build_processor(do_normalize=False)) == (0.0, 0.0, 0.0)


def test_blackening_without_a_processor_is_refused(
    media: MakeMedia, prompt_with: MakePrompt, context: ViewContext
) -> None:
    blind = dataclasses.replace(context, vision=dataclasses.replace(context.vision, black=None))
    with pytest.raises(ConfigurationError, match=r"keytoken\.method\.view\.visual=masked"):
        VIEWS["blackened"].build(prompt_with(media([noise(2)])), blind)


def test_pixels_of_another_prompt_are_refused(
    media: MakeMedia, prompt_with: MakePrompt, context: ViewContext
) -> None:
    inputs = prompt_with(media([noise(2)]))
    inputs.media["pixel_values_videos"] = inputs.media["pixel_values_videos"][1:]
    with pytest.raises(DataError, match=r"prompt p has 23 patches, but video_grid_thw describes \[24\]"):
        VIEWS["blank"].build(inputs, context)
