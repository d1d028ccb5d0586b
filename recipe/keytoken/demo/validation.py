"""Held-out rows for verl's validation: each prompt once for sampled and once for greedy answers.

verl validates with one set of sampling parameters. A row may ask for its own number of answers
(``__rollout_n__``, verl) and for greedy decoding (``extra_info.decoding``, KeyToken's agent loop), so one
validation gives both accuracies.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SAMPLED_ANSWERS = 4


def write_validation(heldout_file: Path, target: Path, sampled_answers: int = SAMPLED_ANSWERS) -> Path:
    """Write the validation file.

    Args:
        heldout_file: held-out prompts, one row each.
        target: Parquet file to write.
        sampled_answers: answers at temperature 1 for each prompt; greedy decoding needs one.
    """
    rows = pq.read_table(heldout_file).to_pylist()
    doubled = [
        {
            **row,
            "data_source": f"demo_{decoding}",
            "extra_info": {**row["extra_info"], "decoding": decoding},
            "__rollout_n__": count,
        }
        for row in rows
        for decoding, count in (("sampled", sampled_answers), ("greedy", 1))
    ]
    partial = target.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(doubled), partial)
    partial.replace(target)
    return target
