"""The attribution passes: one batched, gradient-free forward for each view, answer positions only.

The transformer runs over the whole sequence, the head over the answer's rows alone: a pre-hook on the
head takes those rows out of the hidden states, computes their log-probs and entropies in float32 and
leaves one dummy row to the head itself. The hook runs while FSDP holds the head's weight unsharded, so
it works for packed and padded batches and for every model whose head is its output embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keytoken.errors import ConfigurationError, NonFiniteError
from keytoken.workers.rows import Row, answer_row_index, batch_of
from keytoken_kernels.head import head_log_probs


@dataclass(frozen=True, slots=True)
class PassSettings:
    """How a pass runs: ``micro_batch_size`` rows at a time, logits divided by ``temperature``."""

    micro_batch_size: int
    temperature: float
    use_remove_padding: bool


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
    head = engine.module.get_output_embeddings()
    with _autocast(engine, device), _answer_rows(head, index, labels, settings.temperature) as taken:
        engine.module(**inputs, use_cache=False)
    return list(taken[0].cpu().split([row.response_length for row in rows]))


@contextmanager
def _answer_rows(
    head: torch.nn.Linear, index: Tensor, labels: Tensor, temperature: float
) -> Iterator[list[Tensor]]:
    """While active, the head's input is read at ``index`` and the log-probs land in the yielded list."""
    taken: list[Tensor] = []

    def take(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = args[0].flatten(0, -2)
        with torch.autocast(hidden.device.type, enabled=False):
            log_prob, _ = head_log_probs(hidden[index], module.weight, labels, temperature)
        taken.append(log_prob)
        return (args[0][:, :1],)

    handle = head.register_forward_pre_hook(take)
    try:
        yield taken
    finally:
        handle.remove()
    if len(taken) != 1:
        raise ConfigurationError(
            f"The language-model head ran {len(taken)} times in one attribution pass instead of once: "
            "set actor_rollout_ref.model.use_fused_kernels=false for the attribution group."
        )


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
