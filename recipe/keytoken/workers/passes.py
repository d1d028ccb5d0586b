"""The attribution passes: one batched, gradient-free forward for each view, answer positions only.

The transformer runs over the whole sequence, the head over the answer's rows alone
(:class:`keytoken.workers.answer_head.AnswerHead`). Answers of a micro-batch share their prompts unless
``keytoken.prefix=separate`` (:class:`keytoken.workers.packed.PackedRows`). The pass over the real input can
measure more of the same logits than log-probs (:func:`measure_rows`).
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from keytoken.errors import ConfigurationError, NonFiniteError
from keytoken.prefix.attention import share_prefix
from keytoken.workers.answer_head import AnswerHead
from keytoken.workers.packed import PackedRows
from keytoken.workers.ranks import largest_over_ranks
from keytoken.workers.rows import Row, answer_row_index, batch_of
from keytoken_kernels.dispatch import Impl
from keytoken_kernels.head import Groups, head_measures


@dataclass(frozen=True, slots=True)
class PassSettings:
    """How a pass runs: ``micro_batch_size`` rows at a time, logits divided by ``temperature``.

    ``impl`` is the implementation of the kernels (:func:`keytoken_kernels.dispatch.resolve`). With ``shared``
    rows of a micro-batch that answer the same prompt have one copy of it; otherwise each has its own, without
    padding between them if ``use_remove_padding``.
    """

    micro_batch_size: int
    temperature: float
    use_remove_padding: bool
    impl: Impl = "auto"
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a pass measures besides log-probs.

    Attributes:
        top_p: Mass of the nucleus whose entropy is measured; None for no such measure.
        disagreement: Whether the answers to one prompt are compared position by position.
        collision: Whether the squared probabilities are summed.
    """

    top_p: float | None = None
    disagreement: bool = False
    collision: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What comes out, log-probs first."""
        measures = (
            ("truncated_entropy", self.top_p is not None),
            ("disagreement", self.disagreement),
            ("collision", self.collision),
        )
        return ("log_prob", *(name for name, wanted in measures if wanted))


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
    return [values[0] for values in _run(engine, _slices(rows, settings), settings, view, Wanted())]


def measure_rows(
    engine: Any, rows: list[Row], settings: PassSettings, wanted: Wanted
) -> dict[str, list[Tensor]]:
    """Log-probs of every answer under the real input, and other measures of the same logits.

    Args:
        engine: verl's FSDP engine in eval mode.
        rows: the rows of this rank. If disagreement is wanted, all answers to a prompt must be among them.
        settings: see :class:`PassSettings`.
        wanted: what to measure.

    Returns:
        For each of ``wanted.names`` one float32 tensor ``[R]`` for each row, on the CPU. The disagreement at
        a position is the same for all answers to a prompt.

    Raises:
        ConfigurationError: the answers to a prompt do not fit into a micro-batch, and disagreement is wanted.
        NonFiniteError: a value is NaN or infinite.
    """
    chunks = whole_groups(rows, settings.micro_batch_size) if wanted.disagreement else _slices(rows, settings)
    values = _run(engine, chunks, settings, "real", wanted)
    order = [row.number for chunk in chunks for row in chunk]
    by_row = dict(zip(order, values, strict=True))
    return {name: [by_row[row.number][place] for row in rows] for place, name in enumerate(wanted.names)}


def whole_groups(rows: list[Row], size: int) -> list[list[Row]]:
    """Micro-batches of at most ``size`` rows, none of which holds a part of the answers to a prompt only.

    Raises:
        ConfigurationError: a prompt has more answers.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.prompt}/{row.number}" if row.is_padding else row.prompt, []).append(row)
    chunks: list[list[Row]] = []
    for prompt, group in groups.items():
        if len(group) > size:
            raise ConfigurationError(
                f"keytoken.attribution.micro_batch_size={size} has no room for the {len(group)} answers to "
                f"prompt {prompt}, which the method compares with each other in one forward pass; set it to "
                "a multiple of actor_rollout_ref.rollout.n."
            )
        if not chunks or len(chunks[-1]) + len(group) > size:
            chunks.append([])
        chunks[-1].extend(group)
    return chunks


def _slices(rows: list[Row], settings: PassSettings) -> list[list[Row]]:
    size = settings.micro_batch_size
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _run(
    engine: Any, chunks: list[list[Row]], settings: PassSettings, view: str, wanted: Wanted
) -> list[Tensor]:
    """``[K, R]`` for each row of each chunk, the rows of ``wanted.names``."""
    if settings.shared:
        share_prefix(engine.module)
    rows = [row for chunk in chunks for row in chunk]
    # First, because it is a collective itself and may not fall between those of another rank's forward.
    device = next(engine.module.parameters()).device
    num_rounds = largest_over_ranks(len(chunks), engine.get_data_parallel_group(), device)
    scored: list[Tensor] = []
    for chunk in chunks:
        scored.extend(_score_chunk(engine, chunk, settings, wanted))
    for _ in range(num_rounds - len(chunks)):
        _score_chunk(engine, _filler(rows), settings, wanted)
    # Last, so that a rank with a bad value does not leave the others waiting in a collective.
    _refuse_non_finite(rows, scored, view, wanted.names)
    return scored


@torch.no_grad()
def _score_chunk(engine: Any, rows: list[Row], settings: PassSettings, wanted: Wanted) -> list[Tensor]:
    device = next(engine.module.parameters()).device
    packed = PackedRows(rows) if settings.shared else None
    if packed is not None:
        inputs, index = packed.model_inputs(device), packed.pack.rows.to(device)
        scored, labels = packed.in_order, packed.pack.labels
    else:
        batch = batch_of(rows, settings.temperature, settings.use_remove_padding).to(device)
        inputs, _ = engine.prepare_model_inputs(micro_batch=batch)
        index = answer_row_index(rows, settings.use_remove_padding).to(device)
        scored, labels = rows, torch.cat([row.answer_ids for row in rows])
    score = partial(_score, rows=scored, labels=labels, settings=settings, wanted=wanted)
    with _autocast(engine, device), AnswerHead(engine.module, index, score) as head:
        found = head.read(engine.module(**inputs, use_cache=False))
    values = torch.stack([value.flatten()[index] for value in found]).cpu()
    if packed is not None:
        return packed.by_row(values)
    return list(values.split([row.response_length for row in rows], dim=1))


def _score(
    hidden: Tensor, weight: Tensor, *, rows: list[Row], labels: Tensor, settings: PassSettings, wanted: Wanted
) -> tuple[Tensor, ...]:
    """What is wanted of the hidden states [N, H] that predict the answers, row after row; [N] each."""
    groups = None
    if wanted.disagreement:
        prompts = [row.prompt for row in rows]
        groups = Groups(
            lengths=torch.tensor([row.response_length for row in rows]),
            prompts=torch.tensor([prompts.index(prompt) for prompt in prompts]),
        )
    found = head_measures(
        hidden,
        weight,
        labels.to(hidden.device),
        settings.temperature,
        top_p=wanted.top_p,
        groups=groups,
        collision=wanted.collision,
        impl=settings.impl,
    )
    return tuple(getattr(found, name) for name in wanted.names)


def _autocast(engine: Any, device: torch.device) -> Any:
    """The precision verl's engine itself runs in (transformer_impl.py, forward_step)."""
    dtype = engine._autocast_dtype
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def _filler(rows: list[Row]) -> list[Row]:
    """One row to run when a rank has none left: its first, or two tokens of text."""
    if rows:
        return rows[:1]
    ids = torch.zeros(2, dtype=torch.int64)
    return [Row(ids, torch.arange(2).expand(4, 2).contiguous(), 1, {})]


def _refuse_non_finite(rows: list[Row], scored: list[Tensor], view: str, names: tuple[str, ...]) -> None:
    for row, values in zip(rows, scored, strict=True):
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            kind, token = bad[0].tolist()
            raise NonFiniteError(
                f"The {view} pass gave a {names[kind].replace('_', '-')} of {values[kind, token].item()} at "
                f"token {token} of the answer in row {row.number} (prompt {row.prompt}). The weights or the "
                "pixels hold NaN or infinity: look at actor/grad_norm of the steps before, and lower "
                "actor_rollout_ref.actor.optim.lr."
            )
