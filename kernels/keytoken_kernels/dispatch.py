"""Which implementation of an operator runs: its Triton kernels or its reference in plain torch.

The choice is made before anything is computed and never revised afterwards: an error of a kernel reaches the
caller, because a silent fall back would hide a wrong number or a lost factor of ten.
"""

from __future__ import annotations

import logging
import os
from typing import Literal, get_args

import torch

Impl = Literal["auto", "triton", "reference"]
ENVIRONMENT_VARIABLE = "KEYTOKEN_KERNELS"

_logger = logging.getLogger("keytoken_kernels")
_chosen: dict[str, str] = {}


def resolve(op: str, impl: Impl, device: torch.device) -> Literal["triton", "reference"]:
    """Implementation of ``op`` for tensors on ``device``; logged once and remembered for :func:`chosen`.

    ``auto`` means the kernels on CUDA and HIP devices and the reference elsewhere. The environment variable
    ``KEYTOKEN_KERNELS`` replaces ``auto``, and only that: what a caller asks for explicitly is what runs.

    Raises:
        ValueError: an unknown name, or kernels asked for on a CPU without Triton's interpreter.
        ImportError: kernels are due, but Triton cannot be imported.
    """
    wanted = _checked(impl, "impl")
    if wanted == "auto":
        wanted = _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)
    on_gpu = device.type == "cuda"  # torch calls HIP devices cuda as well
    if wanted == "reference" or (wanted == "auto" and not on_gpu):
        return _remember(op, "reference")
    interpreted = _triton_interprets(op, device)
    if not (on_gpu or interpreted):
        raise ValueError(
            f"{op}: impl='triton' needs tensors on a GPU; these are on {device}. Use impl='auto' or "
            "impl='reference', or start Python with TRITON_INTERPRET=1 to interpret the kernels (tests only)"
        )
    return _remember(op, "triton")


def chosen() -> dict[str, str]:
    """Operator to implementation, as last resolved in this process."""
    return dict(_chosen)


def _checked(impl: str, source: str) -> str:
    if impl not in get_args(Impl):
        raise ValueError(f"{source} must be one of {', '.join(get_args(Impl))}; got {impl!r}")
    return impl


def _triton_interprets(op: str, device: torch.device) -> bool:
    try:
        import triton
    except ImportError as error:
        raise ImportError(
            f"{op}: the kernels for {device} need Triton, which cannot be imported ({error}). Install triton "
            f"or ask for the reference in torch: impl='reference' or {ENVIRONMENT_VARIABLE}=reference"
        ) from error
    return bool(triton.knobs.runtime.interpret)


def _remember(op: str, implementation: Literal["triton", "reference"]) -> Literal["triton", "reference"]:
    if _chosen.get(op) != implementation:
        _logger.info("%s: %s", op, implementation)
        _chosen[op] = implementation
    return implementation
