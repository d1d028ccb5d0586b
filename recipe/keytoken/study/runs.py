"""One run from its plan to its file, and back: the raw numbers of a study are one JSON file a run.

A file appears under its name only when its run is complete, and names the digest of what it was run with, so
an interrupted study goes on with what is missing, and a changed one runs again what has changed.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from keytoken.study import warm
from keytoken.study.evaluation import Evaluation, evaluate
from keytoken.study.policy import load_policy
from keytoken.study.prompts import load_split
from keytoken.study.settings import RunPlan, TrainSettings
from keytoken.study.trainer import Trainer

# What a run is, in the words of the report and of the files.
BACKENDS = {
    "process": "one process: plain torch around the pure core, without Ray, vLLM or verl",
    "stack": "a run of `keytoken train` on the real stack: verl, Ray and vLLM",
}
_DIGITS = 5  # significant ones, of metrics
_PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    Attributes:
        section: Its section.
        arm: Its arm.
        seed: Its seed.
        digest: Of what it was run with.
        evaluations: For each evaluated split what came out.
        steps: Metrics by name, one value a step; None where a step has no such value.
        cost: Seconds of wall and CPU time, of training and evaluation.
        content: The whole file.
    """

    section: str
    arm: str
    seed: int
    digest: str
    evaluations: dict[str, Evaluation]
    steps: dict[str, list[float | None]]
    cost: dict[str, float]
    content: dict[str, Any]


def run_file(folder: Path, plan: RunPlan) -> Path:
    """Where a run's numbers go."""
    return folder / "runs" / f"{plan.name}.json"


def is_finished(folder: Path, plan: RunPlan, settings: TrainSettings | None) -> bool:
    """Whether a run has been run, with these settings."""
    path = run_file(folder, plan)
    return path.exists() and json.loads(path.read_text())["digest"] == plan.digest(settings)


def execute(folder: Path, plan: RunPlan, settings: TrainSettings) -> Path:
    """Run a plan in this process and write its file.

    Training and evaluation depend on the plan and the settings only: the same ones give the same numbers.
    """
    torch.set_num_threads(1)  # tensors this small run no faster on two, and stall on a busy machine
    torch.manual_seed(plan.seed)
    model = load_policy(warm.prepare(plan.start))
    train_prompts = load_split(plan.start.world, "train", plan.train_prompts) if plan.steps else ()
    held_out = {split: load_split(plan.start.world, split, plan.eval_prompts) for split in plan.splits}
    trained = _Clock()
    trainer = Trainer(model, train_prompts, settings, plan.max_refills)
    steps = [trainer.step(number) for number in range(1, plan.steps + 1)]
    cost = trained.read("train")
    evaluated = _Clock()
    evaluations = {
        split: evaluate(
            model, prompts, samples=plan.eval_samples, max_tokens=settings.max_tokens, seed=plan.seed
        )
        for split, prompts in held_out.items()
    }
    return write_run(folder, plan, settings, evaluations, steps, cost | evaluated.read("evaluate"))


def write_run(
    folder: Path,
    plan: RunPlan,
    settings: TrainSettings | None,
    evaluations: Mapping[str, Evaluation],
    steps: Sequence[Mapping[str, float]],
    cost: Mapping[str, float],
) -> Path:
    """Write the file of a finished run, one line for each of its parts."""
    content = {
        "study": plan.study,
        "section": plan.section,
        "arm": plan.arm,
        "seed": plan.seed,
        "digest": plan.digest(settings),
        "backend": BACKENDS[plan.backend],
        "words": list(plan.words),
        "settings": None if settings is None else asdict(settings),
        "warm_start": {**asdict(plan.start), "digest": plan.start.digest()},
        "evaluations": {split: _packed(found) for split, found in evaluations.items()},
        "steps": _columns(steps),
        "cost": dict(cost),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
    }
    path = run_file(folder, plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    partial.write_text(f"{{\n{lines}\n}}\n")
    partial.replace(path)
    return path


def read_run(path: Path) -> RunResult:
    """Read a run's file."""
    content = json.loads(path.read_text())
    evaluations = {split: _unpacked(packed) for split, packed in content["evaluations"].items()}
    names = ("section", "arm", "seed", "digest", "steps", "cost")
    return RunResult(**{name: content[name] for name in names}, evaluations=evaluations, content=content)


class _Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def read(self, name: str) -> dict[str, float]:
        wall, cpu = time.monotonic() - self.wall, time.process_time() - self.cpu
        return {f"{name}_wall_s": round(wall, 2), f"{name}_cpu_s": round(cpu, 2)}


def _packed(found: Evaluation) -> dict[str, Any]:
    """One character a prompt: right answers among the sampled ones, right greedy answers."""
    assert found.samples < 10
    return asdict(found) | {
        "families": " ".join(found.families),
        "sampled": "".join(map(str, found.sampled)),
        "greedy": "".join(map(str, found.greedy)),
    }


def _unpacked(packed: dict[str, Any]) -> Evaluation:
    return Evaluation(
        **packed
        | {
            "families": packed["families"].split(),
            "sampled": [int(digit) for digit in packed["sampled"]],
            "greedy": [int(digit) for digit in packed["greedy"]],
        }
    )


def _columns(steps: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    names = sorted({name for step in steps for name in step})
    return {name: [_rounded(step.get(name)) for step in steps] for name in names}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
