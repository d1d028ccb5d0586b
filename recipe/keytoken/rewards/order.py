"""T-GRPO's reward of order: right answers earn more, unless the policy does better on shuffled frames.

Besides the answers that are trained on, half as many are sampled from the same clip with its frames in
another order. They are scored and then forgotten. Prompts without a video have none and get nothing.

Source: Video-R1 (arXiv 2503.21776) and its published trainer. Known from the code alone: the factor 0.8 (the
paper's equation 1 compares the accuracies as they are), "right" above an accuracy of 0.1, one order for all
shuffled answers to a prompt. Departures:

- the order always changes the clip, where a random permutation may be the identity; a clip that shows one
  picture has no other order, no shuffled answers and no bonus;
- the bonus is added to the whole reward, not to the accuracy in it, so a weight of the accuracy leaves it
  alone. With Video-R1's weights of 1 both are the same.

The variant of the published trainer that samples with vLLM hands the ordered clip over for the shuffled
answers as well; here they see shuffled frames.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from keytoken.schema import OrderBonusConfig

# Two equal means may differ by this much in float64, as 3/5 and 0.8 * 3/4 do: rounding decides nothing.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class OrderBonuses:
    """What the answers of a batch earn for order.

    Attributes:
        bonuses: [B] added to the reward of each answer; 0 where none is due.
        metrics: ``reward/order_bonus_share``: share of the compared prompts with an answer that got the bonus
            (Video-R1 logs the share that reached the threshold, also by two accuracies of 0).
            ``reward/shuffled_accuracy`` and ``reward/ordered_accuracy``: mean accuracies with the frames
            shuffled and in order, every compared prompt counting once. Empty if no prompt was compared.
    """

    bonuses: list[float]
    metrics: dict[str, float]


def order_bonuses(
    accuracies: Sequence[float],
    shuffled: Sequence[float | None],
    group: Sequence[Hashable],
    config: OrderBonusConfig,
) -> OrderBonuses:
    """Compare the answers to every prompt with those on shuffled frames.

    Args:
        accuracies: [B] accuracy of each answer.
        shuffled: [B] accuracy of the answer on shuffled frames that was sampled beside it; None where there
            was none. Any number of them makes a mean; prompts without one get nothing.
        group: [B] the prompt of each answer.
        config: Threshold, bonus and what counts as right.
    """
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, (prompt, _, _) in enumerate(zip(group, accuracies, shuffled, strict=True)):
        rows[prompt].append(row)
    bonuses = [0.0] * len(accuracies)
    means, num_rewarded = [], 0
    for members in rows.values():
        compared = [value for row in members if (value := shuffled[row]) is not None]
        if not compared:
            continue
        ordered, disordered = _mean([accuracies[row] for row in members]), _mean(compared)
        means.append((ordered, disordered))
        right = [row for row in members if accuracies[row] > config.min_accuracy]
        if right and ordered >= config.threshold * disordered - ROUNDING:
            num_rewarded += 1
            for row in right:
                bonuses[row] = config.bonus
    if not means:
        return OrderBonuses(bonuses, {})
    ordered_means, disordered_means = zip(*means, strict=True)
    metrics = {
        "reward/order_bonus_share": num_rewarded / len(means),
        "reward/ordered_accuracy": _mean(ordered_means),
        "reward/shuffled_accuracy": _mean(disordered_means),
    }
    return OrderBonuses(bonuses, metrics)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
