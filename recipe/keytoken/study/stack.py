"""The same runs by the real stack: ``keytoken train`` in a process of its own, one run after the other.

For a few runs: each starts Ray, vLLM and three pools. Prompts, warm start, words and splits are those of the
other backend; what it draws is its own, so numbers of the two backends agree in distribution only. An arm
that one process refuses, such as T-GRPO, runs here.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from keytoken.bench.run import run_and_watch
from keytoken.demo.curves import read_metrics
from keytoken.demo.render import draw_clip, write_clip
from keytoken.demo.rows import question_row
from keytoken.demo.tokenizer import DEMO_CONTRACT
from keytoken.demo.validation import HeldOutAnswer, read_answers, write_validation
from keytoken.errors import ConfigurationError
from keytoken.study import runs, warm
from keytoken.study.evaluation import Evaluation
from keytoken.study.prompts import split_question
from keytoken.study.settings import RunPlan, demo_folder

LIMIT_S = 7200.0  # of one run
# Metrics of verl's file logger under the names of the other backend; those of attribution/ keep theirs.
METRICS = {
    "reward": "critic/score/mean",
    "entropy": "actor/entropy",
    "grad_norm": "actor/grad_norm",
    "length": "response_length/mean",
}


def execute(folder: Path, plan: RunPlan) -> Path:
    """Run a plan by ``keytoken train`` and write its file; the run folder stays beside it.

    Raises:
        ConfigurationError: more than one split, of which the stack validates one.
        ClusterError: the run failed or took too long; its log is named.
    """
    if len(plan.splits) > 1:
        raise ConfigurationError(
            f"study.backend=stack evaluates one split, and section {plan.section} lists "
            f"{', '.join(plan.splits)}; keep the first."
        )
    run_dir = folder / "stack" / plan.name
    words = [
        *plan.words,
        f"keytoken.seed={plan.seed}",
        f"keytoken.run_dir={run_dir}",
        f"trainer.test_freq={max(plan.steps, 1)}",
        f"trainer.val_only={str(plan.steps == 0).lower()}",
        "trainer.val_before_train=true",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        "keytoken.export.enabled=false",
    ]
    begun = time.monotonic()
    with demo_folder(write_world(plan)):
        run_and_watch([sys.executable, "-m", "keytoken.cli", "train", *words], run_dir / "log.txt", LIMIT_S)
    cost = {"train_wall_s": round(time.monotonic() - begun, 2)}
    answers = read_answers(run_dir / "validation" / f"{plan.steps}.jsonl")
    steps = [_metrics(row["data"]) for row in read_metrics(run_dir / "metrics.jsonl") if row["step"] > 0]
    return runs.write_run(folder, plan, None, {plan.splits[0]: evaluation_of(answers)}, steps, cost)


def write_world(plan: RunPlan) -> Path:
    """The files that ``experiment=demo_cpu`` reads: model, training prompts, prompts to validate on.

    They lie below the warm start, and are written once for each split and number of prompts.
    """
    model = warm.prepare(plan.start)
    split = plan.splits[0]
    world = model / f"stack-{split}-{plan.train_prompts}-{plan.eval_prompts}-{plan.eval_samples}"
    if (world / "validation.parquet").exists():
        return world
    world.mkdir(exist_ok=True)
    if not (world / "model").exists():
        (world / "model").symlink_to(model, target_is_directory=True)
    _write_split(world, plan.start.world, "train", plan.train_prompts)
    held_out = _write_split(world, plan.start.world, split, plan.eval_prompts)
    write_validation(held_out, world / "validation.parquet", plan.eval_samples, controls=())
    return world


def _write_split(folder: Path, world: str, split: str, count: int) -> Path:
    clips = folder / "clips" / split
    clips.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in tqdm(range(count), desc=f"clips: {world} {split}", unit="clip", mininterval=1.0):
        question, rng = split_question(world, split, index)
        path = clips / f"{index:05d}-{question.family}.mp4" if question.bodies else None
        if path is not None and not path.exists():
            write_clip(path, draw_clip(question.bodies, rng))
        rows.append(question_row(question, split=split, index=index, clip=path, contract=DEMO_CONTRACT))
    target = folder / f"{split}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), target)
    return target


def evaluation_of(answers: list[HeldOutAnswer]) -> Evaluation:
    """Scored answers of one validation, prompt by prompt in the order of the split.

    The stack's records hold neither format nor length; they are 0 here.
    """
    prompts: dict[str, dict[str, list[HeldOutAnswer]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        prompts[answer.prompt_id][answer.decoding].append(answer)
    ordered = [prompts[name] for name in sorted(prompts)]
    return Evaluation(
        families=[prompt["greedy"][0].family for prompt in ordered],
        sampled=[round(sum(answer.correct for answer in prompt["sampled"])) for prompt in ordered],
        greedy=[round(prompt["greedy"][0].correct) for prompt in ordered],
        samples=len(ordered[0]["sampled"]),
        well_formed=0.0,
        mean_length=0.0,
    )


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    named = {name: float(row[metric]) for name, metric in METRICS.items() if metric in row}
    return named | {name: float(value) for name, value in row.items() if name.startswith("attribution/")}
