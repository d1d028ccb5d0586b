"""What an evaluation says at its end: scores under every control, and what they say together."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keytoken.evaluation.controls import as_json, compare_controls, control_section
from keytoken.scoring.benchmarks import own
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.items import CONTROLS, Item, Prediction
from keytoken.scoring.prompts import OFFICIAL
from keytoken.scoring.report import Report, markdown, write_report
from keytoken.scoring.score import score_predictions
from keytoken.words import number_of

CONTROL_FILE = "controls.json"


def write_reports(
    folder: Path,
    benchmark: Benchmark,
    items: Sequence[Item],
    predictions: Sequence[Prediction],
    header: Mapping[str, Any],
) -> str:
    """Score answers and write the reports: those of ``keytoken score``, and ``controls.json``.

    Args:
        folder: Where to.
        benchmark: Whose rule.
        items: The questions; answers to others (of a call without ``limit``) are left out, and said so.
        predictions: The answers.
        header: What they depend on.

    Returns:
        The report as text.
    """
    asked = {item.item_id for item in items}
    mine = [each for each in predictions if each.item_id in asked]
    scores = score_predictions(benchmark, items, mine)
    scores.sort(key=lambda each: (each.decoding, CONTROLS.index(each.control)))
    results = compare_controls(scores)
    notes = [control_section(results, len(items))] if len(results) > 1 else []
    others = len(predictions) - len(mine)
    if others:
        what = number_of(others, "answer to another question is", "answers to other questions are")
        notes.append(f"{what} in the file and not here.")
    report = Report(scores=scores, about=_about(header), notes=notes)
    write_report(folder, report)
    text = json.dumps(as_json(results), indent=2, allow_nan=False)
    (folder / CONTROL_FILE).write_text(text + "\n", encoding="utf-8")
    return markdown(report)


def _about(header: Mapping[str, Any]) -> dict[str, str]:
    """Lines for the head of the report."""
    sampling = ", ".join(f"{name} {value}" for name, value in header["sampling"].items())
    decoding = ", ".join(f"{name} {value}" for name, value in header["decoding"].items())
    mismatch = "; ".join(header.get("sampling_mismatch", ()))
    asked = header.get("benchmark"), header["prompt"]
    return {
        "Model": f"{header['model']} ({header['model_digest']})",
        "Frames": sampling,
        **({"Not the frames of training": mismatch} if mismatch else {}),
        "Prompt": "as prepared" if asked == (own.NAME, OFFICIAL) else str(header["prompt"]),
        "Answers": decoding,
    }
