"""The loss of a method in words.

Symbols: w token weight, l token loss, o_i the tokens of answer i, S_i the selected ones, G answers, rho the
ratio of new to old probability, A advantage, r reward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from omegaconf import DictConfig

from keytoken.explain.notes import METHOD
from keytoken.explain.run import Run
from keytoken.explain.words import Row, number
from keytoken.losses.divergence import KL_CLAMPS
from keytoken.schema import LossConfig, MethodConfig

_DENOMINATORS = {
    ("selected", "response"): (
        "the sum over an answer by the number of its selected tokens; then the mean over answers",
        "1/G sum_i 1/|S_i| sum_t w l",
    ),
    ("selected", "batch"): (
        "one sum over all answers of the update, by the number of their selected tokens",
        "sum_i sum_t w l / sum_i |S_i|",
    ),
    ("all", "response"): (
        "the sum over an answer by the number of all its tokens, selected or not; then the mean over answers",
        "1/G sum_i 1/|o_i| sum_t w l",
    ),
    ("all", "batch"): (
        "one sum over all answers of the update, by the number of all their tokens, selected or not",
        "sum_i sum_t w l / sum_i |o_i|",
    ),
    ("constant", "response"): (
        "the sum over an answer by a constant; then the mean over answers",
        "1/G sum_i 1/{length} sum_t w l",
    ),
}


def loss(run: Run) -> list[Row]:
    """The loss, term by term, and what it is fed with."""
    config, where = run.keytoken.method.loss, f"{METHOD}.loss"
    rows = [
        Row(
            "objective",
            _OBJECTIVES[config.objective](config),
            _keys(where, "objective clip_low clip_high dual_clip"),
        ),
        Row("denominator", _denominator(config), _keys(where, "normalizer level constant_length")),
        Row("KL to reference", _kl(config), _keys(where, "kl_coef kl_clamp mask_kl")),
    ]
    if config.entropy_penalty > 0.0:
        coefficient = number(config.entropy_penalty)
        text = f"{coefficient} times the mean of -log p over all answer tokens; lowers entropy"
        rows.append(Row("entropy penalty", text, _keys(where, "entropy_penalty")))
    if config.perception_coef > 0.0:
        bound = (
            ""
            if config.perception_clip is None
            else f", at most {number(config.perception_clip)} nats a token"
        )
        text = (
            f"minus {number(config.perception_coef)} times the mean over all answer tokens of k3 between "
            f"{run.keytoken.method.view.visual} and real input{bound}"
        )
        rows.append(Row("perception", text, _keys(where, "perception_coef perception_clip")))
    return [*rows, *_feeding(run)]


def _feeding(run: Run) -> Iterator[Row]:
    method, algorithm = run.keytoken.method, run.config.algorithm
    yield Row("advantage", _advantage(algorithm, method), (f"{METHOD}.advantage_epsilon", *_ADVANTAGE_KEYS))
    bonus = method.order_bonus
    if bonus is not None:
        text = (
            f"+{number(bonus.bonus)} for every answer with an accuracy above {number(bonus.min_accuracy)}, "
            f"where the mean accuracy is at least {number(bonus.threshold)} times that on shuffled frames"
        )
        keys = _keys(f"{METHOD}.order_bonus", "threshold bonus min_accuracy")
        yield Row("bonus for order", text, keys)


_ADVANTAGE_KEYS = ("algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo")


def _advantage(algorithm: DictConfig, method: MethodConfig) -> str:
    if algorithm.adv_estimator != "keytoken_grpo":
        return f"verl's {algorithm.adv_estimator}"
    if not algorithm.get("norm_adv_by_std_in_grpo", True):
        return "A = r - mean over the answers to a prompt"
    epsilon = number(method.advantage_epsilon)
    return f"A = (r - mean) / (std + {epsilon}) over the answers to a prompt, unbiased std"


def _ppo(config: LossConfig) -> str:
    if config.clip_low is None:
        return "l = -rho A, not clipped: one update a batch, where rho is 1"
    text = f"l = max(-rho A, -clip(rho, {_range(config)}) A)"
    if config.dual_clip is not None:
        text += f", at most {number(config.dual_clip)} |A| where A is negative"
    return text


def _gspo(config: LossConfig) -> str:
    bounds = "s is not clipped" if config.clip_low is None else f"s is clipped to {_range(config)}"
    return f"PPO's with one ratio for the answer, s = exp(mean_t log rho); {bounds}"


def _cispo(config: LossConfig) -> str:
    weight = "rho" if config.clip_low is None else f"clip(rho, {_range(config)})"
    return f"l = -{weight} A log p, with no gradient through the factor before A"


_OBJECTIVES: dict[str, Callable[[LossConfig], str]] = {"ppo": _ppo, "gspo": _gspo, "cispo": _cispo}


def _range(config: LossConfig) -> str:
    assert config.clip_low is not None and config.clip_high is not None
    return f"{number(1.0 - config.clip_low)}, {number(1.0 + config.clip_high)}"


def _denominator(config: LossConfig) -> str:
    text, formula = _DENOMINATORS[config.normalizer, config.level]
    return f"{text}: {formula.format(length=config.constant_length)}"


def _kl(config: LossConfig) -> str:
    if config.kl_coef == 0.0:
        return "none; no reference model runs"
    bound, estimate = KL_CLAMPS[config.kl_clamp]
    over = (
        "selected tokens, over the denominator above"
        if config.mask_kl
        else "all answer tokens, over their number"
    )
    clamp = f"log-ratio within +-{number(bound)}" + (
        "" if estimate is None else f", k3 within +-{number(estimate)}"
    )
    return f"{number(config.kl_coef)} times k3 at {over} ({clamp})"


def _keys(where: str, names: str) -> tuple[str, ...]:
    return tuple(f"{where}.{name}" for name in names.split())
