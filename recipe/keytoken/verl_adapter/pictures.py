"""What is done to a prompt's pictures to see what answers owe to them: blank frames, shuffled frames.

Evaluation and the validation of a run take the same functions, so that their controls mean the same. Ids and
positions stay: the model is told that it is shown a video of this length and size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from keytoken.errors import ConfigurationError
from keytoken.verl_adapter import order


@dataclass(frozen=True, slots=True)
class Media:
    """What a conversation shows, as the dataset reads it; None where there is nothing."""

    images: list[Image.Image] | None = None
    videos: list[order.Video] | None = None


def blank(media: Media, mean: Sequence[float]) -> Media:
    """Every picture in one grey, the processor's mean colour, as in attribution's view ``blank``.

    There it is exactly 0 after normalisation; a picture has 8 bits, so here it is within 0.01 of it.

    Args:
        media: The pictures.
        mean: ``image_mean`` of the processor, for red, green and blue in [0, 1].
    """
    grey = (torch.tensor(mean) * 255).round().to(torch.uint8)
    images = media.images and [Image.new("RGB", image.size, tuple(grey.tolist())) for image in media.images]
    videos = media.videos and [
        (grey[:, None, None].expand(frames.shape).contiguous(), metadata) for frames, metadata in media.videos
    ]
    return Media(images, videos)


def shuffled(media: Media, seed: int, name: str) -> Media:
    """The frames of every video in another order, the one of the view ``shuffled``; times stay.

    Where all frames look alike there is no other order, and they stay as they are.

    Args:
        media: The pictures.
        seed: Seed of the orders.
        name: Name of the question; its answers share the orders.
    """
    videos = order.shuffled_videos(media.videos, seed, name)
    return media if videos is None else replace(media, videos=videos)


def controlled(media: Media, control: str, mean: Sequence[float], seed: int, name: str) -> Media:
    """The pictures under a control that a row asks for: "none", "blank" or "shuffled".

    Raises:
        ConfigurationError: another control.
    """
    match control:
        case "none":
            return media
        case "blank":
            return blank(media, mean)
        case "shuffled":
            return shuffled(media, seed, name)
    raise ConfigurationError(
        f"prompt {name}: extra_info.control is {control!r}; use none, blank or shuffled. For text alone "
        "leave the videos out of the row."
    )
