"""The counterfactual views of a real batch through verl's real engine, against plain transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from keytoken import fields
from keytoken.attribution.views import VIEWS, ModelInput, View, ViewContext, VisionFormat, permute_frames
from keytoken.errors import InertViewError, NonFiniteError
from keytoken.schema import ViewConfig
from keytoken.view_config import BlackenedConfig
from keytoken.workers.attribution import score_views, view_row
from keytoken.workers.rows import rows_of

pytestmark = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True, scope="session")

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
MOVING = ("video", "same video", "empty answer", "two videos", "image and video")
STATIC = ("one frame", "static")
WITHOUT_VISION = ("text", "short text")


@pytest.fixture(params=[True, False], ids=["shared", "separate"], autouse=True)
def prefix(request: pytest.FixtureRequest, worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with a prompt for all its answers, and with one for each."""
    monkeypatch.setattr(worker, "settings", dataclasses.replace(worker.settings, shared=request.param))


def run(
    worker: Any,
    data: TensorDict,
    *,
    positions: str = "kept",
    view: ViewConfig | None = None,
    size: int = 16,
    **changes: Any,
) -> TensorDict:
    """The passes of ``method=video_ktr`` in the worker's engine."""
    keytoken = worker.keytoken
    return score_views(
        worker.engine,
        data,
        dataclasses.replace(keytoken.method, positions=positions, view=view or keytoken.method.view),
        dataclasses.replace(keytoken.attribution, **changes),
        dataclasses.replace(worker.settings, micro_batch_size=size),
        version=4,
    )


def expected(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1).gather(1, labels[:, None]).squeeze(1).float()


@pytest.fixture
def data(mixed: dict[str, Any], as_batch: Callable[..., TensorDict]) -> TensorDict:
    return as_batch(list(mixed.values()))


@pytest.fixture(scope="module")
def context(vision_ids: tuple[int, int]) -> ViewContext:
    return ViewContext(vision=VisionFormat(vision_ids, temporal_patch_size=2))


@pytest.mark.parametrize(("positions", "size"), [("kept", 16), ("kept", 1), ("compressed", 4)])
@pytest.mark.usefixtures("engine")
def test_the_masked_view_is_a_forward_that_hides_the_vision_tokens(
    worker: Any,
    data: TensorDict,
    mixed: dict[str, Any],
    truth: dict[str, dict[str, torch.Tensor]],
    positions: str,
    size: int,
) -> None:
    output = run(worker, data, positions=positions, size=size)
    hidden = truth["masked" if positions == "kept" else "compressed"]
    for index, (name, example) in enumerate(mixed.items()):
        visual = name not in WITHOUT_VISION
        assert bool(output[fields.HAS_VISUAL][index]) == visual
        logits = hidden[name] if visual else truth["real"][name]
        masked, real = output[fields.MASKED_LOG_PROB][index], output[fields.REAL_LOG_PROB][index]
        torch.testing.assert_close(masked, expected(logits, example.labels), **TOLERANCE)
        torch.testing.assert_close(real, expected(truth["real"][name], example.labels), **TOLERANCE)
        if visual and example.response_length:
            assert (masked - real).abs().max() > 1e-3  # else the comparison would show nothing
        elif not visual:
            assert torch.equal(masked, real)


def test_kept_and_compressed_positions_differ(
    mixed: dict[str, Any], truth: dict[str, dict[str, torch.Tensor]]
) -> None:
    kept, compressed = (truth[view]["video"] for view in ("masked", "compressed"))
    labels = mixed["video"].labels
    assert (expected(kept, labels) - expected(compressed, labels)).abs().max() > 1e-3


@pytest.mark.usefixtures("engine")
def test_the_shuffled_view_is_the_processor_on_permuted_frames(
    worker: Any,
    data: TensorDict,
    mixed: dict[str, Any],
    frame_order: tuple[int, ...],
    truth: dict[str, dict[str, torch.Tensor]],
) -> None:
    """Both answers to one prompt see the same order of frames."""
    assert frame_order != (0, 1, 2, 3)
    output = run(worker, data, size=3)
    for index, name in enumerate(("video", "same video")):
        labels = mixed[name].labels
        wanted, real = (expected(truth[view][name], labels) for view in ("shuffled", "real"))
        torch.testing.assert_close(output[fields.SHUFFLED_LOG_PROB][index], wanted, **TOLERANCE)
        assert (wanted - real).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("visual", "temporal"),
    [("blank", "tubelets"), ("blackened", "reversed"), ("masked", "frozen")],
)
@pytest.mark.usefixtures("engine")
def test_every_other_view_is_a_forward_of_its_pixels(
    worker: Any,
    data: TensorDict,
    mixed: dict[str, Any],
    truth: dict[str, dict[str, torch.Tensor]],
    visual: str,
    temporal: str,
) -> None:
    """Two views of one method, each in fields of its own; rows without a view keep the real log-probs."""
    output = run(worker, data, view=ViewConfig(visual=visual, temporal=temporal), size=3)
    for view, lacking in ((visual, WITHOUT_VISION), (temporal, tuple(set(mixed) - set(MOVING)))):
        log_prob, applies = fields.view_outputs(view)
        for index, name in enumerate(mixed):
            assert bool(output[applies][index]) == (name not in lacking), (view, name)
            scored, real = output[log_prob][index], output[fields.REAL_LOG_PROB][index]
            if name in lacking:
                assert torch.equal(scored, real)
            elif name in truth[view] and len(scored):
                wanted = expected(truth[view][name], mixed[name].labels)
                torch.testing.assert_close(scored, wanted, **TOLERANCE)
                assert (scored - real).abs().max() > 1e-4, (view, name)
    assert fields.SHUFFLED_LOG_PROB not in output.keys()  # noqa: SIM118 - a TensorDict is no dict


@pytest.mark.usefixtures("engine")
def test_seed_and_options_reach_the_views(
    worker: Any, mixed: dict[str, Any], as_batch: Callable[..., TensorDict]
) -> None:
    """Six frames in another order, and squares of another size: the same answer, other log-probs."""
    batch = as_batch([mixed["image and video"]])

    def scores(view: ViewConfig, seed: int = 0) -> list[torch.Tensor]:
        output = run(worker, batch, view=view, shuffle_seed=seed)
        return [output[fields.view_outputs(name)[0]][0] for name in (view.visual, view.temporal)]

    small, large = (
        ViewConfig(visual="blackened", blackened=BlackenedConfig(size=size, p=0.5)) for size in (14, 28)
    )
    first = scores(small)
    for changed, same in zip(scores(small, seed=1), first, strict=True):
        assert (changed - same).abs().max() > 1e-5
    squares, order = (a - b for a, b in zip(scores(large), first, strict=True))
    assert squares.abs().max() > 1e-5 and order.abs().max() < 1e-6


@pytest.mark.usefixtures("engine")
def test_rows_say_which_views_they_have(worker: Any, data: TensorDict, mixed: dict[str, Any]) -> None:
    """Images, text, a one-frame clip and a clip of equal frames have no temporal score; it is exactly 0."""
    output = run(worker, data)
    for index, name in enumerate(mixed):
        assert bool(output[fields.HAS_TEMPORAL][index]) == (name in MOVING), name
        assert bool(output[fields.STATIC_CLIP][index]) == (name in STATIC), name
        difference = output[fields.REAL_LOG_PROB][index] - output[fields.SHUFFLED_LOG_PROB][index]
        if name not in MOVING:
            assert (difference == 0).all()
        elif len(difference):
            assert difference.abs().max() > 1e-4
    assert output[fields.VERSION].tolist() == [4] * len(mixed)
    assert (output[fields.PASS_SECONDS] > 0).all()
    parts = [output[fields.pass_seconds(name)] for name in ("real", "masked", "shuffled")]
    assert all((part > 0).all() for part in parts)
    assert (sum(parts) <= output[fields.PASS_SECONDS]).all()


@pytest.mark.usefixtures("engine")
def test_a_view_that_changes_nothing_scores_nothing(
    worker: Any, data: TensorDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The identity forced upon the shuffled pass: other micro-batches, the same input."""

    def unchanged(inputs: ModelInput, _: ViewContext) -> ModelInput | None:
        return inputs if "video_grid_thw" in inputs.media else None

    monkeypatch.setitem(VIEWS, "shuffled", View(kind="temporal", build=unchanged))
    output = run(worker, data, size=4)
    real, shuffled = output[fields.REAL_LOG_PROB].values(), output[fields.SHUFFLED_LOG_PROB].values()
    torch.testing.assert_close(shuffled, real, **TOLERANCE)


@pytest.mark.usefixtures("engine")
def test_frames_that_are_all_alike_score_nothing_even_when_shuffled(
    worker: Any, mixed: dict[str, Any], as_batch: Callable[..., TensorDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forced(inputs: ModelInput, _: ViewContext) -> ModelInput:
        grid, pixels = inputs.media["video_grid_thw"], inputs.media["pixel_values_videos"]
        moved = permute_frames(pixels, grid, [(3, 1, 0, 2)], 2)
        return dataclasses.replace(inputs, media={**inputs.media, "pixel_values_videos": moved})

    monkeypatch.setitem(VIEWS, "shuffled", View(kind="temporal", build=forced))
    output = run(worker, as_batch([mixed["static"], mixed["video"]]), size=1)
    still, moving = (
        (output[fields.REAL_LOG_PROB][index] - output[fields.SHUFFLED_LOG_PROB][index]).abs().max()
        for index in (0, 1)
    )
    assert still < 1e-5
    assert moving > 1e-3


@pytest.mark.usefixtures("engine")
def test_without_the_real_view_only_the_views_are_scored(
    worker: Any, data: TensorDict, mixed: dict[str, Any]
) -> None:
    both, alone = run(worker, data), run(worker, data, check_base=False)
    assert fields.REAL_LOG_PROB not in alone.keys()  # noqa: SIM118 - a TensorDict is no dict
    for index, name in enumerate(mixed):
        masked = alone[fields.MASKED_LOG_PROB][index]
        if name in WITHOUT_VISION:
            assert (masked == 0).all()
        else:
            assert torch.equal(masked, both[fields.MASKED_LOG_PROB][index])


@pytest.mark.parametrize("answer", [[7], [7, 8, 9]])
@pytest.mark.usefixtures("engine")
def test_a_placeholder_in_an_answer_stays_in_the_masked_view(
    worker: Any,
    encoder: Any,
    context: ViewContext,
    as_batch: Callable[..., TensorDict],
    vision_ids: tuple[int, int],
    answer: list[int],
) -> None:
    example = encoder.example("p0", [5, vision_ids[1], *answer], images=[encoder.noise(1)[0]])
    (row,) = rows_of(as_batch([example]))
    view = view_row(row, "masked", context)
    assert view is not None
    assert view.answer_ids.tolist() == [5, vision_ids[1], *answer]
    assert not torch.isin(view.input_ids[: view.prompt_length], torch.tensor(vision_ids)).any()
    output = run(worker, as_batch([example]))
    assert output[fields.MASKED_LOG_PROB][0].shape == (2 + len(answer),)


@pytest.mark.usefixtures("engine")
def test_pixels_without_placeholders_are_refused(
    worker: Any, mixed: dict[str, Any], as_batch: Callable[..., TensorDict]
) -> None:
    """A masked view that would drop nothing is no view."""
    impostor = dataclasses.replace(mixed["text"], media=mixed["video"].media)
    with pytest.raises(InertViewError, match="dropped nothing"):
        run(worker, as_batch([impostor]), check_base=False)


def test_a_bad_weight_names_the_pass(worker: Any, engine: Any, data: TensorDict) -> None:
    with torch.no_grad():
        engine.module.get_output_embeddings().weight.to_local()[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"The real pass .* token 0 .* row 0 \(prompt p0\)"):
        run(worker, data)
    with pytest.raises(NonFiniteError, match=r"The masked pass .* token 0 .* row 0 \(prompt p0\)"):
        run(worker, data, check_base=False)


@pytest.mark.usefixtures("engine")
def test_the_workers_own_method(worker: Any, data: TensorDict) -> None:
    """What verl calls: all pass outputs but measures nobody asks for, and the version of the last sync."""
    worker.version = 7
    output = worker.compute_attribution(data)
    seconds = {fields.pass_seconds(name) for name in ("real", "masked", "shuffled")}
    assert set(output.keys()) == (set(fields.PASS_OUTPUTS) | seconds) - set(fields.MEASURES.values())
    assert output[fields.VERSION].unique().tolist() == [7]
