"""The typed configuration of KeyToken's own block, ``keytoken.*`` in hydra.

The block is parsed once, by :meth:`KeyTokenConfig.from_mapping`; below that point nobody sees a config
mapping. Unknown keys, wrong types and impossible values are refused here, before any process starts, each
with one message that names the key and the remedy. verl's own keys stay in verl's own blocks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from keytoken.attribution_config import AttributionConfig
from keytoken.block import ROOT, Block, check_choices, require, unknown_name
from keytoken.cluster_config import ClusterConfig
from keytoken.loss_config import LossConfig
from keytoken.parity_config import ParityConfig
from keytoken.view_config import ViewConfig

# Below this a weight may not be told from none (keytoken_kernels.selection refuses it too).
SMALLEST_WEIGHT = 1e-30
# Scores that say which of two views makes a token likelier.
SIGNED_SCORES = ("difference", "probability")

__all__ = [
    "AttributionConfig",
    "DiagnosticsConfig",
    "ExportConfig",
    "KernelsConfig",
    "KeyTokenConfig",
    "LossConfig",
    "MediaConfig",
    "MethodConfig",
    "OrderBonusConfig",
    "ParityConfig",
    "SelectionConfig",
    "ViewConfig",
    "unknown_name",
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig(Block):
    """Which tokens a method keeps: the top share of each signal, joined.

    Attributes:
        score_sign: ``signed`` keeps log p(real) - log p(view) as it is, so that tokens which become more
            likely without the video are never selected; ``absolute`` takes the magnitude.
        scope: The set of tokens over which a share is taken: one response, all responses of one
            prompt (group), or the whole batch.
        visual_ratio: Share of tokens kept for their dependence on the video. 0 switches the signal off.
        temporal_ratio: The same for the order of the frames.
        entropy_ratio: The same for the policy's entropy.
        floor: A kept token also needs a score of at least this, in the unit of the score (nats, but for
            ``score=probability``); null for no floor.
        rule: ``quantile`` keeps what reaches the (1 - ratio) quantile, ties with it; ``count`` keeps exactly
            ceil(ratio n) tokens and breaks ties by a seeded draw.
        score: How a log-prob is compared with that of a view: a key of
            :data:`keytoken.attribution.scores.COMPARISONS`.
        probability_floor: Probabilities below this count as this before they are compared, so that a change
            between two negligible ones is none; 0 for none.
        entropy_top_p: The entropy is that of the smallest set of tokens with this mass (ToR: 0.95); null for
            the whole distribution.
        visual_weight: Weight of a token kept for its dependence on the video.
        temporal_weight: The same for the order of the frames.
        entropy_weight: The same for the entropy. Which weight a token gets that several signals keep, is the
            method's choice.
        advantage_conditioned: Whether every score is multiplied by the magnitude of its answer's advantage,
            so that within a group or a batch answers that teach little lose their tokens to those that do;
            those that teach nothing have none.
    """

    score_sign: Literal["signed", "absolute"]
    scope: Literal["response", "group", "batch"]
    visual_ratio: float
    temporal_ratio: float
    entropy_ratio: float
    floor: float | None = None
    rule: Literal["quantile", "count"] = "quantile"
    score: Literal["difference", "probability", "k3", "jsd"] = "difference"
    probability_floor: float = 0.0
    entropy_top_p: float | None = None
    visual_weight: float = 1.0
    temporal_weight: float = 1.0
    entropy_weight: float = 1.0
    advantage_conditioned: bool = False

    def __post_init__(self) -> None:
        where = f"{ROOT}.method.selection"
        check_choices(self, where)
        self._check_ratios(where)
        self._check_scores(where)

    def _check_ratios(self, where: str) -> None:
        for name in ("visual_ratio", "temporal_ratio", "entropy_ratio"):
            value = getattr(self, name)
            require(
                0.0 <= value <= 1.0, f"{where}.{name} is {value}; use 0 (off) to 1 (all tokens), such as 0.2."
            )
        require(
            max(self.visual_ratio, self.temporal_ratio, self.entropy_ratio) > 0.0,
            f"{where} has no signal switched on; set a ratio above 0, or {where}=null for all tokens.",
        )
        require(
            self.floor is None or 0.0 <= self.floor < math.inf,
            f"{where}.floor is {self.floor}; use nats of at least 0, or null for no floor.",
        )
        for name in ("visual_weight", "temporal_weight", "entropy_weight"):
            value = getattr(self, name)
            require(
                SMALLEST_WEIGHT <= value < math.inf,
                f"{where}.{name} is {value}; use a number above 0, or switch the signal off by its ratio.",
            )

    def _check_scores(self, where: str) -> None:
        require(
            0.0 <= self.probability_floor < 1.0,
            f"{where}.probability_floor is {self.probability_floor}; use 0 (none) to below 1, such as 1e-4.",
        )
        require(
            self.entropy_top_p is None or 0.0 < self.entropy_top_p <= 1.0,
            f"{where}.entropy_top_p is {self.entropy_top_p}; use a mass in (0, 1], or null for all of it.",
        )
        require(
            not self.advantage_conditioned or self.scope != "response",
            f"{where}.advantage_conditioned=true compares answers, and {where}.scope=response the tokens of "
            f"one; set {where}.scope=group or batch.",
        )
        require(
            self.score in SIGNED_SCORES or self.score_sign == "absolute",
            f"{where}.score={self.score} is never negative and has no sign; set {where}.score_sign=absolute.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OrderBonusConfig(Block):
    """T-GRPO's reward for prompts that are answered better with the frames in order (Video-R1).

    Attributes:
        shuffled_answers: Answers to each video prompt that are sampled from shuffled frames, for comparison
            only; null for half the group.
        threshold: The bonus is due where the mean accuracy of the ordered answers is at least this times that
            of the shuffled ones.
        bonus: What a right answer then gets.
        min_accuracy: An answer is right above this accuracy.
    """

    shuffled_answers: int | None = None
    threshold: float = 0.8
    bonus: float = 0.3
    min_accuracy: float = 0.1

    def __post_init__(self) -> None:
        where = f"{ROOT}.method.order_bonus"
        require(
            self.shuffled_answers is None or self.shuffled_answers >= 1,
            f"{where}.shuffled_answers is {self.shuffled_answers}; use 1 or more, or null for half a group.",
        )
        for name in ("threshold", "bonus"):
            value = getattr(self, name)
            require(0.0 < value < math.inf, f"{where}.{name} is {value}; use a number above 0.")
        require(
            0.0 <= self.min_accuracy < 1.0,
            f"{where}.min_accuracy is {self.min_accuracy}; use 0 to below 1, such as 0.1.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig(Block):
    """One method: how tokens are chosen and how the loss weighs them.

    Attributes:
        name: A key of :data:`keytoken.attribution.methods.METHODS`.
        selection: Null keeps every token: the plain baseline with this method's loss.
        loss: The policy loss.
        view: What the visual and the temporal signal are compared with.
        positions: Positions in the masked view. ``kept`` leaves the remaining tokens where they were;
            ``compressed`` renumbers them from 0, as the published Video-KTR code does in effect.
        advantage_epsilon: Added to the group's standard deviation of rewards.
        options: What only this method has; its own file names and checks the keys.
        control: Replaces the weights for comparison: ``random`` puts those of every answer at random tokens
            of the same answer, ``inverse`` gives 1 to the tokens that had none and 0 to the others.
        order_bonus: T-GRPO's reward; null for none.
    """

    name: str
    selection: SelectionConfig | None
    loss: LossConfig
    view: ViewConfig = dataclasses.field(default_factory=ViewConfig)
    positions: Literal["kept", "compressed"] = "kept"
    advantage_epsilon: float = 1e-6
    options: dict = dataclasses.field(default_factory=dict)
    control: Literal["none", "random", "inverse"] = "none"
    order_bonus: OrderBonusConfig | None = None

    def __post_init__(self) -> None:
        where = f"{ROOT}.method"
        check_choices(self, where)
        require(
            0.0 < self.advantage_epsilon < 1.0,
            f"{where}.advantage_epsilon is {self.advantage_epsilon}; use a small number such as 1e-6.",
        )
        require(
            self.positions == "kept" or self.view.visual == "masked",
            f"{where}.positions={self.positions} is of the view masked, but {where}.view.visual is "
            f"{self.view.visual}; set {where}.positions=kept.",
        )

    @property
    def views(self) -> tuple[str, ...]:
        """Counterfactual passes that selection and loss need: a subset of the two that ``view`` names."""
        visual = self.selection.visual_ratio if self.selection else 0.0
        temporal = self.selection.temporal_ratio if self.selection else 0.0
        needed = (
            (self.view.visual, visual > 0.0 or self.loss.perception_coef > 0.0),
            (self.view.temporal, temporal > 0.0),
        )
        return tuple(view for view, wanted in needed if wanted)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig(Block):
    """The per-token export in the run folder.

    Attributes:
        enabled: Whether tokens, log-probs, scores and weights are written.
        every_steps: A step is exported when its number is a multiple of this.
        max_responses: At most so many responses of an exported step are written.
        pictures: So many of them go as pictures to the trackers that take some; 0 for none.
    """

    enabled: bool = True
    every_steps: int = 10
    max_responses: int = 32
    pictures: int = 2

    def __post_init__(self) -> None:
        for name in ("every_steps", "max_responses"):
            value = getattr(self, name)
            require(
                value >= 1, f"{ROOT}.export.{name} is {value}; use 1 or more, or {ROOT}.export.enabled=false."
            )
        require(self.pictures >= 0, f"{ROOT}.export.pictures is {self.pictures}; use 0 (none) or more.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DiagnosticsConfig(Block):
    """What selected tokens contribute to the gradient, where they lie and how the signals overlap.

    Attributes:
        every_steps: A step is looked at when its number is a multiple of this; null for none. The pass over
            the real input then runs in any case, for one measure more.
        word_classes: Names of classes and the words of each, before the rule of
            :func:`keytoken.attribution.diagnostics.word_class` is asked; {} for the rule alone.
    """

    every_steps: int | None = None
    word_classes: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"{ROOT}.diagnostics"
        require(
            self.every_steps is None or self.every_steps >= 1,
            f"{where}.every_steps is {self.every_steps}; use 1 or more, or null for none.",
        )
        seen: dict[str, str] = {}
        for name, words in self.word_classes.items():
            require(
                isinstance(words, list) and all(isinstance(word, str) for word in words),
                f"{where}.word_classes.{name} is {words!r}; give it a list of words, such as [left, right].",
            )
            for word in words:
                other = seen.setdefault(word, str(name))
                require(
                    other == name, f"{where}.word_classes has {word!r} in {other} and {name}; choose one."
                )

    def due(self, step: int) -> bool:
        """Whether a step is looked at."""
        return self.every_steps is not None and step % self.every_steps == 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KernelsConfig(Block):
    """Which code computes log-probs and selections; every choice gives the same numbers up to rounding.

    Attributes:
        impl: ``triton`` for the kernels, ``reference`` for plain torch, ``auto`` for the kernels on a GPU and
            plain torch elsewhere (:func:`keytoken_kernels.dispatch.resolve`).
        head: How actor and reference compute log-probs: ``fused`` at answer positions only, with a backward
            pass over tokens with a gradient only; ``verl`` as verl does, from logits of whole sequences.
    """

    impl: Literal["auto", "triton", "reference"] = "auto"
    head: Literal["fused", "verl"] = "fused"

    def __post_init__(self) -> None:
        check_choices(self, f"{ROOT}.kernels")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MediaConfig(Block):
    """The pixels of prompts between rollout and training.

    Attributes:
        cache_gb: GiB of fetched pixels that a worker process keeps within a step, in ordinary memory. With
            less than the pixels of its share of a batch it fetches some of them again.
    """

    cache_gb: float = 4.0

    def __post_init__(self) -> None:
        require(
            0.0 <= self.cache_gb < math.inf,
            f"{ROOT}.media.cache_gb is {self.cache_gb}; use GiB such as 4, or 0 to keep nothing.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KeyTokenConfig(Block):
    """The whole ``keytoken`` block.

    Example:
        ``KeyTokenConfig.from_mapping({"method": {"name": "grpo", "selection": None, "loss": {...}}})``
        uses the defaults of the other blocks.

    Attributes:
        method: How tokens are chosen and weighed.
        attribution: Where and how the counterfactual passes run.
        export: The per-token export.
        diagnostics: What selected tokens contribute, in some steps.
        kernels: Which code computes log-probs and selections.
        media: The pixels of prompts between rollout and training.
        parity: What engine, actor and attribution group have to agree on.
        cluster: Hosts of the pools, and limits on waits for them.
        prefix: ``shared`` computes a prompt once for the answers to it that are in the same micro-batch, in
            every pass and update (:mod:`keytoken.prefix`); ``separate`` once for each.
        run_dir: Folder that holds all that the run leaves behind.
        seed: Seeds the order of the data and, with prompt and answer number, every answer's sampling.
        sampling: Keys of :class:`keytoken.data.contract.SamplingContract`, which checks them.
        doctor: ``short`` makes the quick checks of ``keytoken doctor`` before a run; ``off`` makes none.
        on_sigterm: What the first SIGTERM does: ``save`` finishes the step, saves it and ends the run;
            ``end`` ends the run at once.
        save_timeout_s: Limit of writing a checkpoint.
    """

    method: MethodConfig
    attribution: AttributionConfig = dataclasses.field(default_factory=AttributionConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    diagnostics: DiagnosticsConfig = dataclasses.field(default_factory=DiagnosticsConfig)
    kernels: KernelsConfig = dataclasses.field(default_factory=KernelsConfig)
    media: MediaConfig = dataclasses.field(default_factory=MediaConfig)
    parity: ParityConfig = dataclasses.field(default_factory=ParityConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    prefix: Literal["shared", "separate"] = "shared"
    run_dir: str = "outputs/run"
    seed: int = 1
    sampling: dict = dataclasses.field(default_factory=dict)
    doctor: Literal["short", "off"] = "short"
    on_sigterm: Literal["save", "end"] = "save"
    save_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        check_choices(self, ROOT)
        limit = self.save_timeout_s
        require(0.0 < limit < math.inf, f"{ROOT}.save_timeout_s is {limit}; use a finite number above 0.")
