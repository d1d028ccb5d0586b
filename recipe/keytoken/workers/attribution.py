"""Attribution of one batch: the real input and its counterfactual views, scored row by row.

For every answer token a view (:mod:`keytoken.attribution.views`) asks how its log-prob changes when the input
does: when the video is removed, its frames shuffled, and so on. Not every row has every view: text has none,
an image no temporal one, and nothing can shuffle a clip whose frames are all alike. Such rows keep the real
log-prob, so a difference is 0, and say so in the field "applies" of the view.

Some methods ask for more of the real input than log-probs (:func:`keytoken.attribution.methods.measures_of`),
and so do diagnostics. The pass over it runs for them, or to check the actor's log-probs.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from keytoken import fields
from keytoken.attribution.methods import measures_of
from keytoken.attribution.views import VIEWS, ViewContext, VisionFormat, shows_one_picture
from keytoken.schema import AttributionConfig, MethodConfig
from keytoken.workers.passes import PassSettings, Wanted, measure_rows, score_rows
from keytoken.workers.rows import Row, model_input, one_object_each, rows_of


def score_views(
    engine: Any,
    data: TensorDict,
    method: MethodConfig,
    attribution: AttributionConfig,
    settings: PassSettings,
    version: int,
    collision: bool = False,
    views: Sequence[str] | None = None,
) -> TensorDict:
    """Run the passes a method needs over the rows of this rank.

    Args:
        engine: verl's FSDP engine in eval mode.
        data: this rank's rows, as verl dispatches them; ``uid`` names the prompt of each. For a method that
            compares the answers to a prompt, all of them must be here.
        method: which views and measures, and their options.
        attribution: seed of what views draw, and whether the real view is scored here too.
        settings: batching and temperature.
        version: global step of the weights in ``engine``.
        collision: whether the diagnostics of this step need the collision probability.
        views: the views to score; None for all that the method needs.

    Returns:
        The tensors of :data:`keytoken.fields.PASS_OUTPUTS` that were computed, and
        :func:`keytoken.fields.view_outputs` and :func:`keytoken.fields.pass_seconds` of every view,
        ``[B, ...]``. In a step that is not scored (``attribution.every_steps``) no pass runs, and of a view
        there is only whether a row has it.

    Raises:
        ConfigurationError: answers that have to be compared do not fit into a micro-batch.
        InertViewError: a view equals the real input.
        NonFiniteError: a pass gave NaN or infinity.
    """
    start = time.perf_counter()
    rows = rows_of(data)
    vision = VisionFormat.of(engine.module.config, engine.model_config.processor)
    context = ViewContext(
        vision=vision, seed=attribution.shuffle_seed, positions=method.positions, options=method.view
    )
    outputs: dict[str, Tensor] = {}
    scored = attribution.scores(version + 1)
    if scored:
        real = _real_side(engine, rows, _wanted(method, collision), attribution, settings, outputs)
    lap = time.perf_counter()
    for name in method.views if views is None else views:
        seen = one_object_each([view_row(row, name, context) for row in rows])
        log_prob, applies = fields.view_outputs(name)
        if scored:
            outputs[log_prob] = _score_where_it_exists(engine, seen, real, settings, name)
        outputs[applies] = _flags(view is not None for view in seen)
        now = time.perf_counter()
        outputs[fields.pass_seconds(name)], lap = _seconds(rows, now - lap), now
    outputs[fields.STATIC_CLIP] = _flags(shows_one_picture(model_input(row), context) for row in rows)
    outputs[fields.VERSION] = torch.full((len(rows),), version, dtype=torch.int64)
    outputs[fields.PASS_SECONDS] = _seconds(rows, time.perf_counter() - start)
    return TensorDict(outputs, batch_size=[len(rows)])


def view_row(row: Row, name: str, context: ViewContext) -> Row | None:
    """The row under a view of :data:`keytoken.attribution.views.VIEWS`; None if it has no such view."""
    view = VIEWS[name].build(model_input(row), context)
    if view is None:
        return None
    return replace(row, input_ids=view.input_ids, position_ids=view.position_ids, media=view.media)


def _real_side(
    engine: Any,
    rows: list[Row],
    wanted: Wanted,
    attribution: AttributionConfig,
    settings: PassSettings,
    outputs: dict[str, Tensor],
) -> list[Tensor]:
    """The real log-probs that rows without a view keep, and all that the real pass writes.

    Unless ``check_base``, the real side of a difference is the actor's own: zeros stand in here, and the
    trainer reads ``has_visual`` and ``has_temporal`` instead.
    """
    stand_ins, start = [torch.zeros(row.response_length) for row in rows], time.perf_counter()
    if not attribution.check_base and wanted == Wanted():
        return stand_ins
    found = measure_rows(engine, rows, settings, wanted)
    outputs[fields.pass_seconds("real")] = _seconds(rows, time.perf_counter() - start)
    real = found.pop("log_prob")
    outputs.update({fields.MEASURES[name]: _ragged(values) for name, values in found.items()})
    if not attribution.check_base:
        return stand_ins
    outputs[fields.REAL_LOG_PROB] = _ragged(real)
    return real


def _wanted(method: MethodConfig, collision: bool) -> Wanted:
    measures, selection = measures_of(method), method.selection
    truncated = "truncated_entropy" in measures
    top_p = selection.entropy_top_p if selection is not None and truncated else None
    return Wanted(top_p=top_p, disagreement="disagreement" in measures, collision=collision)


def _score_where_it_exists(
    engine: Any, views: list[Row | None], real: list[Tensor], settings: PassSettings, name: str
) -> Tensor:
    """[B, T] ragged log-probs of a view, the real ones in rows that have no such view."""
    scored = iter(score_rows(engine, [row for row in views if row is not None], settings, name))
    filled = [base if row is None else next(scored) for row, base in zip(views, real, strict=True)]
    return _ragged(filled)


def _seconds(rows: list[Row], seconds: float) -> Tensor:
    return torch.full((len(rows),), seconds)


def _flags(values: Iterable[bool]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _ragged(values: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(values, layout=torch.jagged)
