"""The page as a file: what it holds, what it allows, and that no answer can leave its place as text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keytoken.lens.classes import class_of, known_words
from keytoken.lens.frames import Strip
from keytoken.lens.page import build_page, payload
from keytoken.lens.read import read_export

RECORDED = Path(__file__).with_name("data") / "step_000001.parquet"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> <!-- {{DATA}} \u2028 & \" '"


class Tags(HTMLParser):
    """Start tags, and the text of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, dict[str, str | None], str]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts.append((*self.tags[-1], data))


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def data_of(page: str) -> dict[str, Any]:
    found = [text for _, attributes, text in parsed(page).texts if attributes.get("id") == "data"]
    return json.loads("".join(found))


def test_the_page_is_one_file_that_allows_nothing_else() -> None:
    page = build_page([read_export(RECORDED)], title="run")
    tags = parsed(page)
    policy = next(a["content"] for t, a in tags.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "unsafe" not in policy and "http" not in policy and "connect-src" not in policy
    for tag, attributes in tags.tags:  # nothing is fetched: no address anywhere
        assert not {"src", "href", "action"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
    programs = [text for tag, a, text in tags.texts if tag == "script" and "type" not in a]
    styles = [text for tag, _, text in tags.texts if tag == "style"]
    assert len(programs) == 6 and len(styles) == 2
    for text in [*programs, *styles]:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "MIT License" in page and "Leon Sorokin" in page  # the licence travels with the library


def test_our_scripts_make_no_markup_of_text() -> None:
    folder = Path(read_export.__code__.co_filename).with_name("web")
    for name in ("select.js", "data.js", "list.js", "panels.js", "main.js"):
        text = (folder / name).read_text()
        forbidden = (
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|fetch\(|XMLHttp"
        )
        assert re.findall(forbidden, text) == [], name


def test_hostile_text_stays_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_of: Callable[..., Any]
) -> None:
    file = batch_of([HOSTILE, "red"], prompt=HOSTILE, clip=f"/{HOSTILE}.mp4").write(tmp_path, monkeypatch)
    page = build_page([read_export(file)], title=HOSTILE)
    tags = parsed(page)
    assert [tag for tag, _ in tags.tags].count("script") == 7 and "img" not in dict(tags.tags)
    data = data_of(page)
    length = data["answers"]["length"][0]
    words = np.frombuffer(base64.b64decode(data["words"]), dtype="<u4")[:length]
    assert "".join(data["vocabulary"][word] for word in words) == HOSTILE
    assert HOSTILE in data["prompts"][0]["text"]
    assert data["title"] == HOSTILE


def test_numbers_arrive_bit_for_bit() -> None:
    export = read_export(RECORDED)
    data = data_of(build_page([export], title="run"))
    for name in ("visual", "temporal", "entropy", "log_prob", "advantage"):
        found = np.frombuffer(base64.b64decode(data["columns"][name]), dtype="<f4")
        expected = np.concatenate([answer.values[name] for answer in export.answers])
        np.testing.assert_array_equal(found, expected)
    flags = np.frombuffer(base64.b64decode(data["flags"]), dtype=np.uint8)
    for bit, name in enumerate(("visual", "temporal", "entropy")):
        expected = np.concatenate([answer.selected[name] for answer in export.answers])
        np.testing.assert_array_equal((flags >> bit & 1).astype(bool), expected)
    assert (flags >> 3 == 0b1111).all()
    assert data["answers"]["right"] == [answer.accuracy == 1.0 for answer in export.answers]


def test_clips_that_are_gone_are_named() -> None:
    data = data_of(build_page([read_export(RECORDED)], title="run"))
    notes = [strip["note"] for prompt in data["prompts"] for strip in prompt["strips"]]
    assert notes and all("no such file" in note for note in notes)


def test_every_prompt_has_its_own_frames() -> None:
    asked: list[tuple[Any, ...]] = []

    def strip(clip: Any, prompt_id: str, number: int, about: Any, viewed: bool) -> Strip:
        asked.append((clip, prompt_id, number, about["shuffle_seed"], viewed))
        return Strip(path=str(clip), frames=("data:,",), times=(0.0,))

    export = read_export(RECORDED)
    still = next(a.prompt_id for a in export.answers if a.clips)  # say that training had no view of this one
    for answer in export.answers:
        answer.applies["temporal"] = answer.prompt_id != still
    data = payload([export], strip)
    expected = {(a.clips[0], a.prompt_id, 0, 0, a.prompt_id != still) for a in export.answers if a.clips}
    assert sorted(asked) == sorted(expected)
    for row, answer in enumerate(export.answers):
        prompt = data["prompts"][data["answers"]["prompt"][row]]
        assert prompt["id"] == answer.prompt_id
        assert [one["path"] for one in prompt["strips"]] == list(answer.clips or ())


def test_words_have_classes() -> None:
    known = known_words({"direction": ["left"], "own": ["zebra"]})
    assert class_of(" left", known) == "direction"  # the run's own classes come first
    assert class_of("First", known) == "order"
    assert class_of(" zebra", known) == "own"
    assert class_of("<think>", known) == "special"
    assert class_of(" A", known) == "letter"
    assert class_of("xyzzy", known) == "word"
