"""Held-out rows for verl's validation, and the answers that it leaves behind.

verl validates with one set of sampling parameters. A row may ask for its own number of answers
(``__rollout_n__``, verl), for greedy decoding (``extra_info.decoding``) and for blank or shuffled frames
(``extra_info.control``; both KeyToken's agent loop), so one validation gives all accuracies.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SAMPLED_ANSWERS = 4
CONTROLS = ("blank", "shuffled")


@dataclass(frozen=True, slots=True)
class HeldOutAnswer:
    """One scored answer to a held-out prompt.

    Attributes:
        prompt_id: Which prompt; pairs the answers of two validations.
        family: Question family of the prompt.
        correct: Accuracy reward in [0, 1].
        decoding: "sampled" (temperature 1) or "greedy".
        control: What was done to the clip: "none", "blank" or "shuffled".
        response: The answer.
    """

    prompt_id: str
    family: str
    correct: float
    decoding: str = "sampled"
    control: str = "none"
    response: str = ""


def write_validation(
    heldout_file: Path,
    target: Path,
    sampled_answers: int = SAMPLED_ANSWERS,
    controls: Sequence[str] = CONTROLS,
) -> Path:
    """Write the validation file.

    Args:
        heldout_file: held-out prompts, one row each.
        target: Parquet file to write.
        sampled_answers: answers at temperature 1 for each prompt; greedy decoding needs one.
        controls: What prompts with a clip are asked with once more, greedily.
    """
    asked = [("sampled", "none", sampled_answers), ("greedy", "none", 1)]
    asked += [("greedy", control, 1) for control in controls]
    rows = [
        _row(row, decoding, control, count)
        for row in pq.read_table(heldout_file).to_pylist()
        for decoding, control, count in asked
        if control == "none" or row["videos"]
    ]
    partial = target.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    partial.replace(target)
    return target


def _row(row: dict[str, Any], decoding: str, control: str, count: int) -> dict[str, Any]:
    name = f"demo_{decoding}" if control == "none" else f"demo_{decoding}_{control}"
    info = {**row["extra_info"], "decoding": decoding, "control": control}
    return {**row, "data_source": name, "extra_info": info, "__rollout_n__": count}


def read_answers(path: Path) -> list[HeldOutAnswer]:
    """The scored held-out answers that verl wrote at one validation.

    Read line by line as files are: an answer may hold what str.splitlines() takes for the end of a line.
    """
    with path.open(encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [
        HeldOutAnswer(
            row["prompt_id"], row["family"], float(row["acc"]), row["decoding"], row["control"], row["output"]
        )
        for row in rows
    ]
