"""The plain-language part of a report: sentences that follow from the numbers, whatever they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from keytoken.scoring.statistics import Estimate
from keytoken.study.analysis import ALL, GREEDY, SAMPLED, SIGNIFICANT, Comparison, SectionResult
from keytoken.study.config import START, StudyConfig

Title = Callable[[str], str]


def percent(value: float, sign: str = "") -> str:
    """A share as percent with one decimal."""
    return f"{100 * value:{sign}.1f}"


def interval(estimate: Estimate, sign: str = "") -> str:
    """``51.2 [49.8, 52.6]`` in percent; a single value has no interval."""
    if math.isinf(estimate.low):
        return f"{percent(estimate.value, sign)} [one seed]"
    return f"{percent(estimate.value, sign)} [{percent(estimate.low, sign)}, {percent(estimate.high, sign)}]"


def summarise(study: StudyConfig, sections: Sequence[SectionResult], title_of: Title) -> list[str]:
    """Markdown lines: for each section what was and was not found, then what holds in all of them."""
    lines: list[str] = []
    for section in sections:
        heading = study.sections[section.name].title or section.name
        lines += [f"**{heading}.** " + " ".join(_section(study, section, title_of)), ""]
    lines += [" ".join(_together(study, sections, title_of)), ""] if len(sections) > 1 else []
    return lines


def _section(study: StudyConfig, section: SectionResult, title_of: Title) -> list[str]:
    sentences = []
    if START in section.arms:
        start = section.arms[START].accuracy
        sampled, greedy = (start[section.split, kind, ALL].value for kind in (SAMPLED, GREEDY))
        sentences.append(
            f"Before training {percent(sampled)} % of the sampled and {percent(greedy)} % of the greedy "
            "answers are right."
        )
    gain = section.arms.get(study.baseline)
    if gain is not None and START in gain.comparisons:
        sentences.append(_gain(title_of(study.baseline), gain.comparisons[START]))
    for other in (study.baseline, study.control):
        found = {
            arm: result.comparisons[other]
            for arm, result in section.arms.items()
            if other in result.comparisons
        }
        if found:
            sentences += _against(title_of(other), found, title_of)
    return sentences


def _gain(name: str, comparison: Comparison) -> str:
    test = comparison.test
    if test.count < 2:
        return f"{name} was run with one seed, which no test can be made of."
    if test.p_value >= SIGNIFICANT:
        return (
            f"There is no evidence that {name} changes sampled accuracy "
            f"({interval(test.difference, '+')} points)."
        )
    verb = "raises" if test.difference.value > 0 else "lowers"
    return f"{name} {verb} sampled accuracy ({interval(test.difference, '+')} points)."


def _against(name: str, found: dict[str, Comparison], title_of: Title) -> list[str]:
    if all(comparison.test.count < 2 for comparison in found.values()):
        return [f"With one seed nothing can be said about differences from {name}."]
    sentences = []
    for verdict, word in ((1, "Better"), (-1, "Worse")):
        arms = [arm for arm, comparison in found.items() if comparison.verdict == verdict]
        listed = [f"{title_of(arm)} ({interval(found[arm].test.difference, '+')})" for arm in arms]
        if listed:
            sentences.append(f"{word} than {name} after Holm's correction: {_enumerated(listed)}.")
    ties = [title_of(arm) for arm, comparison in found.items() if comparison.verdict == 0]
    if ties:
        sentences.append(f"No evidence of a difference from {name}: {_enumerated(ties)}.")
    halves = [
        0.5 * (each.test.difference.high - each.test.difference.low)
        for each in found.values()
        if each.test.count > 1
    ]
    counts = sorted({each.test.count for each in found.values()})
    sentences.append(
        f"(Half the width of these intervals is {percent(median(halves))} points in the median, with "
        f"{' or '.join(map(str, counts))} seeds: smaller differences would mostly go unseen.)"
    )
    return sentences


def _together(study: StudyConfig, sections: Sequence[SectionResult], title_of: Title) -> list[str]:
    """Over sections: who was better or worse how often; nothing is pooled."""
    sentences = []
    for other in (study.baseline, study.control):
        verdicts: dict[str, list[int]] = {}
        for section in sections:
            for arm, result in section.arms.items():
                if other in result.comparisons and result.comparisons[other].test.count > 1:
                    verdicts.setdefault(arm, []).append(result.comparisons[other].verdict)
        told = []
        for arm, each in verdicts.items():
            better, worse = each.count(1), each.count(-1)
            if better or worse:
                told.append(f"{title_of(arm)} better in {better} and worse in {worse} of {len(each)}")
        never = [title_of(arm) for arm, each in verdicts.items() if not any(each)]
        if told:
            sentences.append(f"Over all sections, against {title_of(other)}: {'; '.join(told)}.")
        if never:
            sentences.append(
                f"In no section is there evidence of a difference from {title_of(other)} for "
                f"{_enumerated(never)}."
            )
    return sentences


def _enumerated(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
