"""Medians of interleaved measurements, and the time that is left for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

Call = Callable[[int], object]  # takes the number of a set of inputs

REPEATS = 2  # the whole series again, later: the difference of the medians is the noise
LEAST_ROUNDS, MOST_ROUNDS = 3, 50


@dataclass(frozen=True, slots=True)
class Timing:
    """One provider on one case.

    Attributes:
        median_ms: Median over all samples of all repeats.
        p20_ms: A fifth of the samples is faster.
        p80_ms: A fifth of the samples is slower.
        noise: Difference between the repeats' medians, as a share of their mean.
        samples: How many there are.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    noise: float
    samples: int


class Budget:
    """Seconds left of a limit that starts now."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._end = clock() + limit_s

    def left(self) -> float:
        """Seconds until the limit; negative after it."""
        return self._end - self._clock()


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the sorted ``values`` lie below, linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summarise(repeats: Sequence[Sequence[float]]) -> Timing:
    """The figures of the samples of every repeat, in milliseconds."""
    samples = [sample for repeat in repeats for sample in repeat]
    medians = [median(repeat) for repeat in repeats]
    return Timing(
        median_ms=median(samples),
        p20_ms=percentile(samples, 0.2),
        p80_ms=percentile(samples, 0.8),
        noise=(max(medians) - min(medians)) * len(medians) / sum(medians),
        samples=len(samples),
    )


def turn_order(names: Sequence[str], turn: int) -> list[str]:
    """Every name once; each turn starts with another, so that none always follows the same neighbour."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def measure(
    calls: Mapping[str, Call],
    time_ms: Callable[[Callable[[], object]], float],
    *,
    num_sets: int,
    seconds: float,
    budget: Budget,
) -> dict[str, Timing] | None:
    """Time all providers in turns, each turn on the next set of inputs.

    Args:
        calls: Providers that have been called before, so that nothing is left to compile.
        time_ms: Times one call.
        num_sets: Sets of inputs to rotate through.
        seconds: How long to measure; exceeded where the fewest rounds take longer.
        budget: What is left in all.

    Returns:
        One timing for each provider; None if the fewest rounds do not fit the budget.
    """
    before = budget.left()
    for call in calls.values():
        time_ms(partial(call, 0))  # a round to estimate by; not counted
    round_s = max(before - budget.left(), 1e-6)
    if REPEATS * LEAST_ROUNDS * round_s > budget.left():
        return None
    wanted = int(min(seconds, budget.left()) / (REPEATS * round_s))
    rounds = min(max(wanted, LEAST_ROUNDS), MOST_ROUNDS)
    samples: dict[str, list[list[float]]] = {name: [[] for _ in range(REPEATS)] for name in calls}
    for turn in range(REPEATS * rounds):
        for name in turn_order(list(calls), turn):
            call = partial(calls[name], turn % num_sets)
            samples[name][turn // rounds].append(time_ms(call))
    return {name: summarise(repeats) for name, repeats in samples.items()}
