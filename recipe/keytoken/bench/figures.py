"""What was measured of a run, and several of them in a table."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keytoken.errors import ConfigurationError

TARGET_RATIO = 1.3
NUM_WARM_UP_STEPS = 2  # caches fill and workers import their last modules in the first steps

STOCK, PLAIN, SEPARATE, ATTRIBUTED = "GRPO, stock", "GRPO", "KTR, separate", "Video-KTR"
# Parts of a step by metric, in the order of the step. What is indented lies within the line above it.
PARTS = {
    "whole step": "timing_s/step",
    "sampling": "timing_s/gen",
    "old log-probs": "timing_s/old_log_prob",
    "  of it waiting for attribution": "attribution/wait_s",
    "  attribution passes, beside it": "attribution/pass_s",
    "reference log-probs": "timing_s/ref",
    "advantages and selection": "timing_s/adv",
    "actor update": "timing_s/update_actor",
    "weight sync": "timing_s/update_weights",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One run.

    Attributes:
        seconds: Median of each part over the warm steps; None where the run has no such part.
        step_seconds: The whole step, every step from the first on.
        peak_gib: Largest memory of all processes of the run together, shared pages counted once.
    """

    seconds: dict[str, float | None]
    step_seconds: list[float]
    peak_gib: float


def measure(rows: Sequence[dict[str, Any]], peak_gib: float) -> Measured:
    """Medians over the warm steps of a metrics file.

    Args:
        rows: one a step: ``{"step": 1, "data": {"timing_s/step": 9.8, ...}}``.
        peak_gib: peak memory of the run.

    Raises:
        ConfigurationError: no step is left after the warm-up.
    """
    steps = [row["data"] for row in rows if PARTS["whole step"] in row["data"]]
    warm = steps[NUM_WARM_UP_STEPS:]
    if not warm:
        raise ConfigurationError(
            f"The run has {len(steps)} steps and the first {NUM_WARM_UP_STEPS} are not counted: give it more "
            "by --steps, and no trainer.total_training_steps."
        )
    seconds = {}
    for part, metric in PARTS.items():
        found = [step[metric] for step in warm if metric in step]
        seconds[part] = statistics.median(found) if found else None
    return Measured(seconds, [step[PARTS["whole step"]] for step in steps], peak_gib)


def ratio(measured: Mapping[str, Measured], arm: str = ATTRIBUTED, base: str = PLAIN) -> float:
    """The whole warm step of one arm over that of another."""
    one, other = (measured[name].seconds["whole step"] for name in (arm, base))
    assert one is not None and other is not None  # measure() keeps steps that have it only
    return one / other


def table(measured: Mapping[str, Measured]) -> str:
    """The figures side by side."""
    lines = [_line("seconds, median of warm steps", *measured)]
    for part in PARTS:
        lines.append(_line(part, *(_figure(run.seconds[part]) for run in measured.values())))
    lines.append(_line("training side", *(f"{training_side(run):.2f}" for run in measured.values())))
    lines.append(_line("peak memory, GiB", *(f"{run.peak_gib:.2f}" for run in measured.values())))
    share = training_side(measured[ATTRIBUTED]) / training_side(measured[STOCK])
    lines.append(
        f"A step with attribution takes {ratio(measured):.2f} times one without (target: {TARGET_RATIO}) and "
        f"{ratio(measured, base=STOCK):.2f} times one of stock GRPO; its training side takes {share:.2f} of "
        "that one's."
    )
    return "\n".join(lines)


def training_side(measured: Measured) -> float:
    """Seconds of a step that are neither sampling nor weight sync."""
    parts = ("old log-probs", "reference log-probs", "advantages and selection", "actor update")
    return sum(measured.seconds[part] or 0.0 for part in parts)


def _line(name: str, *columns: str) -> str:
    return f"{name:<34}" + "".join(f"{column:>12}" for column in columns)


def _figure(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"
