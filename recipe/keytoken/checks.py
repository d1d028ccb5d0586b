"""Checks of tensors that several parts of the pure core share."""

from __future__ import annotations

import torch

from keytoken.errors import NonFiniteError


def require_finite(values: torch.Tensor, mask: torch.Tensor, name: str) -> None:
    """Raise when a value inside the mask is NaN or infinite.

    Args:
        values: [B, T].
        mask: [B, T] bool; values outside it are padding and may be anything.
        name: What the values are, for the message, such as "log-probs of the masked view".

    Raises:
        NonFiniteError: Names the first bad response and token.
    """
    bad = mask & ~torch.isfinite(values)
    if not bool(bad.any()):
        return
    response, token = (int(index) for index in bad.nonzero()[0])
    raise NonFiniteError(
        f"{name}: {float(values[response, token])} at response {response}, token {token} "
        f"({int(bad.sum())} such values in the batch). Look at that sample's input and at the learning rate; "
        "a half-precision overflow goes away in float32."
    )
