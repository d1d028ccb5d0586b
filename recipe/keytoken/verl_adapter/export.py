"""The per-token export: one Parquet file for each exported step, one row for each answer.

Columns: ``step``, ``prompt_id``, ``answer`` (its number in the group), ``prompt``, ``reward``, and lists with
one entry for each answer token: ``token_ids``, ``tokens``, ``log_prob``, ``log_prob_masked``,
``log_prob_shuffled``, ``entropy``, ``truncated_entropy``, ``disagreement``, ``visual``, ``temporal`` (scores,
in nats or in the unit of ``keytoken.method.selection.score``), ``selected_visual``, ``selected_temporal``,
``selected_entropy``, ``weight`` and ``advantage``. A pass or signal that did not run has null in place of its
list. Read it with ``pandas.read_parquet(run / "tokens")``.
"""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from transfer_queue import KVBatchMeta

from keytoken.attribution.types import Signals, TokenWeights
from keytoken.verl_adapter import batch as batches


def maybe_write(trainer: Any, batch: KVBatchMeta, signals: Signals, result: TokenWeights) -> Path | None:
    """Write this step's export if it is due; returns the file.

    Args:
        trainer: the running trainer, for its step, tokenizer and configuration.
        batch: the batch, after advantages were written.
        signals: what the method looked at.
        result: what it decided.
    """
    export, step = trainer.keytoken.export, trainer.global_steps
    if not export.enabled or step % export.every_steps:
        return None
    data = batches.read(batch, ["uid", "prompts", "responses", "rm_scores", "advantages"])
    # Whole groups first: answers of one prompt are worth more side by side than spread.
    order = sorted(range(len(batch)), key=lambda row: batch.keys[row])[: export.max_responses]
    rows = [_row(trainer.tokenizer, step, batch.keys[i], i, data, signals, result) for i in order]
    folder = Path(trainer.keytoken.run_dir) / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step_{step:06d}.parquet"
    partial = target.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
    os.replace(partial, target)
    return target


_NUMBERS = pa.list_(pa.float32())
_FLAGS = pa.list_(pa.bool_())
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt_id", pa.string()),
        ("answer", pa.int64()),
        ("prompt", pa.string()),
        ("reward", pa.float32()),
        ("token_ids", pa.list_(pa.int64())),
        ("tokens", pa.list_(pa.string())),
        *((name, _NUMBERS) for name in ("log_prob", "log_prob_masked", "log_prob_shuffled", "entropy")),
        *((name, _NUMBERS) for name in ("truncated_entropy", "disagreement")),
        *((name, _NUMBERS) for name in ("visual", "temporal")),
        *((f"selected_{name}", _FLAGS) for name in ("visual", "temporal", "entropy")),
        *((name, _NUMBERS) for name in ("weight", "advantage")),
    ]
)


def _row(
    tokenizer: Any, step: int, key: str, index: int, data: Any, signals: Signals, result: TokenWeights
) -> dict[str, Any]:
    ids = data["responses"][index].tolist()
    prompt_id, answer, _ = key.rsplit("_", 2)

    def values(tensor: Tensor | None) -> list[Any] | None:
        return None if tensor is None else tensor[index][: len(ids)].tolist()

    return {
        "step": step,
        "prompt_id": prompt_id,
        "answer": int(answer),
        "prompt": tokenizer.decode(data["prompts"][index], skip_special_tokens=True),
        "reward": float(data["rm_scores"][index].sum()),
        "token_ids": ids,
        "tokens": [tokenizer.decode([token]) for token in ids],
        "log_prob": values(signals.logp),
        "log_prob_masked": values(signals.logp_masked),
        "log_prob_shuffled": values(signals.logp_shuffled),
        "entropy": values(signals.entropy),
        "truncated_entropy": values(signals.truncated_entropy),
        "disagreement": values(signals.disagreement),
        **{name: values(result.scores.get(name)) for name in ("visual", "temporal")},
        **{f"selected_{name}": values(result.masks.get(name)) for name in ("visual", "temporal", "entropy")},
        "weight": values(result.weights),
        "advantage": data["advantages"][index].tolist(),
    }
