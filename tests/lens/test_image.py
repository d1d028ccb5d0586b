"""One answer as a PNG: what is drawn can be seen in its pixels."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keytoken.cli import main
from keytoken.errors import DataError
from keytoken.lens import image
from keytoken.lens.image import find_answer, lines_of, png_of, write_image
from keytoken.lens.read import read_export

RECORDED = Path(__file__).with_name("data") / "step_000001.parquet"


def test_the_command_draws_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "answer.png"
    assert main(["lens", str(RECORDED), "--image", "--answer", "3", "--out", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    export = read_export(RECORDED)
    without = dataclasses.replace(export.answers[3], selected={})
    marked, bare = (coloured(path) for path in (target, write_image(export, without, tmp_path / "bare.png")))
    assert all(more > less + 100 for more, less in zip(marked, bare, strict=True)), (marked, bare)


def test_the_scale_is_that_of_the_whole_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_of: Callable[..., Any]
) -> None:
    """The same answer is paler where another answer of the step has larger scores; the heading says why."""
    export = read_export(batch_of(["red blue"] * 4, clip="").write(tmp_path, monkeypatch))
    answer, *others = export.answers
    louder = [
        dataclasses.replace(each, values={name: 9 * values for name, values in each.values.items()})
        for each in others
    ]
    written: list[str] = []
    write = image._write
    monkeypatch.setattr(
        image, "_write", lambda *given, **style: written.append(given[3]) or write(*given, **style)
    )
    darkness = []
    for step in (export, dataclasses.replace(export, answers=(answer, *louder))):
        written.clear()
        pixels = np.asarray(Image.open(io.BytesIO(png_of(step, answer))).convert("L"))
        darkness.append(float((255 - pixels.astype(float)).mean()))
        for name in ("visual", "temporal", "entropy"):
            values = np.abs(np.concatenate([each.values[name] for each in step.answers]))
            values = sorted(values[values > 0])
            top = values[int(0.97 * (len(values) - 1))]
            assert any(f"{name}: colours from 0 to {top:.3g}" in text for text in written), name
    assert darkness[1] < 0.9 * darkness[0]


def coloured(path: Path) -> list[int]:
    """Pixels in the colour of each signal; the frames of selected tokens are, and the signal's name."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    colours = ((0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x9E, 0x73))
    return [int((np.abs(pixels - colour).max(axis=1) < 12).sum()) for colour in colours]


def test_an_answer_is_found_by_name_or_place() -> None:
    export = read_export(RECORDED)
    answer = export.answers[9]
    assert find_answer(export, f"{answer.prompt_id}/{answer.number}") is answer
    assert find_answer(export, "9") is answer and find_answer(export, None) is export.answers[0]
    with pytest.raises(DataError, match="prompt/number"):
        find_answer(export, "nobody/0")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "answer.png"
    for words in (["--image"], []):
        assert main(["lens", str(RECORDED), *words, "--out", str(target)]) == 2
        assert f"{target}: cannot be written" in capsys.readouterr().err


def test_a_picture_is_a_png_by_any_name(tmp_path: Path) -> None:
    export = read_export(RECORDED)
    target = write_image(export, export.answers[0], tmp_path / "answer.v1")
    assert Image.open(target).format == "PNG"


def test_lines_hold_every_token_once() -> None:
    texts = ("<think>", " a" * 30, " b" * 40, "\n", "c\n\nd", "$x$", "\u202e", "e" * 300)
    lines = lines_of(texts)
    assert sorted(number for line in lines for number, _, _ in line) == list(range(len(texts)))
    assert all(column + len(text) <= 134 for line in lines for _, column, text in line)
    assert "\u202e" not in "".join(text for line in lines for *_, text in line)
    assert lines_of(()) == [[]]


@pytest.mark.parametrize("length", [0, 8000])
def test_answers_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_of: Callable[..., Any], length: int
) -> None:
    file = batch_of([" red" * length, "blue $ { \\frac"], per_prompt=2).write(tmp_path, monkeypatch)
    export = read_export(file)
    assert len(export.answers[0].texts) == length
    for number in (0, 1):
        target = write_image(export, export.answers[number], tmp_path / f"{number}.png")
        assert Image.open(target).size[0] == 1500


@pytest.mark.parametrize("words", [["--answer", "1"], ["--image", "--compare", "2"]])
def test_options_that_do_not_fit_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lens", str(RECORDED), *words]) == 2
    assert "leave --" in capsys.readouterr().err
