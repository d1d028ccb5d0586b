"""A few exported answers as pictures in the run's trackers, drawn as ``keytoken lens --image`` draws them.

verl's trainer keeps the trackers that ``trainer.logger`` lists by their names (verl 0.9.1,
trainer/ppo/v1/trainer_base.py:423, utils/tracking.py:62): modules such as wandb, or adapters around them.
"""

import functools
import io
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keytoken.lens.image import png_of
from keytoken.lens.read import Answer, read_export

logger = logging.getLogger(__name__)

Pictures = Mapping[str, Image.Image]  # by the name under which a tracker shows them, step after step


def maybe_log(trainer: Any, exported: Path | None) -> dict[str, float]:
    """Give the run's trackers some of the answers that were exported in this step.

    A tracker that cannot be reached or written is a warning: training goes on without its pictures.

    Args:
        trainer: The running trainer, for its step, trackers and configuration.
        exported: The file of this step; None if none was written.

    Returns:
        ``export/pictures_s``, the seconds this took; nothing if no tracker of the run takes pictures.
    """
    count = trainer.keytoken.export.pictures
    if exported is None or count == 0:
        return {}
    trackers: dict[str, Any] = trainer.logger.logger
    taking = {name: tracker for name, tracker in trackers.items() if name in TAKES}
    for name in trackers.keys() - TAKES.keys() - _TEXT_ONLY:
        _warn_once(name)
    if not taking:
        return {}
    start, export = time.perf_counter(), read_export(exported)
    pictures = {
        f"lens/answer_{number}": Image.open(io.BytesIO(png_of(export, answer))).convert("RGB")
        for number, answer in enumerate(chosen(export.answers, count), start=1)
    }
    for name, tracker in taking.items():
        try:
            TAKES[name](tracker, pictures, trainer.global_steps)
        except OSError as problem:  # a full disk, or no connection
            logger.warning(
                "%s did not take the pictures of step %d (%s); the run goes on. keytoken.export.pictures=0 "
                "sends none.",
                *(name, trainer.global_steps, problem),
            )
    return {"export/pictures_s": time.perf_counter() - start}


def chosen(answers: Sequence[Answer], count: int) -> list[Answer]:
    """So many of them: answers about clips first, and of those one to each prompt before a second one."""
    turns: Counter[str] = Counter()
    order = []
    for place, answer in enumerate(answers):
        order.append((not answer.clips, turns[answer.prompt_id], place))
        turns[answer.prompt_id] += 1
    return [answers[place] for *_, place in sorted(order)[:count]]


def _to_module(tracker: Any, pictures: Pictures, step: int) -> None:
    """wandb and SwanLab: modules with the same two names."""
    tracker.log({name: tracker.Image(picture) for name, picture in pictures.items()}, step=step)


def _to_tensorboard(tracker: Any, pictures: Pictures, step: int) -> None:
    for name, picture in pictures.items():
        tracker.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    tracker.writer.flush()  # verl closes the file only if the run ends in peace


def _to_mlflow(tracker: Any, pictures: Pictures, step: int) -> None:
    import mlflow  # installed where a run asks for it

    try:
        for name, picture in pictures.items():
            mlflow.log_image(picture, key=name, step=step)
    except mlflow.exceptions.MlflowException as problem:
        raise OSError(str(problem)) from problem


TAKES: dict[str, Callable[[Any, Pictures, int], None]] = {
    "wandb": _to_module,
    "swanlab": _to_module,
    "tensorboard": _to_tensorboard,
    "mlflow": _to_mlflow,
}
_TEXT_ONLY = {"console", "file"}  # nobody expects pictures there


@functools.cache
def _warn_once(name: str) -> None:
    logger.warning(
        "trainer.logger: %s gets no pictures of answers (keytoken.export.pictures); these do: %s. "
        "`keytoken lens RUN --image` draws them as files.",
        *(name, ", ".join(TAKES)),
    )
