"""Attribution of one batch: the real input and its counterfactual views, scored row by row.

Video-KTR (arXiv 2601.19686) asks for every answer token how its log-prob changes when the video is
removed (masked view) and when its frames are shuffled (shuffled view). Text has neither view, an image
and a one-frame clip have no shuffled one; their rows keep the real log-prob, so a difference is 0, and
say so in ``has_visual`` and ``has_temporal``.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from keytoken import fields
from keytoken.attribution.views import drop_vision_tokens, frame_permutation, permute_frames
from keytoken.errors import InertViewError
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
    visual = [bool(row.media) for row in rows]
    temporal = [_num_frames(row, vision) >= 2 for row in rows]
    outputs: dict[str, Tensor] = {}
    real = _real_log_probs(engine, data, rows, attribution, settings, outputs)
    if "masked" in method.views:
        views = [
            masked_row(row, vision, method.positions) for row, applies in zip(rows, visual, strict=True) if applies
        ]
        scored = score_rows(engine, views, settings, "masked")
        outputs[fields.MASKED_LOG_PROB] = _ragged(_fill(real, scored, visual))
    if "shuffled" in method.views:
        keys = [str(uid) for uid in data["uid"]]
        views = [
            shuffled_row(row, vision, attribution.shuffle_seed, key)
            for row, key, applies in zip(rows, keys, temporal, strict=True)
            if applies
        ]
        scored = score_rows(engine, views, settings, "shuffled")
        outputs[fields.SHUFFLED_LOG_PROB] = _ragged(_fill(real, scored, temporal))
    outputs[fields.HAS_VISUAL] = torch.tensor(visual, dtype=torch.int64)
    outputs[fields.HAS_TEMPORAL] = torch.tensor(temporal, dtype=torch.int64)
    outputs[fields.VERSION] = torch.full((len(rows),), version, dtype=torch.int64)
    outputs[fields.PASS_SECONDS] = torch.full((len(rows),), time.perf_counter() - start)
    return TensorDict(outputs, batch_size=[len(rows)])


def masked_row(row: Row, vision: VisionFormat, positions: str) -> Row:
    """The row without its vision tokens and pixels; exact for ``positions="kept"``."""
    view = drop_vision_tokens(
        row.input_ids,
        row.position_ids,
        vision.token_ids,
        prompt_length=len(row) - row.response_length,
        positions=positions,
    )
    return Row(view.input_ids, view.position_ids, row.response_length, {})


def shuffled_row(row: Row, vision: VisionFormat, seed: int, key: str) -> Row:
    """The row with the frames of its videos in another order, the same one for a whole group."""
    grid = row.media["video_grid_thw"]
    permutations = [
        frame_permutation(int(steps) * vision.temporal_patch_size, seed, f"{key}/{number}")
        for number, steps in enumerate(grid[:, 0])
    ]
    pixels = permute_frames(row.media["pixel_values_videos"], grid, permutations, vision.temporal_patch_size)
    return replace(row, media={**row.media, "pixel_values_videos": pixels})


def _num_frames(row: Row, vision: VisionFormat) -> int:
    grid = row.media.get("video_grid_thw")
    return 0 if grid is None else int(grid[:, 0].max()) * vision.temporal_patch_size


def _real_log_probs(
    engine: Any,
    data: TensorDict,
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


def _fill(real: list[Tensor], scored: list[Tensor], applies: list[bool]) -> list[Tensor]:
    remaining = iter(scored)
    filled = [next(remaining) if applied else base for base, applied in zip(real, applies, strict=True)]
    if next(remaining, None) is not None:
        raise InertViewError("More rows were scored than have the view: this is a defect of KeyToken, report it.")
    return filled


def _ragged(values: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(values, layout=torch.jagged)
