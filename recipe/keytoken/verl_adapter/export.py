"""The per-token export: one Parquet file for each exported step, one row for each answer.

Read it with ``pandas.read_parquet(run / "tokens")``, or look at it with ``keytoken lens RUN``. Columns, in
this order; those of version 2 are marked:

- ``step``, ``prompt_id``, ``answer`` (its number in the group), ``prompt`` (decoded, without special tokens),
  ``reward``.
- Lists with one entry for each answer token: ``token_ids``, ``tokens``, ``log_prob``, ``log_prob_masked`` and
  ``log_prob_shuffled`` (under the views behind the visual and the temporal signal, nats), ``entropy``,
  ``truncated_entropy``, ``disagreement`` (nats), ``visual`` and ``temporal`` (scores, in nats or in the unit
  of ``keytoken.method.selection.score``), ``selected_visual``, ``selected_temporal``, ``selected_entropy``,
  ``weight`` and ``advantage``. A pass or signal that did not run has null in place of its list.
- 2: ``token_bytes``, what each token stands for; a character of several tokens is broken in ``tokens`` and
  whole in their joined bytes. ``counted``, whether a token is part of the loss: not the mark behind an answer
  that was cut off. ``uncertainty``, the score of the entropy signal: ``entropy``, or what the method made of
  it.
- 2: ``clips`` (the prompt's videos: ``video``, a path, and for a part of it ``video_start`` and ``video_end``
  in seconds, else null), ``accuracy`` (what the reward function said of the answer, null
  if nothing), ``group_size`` (answers to the prompt in the batch), ``row_key`` (what ties know the answer
  by), ``has_visual`` and ``has_temporal`` (whether the prompt has such a signal).

What holds for all rows is in the file's metadata (``pyarrow.parquet.read_schema(file).metadata``), under the
key ``keytoken``, as JSON: ``version`` (of this schema; files without the key are of version 1), ``step``,
``method`` (``keytoken.method``), ``sampling`` (the sampling contract), ``shuffle_seed`` (with the prompt's id
and the clip's number it gives the order of the shuffled frames,
:func:`keytoken.attribution.views.frames.changing_order`), ``tie_seed`` (of ties of ``rule=count``),
``batch_answers`` (how many answers the batch had; ``keytoken.export.max_responses`` may have cut it) and
``word_classes``.
"""

import dataclasses
import json
import logging
import numbers
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from transfer_queue import KVBatchMeta

from keytoken.attribution.types import Signals, TokenWeights
from keytoken.data.part import entry_of, named_clip
from keytoken.verl_adapter import batch as batches
from keytoken.verl_adapter.keys import place_of

logger = logging.getLogger(__name__)
VERSION = 2
METADATA_KEY = b"keytoken"
STORED = ("prompts", "responses", "rm_scores", "advantages", "raw_prompt", "extra_fields")


def maybe_write(trainer: Any, batch: KVBatchMeta, signals: Signals, result: TokenWeights) -> Path | None:
    """Write this step's export if it is due; returns the file.

    A file that cannot be written, such as on a full disk, is a warning: training goes on without it.

    Args:
        trainer: the running trainer, for its step, tokenizer, contract and configuration.
        batch: the batch, after advantages were written.
        signals: what the method looked at.
        result: what it decided.
    """
    export, step = trainer.keytoken.export, trainer.global_steps
    if not export.enabled or step % export.every_steps:
        return None
    # Whole groups first: answers of one prompt are worth more side by side than spread.
    real = [row for row, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
    order = sorted(real, key=lambda row: place_of(batch.keys[row]))[: export.max_responses]
    kept = KVBatchMeta(
        partition_id=batch.partition_id,
        keys=[batch.keys[row] for row in order],
        tags=[batch.tags[row] for row in order],
    )
    data = batches.read(kept, list(STORED))
    sizes = Counter(place_of(batch.keys[row])[0] for row in real)
    decode = _Decoder(trainer.tokenizer)
    rows = [
        {
            "step": step,
            "group_size": sizes[place_of(key)[0]],
            **_row(decode, key, place, index, data, signals, result),
        }
        for place, (key, index) in enumerate(zip(kept.keys, order, strict=True))
    ]
    about = json.dumps(_about(trainer, signals, len(real)))
    target = Path(trainer.keytoken.run_dir) / "tokens" / f"step_{step:06d}.parquet"
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({METADATA_KEY: about.encode()}))
    try:
        _write(table, target)
    except OSError as problem:
        logger.warning(
            "%s: the tokens of step %d are not exported (%s); the run goes on. Make room on the disk, or set "
            "keytoken.export.max_responses or every_steps to write less.",
            *(target, step, problem),
        )
        return None
    return target


def _write(table: pa.Table, target: Path) -> None:
    """Whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    try:
        pq.write_table(table, partial)
        os.replace(partial, target)
    except OSError:
        partial.unlink(missing_ok=True)  # what there is of it takes the room that is short
        raise


_NUMBERS = pa.list_(pa.float32())
_FLAGS = pa.list_(pa.bool_())
_CLIP = pa.struct([("video", pa.string()), ("video_start", pa.float64()), ("video_end", pa.float64())])
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
        ("token_bytes", pa.list_(pa.binary())),
        ("counted", _FLAGS),
        ("uncertainty", _NUMBERS),
        ("clips", pa.list_(_CLIP)),
        ("accuracy", pa.float32()),
        ("group_size", pa.int64()),
        ("row_key", pa.int64()),
        ("has_visual", pa.bool_()),
        ("has_temporal", pa.bool_()),
    ]
)


def _row(
    decode: "_Decoder", key: str, place: int, index: int, data: Any, signals: Signals, result: TokenWeights
) -> dict[str, Any]:
    """One answer: number ``place`` of what was read, row ``index`` of the batch."""
    ids = data["responses"][place].tolist()
    prompt_id, answer, _ = place_of(key)

    def values(tensor: Tensor | None) -> list[Any] | None:
        return None if tensor is None else tensor[index][: len(ids)].tolist()

    return {
        "prompt_id": prompt_id,
        "answer": answer,
        "prompt": decode.text(data["prompts"][place].tolist()),
        "reward": float(data["rm_scores"][place].sum()),
        "token_ids": ids,
        "tokens": [decode.token(token) for token in ids],
        "log_prob": values(signals.logp),
        "log_prob_masked": values(signals.logp_masked),
        "log_prob_shuffled": values(signals.logp_shuffled),
        "entropy": values(signals.entropy),
        "truncated_entropy": values(signals.truncated_entropy),
        "disagreement": values(signals.disagreement),
        **{name: values(result.scores.get(name)) for name in ("visual", "temporal")},
        **{f"selected_{name}": values(result.masks.get(name)) for name in ("visual", "temporal", "entropy")},
        "weight": values(result.weights),
        "advantage": data["advantages"][place].tolist(),
        "token_bytes": [decode.raw(token) for token in ids],
        "counted": values(signals.mask),
        "uncertainty": values(result.scores.get("entropy")),
        "clips": _clips(data["raw_prompt"][place]),
        "accuracy": _accuracy(data["extra_fields"][place]),
        "row_key": index if signals.row_keys is None else int(signals.row_keys[index]),
        "has_visual": bool(signals.has_visual[index]),
        "has_temporal": bool(signals.has_temporal[index]),
    }


def _about(trainer: Any, signals: Signals, num_answers: int) -> dict[str, Any]:
    """What holds for the whole file."""
    keytoken = trainer.keytoken
    return {
        "version": VERSION,
        "step": trainer.global_steps,
        "method": dataclasses.asdict(keytoken.method),
        "sampling": dataclasses.asdict(trainer.contract),
        "shuffle_seed": keytoken.attribution.shuffle_seed,
        "tie_seed": signals.seed % 2**32,
        "batch_answers": num_answers,
        "word_classes": keytoken.diagnostics.word_classes,
    }


def _clips(messages: Any) -> list[dict[str, Any]]:
    """The videos of a conversation, in order."""
    messages = getattr(messages, "data", messages)
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    parts = [part for content in contents for part in content if part.get("type") == "video"]
    return [entry_of(named_clip(part)) for part in parts]


def _accuracy(extra_fields: Any) -> float | None:
    """What the reward function said of an answer beside its score, if it is a number."""
    info = dict(getattr(extra_fields, "data", extra_fields)).get("reward_extra_info") or {}
    accuracy = info.get("acc")
    return float(accuracy) if isinstance(accuracy, numbers.Real) else None


class _Decoder:
    """Tokens as text and as bytes; every id is decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = set(tokenizer.added_tokens_decoder)  # these are text, not bytes
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}

    def text(self, ids: list[int]) -> str:
        """A prompt, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token(self, token: int) -> str:
        """One token decoded by itself."""
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]

    def raw(self, token: int) -> bytes:
        """The bytes that a token stands for; those of its text, where the tokenizer is not one of bytes."""
        if token not in self._bytes:
            piece = "" if token in self._added else self._tokenizer.convert_ids_to_tokens(token) or ""
            known = bool(piece) and all(character in _BYTES for character in piece)
            raw = bytes(_BYTES[character] for character in piece) if known else self.token(token).encode()
            self._bytes[token] = raw
        return self._bytes[token]


def _byte_characters() -> dict[str, int]:
    """Byte-level BPE writes a byte as the character of that number if that can be seen, else from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    shown = {chr(byte): byte for byte in seen}
    return shown | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTES = _byte_characters()
