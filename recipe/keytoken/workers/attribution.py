"""Attribution of one batch: the real input and its counterfactual views, scored row by row.

Video-KTR (arXiv 2601.19686) asks for every answer token how its log-prob changes when the video is
removed (masked view) and when its frames are shuffled (shuffled view). Text has neither view; an image and
a static clip, whose frames are all alike, have no shuffled one. Their rows keep the real log-prob, so a
difference is 0, and say so in ``has_visual`` and ``has_temporal``.
"""

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from keytoken import fields
from keytoken.attribution.views import drop_vision_tokens, frame_permutation, is_static, permute_frames
from keytoken.schema import AttributionConfig, MethodConfig
from keytoken.workers.passes import PassSettings, score_rows
from keytoken.workers.rows import Row, rows_of


@dataclass(frozen=True, slots=True)
class VisionFormat:
    """What the model's config says about vision tokens and frames."""

    token_ids: tuple[int, ...]  # placeholders that stand for pixels
    temporal_patch_size: int

    @classmethod
    def of(cls, model_config: Any) -> "VisionFormat":
        """Read it from a Hugging Face config of the Qwen-VL family."""
        ids = (model_config.image_token_id, model_config.video_token_id)
        return cls(ids, model_config.vision_config.temporal_patch_size)


def score_views(
    engine: Any,
    data: TensorDict,
    method: MethodConfig,
    attribution: AttributionConfig,
    settings: PassSettings,
    version: int,
) -> TensorDict:
    """Run the views a method needs over the rows of this rank.

    Args:
        engine: verl's FSDP engine in eval mode.
        data: this rank's rows, as verl dispatches them; ``uid`` names the prompt of each.
        method: which views, and which positions the masked one uses.
        attribution: seed of the permutations, and whether the real view is scored here too.
        settings: batching and temperature.
        version: global step of the weights in ``engine``.

    Returns:
        The tensors of :data:`keytoken.fields.PASS_OUTPUTS` that were computed, ``[B, ...]``.

    Raises:
        InertViewError: a view equals the real input.
        NonFiniteError: a pass gave NaN or infinity.
    """
    start = time.perf_counter()
    rows = rows_of(data)
    vision = VisionFormat.of(engine.module.config)
    outputs: dict[str, Tensor] = {}
    real = _real_log_probs(engine, rows, attribution, settings, outputs)
    if "masked" in method.views:
        masked = [masked_row(row, vision, method.positions) for row in rows]
        outputs[fields.MASKED_LOG_PROB] = _score_where_it_exists(engine, masked, real, settings, "masked")
        outputs[fields.HAS_VISUAL] = _flags(view is not None for view in masked)
    if "shuffled" in method.views:
        shuffled = [shuffled_row(row, vision, attribution.shuffle_seed) for row in rows]
        outputs[fields.SHUFFLED_LOG_PROB] = _score_where_it_exists(
            engine, shuffled, real, settings, "shuffled"
        )
        outputs[fields.HAS_TEMPORAL] = _flags(view is not None for view in shuffled)
        outputs[fields.STATIC_CLIP] = _flags(
            view is None and "video_grid_thw" in row.media for row, view in zip(rows, shuffled, strict=True)
        )
    outputs[fields.VERSION] = torch.full((len(rows),), version, dtype=torch.int64)
    outputs[fields.PASS_SECONDS] = torch.full((len(rows),), time.perf_counter() - start)
    return TensorDict(outputs, batch_size=[len(rows)])


def masked_row(row: Row, vision: VisionFormat, positions: Literal["kept", "compressed"]) -> Row | None:
    """The row without its vision tokens and pixels, exact for ``positions="kept"``; None for text."""
    if not row.media:
        return None
    view = drop_vision_tokens(
        row.input_ids,
        row.position_ids,
        vision.token_ids,
        prompt_length=row.prompt_length,
        positions=positions,
    )
    return replace(row, input_ids=view.input_ids, position_ids=view.position_ids, media={})


def shuffled_row(row: Row, vision: VisionFormat, seed: int) -> Row | None:
    """The row with the frames of its videos in another order, the same one for a whole group.

    None if there is no order to change: no video, or only static ones.
    """
    if "video_grid_thw" not in row.media:
        return None
    grid, pixels = row.media["video_grid_thw"], row.media["pixel_values_videos"]
    clips = pixels.split(grid.prod(dim=1).tolist())
    orders = [
        changing_order(clip, shape[None], vision.temporal_patch_size, seed, f"{row.prompt}/{number}")
        for number, (clip, shape) in enumerate(zip(clips, grid, strict=True))
    ]
    if all(order is None for order in orders):
        return None
    shuffled = permute_frames(pixels, grid, orders, vision.temporal_patch_size)
    return replace(row, media={**row.media, "pixel_values_videos": shuffled})


def changing_order(
    clip: Tensor, grid: Tensor, temporal_patch_size: int, seed: int, key: str
) -> tuple[int, ...] | None:
    """A seeded order of a clip's frames that changes its pixels; None for a static clip.

    An order that only exchanges equal frames (a still moment, or a last frame repeated to fill its patch)
    would score the real input again, so another one is drawn.

    Args:
        clip: [N, D] patches of one video.
        grid: [1, 3] its patches along time, height and width.
        temporal_patch_size: frames of one patch.
        seed: seed of the run.
        key: names the clip, the same on every rank.
    """
    num_frames = int(grid[0, 0]) * temporal_patch_size

    def moves_nothing(order: tuple[int, ...]) -> bool:
        return is_static(clip, permute_frames(clip, grid, [order], temporal_patch_size))

    # A clip that equals itself one frame later has one and the same picture in all frames.
    if num_frames < 2 or moves_nothing((*range(1, num_frames), 0)):
        return None
    drawn = (frame_permutation(num_frames, seed, f"{key}/{attempt}") for attempt in itertools.count())
    return next(order for order in drawn if order is not None and not moves_nothing(order))


def _real_log_probs(
    engine: Any,
    rows: list[Row],
    attribution: AttributionConfig,
    settings: PassSettings,
    outputs: dict[str, Tensor],
) -> list[Tensor]:
    """The real side: scored here, or left to the actor's own pass (then zeros stand in for rows
    without a view, and the trainer reads ``has_visual`` and ``has_temporal`` instead)."""
    if not attribution.check_base:
        return [torch.zeros(row.response_length) for row in rows]
    real = score_rows(engine, rows, settings, "real")
    outputs[fields.REAL_LOG_PROB] = _ragged(real)
    return real


def _score_where_it_exists(
    engine: Any, views: list[Row | None], real: list[Tensor], settings: PassSettings, name: str
) -> Tensor:
    """[B, T] ragged log-probs of a view, the real ones in rows that have no such view."""
    scored = iter(score_rows(engine, [row for row in views if row is not None], settings, name))
    filled = [base if row is None else next(scored) for row, base in zip(views, real, strict=True)]
    return _ragged(filled)


def _flags(values: Iterable[bool]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _ragged(values: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(values, layout=torch.jagged)
