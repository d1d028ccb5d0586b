"""Diagnostics of a step: the metrics of :mod:`keytoken.attribution.diagnostics`, and a file with more.

They are computed where signals and weights already are, in the trainer's process. The file,
``<run_dir>/diagnostics/step_<step>.json``, holds ``step``, ``metrics`` (the same as in the log) and
``answers``, one entry for each: ``prompt_id``, ``answer`` (its number in the group), ``tokens``, ``selected``
(how many), ``weight`` (their sum) and ``right`` (null where unknown).

An answer is right if the reward function gave it an ``acc`` above one half. Where some answer has none, the
metrics of outcomes are left out.
"""

import json
import math
import numbers
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta

from keytoken.attribution.diagnostics import diagnose, word_class
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.losses.denominators import loss_totals, token_coefficients
from keytoken.verl_adapter.keys import place_of

RIGHT_ABOVE = 0.5


def maybe_write(
    trainer: Any, batch: KVBatchMeta, signals: Signals, result: TokenWeights, data: TensorDict
) -> dict[str, float]:
    """Diagnose this step if it is due, and write its file.

    Args:
        trainer: the running trainer, for its step, tokenizer and configuration.
        batch: the batch.
        signals: what the method looked at.
        result: what it decided.
        data: the ragged tensors that the signals came from.

    Returns:
        The metrics, with ``diagnostics/seconds``, the time that all this took beside the measure of the pass;
        empty in other steps.
    """
    keytoken, step = trainer.keytoken, trainer.global_steps
    if not keytoken.diagnostics.due(step):
        return {}
    start = time.perf_counter()
    mask, loss = signals.mask, keytoken.method.loss
    right = rightness(data["extra_fields"], mask.any(dim=1))
    known = {word: name for name, words in keytoken.diagnostics.word_classes.items() for word in words}
    metrics = diagnose(
        signals,
        result,
        data["advantages"].to_padded_tensor(0.0),
        lambda weights: token_coefficients(weights, mask, loss, loss_totals(weights, mask)).policy,
        right=right,
        classes=token_classes(data["responses"], mask, trainer.tokenizer, known),
    )
    answers = _answers(batch.keys, result, mask, right)
    folder = Path(keytoken.run_dir) / "diagnostics"
    _write(folder / f"step_{step:06d}.json", {"step": step, "metrics": metrics, "answers": answers})
    return {**metrics, "diagnostics/seconds": time.perf_counter() - start}


def rightness(extra_fields: Sequence[Any], real: Tensor) -> Tensor | None:
    """[B] bool, answers that are right; None if the reward function did not say it of every answer.

    Args:
        extra_fields: Of each row, as verl stores them.
        real: [B] bool, false for rows that only fill the batch, of which nothing is asked.
    """
    found = []
    for value, counts in zip(extra_fields, real.tolist(), strict=True):
        accuracy: Any = (dict(getattr(value, "data", value)).get("reward_extra_info") or {}).get("acc")
        known = isinstance(accuracy, numbers.Real) and math.isfinite(accuracy)
        if counts and not known:
            return None
        found.append(known and accuracy > RIGHT_ABOVE)
    return torch.tensor(found, dtype=torch.bool)


def token_classes(
    responses: Sequence[Tensor] | Tensor, mask: Tensor, tokenizer: Any, known: dict[str, str]
) -> list[list[str]]:
    """For each answer the class of each of its tokens; every id is decoded once.

    Args:
        responses: B rows of token ids.
        mask: [B, T] bool, answer tokens.
        tokenizer: A Hugging Face tokenizer; its special tokens are of the class ``special``.
        known: Classes of whole words.
    """
    answers = [ids[row[: len(ids)]].tolist() for ids, row in zip(responses, mask, strict=True)]
    special = set(tokenizer.all_special_ids)
    classes = {
        token: "special" if token in special else word_class(tokenizer.decode([token]), known)
        for token in {token for ids in answers for token in ids}
    }
    return [[classes[token] for token in ids] for ids in answers]


def _answers(
    keys: Sequence[str], result: TokenWeights, mask: Tensor, right: Tensor | None
) -> list[dict[str, Any]]:
    rows = []
    for row in mask.any(dim=1).nonzero().flatten().tolist():
        prompt_id, answer, _ = place_of(keys[row])
        rows.append(
            {
                "prompt_id": prompt_id,
                "answer": answer,
                "tokens": int(mask[row].sum()),
                "selected": int(result.selected[row].sum()),
                "weight": float(result.weights[row].sum()),
                "right": None if right is None else bool(right[row]),
            }
        )
    return sorted(rows, key=lambda entry: (entry["prompt_id"], entry["answer"]))


def _write(target: Path, content: dict[str, Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, target)
