"""From the raw numbers of runs to what a report says: accuracies, paired comparisons, costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from keytoken.scoring.statistics import Estimate
from keytoken.study.config import START, StudyConfig
from keytoken.study.evaluation import Evaluation
from keytoken.study.runs import RunResult
from keytoken.study.statistics import PairedTest, holm, mean_interval, paired_difference, paired_t

ALL = "all"
SAMPLED, GREEDY = "sampled", "greedy"
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Comparison:
    """An arm against another one, on sampled accuracy over all families of the first split.

    Attributes:
        other: The arm that is subtracted.
        test: Over seeds, paired.
        adjusted: The p-value after Holm's correction over the arms of the section.
        by_prompt: The same difference with an interval over prompts, given these very runs: how much depends
            on which prompts were asked.
    """

    other: str
    test: PairedTest
    adjusted: float
    by_prompt: Estimate

    @property
    def verdict(self) -> int:
        """1 for better, -1 for worse, 0 for no evidence of a difference."""
        if self.adjusted >= SIGNIFICANT:
            return 0
        return 1 if self.test.difference.value > 0 else -1


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm of a section.

    Attributes:
        arm: Its name.
        runs: Its finished runs by seed.
        accuracy: For (split, decoding, family) the mean over seeds with its 95 % t-interval, cut at 0 and 1.
        by_seed: For (split, decoding, family) the values.
        comparisons: With the baseline, the control and the start, as far as the section has them.
    """

    arm: str
    runs: dict[int, RunResult]
    accuracy: dict[tuple[str, str, str], Estimate]
    by_seed: dict[tuple[str, str, str], dict[int, float]]
    comparisons: dict[str, Comparison]


@dataclass(frozen=True, slots=True)
class SectionResult:
    """A section: its arms in the order of the study, the untrained one first."""

    name: str
    split: str
    families: list[str]
    arms: dict[str, ArmResult]


def analyse(study: StudyConfig, finished: Iterable[RunResult]) -> list[SectionResult]:
    """Everything that the finished runs say; sections without any are left out."""
    runs = list(finished)
    results = []
    for name, section in study.sections.items():
        order = [START, *section.arms]
        found = {
            arm: {run.seed: run for run in runs if (run.section, run.arm) == (name, arm)} for arm in order
        }
        present = {arm: by_seed for arm, by_seed in found.items() if by_seed}
        if present:
            results.append(_section(name, section.splits, present, study))
    return results


def _section(
    name: str, splits: Sequence[str], runs: Mapping[str, Mapping[int, RunResult]], study: StudyConfig
) -> SectionResult:
    split = splits[0]
    compared = {
        other: _comparisons(runs, other, split)
        for other in dict.fromkeys((study.baseline, study.control, START))
        if other in runs
    }
    arms = {}
    families: list[str] = []
    for arm, by_seed in runs.items():
        values = _accuracies(by_seed, splits)
        families = families or [family for at, kind, family in values if (at, kind) == (split, SAMPLED)]
        arms[arm] = ArmResult(
            arm,
            dict(by_seed),
            {key: _share(mean_interval(list(of_seed.values()))) for key, of_seed in values.items()},
            values,
            {other: found[arm] for other, found in compared.items() if arm in found},
        )
    return SectionResult(name, split, families, arms)


def _share(estimate: Estimate) -> Estimate:
    """An interval of an accuracy, cut at 0 and 1; with few seeds Student's t knows no such bounds."""
    if math.isinf(estimate.low):
        return estimate
    return Estimate(estimate.value, max(0.0, estimate.low), min(1.0, estimate.high))


def _accuracies(
    runs: Mapping[int, RunResult], splits: Sequence[str]
) -> dict[tuple[str, str, str], dict[int, float]]:
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    for split in splits:
        for decoding in (SAMPLED, GREEDY):
            for seed, run in runs.items():
                for family, value in by_family(run.evaluations[split], decoding).items():
                    values.setdefault((split, decoding, family), {})[seed] = value
    return values


def by_family(found: Evaluation, decoding: str) -> dict[str, float]:
    """Accuracy of each family and of all."""
    shares = by_prompt(found, decoding)
    families = {family: [] for family in found.families}  # type: dict[str, list[float]]
    for family, share in zip(found.families, shares, strict=True):
        families[family].append(share)
    means = {family: math.fsum(values) / len(values) for family, values in families.items()}
    return means | {ALL: math.fsum(shares) / len(shares)}


def by_prompt(found: Evaluation, decoding: str) -> list[float]:
    """Share of right answers to each prompt."""
    if decoding == GREEDY:
        return [float(hit) for hit in found.greedy]
    return [hits / found.samples for hits in found.sampled]


def _comparisons(
    runs: Mapping[str, Mapping[int, RunResult]], other: str, split: str
) -> dict[str, Comparison]:
    """Every arm but the untrained one against another, over the seeds that both have."""
    tests, prompts = {}, {}
    for arm, by_seed in runs.items():
        shared = sorted(by_seed.keys() & runs[other].keys())
        if arm in (other, START) or not shared:
            continue
        pairs = [
            tuple(by_prompt(each[seed].evaluations[split], SAMPLED) for each in (runs[other], by_seed))
            for seed in shared
        ]
        tests[arm] = paired_t([_mean(after) - _mean(before) for before, after in pairs])
        columns = [[_mean(values) for values in zip(*side, strict=True)] for side in zip(*pairs, strict=True)]
        prompts[arm] = paired_difference(*columns)
    adjusted = holm({arm: test.p_value for arm, test in tests.items()})
    return {arm: Comparison(other, test, adjusted[arm], prompts[arm]) for arm, test in tests.items()}


def curve(arm: ArmResult, metric: str) -> list[float]:
    """A metric of the training, one value a step, mean over the seeds that have it."""
    columns = zip(*(run.steps[metric] for run in arm.runs.values() if metric in run.steps), strict=True)
    kept = ([value for value in column if value is not None] for column in columns)
    return [_mean(values) if values else math.nan for values in kept]


def mean_metric(arm: ArmResult, metric: str) -> float | None:
    """Mean of a metric over steps and seeds; None if no run has it."""
    values = [value for run in arm.runs.values() for value in run.steps.get(metric, ()) if value is not None]
    return _mean(values) if values else None


def mean_cost(arm: ArmResult, name: str) -> float | None:
    """Mean over seeds of an entry of the runs' costs; None if no run has it."""
    values = [run.cost[name] for run in arm.runs.values() if name in run.cost]
    return _mean(values) if values else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
