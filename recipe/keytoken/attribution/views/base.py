"""What views are made of: the input of a pass, one clip of it, and a view over either.

Axes: L tokens of one unpadded sequence, R position rows, N patches, D values of a patch, F frames. The
patches of a clip and the values of a patch are ordered as Qwen2-VL, 2.5-VL and 3-VL expect them, see
:mod:`keytoken.attribution.views.frames`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from keytoken.attribution.views.frames import appearances, join_frames, split_frames
from keytoken.errors import ConfigurationError, DataError
from keytoken.view_config import ViewConfig

Kind = Literal["visual", "temporal"]
VIDEO = ("pixel_values_videos", "video_grid_thw")
IMAGE = ("pixel_values", "image_grid_thw")


@dataclasses.dataclass(frozen=True, slots=True)
class VisionFormat:
    """What the model and its processor say about vision tokens and pixels.

    Attributes:
        token_ids: Placeholders that stand for pixels.
        temporal_patch_size: Frames of one patch.
        merge_size: Patches along each side of a picture that become one vision token.
        black: Values of a black pixel by channel, as the processor normalises them; None if unknown.
    """

    token_ids: tuple[int, ...]
    temporal_patch_size: int
    merge_size: int = 2
    black: tuple[float, ...] | None = None

    @classmethod
    def of(cls, model_config: Any, processor: Any = None) -> VisionFormat:
        """Read it from a Hugging Face config and processor of the Qwen-VL family."""
        vision = model_config.vision_config
        return cls(
            token_ids=(model_config.image_token_id, model_config.video_token_id),
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            black=None if processor is None else black_pixel(processor),
        )


def black_pixel(processor: Any) -> tuple[float, ...]:
    """The values of a black pixel by channel, bit for bit: what the processor makes of a black picture.

    Raises:
        ConfigurationError: If its image and its video processor do not agree.
    """
    side = 2 * processor.image_processor.patch_size * processor.image_processor.merge_size
    frames = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    video = processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    image = processor.image_processor(images=[frames[0]], return_tensors="pt")
    seen = [made[name][0].unflatten(0, (3, -1)) for made, name in ((video, VIDEO[0]), (image, IMAGE[0]))]
    if not torch.equal(*seen):
        raise ConfigurationError(
            f"The processor shows a black pixel as {seen[0][:, 0].tolist()} in a video and as "
            f"{seen[1][:, 0].tolist()} in an image; give both the same image_mean and image_std in the "
            "files of actor_rollout_ref.model.path."
        )
    return tuple(seen[0][:, 0].tolist())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelInput:
    """What the model reads for one answer.

    Attributes:
        input_ids: [L] prompt and answer, without padding.
        position_ids: [R, L] their positions.
        prompt_length: Tokens of the prompt; the rest is the answer.
        media: Pixel tensors and grids by name; empty for text.
        prompt: Name of the prompt, the same for all answers to it.
    """

    input_ids: Tensor
    position_ids: Tensor
    prompt_length: int
    media: Mapping[str, Tensor]
    prompt: str

    @property
    def answer(self) -> str:
        """Name of the answer: a digest of its tokens, which no rank or place in a batch can change.

        Equal answers to one prompt have equal names.
        """
        ids = ",".join(map(str, self.input_ids[self.prompt_length :].tolist()))
        return hashlib.blake2b(ids.encode(), digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ViewContext:
    """What a view may depend on besides the input.

    Attributes:
        vision: The model's format of pixels.
        seed: Seed of all that views draw.
        positions: Positions in the masked view (:func:`keytoken.attribution.views.drop_vision_tokens`).
        options: Options of single views.
    """

    vision: VisionFormat
    seed: int = 0
    positions: Literal["kept", "compressed"] = "kept"
    options: ViewConfig = dataclasses.field(default_factory=ViewConfig)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One video, or one image, of an input.

    Attributes:
        patches: [N, D] its pixels.
        grid: [3] its patches along time, height and width; their product is N.
        prompt_key: Names prompt and clip: the key of what all answers to a prompt share.
        answer_key: Names prompt, clip and answer: the key of what is drawn for one answer alone.
        context: Format, seed and options.
    """

    patches: Tensor
    grid: Tensor
    prompt_key: str
    answer_key: str
    context: ViewContext

    def frames(self) -> Tensor:
        """The frames as [F, N / T, 3, pixels of a patch]. A frame repeated to fill a patch is one of them."""
        return split_frames(self.patches, int(self.grid[0]), self.context.vision.temporal_patch_size)

    def with_frames(self, frames: Tensor) -> Tensor:
        """[N, D] patches of F frames in the shape of :meth:`frames`."""
        return join_frames(frames, self.context.vision.temporal_patch_size)

    def tubelets(self) -> Tensor:
        """The temporal patches as [T, N / T, D]: the frames that the model merges stay together."""
        return self.patches.unflatten(0, (int(self.grid[0]), -1))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A counterfactual view.

    Attributes:
        kind: "visual" takes something of images and videos away, "temporal" something of videos' order.
        build: The input under the view, or None where it has no such view, because nothing would change.
            It must not write into the tensors that it is given, and must depend on its arguments only:
            every rank builds the same view.
    """

    kind: Kind
    build: Callable[[ModelInput, ViewContext], ModelInput | None]


def pixel_view(kind: Kind, change: Callable[[Clip], Tensor | None]) -> View:
    """The view that changes pixels and nothing else.

    Args:
        kind: See :class:`View`; "temporal" leaves images alone.
        change: New patches [N, D] of one clip, or None if there are none. An input none of whose clips
            changes has no such view.
    """

    def build(inputs: ModelInput, context: ViewContext) -> ModelInput | None:
        media = dict(inputs.media)
        changed = False
        for names in (VIDEO, IMAGE) if kind == "visual" else (VIDEO,):
            parts = []
            for clip in clips_of(inputs, names, context):
                view = change(clip)
                differs = view is not None and not torch.equal(view, clip.patches)
                parts.append(view if view is not None and differs else clip.patches)
                changed = changed or differs
            if parts:
                media[names[0]] = torch.cat(parts)
        return dataclasses.replace(inputs, media=media) if changed else None

    return View(kind=kind, build=build)


def clips_of(inputs: ModelInput, names: tuple[str, str], context: ViewContext) -> Iterator[Clip]:
    """The videos or the images of an input.

    Args:
        inputs: The input.
        names: :data:`VIDEO` or :data:`IMAGE`.
        context: Handed on.

    Raises:
        DataError: If pixels and grid do not fit together.
    """
    if names[0] not in inputs.media:
        return
    pixels, grids = (inputs.media[name] for name in names)
    counts = grids.prod(dim=1).tolist()
    if sum(counts) != pixels.shape[0]:
        raise DataError(
            f"{names[0]} of prompt {inputs.prompt} has {pixels.shape[0]} patches, but {names[1]} describes "
            f"{counts}; pass the two of one and the same prompt."
        )
    kind = "" if names == VIDEO else "image/"
    for number, (patches, grid) in enumerate(zip(pixels.split(counts), grids, strict=True)):
        key = f"{inputs.prompt}/{kind}{number}"
        yield Clip(
            patches=patches,
            grid=grid,
            prompt_key=key,
            answer_key=f"{key}/{inputs.answer}",
            context=context,
        )


def shows_one_picture(inputs: ModelInput, context: ViewContext) -> bool:
    """Whether there are videos and all frames of each look alike; such an input has no temporal view."""
    looks = [appearances(clip.frames()) for clip in clips_of(inputs, VIDEO, context)]
    return bool(looks) and all(max(look) == 0 for look in looks)
