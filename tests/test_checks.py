"""The finite check names the place and ignores padding."""

from __future__ import annotations

import pytest
import torch

from keytoken.checks import require_finite
from keytoken.errors import NonFiniteError


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_names_view_response_and_token(bad: float) -> None:
    values = torch.zeros(3, 4)
    values[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"masked view.*response 1, token 2"):
        require_finite(values, torch.ones(3, 4, dtype=torch.bool), "log-probs of the masked view")


def test_padding_may_hold_anything() -> None:
    mask = torch.tensor([[True, False]])
    require_finite(torch.tensor([[0.0, torch.nan]]), mask, "entropy")
