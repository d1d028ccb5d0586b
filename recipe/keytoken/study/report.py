"""The report of a study: ``report.md`` with its plots, ``results.json`` and ``results.csv``."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keytoken.scoring.statistics import Estimate
from keytoken.study import analysis, plots
from keytoken.study.analysis import ALL, GREEDY, SAMPLED, ArmResult, Comparison, SectionResult
from keytoken.study.config import START, SectionConfig, StudyConfig
from keytoken.study.runs import BACKENDS, RunResult
from keytoken.study.summary import interval, summarise

START_TITLE = "warm start"
CSV_COLUMNS = (
    *("section", "arm", "quantity", "split", "decoding", "family"),
    *("value", "low", "high", "pairs", "holm"),
)
METHOD_NOTES = """\
- Accuracies are in percent. The split `test` has prompts with parameters that no training prompt, warm-start
  example or tuning prompt had; `familiar` and `tuning` have other clips with parameters of the training.
  *Sampled* is the mean over several answers at temperature 1 to each prompt, *greedy* one answer.
- Brackets are 95 % intervals over seeds (Student's t). A seed is one order of prompts and one draw of all
  sampling; arms with the same seed see the same prompts and, in one process, the same noise, so differences
  are paired by seed. The intervals hold for the warm start of the section and its test prompts, and say
  nothing about others.
- *Holm* is the p-value of the paired t-test over seeds on sampled accuracy, corrected for the number of
  arms compared with the same other arm in the section. Below 0.05 the difference is called evidence;
  nothing else is.
- *By prompt* is the same difference with an interval over prompts, given these very runs: what another draw
  of test prompts would change. Prompts are the unit there, and seeds are averaged over.
- All arms have the same batches, warm-up, optimizer and number of updates, and those of a section the same
  learning rate unless their configuration sets another. Every batch is used for one update by the policy
  that sampled it: ratios are 1, so nothing is clipped and bounds play no part."""


def write_report(folder: Path, study: StudyConfig, finished: Sequence[RunResult]) -> Path:
    """Write everything that can be said from the finished runs.

    Returns:
        Path of ``report.md``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = analysis.analyse(study, finished)
    (folder / "results.json").write_text(json.dumps(_as_json(sections), indent=1) + "\n")
    _write_csv(folder / "results.csv", sections)
    path = folder / "report.md"
    path.write_text("\n".join(_lines(folder, study, sections)) + "\n")
    return path


def _lines(folder: Path, study: StudyConfig, sections: Sequence[SectionResult]) -> list[str]:
    def title_of(arm: str) -> str:
        return START_TITLE if arm == START else study.arms[arm].title or arm

    lines = [f"# Study {study.name}", "", study.description.strip(), ""]
    backend = "" if study.backend == "process" else f" backend={study.backend}"
    command = f"keytoken sweep study={study.name}{backend}"
    lines += [f"Every run is {BACKENDS[study.backend]}. Rerun the study with `{command}`.", ""]
    if not sections:
        return [*lines, "No run is finished yet."]
    lines += ["## What was found", "", *summarise(study, sections, title_of)]
    lines += ["## How to read the numbers", "", METHOD_NOTES, ""]
    lines += ["## Arms", "", *_arm_table(study, title_of), ""]
    for section in sections:
        lines += _section_lines(folder, study, section, title_of)
    return lines


def _arm_table(study: StudyConfig, title_of: Any) -> list[str]:
    rows = [
        [title_of(name), f"`{' '.join([f'method={arm.method}', *arm.overrides])}`", arm.note]
        for name, arm in study.arms.items()
    ]
    words = " ".join(["experiment=demo_cpu", *study.overrides])
    note = f"Common to all arms: `{words}`, {study.steps} updates, and the learning rate of the section."
    return [*_table(["arm", "configuration", "what sets it apart"], rows), "", note]


def _section_lines(folder: Path, study: StudyConfig, section: SectionResult, title_of: Any) -> list[str]:
    config = study.sections[section.name]
    lines = [f"## {config.title or section.name}", "", _where(study, config), ""]
    lines += [*_main_table(study, section, title_of), ""]
    table = _family_table(section, section.split, title_of)
    lines += ["Sampled accuracy by family:", "", *table, ""]
    for split in config.splits[1:]:
        table = _family_table(section, split, title_of)
        lines += [f"Sampled accuracy on the split {split!r}:", "", *table, ""]
    lines += ["Cost and selection, means over seeds:", "", *_cost_table(section, title_of), ""]
    for name in plots.draw(folder, study, section, title_of):
        lines += [f"![{name}]({name})", ""]
    return lines


def _where(study: StudyConfig, config: SectionConfig) -> str:
    return (
        f"World `{config.world}`, warm start `{config.warm_start}` with seed {config.warm_seed}, "
        f"{study.eval_prompts} prompts of the split `{config.splits[0]}`, {study.eval_samples} samples and "
        f"one greedy answer each; seeds {', '.join(map(str, config.seeds))}; learning rate "
        f"{study.lr if config.lr is None else config.lr:g}."
    )


def _main_table(study: StudyConfig, section: SectionResult, title_of: Any) -> list[str]:
    others = [
        other
        for other in dict.fromkeys((study.baseline, study.control))
        if any(other in arm.comparisons for arm in section.arms.values())
    ]
    header = ["arm", "seeds", "sampled", "greedy"]
    for other in others:
        header += [f"minus {title_of(other)}", "Holm", "by prompt"]
    rows = []
    for arm in section.arms.values():
        row = [title_of(arm.arm), str(len(arm.runs))]
        row += [interval(arm.accuracy[section.split, kind, ALL]) for kind in (SAMPLED, GREEDY)]
        for other in others:
            row += _compared(arm.comparisons.get(other))
        rows.append(row)
    return _table(header, rows)


def _compared(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return ["", "", ""]
    mark = {1: " **better**", -1: " **worse**", 0: ""}[comparison.verdict]
    return [
        interval(comparison.test.difference, "+") + mark,
        f"{comparison.adjusted:.3f}" if comparison.test.count > 1 else "",
        interval(comparison.by_prompt, "+"),
    ]


def _family_table(section: SectionResult, split: str, title_of: Any) -> list[str]:
    rows = [
        [title_of(arm.arm), *(interval(arm.accuracy[split, SAMPLED, family]) for family in section.families)]
        for arm in section.arms.values()
    ]
    return _table(["arm", *section.families], rows)


# Column of the cost table: metric of a step, factor, format.
COST_COLUMNS: dict[str, tuple[str, float, str]] = {
    "tokens with a weight, %": ("attribution/selected_share", 100.0, ".1f"),
    "visual score > 0.05 nats, %": ("attribution/visual/notable_share", 100.0, ".1f"),
    "temporal score > 0.05 nats, %": ("attribution/temporal/notable_share", 100.0, ".1f"),
    "entropy > 0.05 nats, %": ("attribution/entropy/notable_share", 100.0, ".1f"),
    "answers with a signal, %": ("answers_with_signal", 100.0, ".0f"),
    "sampled tokens a step": ("tokens/sampled", 1.0, ".0f"),
    "trained tokens a step": ("tokens/trained", 1.0, ".0f"),
    "tokens read by views a step": ("tokens/views", 1.0, ".0f"),
    "gradient norm": ("grad_norm", 1.0, ".2f"),
}


def _cost_table(section: SectionResult, title_of: Any) -> list[str]:
    rows = []
    for arm in section.arms.values():
        if arm.arm == START:
            continue
        row = [title_of(arm.arm)]
        seconds = [analysis.mean_cost(arm, f"train_{clock}_s") for clock in ("cpu", "wall")]
        row += ["" if value is None else f"{value:.0f}" for value in seconds]
        for metric, factor, form in COST_COLUMNS.values():
            value = analysis.mean_metric(arm, metric)
            row.append("" if value is None else f"{factor * value:{form}}")
        rows.append(row)
    return _table(["arm", "training, CPU s", "wall s", *COST_COLUMNS], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def _as_json(sections: Sequence[SectionResult]) -> dict[str, Any]:
    return {
        section.name: {
            "split": section.split,
            "arms": {name: _arm_as_json(arm) for name, arm in section.arms.items()},
        }
        for section in sections
    }


def _arm_as_json(arm: ArmResult) -> dict[str, Any]:
    return {
        "seeds": sorted(arm.runs),
        "accuracy": {
            "/".join(key): _finite(asdict(estimate)) | {"by_seed": arm.by_seed[key]}
            for key, estimate in arm.accuracy.items()
        },
        "comparisons": {
            other: {
                "difference": _finite(asdict(found.test.difference)),
                "p_value": found.test.p_value,
                "holm": found.adjusted,
                "pairs": found.test.count,
                "by_prompt": _finite(asdict(found.by_prompt)),
                "verdict": found.verdict,
            }
            for other, found in arm.comparisons.items()
        },
        "cost": {name: analysis.mean_cost(arm, name) for name in next(iter(arm.runs.values())).cost},
        "metrics": {
            metric: analysis.mean_metric(arm, metric)
            for metric in sorted({metric for run in arm.runs.values() for metric in run.steps})
        },
    }


def _finite(estimate: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in estimate.items()}


def _write_csv(path: Path, sections: Sequence[SectionResult]) -> None:
    """One line for each accuracy and each difference; shares, not percent."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for section in sections:
            for arm in section.arms.values():
                for (split, decoding, family), found in arm.accuracy.items():
                    row = [section.name, arm.arm, "accuracy", split, decoding, family]
                    writer.writerow([*row, *_numbers(found), len(arm.runs), ""])
                for other, compared in arm.comparisons.items():
                    row = [section.name, arm.arm, f"minus {other}", section.split, SAMPLED, ALL]
                    test = compared.test
                    adjusted = f"{compared.adjusted:.4g}"
                    writer.writerow([*row, *_numbers(test.difference), test.count, adjusted])


def _numbers(estimate: Estimate) -> list[str]:
    return [f"{value:.5f}" for value in (estimate.value, estimate.low, estimate.high)]
