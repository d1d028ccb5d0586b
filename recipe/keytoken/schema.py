"""The typed configuration of KeyToken's own block, ``keytoken.*`` in hydra.

The block is parsed once, by :meth:`KeyTokenConfig.from_mapping`; below that point nobody sees a config
mapping. Unknown keys, wrong types and impossible values are refused here, before any process starts, each
with one message that names the key and the remedy. verl's own keys stay in verl's own blocks.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from keytoken.errors import ConfigurationError

ConfigT = TypeVar("ConfigT", bound="_Block")
ROOT = "keytoken"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Base of all blocks: adds the strict constructor."""

    @classmethod
    def from_mapping(cls: type[ConfigT], mapping: Mapping[str, Any], where: str = ROOT) -> ConfigT:
        """Build the block from a plain mapping (a dict, or a hydra node).

        Args:
            mapping: Keys and values as a user would write them in YAML.
            where: Dotted path of this block, used in messages only.

        Raises:
            ConfigurationError: For unknown or missing keys, wrong types and values out of range.
        """
        if not isinstance(mapping, Mapping):
            raise ConfigurationError(f"{where} is {mapping!r}; it must be a mapping of keys to values.")
        specs = {spec.name: spec for spec in dataclasses.fields(cls)}
        for key in mapping:
            if key not in specs:
                raise ConfigurationError(unknown_name(f"key {where}.{key}", str(key), specs, "keys"))
        required = dataclasses.MISSING
        missing = [
            n for n, s in specs.items() if n not in mapping and s.default is s.default_factory is required
        ]
        if missing:
            raise ConfigurationError(f"{where} lacks the keys {', '.join(missing)}; add them.")
        hints = typing.get_type_hints(cls)
        return cls(**{key: _convert(value, hints[key], f"{where}.{key}") for key, value in mapping.items()})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig(_Block):
    """Which tokens a method keeps: the top share of each signal, joined.

    Attributes:
        score_sign: ``signed`` keeps log p(real) - log p(view) as it is, so that tokens which become more
            likely without the video are never selected; ``absolute`` takes the magnitude.
        scope: The set of tokens over which a quantile is taken: one response, all responses of one
            prompt (group), or the whole batch.
        visual_ratio: Share of tokens kept for their dependence on the video. 0 switches the signal off.
        temporal_ratio: The same for the order of the frames.
        entropy_ratio: The same for the policy's entropy.
        floor: A kept token also needs a score of at least this many nats; null for no floor.
    """

    score_sign: Literal["signed", "absolute"]
    scope: Literal["response", "group", "batch"]
    visual_ratio: float
    temporal_ratio: float
    entropy_ratio: float
    floor: float | None = None

    def __post_init__(self) -> None:
        where = f"{ROOT}.method.selection"
        _check_choices(self, where)
        for name in ("visual_ratio", "temporal_ratio", "entropy_ratio"):
            value = getattr(self, name)
            _require(
                0.0 <= value <= 1.0, f"{where}.{name} is {value}; use 0 (off) to 1 (all tokens), such as 0.2."
            )
        _require(
            max(self.visual_ratio, self.temporal_ratio, self.entropy_ratio) > 0.0,
            f"{where} has no signal switched on; set a ratio above 0, or {where}=null for all tokens.",
        )
        _require(
            self.floor is None or 0.0 <= self.floor < math.inf,
            f"{where}.floor is {self.floor}; use nats of at least 0, or null for no floor.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(_Block):
    """The token-weighted policy loss; facts that published methods differ in are options, none is implied.

    Attributes:
        normalizer: Tokens in the denominator of the policy term: the ``selected`` ones or ``all``.
        level: ``response`` averages within each response, then over responses (verl's
            ``seq-mean-token-mean``); ``batch`` takes one mean over all tokens (verl's ``token-mean``).
        mask_kl: Whether the KL term counts selected tokens only, over the denominator of the policy term.
            When false it counts every token, over all tokens.
        kl_coef: Weight of the KL to the reference policy; 0 switches it off.
        kl_clamp: Guard of the k3 estimator. ``verl`` clamps log(ref/policy) to +-20 and the estimate to
            +-10, ``video_r1`` clamps log(ref/policy) to +-10 only.
        clip_low: The ratio is clipped below 1 - clip_low. Null, together with clip_high, for no clipping.
        clip_high: The ratio is clipped above 1 + clip_high.
        dual_clip: Bound of ratio times |advantage| where the advantage is negative (verl: 3); null for none.
    """

    normalizer: Literal["selected", "all"]
    level: Literal["response", "batch"]
    mask_kl: bool
    kl_coef: float
    kl_clamp: Literal["verl", "video_r1"]
    clip_low: float | None
    clip_high: float | None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        where = f"{ROOT}.method.loss"
        _check_choices(self, where)
        _require(0.0 <= self.kl_coef < math.inf, f"{where}.kl_coef is {self.kl_coef}; use 0 (off) or more.")
        _require(
            (self.clip_low is None) == (self.clip_high is None),
            f"{where}.clip_low and clip_high must both be numbers, or both null for no clipping.",
        )
        _require(
            self.clip_low is None or 0.0 < self.clip_low <= 1.0,
            f"{where}.clip_low is {self.clip_low}; use more than 0 and at most 1.",
        )
        _require(
            self.clip_high is None or 0.0 < self.clip_high < math.inf,
            f"{where}.clip_high is {self.clip_high}; use a number above 0.",
        )
        _require(
            self.dual_clip is None or 1.0 < self.dual_clip < math.inf,
            f"{where}.dual_clip is {self.dual_clip}; use a number above 1, or null for none.",
        )
        _require(
            self.dual_clip is None or self.clip_low is not None,
            f"{where}.dual_clip needs clipping; set clip_low and clip_high, or dual_clip=null.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig(_Block):
    """One method: how tokens are chosen and how the loss weighs them.

    Attributes:
        name: A key of :data:`keytoken.attribution.methods.METHODS`.
        selection: Null keeps every token: the plain baseline with this method's loss.
        loss: The policy loss.
        positions: Positions in the masked view. ``kept`` leaves the remaining tokens where they were;
            ``compressed`` renumbers them from 0, as the published Video-KTR code does in effect.
        advantage_epsilon: Added to the group's standard deviation of rewards.
    """

    name: str
    selection: SelectionConfig | None
    loss: LossConfig
    positions: Literal["kept", "compressed"] = "kept"
    advantage_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        where = f"{ROOT}.method"
        _check_choices(self, where)
        _require(
            0.0 < self.advantage_epsilon < 1.0,
            f"{where}.advantage_epsilon is {self.advantage_epsilon}; use a small number such as 1e-6.",
        )

    @property
    def views(self) -> tuple[str, ...]:
        """Counterfactual passes that the method needs: a subset of ``("masked", "shuffled")``."""
        if self.selection is None:
            return ()
        ratios = {"masked": self.selection.visual_ratio, "shuffled": self.selection.temporal_ratio}
        return tuple(view for view, ratio in ratios.items() if ratio > 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttributionConfig(_Block):
    """Where and how the counterfactual passes run.

    Attributes:
        placement: ``pool``: an own worker group on its own resource pool; ``actor``: in the actor workers.
        num_workers: World size of the attribution group. Used by ``pool`` only.
        micro_batch_size: Responses of one forward pass on one worker.
        shuffle_seed: Seed of the frame permutations, one for each prompt.
        check_base: Score the real view in the attribution group as well, take it as the real side of every
            difference and compare it with the actor's old log-probs. When false the actor's log-probs are
            the real side, which is exact in float32 only.
        base_tolerance: Largest allowed difference of that comparison, in nats.
        sync_timeout_s: Limit of one weight broadcast; verl itself would wait for ever.
        pass_timeout_s: Limit of one attribution pass over a batch.
    """

    placement: Literal["pool", "actor"] = "pool"
    num_workers: int = 1
    micro_batch_size: int = 8
    shuffle_seed: int = 0
    check_base: bool = False
    base_tolerance: float = 1e-4
    sync_timeout_s: float = 300.0
    pass_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        where = f"{ROOT}.attribution"
        _check_choices(self, where)
        for name in ("num_workers", "micro_batch_size"):
            count = getattr(self, name)
            _require(count >= 1, f"{where}.{name} is {count}; use a count of 1 or more.")
        for name in ("base_tolerance", "sync_timeout_s", "pass_timeout_s"):
            value = getattr(self, name)
            _require(0.0 < value < math.inf, f"{where}.{name} is {value}; use a finite number above 0.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig(_Block):
    """The per-token export in the run folder.

    Attributes:
        enabled: Whether tokens, log-probs, scores and weights are written.
        every_steps: A step is exported when its number is a multiple of this.
        max_responses: At most so many responses of an exported step are written.
    """

    enabled: bool = True
    every_steps: int = 10
    max_responses: int = 32

    def __post_init__(self) -> None:
        for name in ("every_steps", "max_responses"):
            value = getattr(self, name)
            _require(
                value >= 1, f"{ROOT}.export.{name} is {value}; use 1 or more, or {ROOT}.export.enabled=false."
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KernelsConfig(_Block):
    """Which code computes log-probs and selections; every choice gives the same numbers up to rounding.

    Attributes:
        impl: ``triton`` for the kernels, ``reference`` for plain torch, ``auto`` for the kernels on a GPU and
            plain torch elsewhere (:func:`keytoken_kernels.dispatch.resolve`).
        head: How actor and reference compute log-probs: ``fused`` at answer positions only, with a backward
            pass over tokens with a gradient only; ``verl`` as verl does, from logits of whole sequences.
    """

    impl: Literal["auto", "triton", "reference"] = "auto"
    head: Literal["fused", "verl"] = "verl"

    def __post_init__(self) -> None:
        _check_choices(self, f"{ROOT}.kernels")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KeyTokenConfig(_Block):
    """The whole ``keytoken`` block.

    Example:
        ``KeyTokenConfig.from_mapping({"method": {"name": "grpo", "selection": None, "loss": {...}}})``
        uses the defaults of the other blocks.

    Attributes:
        method: How tokens are chosen and weighed.
        attribution: Where and how the counterfactual passes run.
        export: The per-token export.
        kernels: Which code computes log-probs and selections.
        run_dir: Folder that holds all that the run leaves behind.
        seed: Seeds the order of the data and, with prompt and answer number, every answer's sampling.
        sampling: Keys of :class:`keytoken.data.contract.SamplingContract`, which checks them.
    """

    method: MethodConfig
    attribution: AttributionConfig = dataclasses.field(default_factory=AttributionConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    kernels: KernelsConfig = dataclasses.field(default_factory=KernelsConfig)
    run_dir: str = "outputs/run"
    seed: int = 1
    sampling: dict = dataclasses.field(default_factory=dict)


def unknown_name(what: str, given: str, known: Iterable[str], plural: str) -> str:
    """The message for a name that is not known: what was given, what is known, and the closest match."""
    names = list(known)
    close = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {what}; known {plural}: {', '.join(names)}.{hint}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


def _check_choices(block: _Block, where: str) -> None:
    """Check every field that is declared as a Literal."""
    for name, hint in typing.get_type_hints(type(block)).items():
        choices = typing.get_args(hint)
        value = getattr(block, name)
        if typing.get_origin(hint) is Literal and value not in choices:
            raise ConfigurationError(f"{where}.{name} is {value!r}; use one of {', '.join(choices)}.")


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check a value against a field's type; integers pass as floats, nothing else is converted."""
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if isinstance(hint, type) and issubclass(hint, _Block):
        return value if isinstance(value, hint) else hint.from_mapping(value, where)
    if typing.get_origin(hint) is Literal:
        hint = str
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        got = type(value).__name__
        raise ConfigurationError(f"{where} is {value!r} ({got}); give it a value of type {hint.__name__}.")
    return value
