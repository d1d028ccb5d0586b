"""The lens in a real browser, opened from disk: what it selects, shows, refuses, and how fast it is."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import Tensor

from keytoken.attribution.methods import compute_token_weights
from keytoken.demo.render import draw_clip, write_clip
from keytoken.demo.rows import split_question
from keytoken.lens.read import read_export
from keytoken.lens.scale import top_of
from keytoken.lens.write import write_lens

RECORDED = Path(__file__).with_name("data") / "step_000001.parquet"
RECORDED_TOR = RECORDED.with_name("tor_step_000002.parquet")  # another, of method=tor_dapo
TEXT = "<think> the red square moves left . so the answer is left B .</think>"
RIGHT, LEFT, ESCAPE = "\ue014", "\ue012", "\ue00c"
SET_RATIO = """
  const slider = document.getElementById(`ratio-${arguments[0]}`);
  slider.value = arguments[1];
  slider.dispatchEvent(new Event("input"));
"""
FRAME = (
    "const done = arguments[arguments.length - 1]; requestAnimationFrame(() => requestAnimationFrame(done));"
)
MARKS = "return Array.from(Lens.masks[arguments[0]]).join('')"


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """The page of a real step, with a clip for every prompt that had one."""
    question, rng = split_question("train", 0, 0)
    write_clip(tmp_path / "clip.mp4", draw_clip(question.bodies, rng))
    table = pq.read_table(RECORDED).to_pylist()
    for row in table:
        row["clips"] = [{"video": str(tmp_path / "clip.mp4")} for _ in row["clips"]]
    tokens = tmp_path / "run" / "tokens"
    tokens.mkdir(parents=True)
    schema = pq.read_schema(RECORDED)
    pq.write_table(pa.Table.from_pylist(table, schema=schema), tokens / "step_000001.parquet")
    return write_lens(tmp_path / "run", say=print)


def flat(mask: Tensor, batch: Any) -> str:
    """A mask [B, T] as the page has it: the tokens of one answer after the other."""
    rows = zip(mask.int().tolist(), batch.answers, strict=True)
    return "".join("".join(map(str, row[: len(ids)])) for row, ids in rows)


def test_a_real_step_opens_and_selects_as_training_did(browser: Any, recorded: Path) -> None:
    browser.open(recorded)
    assert "selects as training did" in browser.run("return document.getElementById('agreement').textContent")
    export = read_export(RECORDED)
    for name in ("visual", "temporal", "entropy"):
        expected = np.concatenate([answer.selected[name] for answer in export.answers]).astype(int)
        assert browser.run(MARKS, name) == "".join(map(str, expected))
    assert browser.messages() == []
    assert browser.requests() == []


def test_the_controls_select_as_training_would(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_of: Callable[..., Any]
) -> None:
    """The slider and the switches in the page against training with those settings, ties and all."""
    texts = [" ".join([TEXT] * (1 + number % 3)) for number in range(20)]
    batch = batch_of(texts, grain=0.5)
    batch.write(tmp_path, monkeypatch)
    browser.open(write_lens(tmp_path, say=print))
    for scope, rule, ratio in (
        ("group", "quantile", 0.35),
        ("batch", "count", 0.1),
        ("response", "count", 0.5),
    ):
        browser.run(SET_RATIO, "temporal", ratio)
        for key in (scope, rule):
            browser.run("document.querySelector(`[data-key=${arguments[0]}]`).click()", key)
        browser.run(
            "if (document.getElementById('on-visual').checked) document.getElementById('on-visual').click()"
        )
        browser.wait(FRAME)
        wanted = batch_of(texts, grain=0.5, scope=scope, rule=rule, temporal_ratio=ratio, visual_ratio=0.0)
        result = compute_token_weights(wanted.signals, wanted.method)
        for name in ("temporal", "entropy"):
            assert browser.run(MARKS, name) == flat(result.masks[name], batch), (scope, rule, name)
        assert set(browser.run(MARKS, "visual")) == {"0"}
    browser.press("r")  # the settings of training again
    browser.wait(FRAME)
    trained = compute_token_weights(batch.signals, batch.method)
    assert browser.run(MARKS, "visual") == flat(trained.masks["visual"], batch)


def test_ties_of_a_real_step_of_tor_fall_as_they_fell_in_training(browser: Any, tmp_path: Path) -> None:
    """Exact counts over the whole batch: most truncated entropies are 0, so the draw decides."""
    export = read_export(RECORDED_TOR)
    selection = export.about["method"]["selection"]
    assert (selection["rule"], selection["scope"]) == ("count", "batch")
    browser.open(write_lens(RECORDED_TOR, out=tmp_path / "lens.html", say=print))
    for name in ("visual", "entropy"):
        expected = np.concatenate([answer.selected[name] for answer in export.answers]).astype(int)
        assert browser.run(MARKS, name) == "".join(map(str, expected))
    scores = np.concatenate([answer.values["uncertainty"] for answer in export.answers])
    chosen = np.concatenate([answer.selected["entropy"] for answer in export.answers])
    assert (scores[chosen] == 0).any() and (scores[~chosen] == 0).any()  # there are ties at the threshold


def test_what_is_selected_is_marked_in_the_text(browser: Any, recorded: Path) -> None:
    browser.open(recorded)
    browser.run(SET_RATIO, "entropy", 1)
    browser.wait(FRAME)
    count = "return [document.querySelectorAll('.tok').length, document.querySelectorAll('.tok.e').length]"
    tokens, marked = browser.run(count)
    assert tokens == marked > 50
    browser.run(SET_RATIO, "entropy", 0)
    browser.wait(FRAME)
    assert browser.run(count) == [tokens, 0]


def test_pointing_at_a_token_shows_all_its_values(browser: Any, recorded: Path) -> None:
    browser.open(recorded)
    browser.hover(".answer .tok:nth-of-type(4)")
    shown = browser.run("return document.getElementById('token').textContent")
    at = browser.run("return Number(document.querySelector('.answer .tok:nth-of-type(4)').dataset.at)")
    answer = read_export(RECORDED).answers[0]
    assert answer.texts[at].strip() in shown
    for name in ("visual", "temporal", "entropy", "log_prob", "log_prob_masked", "advantage"):
        value = browser.run("return Lens.format(arguments[0])", float(answer.values[name][at]))
        assert value in shown, name
    assert browser.run("return document.querySelectorAll('#profile canvas').length") == 1


def test_the_page_colours_on_the_scale_of_the_picture(browser: Any, recorded: Path) -> None:
    browser.open(recorded)
    export = read_export(RECORDED)
    for key, name in (("1", "visual"), ("2", "temporal"), ("3", "entropy")):
        browser.press(key)
        assert browser.run("return Lens.state.colour") == name
        assert browser.run("return Lens.scale().max") == top_of(export, name)


def test_the_frames_stand_in_both_orders(browser: Any, recorded: Path) -> None:
    browser.open(recorded)
    places = """return [...document.querySelectorAll('.strip')].slice(0, 2)
        .map((strip) => [...strip.querySelectorAll('img')].map((image) => image.alt))"""
    real, view = browser.run(places)
    assert real == [f"frame {number}" for number in range(1, 9)]
    assert sorted(view) == sorted(real) and view != real
    loaded = (
        "return [...document.querySelectorAll('.strip img')].every((i) => i.complete && i.naturalWidth > 0)"
    )
    assert browser.run(loaded)
    overlaps = """const rows = [...document.querySelectorAll('#canvas > *')]
          .map((row) => row.getBoundingClientRect());
        rows.sort((a, b) => a.top - b.top);
        return rows.some((row, i) => i > 0 && row.top < rows[i - 1].bottom - 0.5);"""
    for layout in ("list", "side"):
        browser.run("document.querySelector(`[data-key=${arguments[0]}]`).click()", layout)
        browser.wait(FRAME)
        assert not browser.run(overlaps)


def test_keys(browser: Any, recorded: Path) -> None:
    browser.open(recorded)
    browser.press("j", "j", RIGHT, RIGHT, LEFT)
    answer, token, first = browser.run("return [Lens.state.answer, Lens.state.token, Lens.offsets[1]]")
    assert (answer, token) == (1, first + 1)
    browser.press("n")
    assert browser.run("return Lens.answers.prompt[Lens.state.answer]") == 1
    browser.press("1")
    assert browser.run("return Lens.state.colour") == "visual"
    before = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.press("t")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") != before
    browser.press("?")
    assert browser.run("return document.getElementById('keys').open")
    browser.press(ESCAPE)
    assert not browser.run("return document.getElementById('keys').open")
    browser.press("/", *"plus")
    time.sleep(0.3)
    prompts = browser.run("return [...document.querySelectorAll('.ask')].map((a) => a.textContent)")
    assert prompts and all("plus" in prompt for prompt in prompts)


def test_every_panel_has_content(browser: Any, recorded: Path) -> None:
    browser.open(recorded)
    for number, wanted in enumerate(("percent", "temporal", "shape", "difference", "score sign")):
        browser.run("document.querySelectorAll('#tabs button')[arguments[0]].click()", number)
        assert wanted in browser.run("return document.getElementById('panel').textContent")
    browser.run("document.querySelectorAll('#tabs button')[1].click()")
    rows = browser.run(
        "return [...document.querySelectorAll('#panel tr')].slice(1).map((r) => r.children[0].textContent)"
    )
    values = dict.fromkeys(rows)
    export = read_export(RECORDED)
    words = [word.strip() for answer in export.answers for word in answer.texts]
    assert values and set(values) <= set(words)
    assert browser.messages() == []


HOSTILE = (
    "</script><script>window.owned = 1</script>",
    "<img src=x onerror='window.owned = 1'><svg onload='window.owned = 1'>",
    "{{SCRIPTS}} ${window.owned = 1} `${window.owned = 1}` <!-- ]]> &lt;script&gt;",
    "\u202e\u2066 evil \u2069 \u200f\u200b\ufeff \u2028 \u2029 \x07",
    "\u0e14" + "\u0e49" * 300 + "\U0001f468\u200d\U0001f469\u200d\U0001f467 " + "\U0001f3f4" * 50,
    "javascript:window.owned=1 <a href='javascript:window.owned=1'>" + "x" * 5000,
    "<style>*{display:none}</style><meta http-equiv=refresh content='0;url=http://192.0.2.1/'>",
    "<iframe src='http://192.0.2.1/'></iframe><link rel=stylesheet href='//192.0.2.1/a.css'>",
)


def test_hostile_answers_run_nothing(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_of: Callable[..., Any]
) -> None:
    batch = batch_of(HOSTILE, per_prompt=2, prompt=" ".join(HOSTILE[:5]), clip=f"/{HOSTILE[0]}.mp4")
    file = batch.write(tmp_path / "<img src=x onerror=alert(1)>", monkeypatch)
    rows, schema = pq.read_table(file).to_pylist(), pq.read_schema(file)
    rows[0]["token_bytes"][: len(HOSTILE)] = [text.encode() for text in HOSTILE]  # each a single token
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    page = write_lens(tmp_path / "<img src=x onerror=alert(1)>", out=tmp_path / "lens.html", say=print)
    browser.open(page)
    for key in ("j", "j", RIGHT, "s", "t"):
        browser.press(key)
        for tab in range(5):
            browser.run("document.querySelectorAll('#tabs button')[arguments[0]].click()", tab)
    assert browser.run("return window.owned") is None
    assert browser.requests() == []
    assert browser.messages() == []
    assert (
        browser.run("return document.querySelectorAll('iframe, link, object, embed, #list img').length") == 0
    )
    text = browser.run(
        "return Array.from({ length: Lens.answers.length.length }, (_, row) => Lens.textOf(row))"
    )
    assert text[0].startswith(HOSTILE[0] + HOSTILE[1]) and text[1] == HOSTILE[1]
    assert "\u202e" not in text[3] and "\u27e8202E\u27e9" in text[3]  # said, and not obeyed
    # Nothing of an answer reaches out of its box.
    boxes = """const edge = document.getElementById('list').getBoundingClientRect().right;
        const boxes = [...document.querySelectorAll('.answer')].map((box) => box.getBoundingClientRect());
        return boxes.length > 0 && boxes.every((box) => box.right <= edge);"""
    assert browser.run(boxes)


def test_the_policy_stops_what_slips_through(browser: Any, recorded: Path) -> None:
    """Markup that somebody managed to put into the page still runs nothing and asks nobody."""
    browser.open(recorded)
    browser.requests()
    browser.run(
        """const box = document.createElement("div"); document.body.append(box);
        box.innerHTML = "<img src=x onerror='window.owned = 1'><img src='http://192.0.2.1/a.png'>";
        const script = document.createElement("script");
        script.textContent = "window.owned = 1"; box.append(script);"""
    )
    refused = browser.wait(
        """const done = arguments[arguments.length - 1];
        fetch("http://192.0.2.1/").then(() => done("sent"), () => done("refused"));"""
    )
    assert refused == "refused"
    assert browser.run("return window.owned") is None
    assert browser.requests() == []
    assert any("Content Security Policy" in message for message in browser.messages())


def test_a_thousand_answers_stay_responsive(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_of: Callable[..., Any]
) -> None:
    texts = [" ".join([TEXT] * (6 + number % 5)) for number in range(1000)]  # 110 to 190 tokens
    batch_of(texts, per_prompt=8).write(tmp_path, monkeypatch)
    page = write_lens(tmp_path, say=print)
    began = time.perf_counter()
    browser.open(page)
    load_s = time.perf_counter() - began
    assert browser.run("return document.getElementById('count').textContent") == "1000 answers"
    assert browser.run("return document.querySelectorAll('.answer').length") < 40  # only what can be seen
    frames = browser.wait(
        """const done = arguments[arguments.length - 1]; const list = document.getElementById("list");
        const times = []; let last = performance.now();
        (function step() {
          const now = performance.now(); times.push(now - last); last = now;
          if (times.length > 60) return done(times.slice(1));
          list.scrollTop += times.length % 20 ? 240 : list.scrollHeight / 5; // a wheel, or a jump
          requestAnimationFrame(step);
        })();"""
    )
    assert browser.run("return document.querySelectorAll('.answer').length") < 40
    select = browser.wait(
        """const done = arguments[arguments.length - 1];
        const slider = document.getElementById("ratio-temporal");
        const began = performance.now(); slider.value = 0.4; slider.dispatchEvent(new Event("input"));
        requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));"""
    )
    search = browser.wait(
        """const done = arguments[arguments.length - 1]; const box = document.getElementById("search");
        const began = performance.now(); box.value = "9"; box.dispatchEvent(new Event("input"));
        (function look() { document.getElementById("count").textContent !== "1000 answers"
          ? done(performance.now() - began) : requestAnimationFrame(look); })();"""
    )
    figures = {
        "page_mb": page.stat().st_size / 1e6,
        "load_s": load_s,
        "frame_ms_median": statistics.median(frames),
        "frame_ms_p95": sorted(frames)[int(0.95 * len(frames))],
        "slider_ms": select,
        "search_ms": search,
    }
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))
    # Far above what an idle machine needs, far below what a frozen page takes.
    assert load_s < 20 and figures["frame_ms_median"] < 250 and select < 5000 and search < 5000


def test_answers_of_no_and_of_8000_tokens(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_of: Callable[..., Any]
) -> None:
    batch_of([" red" * 8000, "", " blue"], per_prompt=3).write(tmp_path, monkeypatch)
    browser.open(write_lens(tmp_path, say=print))
    assert browser.run("return Array.from(Lens.answers.length)") == [8000, 0, 1]
    browser.press("j", RIGHT, "j", "j", RIGHT)
    assert browser.run("return Lens.state.answer") == 2
    assert "blue" in browser.run("return document.getElementById('token').textContent")
    assert "(no tokens)" in browser.run("return document.getElementById('list').textContent")


def test_an_empty_export_says_so(browser: Any, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(RECORDED).slice(0, 0), tmp_path / "step_000001.parquet")
    browser.open(write_lens(tmp_path, say=print))
    assert "hold no answers" in browser.run("return document.getElementById('list').textContent")
    browser.press("j", RIGHT, "s", "1")
    assert browser.messages() == []


def test_two_steps_stand_side_by_side(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_of: Callable[..., Any]
) -> None:
    """Before and after: the same prompts, the left answer of one run beside the right answer of the other."""
    before = batch_of([TEXT, "red", "blue", TEXT], per_prompt=2)
    after = batch_of([TEXT, "red left", "blue", TEXT], per_prompt=2, seed=1)
    before.write(tmp_path / "a", monkeypatch)
    after.write(tmp_path / "b", monkeypatch)
    browser.open(write_lens(tmp_path / "a", compare=str(tmp_path / "b"), say=print))
    pairs = """return [...document.querySelectorAll('.answers')]
        .map((row) => [...row.querySelectorAll('.text')].map((text) => text.textContent))"""
    shown = browser.run(pairs)
    assert shown == [[TEXT, TEXT], ["red", "red left"], ["blue", "blue"], [TEXT, TEXT]]
    assert browser.run("return document.querySelectorAll('.dots').length") == 4
    assert browser.run("return document.body.textContent.includes('same answer')")
    assert browser.messages() == []
