"""A plan as a picture: the memory of one GPU of each pool, and who works when in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keytoken.errors import ConfigurationError
from keytoken.plan.run import Plan
from keytoken.plan.timing import ALL, ROLLOUT, Part

DPI = 110
_GIB = 2.0**30


def spans(plan: Plan) -> list[tuple[Part, float]]:
    """The parts of a step with the second at which each begins.

    Views begin with the old log-probs where they have GPUs of their own; the rest waits for both.
    """
    parts, found = plan.step.parts, []
    clock = dict.fromkeys(plan.memory, 0.0)
    for part in parts:
        if part.pool == ALL:
            continue
        if part.pool != ROLLOUT and not plan.pools.ahead:
            clock[part.pool] = max(clock[part.pool], clock[ROLLOUT])
        if part.name in ("reference", "update"):
            clock[part.pool] = max(value for pool, value in clock.items() if pool != ROLLOUT)
        found.append((part, clock[part.pool]))
        clock[part.pool] += part.seconds
    now = max(clock.values())
    for part in parts:
        if part.pool == ALL:
            found.append((part, now))
            now += part.seconds
    return found


def draw(plan: Plan, path: Path) -> None:
    """Write the picture.

    Raises:
        ConfigurationError: the file's name ends in no format of pictures, or its folder is not there.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    memory, step = figure.subplots(1, 2, width_ratios=(2, 3))
    colors = _draw_memory(memory, plan)
    figure.legend(colors.values(), colors.keys(), loc="outside lower left", ncols=5, fontsize=8)
    _draw_step(step, plan)
    figure.suptitle(
        f"{plan.name}, {plan.pools.total} x {plan.given.device}: computed, not measured", fontsize=11
    )
    try:
        figure.savefig(path, dpi=DPI)
    except (ValueError, OSError) as problem:
        raise ConfigurationError(
            f"--picture {path}: {problem}. Name a .png or .svg file in a folder."
        ) from problem


def _draw_memory(axes: Any, plan: Plan) -> dict[str, Any]:
    drawn: dict[str, Any] = {}
    names = list(dict.fromkeys(name for pool in plan.memory.values() for name in pool.parts))
    bottom = dict.fromkeys(plan.memory, 0.0)
    for number, name in enumerate(names):
        heights = {pool: memory.parts.get(name, 0.0) / _GIB for pool, memory in plan.memory.items()}
        drawn[name] = axes.bar(
            list(heights), list(heights.values()), bottom=list(bottom.values()), color=f"C{number}", width=0.6
        )
        bottom = {pool: bottom[pool] + heights[pool] for pool in bottom}
    axes.axhline(plan.given.accelerator.memory_gib, color="black", linewidth=1, linestyle="--")
    axes.set_ylabel("GiB on one GPU")
    return drawn


def _draw_step(axes: Any, plan: Plan) -> None:
    lanes = [ALL, *reversed(plan.memory)]
    for part, start in spans(plan):
        lane = lanes.index(part.pool)
        axes.barh(lane, part.seconds, left=start, height=0.6, edgecolor="white", color=f"C{lane}")
        if part.seconds > 0.05 * plan.step.seconds:
            axes.text(
                start + part.seconds / 2, lane, part.name, ha="center", va="center", fontsize=7, rotation=20
            )
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_xlabel("seconds of a step")
