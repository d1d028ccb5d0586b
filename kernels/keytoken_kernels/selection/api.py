"""The public function: it checks its input, chooses the implementation and starts it.

For every segment and signal, with ``n`` valid scores ``s`` sorted in ascending order::

    quantile:  threshold = s_lo + (rank - lo) (s_hi - s_lo),  rank = (1 - ratio) (n - 1)
               selected  = score >= threshold                 (ties are kept together)
    count:     selected  = the ceil(ratio n) best,            (ties by a seeded hash of row and position)

    weight     = weight of the first signal that selected the token, else 0
    advantage  = (r - mean) / (std + epsilon)                 over the rows of a group
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from keytoken_kernels.dispatch import Impl, resolve
from keytoken_kernels.selection import reference
from keytoken_kernels.selection.types import MAX_SIGNALS, Rule, Segments, Selection, Signal

OP = "selection"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Offsets are 32-bit integers in the kernels.
MAX_ELEMENTS = 2**31 - 1
# A position's hash takes 16 bits of its row's key and 16 of its place.
MAX_HASHED = 2**16
SMALLEST_WEIGHT = torch.finfo(torch.float32).tiny
# |difference of log-probs| above 0.05 is a change of probability by more than 5 percent.
DEFAULT_NOTABLE = 0.05


@torch.no_grad()
def select(
    signals: Sequence[Signal],
    mask: Tensor,
    segments: Segments,
    *,
    rule: Rule = "quantile",
    floor: float | None = None,
    seed: int = 0,
    row_keys: Tensor | None = None,
    rewards: Tensor | None = None,
    groups: Segments | None = None,
    epsilon: float = 1e-6,
    divide_by_std: bool = True,
    notable: float = DEFAULT_NOTABLE,
    impl: Impl = "auto",
) -> Selection:
    """Select the top share of every signal in every segment; weigh the tokens and their advantages.

    The kernels never wait for the GPU: what a launch needs to know comes from ids on the CPU.

    Args:
        signals: One to three. The order decides whose weight a token gets that several select.
        mask: [B, T] bool, answer tokens.
        segments: Rows that share one threshold; they hold every row once.
        rule: ``quantile``: at or above the linearly interpolated quantile, as ``torch.quantile`` gives it. A
            NaN among the scores of a segment then selects nothing there. ``count``: exactly
            ``ceil(ratio n)`` tokens (ratios count in units of 1e-9); also nothing for a NaN.
        floor: A selected token also needs a score of at least this.
        seed: Changes how ``count`` breaks ties.
        row_keys: [B] integers on the CPU, all different, in [0, 65536): what ``count`` knows a row by, so
            that a row keeps its luck wherever it stands in the batch. None: the number of the row.
        rewards: [B] float. With it, ``groups`` are the rows that are compared.
        groups: See ``rewards``.
        epsilon: Added to the standard deviation of a group's rewards.
        divide_by_std: Whether to divide by it at all.
        notable: Magnitude above which a score counts as notable; selects nothing by itself.
        impl: See :func:`keytoken_kernels.dispatch.resolve`.

    Returns:
        See :class:`Selection`; everything is on the device of ``mask``. The reference computes in float64 if
        any input is float64, otherwise in float32, as the kernels do.

    Raises:
        ValueError: shapes, types or devices that do not fit, values out of range, or a batch that is too
            large.
    """
    _check_signals(signals, mask)
    _check_segments(segments, mask, rule)
    _check_numbers(floor, epsilon, notable)
    _check_rewards(rewards, groups, mask)
    keys = _row_keys(row_keys, mask, rule)
    chosen = resolve(OP, impl, mask.device)
    run = reference.select
    if chosen == "triton":
        _check_for_kernels(signals, mask, rewards)
        from keytoken_kernels.selection import triton

        run = triton.select
    return run(
        tuple(signals),
        mask,
        segments.to(mask.device),
        rule=rule,
        floor=floor,
        seed=seed % 2**32,
        row_keys=keys,
        rewards=rewards,
        groups=None if groups is None else groups.to(mask.device),
        epsilon=epsilon,
        divide_by_std=divide_by_std,
        notable=notable,
    )


def _check_signals(signals: Sequence[Signal], mask: Tensor) -> None:
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool [B, T]; got {mask.dtype} {list(mask.shape)}")
    if not 1 <= len(signals) <= MAX_SIGNALS:
        raise ValueError(f"select takes 1 to {MAX_SIGNALS} signals; got {len(signals)}")
    for number, signal in enumerate(signals):
        where = f"signal {number}"
        _check_floats(signal.values, mask.shape, mask.device, f"{where}: values")
        if signal.baseline is not None:
            _check_floats(signal.baseline, mask.shape, mask.device, f"{where}: baseline")
        if signal.applies is not None:
            _check_place(signal.applies, mask.shape[:1], mask.device, f"{where}: applies")
            if signal.applies.dtype != torch.bool:
                raise ValueError(f"{where}: applies must be bool; got {signal.applies.dtype}")
        if not 0.0 <= signal.ratio <= 1.0:
            raise ValueError(f"{where}: ratio must lie in [0, 1]; got {signal.ratio}")
        if not SMALLEST_WEIGHT <= signal.weight < math.inf:
            raise ValueError(f"{where}: weight must be above 0 and finite; got {signal.weight}")


def _check_floats(tensor: Tensor, shape: torch.Size, device: torch.device, name: str) -> None:
    _check_place(tensor, shape, device, name)
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must hold floats; got {tensor.dtype}")


def _check_place(tensor: Tensor, shape: torch.Size, device: torch.device, name: str) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}; got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and the mask on {device}; move one of them")


def _check_segments(segments: Segments, mask: Tensor, rule: str) -> None:
    if rule not in ("quantile", "count"):
        raise ValueError(f"rule must be 'quantile' or 'count'; got {rule!r}")
    if len(segments.rows) != len(mask):
        raise ValueError(f"segments hold {len(segments.rows)} rows and the mask {len(mask)}; they must agree")


def _check_numbers(floor: float | None, epsilon: float, notable: float) -> None:
    if floor is not None and not math.isfinite(floor):
        raise ValueError(f"floor must be finite, or None for no floor; got {floor}")
    for name, value in (("epsilon", epsilon), ("notable", notable)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative; got {value}")


def _check_rewards(rewards: Tensor | None, groups: Segments | None, mask: Tensor) -> None:
    if (rewards is None) != (groups is None):
        raise ValueError("rewards and groups go together; give both, or neither")
    if rewards is None or groups is None:
        return
    _check_floats(rewards, mask.shape[:1], mask.device, "rewards")
    if len(groups.rows) != len(mask):
        raise ValueError(f"groups hold {len(groups.rows)} rows and the mask {len(mask)}; they must agree")


def _row_keys(row_keys: Tensor | None, mask: Tensor, rule: str) -> Tensor | None:
    """int32 [B] on the device of the mask; None for ``rule="quantile"``, which does not read them."""
    if rule != "count":
        return None
    if max(mask.shape) > MAX_HASHED:
        raise ValueError(
            f"rule='count' takes up to {MAX_HASHED} rows and tokens of a row; got {list(mask.shape)}. Split "
            "the batch, or use rule='quantile'"
        )
    if row_keys is None:
        return torch.arange(len(mask), dtype=torch.int32).to(mask.device, non_blocking=True)
    if row_keys.device.type != "cpu" or row_keys.shape != mask.shape[:1] or row_keys.is_floating_point():
        raise ValueError(
            f"row_keys must be integers [{len(mask)}] on the CPU; got {row_keys.dtype} "
            f"{list(row_keys.shape)} on {row_keys.device}"
        )
    if len(row_keys) and (int(row_keys.min()) < 0 or int(row_keys.max()) >= MAX_HASHED):
        raise ValueError(f"row_keys must lie in [0, {MAX_HASHED}); got {row_keys.min()} to {row_keys.max()}")
    if len(row_keys.unique()) != len(row_keys):
        raise ValueError("row_keys must all be different; rows with equal keys would share their ties' order")
    return row_keys.to(mask.device, torch.int32, non_blocking=True)


def _check_for_kernels(signals: Sequence[Signal], mask: Tensor, rewards: Tensor | None) -> None:
    tensors = [t for s in signals for t in (s.values, s.baseline) if t is not None]
    for tensor in [*tensors, *([] if rewards is None else [rewards])]:
        if tensor.dtype not in KERNEL_DTYPES:
            raise ValueError(
                f"the kernels take {', '.join(map(str, KERNEL_DTYPES))}; got {tensor.dtype}. Convert it, or "
                "use impl='reference'"
            )
    if len(signals) * mask.numel() > MAX_ELEMENTS:
        raise ValueError(
            f"{len(signals)} signals of {list(mask.shape)} tokens take over {MAX_ELEMENTS} places, which "
            "32-bit offsets cannot name; split the batch, or use impl='reference'"
        )
