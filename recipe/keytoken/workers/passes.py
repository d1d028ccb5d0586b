"""The attribution passes: one batched, gradient-free forward for each view, answer positions only.

The transformer runs over the whole sequence, the head over the answer's rows alone
(:class:`keytoken.workers.answer_head.AnswerHead`).
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from keytoken.errors import NonFiniteError
from keytoken.workers.answer_head import AnswerHead
from keytoken.workers.rows import Row, answer_row_index, batch_of
from keytoken_kernels.dispatch import Impl
from keytoken_kernels.head import head_log_probs


@dataclass(frozen=True, slots=True)
class PassSettings:
    """How a pass runs: ``micro_batch_size`` rows at a time, logits divided by ``temperature``.

    ``impl`` is the implementation of the kernels (:func:`keytoken_kernels.dispatch.resolve`).
    """

    micro_batch_size: int
    temperature: float
    use_remove_padding: bool
    impl: Impl = "auto"


def score_rows(engine: Any, rows: list[Row], settings: PassSettings, view: str) -> list[Tensor]:
    """Log-probs (nats) of every answer under one view.

    All data-parallel ranks run the same number of micro-batches, because FSDP gathers parameters
    collectively: a rank with fewer rows repeats its first one and drops the result.

    Args:
        engine: verl's FSDP engine in eval mode.
        rows: the rows of this rank, already turned into the view; may be empty.
        settings: see :class:`PassSettings`.
        view: name of the view, for messages.

    Returns:
        One float32 tensor ``[R]`` for each row, on the CPU.

    Raises:
        NonFiniteError: a log-prob is NaN or infinite.
    """
    size = settings.micro_batch_size
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    # First, because it is a collective itself and may not fall between those of another rank's forward.
    num_rounds = _largest_over_ranks(engine, len(chunks))
    scored: list[Tensor] = []
    for chunk in chunks:
        scored.extend(_score_chunk(engine, chunk, settings))
    for _ in range(num_rounds - len(chunks)):
        _score_chunk(engine, _filler(rows), settings)
    # Last, so that a rank with a bad value does not leave the others waiting in a collective.
    _refuse_non_finite(rows, scored, view)
    return scored


@torch.no_grad()
def _score_chunk(engine: Any, rows: list[Row], settings: PassSettings) -> list[Tensor]:
    device = next(engine.module.parameters()).device
    batch = batch_of(rows, settings.temperature, settings.use_remove_padding).to(device)
    inputs, _ = engine.prepare_model_inputs(micro_batch=batch)
    index = answer_row_index(rows, settings.use_remove_padding).to(device)
    labels = torch.cat([row.answer_ids for row in rows]).to(device)
    score = partial(head_log_probs, labels=labels, temperature=settings.temperature, impl=settings.impl)
    with _autocast(engine, device), AnswerHead(engine.module, index, score) as head:
        log_probs, _ = head.read(engine.module(**inputs, use_cache=False))
    return list(log_probs.flatten()[index].cpu().split([row.response_length for row in rows]))


def _autocast(engine: Any, device: torch.device) -> Any:
    """The precision verl's engine itself runs in (transformer_impl.py, forward_step)."""
    dtype = engine._autocast_dtype
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def _largest_over_ranks(engine: Any, count: int) -> int:
    group = engine.get_data_parallel_group()
    if group is None or torch.distributed.get_world_size(group) == 1:
        return count
    largest = torch.tensor(count, device=next(engine.module.parameters()).device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(largest)


def _filler(rows: list[Row]) -> list[Row]:
    """One row to run when a rank has none left: its first, or two tokens of text."""
    if rows:
        return rows[:1]
    ids = torch.zeros(2, dtype=torch.int64)
    return [Row(ids, torch.arange(2).expand(4, 2).contiguous(), 1, {})]


def _refuse_non_finite(rows: list[Row], scored: list[Tensor], view: str) -> None:
    for row, log_probs in zip(rows, scored, strict=True):
        bad = (~torch.isfinite(log_probs)).nonzero()
        if len(bad):
            token = int(bad[0, 0])
            raise NonFiniteError(
                f"The {view} pass gave a log-prob of {log_probs[token].item()} at token {token} of the "
                f"answer in row {row.number} (prompt {row.prompt}). The weights or the pixels hold NaN or "
                "infinity: look at actor/grad_norm of the steps before, and lower "
                "actor_rollout_ref.actor.optim.lr."
            )
