"""The typed configuration of the policy loss, ``keytoken.method.loss``."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from keytoken.block import ROOT, Block, check_choices, require

WHERE = f"{ROOT}.method.loss"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(Block):
    """The token-weighted policy loss; facts that published methods differ in are options, none is implied.

    Attributes:
        normalizer: Tokens in the denominator of the policy term: the ``selected`` ones, ``all``, or for
            every response the ``constant`` of ``constant_length`` (Dr. GRPO).
        level: ``response`` averages within each response, then over responses (verl's
            ``seq-mean-token-mean``); ``batch`` takes one mean over all tokens (verl's ``token-mean``).
        mask_kl: Whether the KL term counts selected tokens only, over the denominator of the policy term.
            When false it counts every token, over all tokens.
        kl_coef: Weight of the KL to the reference policy; 0 switches it off.
        kl_clamp: Guard of the k3 estimator. ``verl`` clamps log(ref/policy) to +-20 and the estimate to
            +-10, ``video_r1`` clamps log(ref/policy) to +-10 only.
        clip_low: The ratio is clipped below 1 - clip_low; 1 for no lower bound. Null, together with
            clip_high, for no clipping.
        clip_high: The ratio is clipped above 1 + clip_high.
        dual_clip: Bound of ratio times |advantage| where the advantage is negative (verl: 3); null for none.
        objective: A key of :data:`keytoken.losses.objectives.OBJECTIVES`.
        constant_length: Tokens that ``normalizer=constant`` divides each response by; null otherwise.
        entropy_penalty: Weight of -mean log p over all answer tokens; lowers entropy (VPPO, PAPO's eta).
        perception_coef: Weight of the k3 estimate between masked and real view, which is maximised (PAPO's
            gamma); 0 switches it off.
        perception_clip: Upper bound of that estimate at each token, in nats; null for none.
    """

    normalizer: Literal["selected", "all", "constant"]
    level: Literal["response", "batch"]
    mask_kl: bool
    kl_coef: float
    kl_clamp: Literal["verl", "video_r1"]
    clip_low: float | None
    clip_high: float | None
    dual_clip: float | None = None
    objective: Literal["ppo", "gspo", "cispo"] = "ppo"
    constant_length: int | None = None
    entropy_penalty: float = 0.0
    perception_coef: float = 0.0
    perception_clip: float | None = None

    def __post_init__(self) -> None:
        check_choices(self, WHERE)
        self._check_clipping()
        self._check_denominator()
        self._check_terms()

    @property
    def counts_selected_only(self) -> bool:
        """Whether no term of the loss has a gradient at a token without a weight."""
        return (self.kl_coef == 0.0 or self.mask_kl) and self.entropy_penalty == self.perception_coef == 0.0

    def _check_clipping(self) -> None:
        require(
            (self.clip_low is None) == (self.clip_high is None),
            f"{WHERE}.clip_low and clip_high must both be numbers, or both null for no clipping.",
        )
        require(
            self.clip_low is None or 0.0 < self.clip_low <= 1.0,
            f"{WHERE}.clip_low is {self.clip_low}; use more than 0 and at most 1.",
        )
        require(
            self.clip_high is None or 0.0 < self.clip_high < math.inf,
            f"{WHERE}.clip_high is {self.clip_high}; use a number above 0.",
        )
        require(
            self.dual_clip is None or 1.0 < self.dual_clip < math.inf,
            f"{WHERE}.dual_clip is {self.dual_clip}; use a number above 1, or null for none.",
        )
        require(
            self.dual_clip is None or self.clip_low is not None,
            f"{WHERE}.dual_clip needs clipping; set clip_low and clip_high, or dual_clip=null.",
        )
        require(
            self.dual_clip is None or self.objective == "ppo",
            f"{WHERE}.dual_clip belongs to objective=ppo; set it to null for objective={self.objective}.",
        )

    def _check_denominator(self) -> None:
        constant = self.normalizer == "constant"
        require(
            self.objective != "gspo" or self.level == "response",
            f"{WHERE}.objective=gspo weighs every response once, and level=batch weighs a response by its "
            "length; set level=response.",
        )
        require(
            not constant or self.level == "response",
            f"{WHERE}.normalizer=constant divides every response by the same length, and level=batch has one "
            "denominator for all tokens; set level=response.",
        )
        require(
            not constant or self.constant_length is not None,
            f"{WHERE}.normalizer=constant needs constant_length; set it to the longest answer, "
            f"{WHERE}.constant_length=${{data.max_response_length}}.",
        )
        require(
            constant or self.constant_length is None,
            f"{WHERE}.constant_length is {self.constant_length}, which normalizer={self.normalizer} does not "
            "read; set normalizer=constant, or constant_length=null.",
        )
        require(
            self.constant_length is None or self.constant_length >= 1,
            f"{WHERE}.constant_length is {self.constant_length}; use a number of tokens of at least 1.",
        )

    def _check_terms(self) -> None:
        for name in ("kl_coef", "entropy_penalty", "perception_coef"):
            value = getattr(self, name)
            require(0.0 <= value < math.inf, f"{WHERE}.{name} is {value}; use 0 (off) or more.")
        require(
            self.perception_clip is None or 0.0 < self.perception_clip < math.inf,
            f"{WHERE}.perception_clip is {self.perception_clip}; use nats above 0, or null for no bound.",
        )
        require(
            self.perception_clip is None or self.perception_coef > 0.0,
            f"{WHERE}.perception_clip bounds a term that is off; set perception_coef, such as 0.01, or "
            "perception_clip=null.",
        )
