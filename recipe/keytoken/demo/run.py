"""The two ends of the demo: preparing its world, and the table of a finished run."""

import json
import os
from pathlib import Path
from typing import Any

from keytoken.demo.prepare import DemoAssets, prepare
from keytoken.demo.report import read_metrics, write_report
from keytoken.demo.statistics import AnswerRecord
from keytoken.demo.validation import write_validation
from keytoken.errors import DataError

DEMO_VARIABLE = "KEYTOKEN_DEMO_DIR"


def prepare_for_training() -> DemoAssets:
    """Prepare the demo's files and name their folder in ``$KEYTOKEN_DEMO_DIR``, where the configs look."""
    print("Preparing the demo world: clips, tokenizer and a warm-started model (once; cached afterwards).")
    assets = prepare()
    write_validation(assets.heldout_file, assets.root / "validation.parquet")
    os.environ[DEMO_VARIABLE] = str(assets.root)
    print(f"Demo world: {assets.root}")
    print(f"  warm start took {assets.manifest.get('warm_start_wall_s')} s")
    return assets


def report(run_dir: Path) -> str:
    """Write and return the table of a finished run from what it left in its folder.

    Raises:
        DataError: the run has fewer than two evaluations.
    """
    dumps = sorted((run_dir / "validation").glob("*.jsonl"), key=lambda path: int(path.stem))
    if len(dumps) < 2:
        raise DataError(
            f"{run_dir / 'validation'} holds {len(dumps)} evaluations; the table needs one before and "
            "one after training: leave trainer.val_before_train=true, and set trainer.test_freq to the "
            "number of steps."
        )
    rows = [row for path in sorted(run_dir.glob("metrics*.jsonl")) for row in read_metrics(path)]
    return write_report(run_dir, read_answers(dumps[0]), read_answers(dumps[-1]), rows)


def read_answers(path: Path) -> list[AnswerRecord]:
    """The scored held-out answers that verl wrote at one evaluation.

    Read line by line as files are: an answer may hold what str.splitlines() takes for the end of a line.
    """
    with path.open(encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [AnswerRecord(row["prompt_id"], row["family"], float(row["acc"]), row["decoding"]) for row in rows]
