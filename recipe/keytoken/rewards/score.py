"""The reward as verl calls it: ``reward.custom_reward_function`` with name ``compute_score``."""

from typing import Any

from keytoken.errors import ConfigurationError, DataError
from keytoken.rewards.answers import accuracy
from keytoken.rewards.extract import extract_answer, has_format
from keytoken.rewards.length import length_bonus


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    accuracy_weight: float = 1.0,
    format_weight: float = 1.0,
    length_weight: float = 0.0,
    **_: Any,
) -> dict[str, float]:
    """Score one response by Video-R1's rules.

    Departure: the published length bonus also asks for two right answers in the group, which a reward
    of one answer cannot see; :func:`keytoken.rewards.length.group_length_bonuses` has the full rule.

    Args:
        data_source: Name of the dataset, for messages.
        solution_str: The response as text, with ``<think>`` and ``<answer>`` tags.
        ground_truth: The right answer, bare or inside ``<answer>`` tags.
        extra_info: Must hold ``problem_type``; must hold ``response_length`` (tokens of the response)
            if ``length_weight`` is not 0.
        accuracy_weight: Weight of the accuracy reward.
        format_weight: Weight of the format reward.
        length_weight: Weight of the length bonus; 0.2 in Video-R1.

    Returns:
        ``score`` (weighted sum), ``acc``, ``format`` and ``length_bonus`` (0 where the length is unknown).

    Raises:
        DataError: If the problem type is missing or unknown.
        ConfigurationError: If the length bonus is on and the length is not given.
    """
    info = extra_info or {}
    if "problem_type" not in info:
        raise DataError(f"dataset {data_source}: extra_info has no 'problem_type'; the reward depends on it")
    reference = extract_answer(ground_truth) if "<answer>" in ground_truth else ground_truth.strip()
    acc = accuracy(extract_answer(solution_str), reference, info["problem_type"])
    well_formed = float(has_format(solution_str))
    num_tokens = info.get("response_length")
    if num_tokens is None and length_weight != 0:
        raise ConfigurationError(
            f"length_weight is {length_weight} but extra_info has no 'response_length'; "
            "set reward.reward_manager to keytoken.verl_adapter.reward_manager, or length_weight to 0"
        )
    bonus = length_bonus(int(num_tokens), acc) if num_tokens is not None else 0.0
    score = accuracy_weight * acc + format_weight * well_formed + length_weight * bonus
    return {"score": score, "acc": acc, "format": well_formed, "length_bonus": bonus}
