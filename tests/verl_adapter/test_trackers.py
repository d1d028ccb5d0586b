"""Pictures of answers in a run's trackers, read back from what the trackers stored."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from verl.utils.tracking import Tracking

from keytoken.lens.image import png_of
from keytoken.lens.read import read_export
from keytoken.schema import ExportConfig
from keytoken.verl_adapter import trackers

RECORDED = Path(__file__).parents[1] / "lens" / "data" / "step_000001.parquet"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trackers write below the working folder, and into no account."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "events"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("VERL_FILE_LOGGER_PATH", raising=False)
    trackers._warn_once.cache_clear()
    return tmp_path


def trainer(names: list[str], step: int = 7, pictures: int = 2) -> Any:
    """What the pictures need of a trainer, with verl's own trackers."""
    tracking = Tracking("project", "run", names, config={"trainer": {}})
    return SimpleNamespace(
        keytoken=SimpleNamespace(export=ExportConfig(pictures=pictures)), global_steps=step, logger=tracking
    )


def expected(count: int) -> list[np.ndarray]:
    export = read_export(RECORDED)
    drawn = (png_of(export, answer) for answer in trackers.chosen(export.answers, count))
    return [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in drawn]


def test_tensorboard_shows_the_pictures_of_every_exported_step(folder: Path) -> None:
    run = trainer(["console", "file", "tensorboard"])
    seconds = trackers.maybe_log(run, RECORDED)
    run.global_steps = 17
    trackers.maybe_log(run, RECORDED)
    run.logger.finish()
    assert 0 < seconds["export/pictures_s"] < 60
    events = EventAccumulator(str(folder / "events")).Reload()
    assert events.Tags()["images"] == ["lens/answer_1", "lens/answer_2"]
    for name, picture in zip(events.Tags()["images"], expected(2), strict=True):
        stored = events.Images(name)
        assert [image.step for image in stored] == [7, 17]
        for image in stored:
            shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
            np.testing.assert_array_equal(shown, picture)


def test_wandb_gets_them_with_the_metrics_of_the_same_step(folder: Path) -> None:
    run = trainer(["wandb"])
    trackers.maybe_log(run, RECORDED)
    assert run.logger.logger["wandb"].run.step == 7  # still open for the metrics, which come after them
    run.logger.log({"loss": 1.0}, step=7)
    run.logger.finish()
    for number, picture in enumerate(expected(2), start=1):
        (file,) = folder.glob(f"wandb/offline-run-*/files/media/images/lens/answer_{number}_*.png")
        np.testing.assert_array_equal(np.asarray(Image.open(file)), picture)


def test_mlflow_gets_them_where_it_is_installed(folder: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    run = trainer(["mlflow"])
    trackers.maybe_log(run, RECORDED)
    place = mlflow.get_artifact_uri().removeprefix("file://")
    run.logger.finish()
    files = [path for path in Path(place).rglob("*.png") if "answer_1" in path.name]
    assert len(files) == 1
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), expected(1)[0])


def test_swanlab_gets_them_where_it_is_installed(folder: Path) -> None:
    pytest.importorskip("swanlab")
    run = trainer(["swanlab"])
    trackers.maybe_log(run, RECORDED)
    run.logger.finish()
    sizes = [Image.open(file).size for file in folder.rglob("*.png")]
    assert sorted(sizes) == sorted((picture.shape[1], picture.shape[0]) for picture in expected(2))


@pytest.mark.parametrize(
    ("names", "exported", "pictures"),
    [(["console", "file"], RECORDED, 2), (["tensorboard"], None, 2), (["tensorboard"], RECORDED, 0)],
)
def test_nothing_is_drawn_where_nothing_would_be_seen(
    names: list[str],
    exported: Path | None,
    pictures: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(trackers, "png_of", lambda *_: pytest.fail("drawn"))
    run = trainer(names, pictures=pictures)
    assert trackers.maybe_log(run, exported) == {}
    run.logger.finish()
    assert caplog.text == ""


def test_a_tracker_without_pictures_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(["rl_insight"])
    for step in (1, 2):
        run.global_steps = step
        assert trackers.maybe_log(run, RECORDED) == {}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "rl_insight gets no pictures" in record.getMessage()


def test_a_tracker_that_fails_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the tracker")

    run = trainer(["tensorboard"])
    run.logger.logger["tensorboard"].writer.add_image = refuse
    assert "export/pictures_s" in trackers.maybe_log(run, RECORDED)
    assert "tensorboard did not take the pictures of step 7 (no route" in caplog.text


def test_answers_about_clips_come_first_and_every_prompt_once() -> None:
    def answer(prompt: str, number: int, clips: tuple[str, ...] | None = ("a.mp4",)) -> Any:
        return SimpleNamespace(prompt_id=prompt, number=number, clips=clips)

    answers = [answer("a", n, ()) for n in (0, 1)] + [answer(p, n) for p in "bc" for n in (0, 1)]
    names = [(each.prompt_id, each.number) for each in trackers.chosen(answers, 5)]
    assert names == [("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 0)]
    assert len(trackers.chosen(answers, 99)) == 6 and trackers.chosen([], 2) == []
