"""The demo's last page: what the model answered before and after training, and whether it watches.

The answers are those of the run's own validations, so the engine, the weights and the prompts are those of
training; questions, scores, intervals and paired differences are those of every other benchmark
(:mod:`keytoken.scoring`).
"""

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from keytoken.demo.curves import plot_curves, read_metrics
from keytoken.demo.validation import HeldOutAnswer, read_answers
from keytoken.errors import DataError
from keytoken.evaluation.controls import TITLES, ControlResult, compare_controls
from keytoken.evaluation.sources import HELDOUT
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.compare import compare
from keytoken.scoring.items import Item, Prediction
from keytoken.scoring.score import Scores, score_predictions, tables
from keytoken.scoring.statistics import Estimate

NOTE = (
    "Brackets: 95 % intervals (bootstrap over prompts, differences paired by prompt). *: interval above zero."
)
WATCHES = (
    "Greedy answers to questions about a clip; behind the arrow the difference from the same questions with "
    "the clip, and its interval."
)


@dataclass(frozen=True, slots=True)
class Change:
    """What training changed for one family and one kind of answers.

    Attributes:
        decoding: "greedy" or "sampled".
        family: The family, or "all".
        prompts: Held-out prompts.
        before: Accuracy before training.
        after: Accuracy after it.
        difference: After minus before, paired by prompt.
    """

    decoding: str
    family: str
    prompts: int
    before: Estimate
    after: Estimate
    difference: Estimate

    @property
    def improved(self) -> bool:
        """Whether the whole interval of the difference lies above zero."""
        return self.difference.low > 0.0


def report(run_dir: Path) -> str:
    """Write ``table.md``, ``results.json`` and ``learning_curves.png`` of a finished run of the demo.

    Returns:
        The table as text, ready to print.

    Raises:
        DataError: the run has fewer than two validations, or they do not cover the same prompts.
    """
    dumps = sorted((run_dir / "validation").glob("*.jsonl"), key=lambda path: int(path.stem))
    if len(dumps) < 2:
        raise DataError(
            f"{run_dir / 'validation'} holds {len(dumps)} evaluations; the table needs one before and "
            "one after training: leave trainer.val_before_train=true, and set trainer.test_freq to the "
            "number of steps."
        )
    val_files = OmegaConf.load(run_dir / "config.yaml").data.val_files
    benchmark = get_benchmark("demo")
    items = benchmark.read([Path(val_files).with_name(HELDOUT)])
    sides = [score_answers(benchmark, items, read_answers(path)) for path in (dumps[0], dumps[-1])]
    rows = [row for path in sorted(run_dir.glob("metrics*.jsonl")) for row in read_metrics(path)]
    plot_curves(run_dir / "learning_curves.png", rows)
    return write_table(run_dir, *sides)


def score_answers(
    benchmark: Benchmark, items: Sequence[Item], answers: Sequence[HeldOutAnswer]
) -> list[Scores]:
    """Verdicts on the answers of one validation, apart by control and decoding.

    Raises:
        DataError: a verdict is not the reward that training gave.
    """
    numbers: Counter[tuple[str, str, str]] = Counter()
    predictions = []
    for answer in answers:
        key = (answer.prompt_id, answer.decoding, answer.control)
        predictions.append(
            Prediction(
                item_id=answer.prompt_id,
                response=answer.response,
                decoding=answer.decoding,
                control=answer.control,
                sample=numbers[key],
                published_score=answer.correct,
            )
        )
        numbers[key] += 1
    scores = score_predictions(benchmark, items, predictions)
    for one in scores:
        for odd in one.differing:
            raise DataError(
                f"prompt {odd.item.item_id}: training gave the answer {odd.prediction.response!r} the "
                f"accuracy {odd.prediction.published_score:g}, the benchmark's rule gives "
                f"{odd.verdict.score:g}; the table would not be that of this run."
            )
    return scores


def write_table(folder: Path, before: Sequence[Scores], after: Sequence[Scores]) -> str:
    """Write ``table.md`` and ``results.json``.

    Args:
        folder: Where to.
        before: Verdicts before training.
        after: Verdicts after training on the same prompts.

    Returns:
        The tables as text.
    """
    found = changes(before, after)
    controls = compare_controls(before), compare_controls(after)
    text = "\n".join([render_changes(found), "", NOTE, "", render_controls(*controls), "", WATCHES, ""])
    (folder / "table.md").write_text(text, encoding="utf-8")
    content = {
        "changes": [dataclasses.asdict(change) for change in found],
        "controls": {
            name: [dataclasses.asdict(result) for result in results]
            for name, results in zip(("before", "after"), controls, strict=True)
        },
    }
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return text


def changes(before: Sequence[Scores], after: Sequence[Scores]) -> list[Change]:
    """What training changed, for prompts as they are: by decoding, each family and all.

    Raises:
        DataError: the validations do not cover the same prompts.
    """
    sides = [{each.decoding: each for each in side if each.control == "none"} for side in (before, after)]
    if sides[0].keys() != sides[1].keys() or not sides[0]:
        kinds = [", ".join(sorted(side)) or "none" for side in sides]
        raise DataError(f"answers before: {kinds[0]}; after: {kinds[1]}; validate the same file twice.")
    found = []
    for decoding in sorted(sides[0]):
        first, last = (side[decoding] for side in sides)
        compared = compare(first, last)
        odd = [*compared.only_before, *compared.only_after]
        if odd:
            raise DataError(
                f"{len(odd)} prompts were validated only once, such as {odd[0]}; validate one file twice."
            )
        estimates = [
            {row.name: row.score for table in tables(side) for row in table.rows} for side in (first, last)
        ]
        ordered = [*compared.rows[1:], compared.rows[0]]  # "all" below the families
        for row in ordered:
            ends = [side[row.name] for side in estimates]
            assert ends[0] is not None and ends[1] is not None  # the demo's rule decides every answer
            found.append(Change(decoding, row.name, row.items, ends[0], ends[1], row.difference))
    return found


def render_changes(found: Sequence[Change]) -> str:
    """A Markdown table: one row for each kind of decoding and family."""
    table = Table(box=box.MARKDOWN)
    for column in ("answers", "family", "prompts", "before", "after", "difference"):
        table.add_column(column, justify="right" if column == "prompts" else "left", no_wrap=True)
    for change in found:
        table.add_row(
            change.decoding,
            change.family,
            str(change.prompts),
            _interval(change.before),
            _interval(change.after),
            _interval(change.difference, sign="+") + (" *" if change.improved else ""),
        )
    return _text(table)


def render_controls(before: Sequence[ControlResult], after: Sequence[ControlResult]) -> str:
    """A Markdown table: greedy accuracy with the clip, with blank and with shuffled frames."""
    table = Table(box=box.MARKDOWN)
    for column in ("does it watch?", "prompts", "before", "after"):
        table.add_column(column, justify="right" if column == "prompts" else "left", no_wrap=True)
    later = {(result.decoding, result.control): result for result in after}
    for result in before:
        other = later.get((result.decoding, result.control))
        if result.decoding == "greedy" and other is not None:
            cells = (_controlled(result), _controlled(other))
            table.add_row(TITLES[result.control], str(result.num_questions), *cells)
    return _text(table)


def _controlled(result: ControlResult) -> str:
    assert result.score is not None  # the demo's rule decides every answer
    score = f"{result.score.value:.3f}"
    return score if result.difference is None else f"{score} -> {_interval(result.difference, sign='+')}"


def _text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines() if line.strip())


def _interval(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
