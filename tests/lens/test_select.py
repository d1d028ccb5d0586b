"""The page's selection against training's: the same functions that the browser runs, run by node."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.types import Outcomes
from keytoken.lens import read
from keytoken.lens.frames import strip_of
from keytoken.lens.page import payload
from keytoken_kernels.selection import reference

SCRIPT = Path(read.__file__).with_name("web") / "select.js"
TEXT = "<think> the red square moves left . so the answer is left B . </think>"
Node = Callable[..., Any]
KERNEL = f"const K = require({json.dumps(str(SCRIPT))});"
# The page's own data and selection, without its elements.
PAGE = "\n".join(
    [
        "globalThis.document = { getElementById: () => ({ textContent: JSON.stringify(given) }) };",
        *(SCRIPT.with_name(name).read_text() for name in ("select.js", "data.js")),
    ]
)


@pytest.fixture(scope="module")
def node() -> Node:
    program = shutil.which("node")
    if program is None:
        pytest.skip("no node here, which runs the page's functions without a browser")

    def run(body: str, given: Any, before: str = KERNEL) -> Any:
        code = (
            f"const given = JSON.parse(require('fs').readFileSync(0));\n{before}\n"
            f"process.stdout.write(JSON.stringify((() => {{ {body} }})()));"
        )
        done = subprocess.run(
            [program, "-e", code], input=json.dumps(given), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def ragged(tensor: torch.Tensor, mask: torch.Tensor) -> list[float]:
    return tensor[mask].tolist()


SELECT = """
  const signals = given.signals.map((s) => ({ ...s, scores: Float32Array.from(s.scores) }));
  const found = K.select(given.batch, signals, given.options);
  const masks = Object.fromEntries(Object.entries(found.masks).map(([k, v]) => [k, Array.from(v)]));
  return { masks, weights: Array.from(found.weights) };
"""


@pytest.mark.parametrize("equal", [False, True], ids=["some groups teach", "no group teaches"])
@pytest.mark.parametrize("rule", ["quantile", "count"])
@pytest.mark.parametrize("scope", ["group", "batch"])
def test_answers_that_teach_nothing_have_no_scores_times_advantage(
    node: Node,
    batch_of: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scope: str,
    rule: str,
    equal: bool,
) -> None:
    """Through the reading of an export by the page: advantages decide which answers take part."""
    texts = [" ".join([TEXT] * (1 + number % 3)) for number in range(24)]
    batch = batch_of(texts, scope=scope, rule=rule, advantage_conditioned=True)
    rewards = torch.tensor(batch.rewards)
    rewards[(batch.signals.group % 2 == 0) | torch.tensor(equal)] = 1.0
    signals = dataclasses.replace(batch.signals, outcomes=Outcomes(rewards=rewards))
    batch = dataclasses.replace(batch, signals=signals)
    found = read.read_export(batch.write(tmp_path, monkeypatch))
    body = "const found = Lens.selectRows(0, Lens.settingsOf(0));"
    body += "return Object.fromEntries(Object.entries(found.masks).map(([k, v]) => [k, Array.from(v)]));"
    masks = node(body, payload([found], strip_of), PAGE)
    for name, mask in compute_token_weights(signals, batch.method).masks.items():
        assert masks[name] == ragged(mask.int(), signals.mask), name
        assert (sum(masks[name]) == 0) == equal
    plain = "const settings = { ...Lens.settingsOf(0), sign: 'absolute' };"  # differences know no advantage
    plain += "return Array.from(Lens.selectRows(0, settings).masks.visual);"
    assert sum(node(plain, payload([found], strip_of), PAGE)) > 0


def test_both_sides_of_a_comparison_have_their_own_settings(
    node: Node, batch_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [batch_of([TEXT] * 4, seed=seed, visual_ratio=0.1 + 0.3 * seed) for seed in (0, 1)]
    found = [read.read_export(b.write(tmp_path / str(i), monkeypatch)) for i, b in enumerate(batches)]
    body = "Lens.state.compare = 1; Lens.state.settings = Lens.settingsOf(0); Lens.reselect();"
    body += "const before = Array.from(Lens.masks.visual); Lens.state.settings.ratios.visual = 0.2;"
    body += "Lens.reselect(); return [before, Array.from(Lens.masks.visual)];"
    before, moved = node(body, payload(found, strip_of), PAGE)
    expected = [compute_token_weights(b.signals, b.method).masks["visual"][b.signals.mask] for b in batches]
    assert before == torch.cat(expected).int().tolist()
    half = len(moved) // 2
    assert sum(moved[:half]) == sum(moved[half:]) > 0  # one control for both


@pytest.mark.parametrize("grain", [None, 0.5])
@pytest.mark.parametrize("rule", ["quantile", "count"])
@pytest.mark.parametrize("scope", ["response", "group", "batch"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"score_sign": "signed", "floor": 0.3},
        {"visual_ratio": 0.0, "temporal_ratio": 1 / 3, "entropy_ratio": 1.0, "entropy_weight": 0.5},
    ],
)
def test_it_selects_as_training_does(
    node: Node,
    batch_of: Callable[..., Any],
    scope: str,
    rule: str,
    grain: float | None,
    change: dict[str, Any],
) -> None:
    texts = [" ".join([TEXT] * (1 + number % 3)) for number in range(23)] + ["<think>", ""]
    batch = batch_of(texts, grain=grain, seed=3, scope=scope, rule=rule, **change)
    signals = dataclasses.replace(batch.signals, mask=batch.signals.mask.clone())
    signals.mask[2, 1] = False  # a token outside the loss, in the middle
    result = compute_token_weights(signals, batch.method)
    inside = torch.arange(signals.mask.shape[1]) < torch.tensor([[len(ids)] for ids in batch.answers])
    lengths = inside.sum(dim=1)
    offsets = [0, *lengths.cumsum(0).tolist()]
    selection = batch.method.selection
    applies = {"visual": signals.has_visual, "temporal": signals.has_temporal, "entropy": lengths >= 0}
    given = {
        "batch": {
            "offsets": offsets,
            "rowOf": torch.arange(len(texts)).repeat_interleave(lengths).tolist(),
            "counted": ragged(signals.mask.int(), inside),
            "groups": signals.group.tolist(),
            "rowKeys": signals.row_keys.tolist(),
        },
        "signals": [
            {
                "name": name,
                "scores": ragged(scores, inside),
                "applies": applies[name].int().tolist(),
                "ratio": getattr(selection, f"{name}_ratio"),
                "weight": getattr(selection, f"{name}_weight"),
            }
            for name, scores in result.scores.items()
        ],
        "options": {"scope": scope, "rule": rule, "floor": selection.floor, "seed": signals.seed % 2**32},
    }
    found = node(SELECT, given)
    for name, mask in result.masks.items():
        assert found["masks"][name] == ragged(mask.int(), inside), name
        assert sum(found["masks"][name]) > 0
    assert found["weights"] == ragged(result.weights, inside)


def test_the_quantile_is_torchs_to_the_last_bit(node: Node) -> None:
    generator = torch.Generator().manual_seed(1)
    cases = []
    for size in (1, 2, 3, 7, 8, 16, 17, 31, 64, 257, 5000):
        for ratio in (0.05, 0.2, 0.3, 1 / 3, 0.5, 0.77, 1.0):
            for scale in (1.0, 1e-4, 1e-7):
                values = torch.randn(size, generator=generator).abs() * scale
                expected = float(torch.quantile(values, 1.0 - ratio))
                cases.append({"values": values.sort().values.tolist(), "ratio": ratio, "expected": expected})
    body = "return given.map((c) => K.quantile(Float32Array.from(c.values), c.ratio));"
    assert node(body, cases) == [case["expected"] for case in cases]


def test_ties_are_drawn_as_by_the_kernels(node: Node) -> None:
    keys, seed = torch.tensor([0, 1, 7, 40000, 65535]), 0xFEDCBA98
    found = node(
        "return given.keys.map((k) => given.columns.map((c) => K.positionHash(k, c, given.seed)));",
        {"keys": keys.tolist(), "columns": list(range(50)), "seed": seed},
    )
    assert found == reference.position_hash(keys, 50, seed).tolist()
    sizes = [(size, ratio) for size in (1, 5, 9, 19, 4096) for ratio in (0.0, 0.2, 1 / 3, 2 / 3, 1.0)]
    counts = node("return given.map(([n, r]) => K.keptCount(n, r));", sizes)
    assert counts == [reference.kept_count(size, ratio) for size, ratio in sizes]


def test_differences_are_rounded_as_training_rounds_them(node: Node) -> None:
    generator = torch.Generator().manual_seed(2)
    real, view = (-torch.rand(500, generator=generator) * 10 for _ in range(2))
    body = "const f = (x) => Float32Array.from(x);"
    body += "return ['a', ''].map((a) => Array.from(K.difference(f(given[0]), f(given[1]), Boolean(a))));"
    absolute, signed = node(body, [real.tolist(), view.tolist()])
    assert absolute == (real - view).abs().tolist()
    assert signed == (real - view).tolist()
