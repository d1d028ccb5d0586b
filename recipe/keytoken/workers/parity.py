"""What a group that runs attribution passes makes of rows of the parity gate (:mod:`keytoken.parity`)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from torch import Tensor

from keytoken import fields
from keytoken.parity import pixel_figures
from keytoken.schema import AttributionConfig, MethodConfig
from keytoken.workers.attribution import score_views
from keytoken.workers.passes import PassSettings
from keytoken.workers.rows import Row, rows_of

# The pass over the real input; the others are named as their views.
REAL = "real"
# What :func:`read_rows` writes: a mapping for each row.
READING = "keytoken_parity"
_PIXELS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


def read_rows(
    engine: Any,
    data: TensorDict,
    method: MethodConfig,
    attribution: AttributionConfig,
    settings: PassSettings,
    version: int,
    run: str,
) -> TensorDict:
    """Run one pass of training over the rows of this rank, and say what it saw.

    Args:
        engine: verl's FSDP engine in eval mode.
        data: this rank's rows, as the attribution passes get them.
        method: whose passes they are.
        attribution: how they run.
        settings: batching and temperature.
        version: global step of the weights in ``engine``.
        run: :data:`REAL`, or a view.

    Returns:
        :data:`READING`: of each row :func:`reading_of`, and its log-probs if the pass is the real one.
    """
    rows = rows_of(data)
    # Every row is a prompt of its own: what a method compares within a prompt is not asked for here.
    alone = data.copy()
    names = [f"{row.prompt}/{row.number}" for row in rows]
    alone["uid"] = NonTensorStack(*(NonTensorData(name) for name in names))
    attribution = replace(attribution, check_base=run == REAL, every_steps=1)
    views = () if run == REAL else (run,)
    scored = score_views(engine, alone, method, attribution, settings, version, views=views)
    readings = [reading_of(row) for row in rows]
    if run == REAL:
        for reading, log_probs in zip(readings, scored[fields.REAL_LOG_PROB].unbind(), strict=True):
            reading["log_probs"] = log_probs.tolist()
    stack = NonTensorStack(*(NonTensorData(reading) for reading in readings))
    return TensorDict({READING: stack}, batch_size=[len(rows)])


def reading_of(row: Row) -> dict[str, Any]:
    """Ids, positions, grids, seconds and figures of the pixels of a row, as plain numbers."""
    return {
        "ids": row.input_ids.tolist(),
        "prompt_length": row.prompt_length,
        "positions": row.position_ids[-3:].tolist(),
        **media_of(row.media),
    }


def media_of(media: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Grids, seconds and figures of pixels of a prompt's media, images first."""
    found: dict[str, list[Any]] = {"grids": [], "pixels": []}
    for pixels, grids in _PIXELS.items():
        if grids in media:
            found["grids"] += media[grids].tolist()
            found["pixels"] += pixel_figures(media[pixels], media[grids]).tolist()
    if "second_per_grid_ts" in media:  # a family that writes times into the prompt has none
        found["seconds"] = torch.as_tensor(media["second_per_grid_ts"]).double().reshape(-1).tolist()
    return found
