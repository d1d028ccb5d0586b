"""What is tested and timed: the package's functions with one implementation, or others in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from keytoken_kernels import head, logprob, selection
from keytoken_kernels.dispatch import Impl


@dataclass(frozen=True, kw_only=True, slots=True)
class Operators:
    """The public functions of the package, by name."""

    token_log_probs: Callable[..., Any]
    token_log_probs_gradient: Callable[..., Any]
    differentiable_log_probs: Callable[..., Any]
    truncated_entropy: Callable[..., Any]
    head_log_probs: Callable[..., Any]
    differentiable_head: Callable[..., Any]
    select: Callable[..., Any]

    @classmethod
    def of(cls, impl: Impl) -> Operators:
        """The package's own, all with ``impl``."""
        known = {**vars(logprob), **vars(head), **vars(selection)}
        return cls(**{field.name: partial(known[field.name], impl=impl) for field in fields(cls)})
