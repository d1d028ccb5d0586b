"""The typed configuration of counterfactual views, ``keytoken.method.view``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from keytoken.block import ROOT, Block, check_choices, require

WHERE = f"{ROOT}.method.view"

# A draw that changes no pixel is repeated; below this share a small picture would be drawn for ever.
MIN_SHARE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlackenedConfig(Block):
    """Options of the view ``blackened``.

    Attributes:
        p: Probability that a square is set to black (VPPO 0.5, PAPO 0.6).
        size: Side of a square in pixels of the resized picture.
        per: ``response`` draws the squares anew for every answer (VPPO), ``prompt`` once for all answers to
            one prompt (PAPO).
    """

    p: float = 0.5
    size: int = 14
    per: Literal["prompt", "response"] = "response"

    def __post_init__(self) -> None:
        where = f"{WHERE}.blackened"
        check_choices(self, where)
        require(
            MIN_SHARE <= self.p <= 1.0,
            f"{where}.p is {self.p}; use {MIN_SHARE} to 1 (all black), such as 0.5.",
        )
        require(
            self.size >= 1, f"{where}.size is {self.size}; use pixels of at least 1, such as 14, one patch."
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig(Block):
    """Which counterfactual view stands behind each signal.

    Attributes:
        visual: Compared with the real input for the dependence on the picture: a key of
            :data:`keytoken.attribution.views.VIEWS` of the kind "visual".
        temporal: The same for the order of the frames, a view of the kind "temporal".
        blackened: Options of the view of that name.
    """

    visual: str = "masked"
    temporal: str = "shuffled"
    blackened: BlackenedConfig = dataclasses.field(default_factory=BlackenedConfig)
