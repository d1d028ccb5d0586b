"""The golden check: it passes on the published outputs, and it fails when anything is changed."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from keytoken.errors import DataError
from keytoken.golden import check_case, check_file, load_preset, main, parse_case

FILE = "golden/video_ktr_official.json"


@pytest.fixture
def cases(shared_data: Path) -> list[dict[str, Any]]:
    return json.loads((shared_data / FILE).read_text())["cases"]


def write(folder: Path, content: Any) -> Path:
    path = folder / "cases.json"
    path.write_text(json.dumps(content))
    return path


def test_all_published_cases_match(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = check_file(shared_data / FILE)
    assert [result.name for result in results] == ["101", "102", "103", "104", "105", "106"]
    for result in results:
        assert result.matches, result.line()
        assert set(result.wrong_tokens.values()) == {0}
        assert max(result.errors.values()) < 1e-6
    assert main([str(shared_data / FILE)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[-1].startswith("6 of 6")


def test_the_case_with_an_unselected_response_says_what_is_done(shared_data: Path) -> None:
    result = next(r for r in check_file(shared_data / FILE) if r.name == "106")
    assert "response 4 has no selected token" in result.line()
    assert "it adds 0 (loss 0.0196" in result.line()


@pytest.mark.parametrize("signal", ["visual", "temporal", "entropy", "union"])
def test_one_flipped_token_is_a_mismatch(
    cases: list[dict[str, Any]], tmp_path: Path, signal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cases[0]["expected"][signal][3][0] ^= 1
    path = write(tmp_path, {"cases": cases})
    assert main([str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("MISMATCH case 101") and f"1 tokens of {signal} differ" in lines[0]
    assert all(line.startswith("ok") for line in lines[1:6])


@pytest.mark.parametrize("name", ["advantage", "loss", "grad_logp"])
def test_a_difference_above_the_tolerance_is_a_mismatch(cases: list[dict[str, Any]], name: str) -> None:
    expected = cases[1]["expected"]
    if name == "loss":
        expected[name] += 3e-6
    elif name == "advantage":
        expected[name][5] += 3e-6
    else:
        expected[name][2][3] += 3e-6
    result = check_case(parse_case(cases[1], "case"), load_preset("video_ktr_official"))
    assert not result.matches and f"{name} differs by 3" in result.line()


def test_a_null_without_a_reason_is_a_mismatch(cases: list[dict[str, Any]]) -> None:
    cases[0]["expected"]["loss"] = None
    result = check_case(parse_case(cases[0], "case"), load_preset("video_ktr_official"))
    assert not result.matches and "loss is null" in result.line()


def test_another_method_does_not_match(cases: list[dict[str, Any]]) -> None:
    """The check can tell the published code from the paper."""
    official = load_preset("video_ktr_official")
    case = parse_case(cases[1], "case")
    assert official.selection is not None
    variants = [
        load_preset("video_ktr"),
        dataclasses.replace(official, advantage_epsilon=1e-6),
        dataclasses.replace(official, loss=dataclasses.replace(official.loss, mask_kl=False)),
        dataclasses.replace(official, loss=dataclasses.replace(official.loss, normalizer="all")),
        dataclasses.replace(official, selection=dataclasses.replace(official.selection, scope="response")),
        dataclasses.replace(
            official, selection=dataclasses.replace(official.selection, score_sign="absolute")
        ),
    ]
    assert check_case(case, official).matches
    for variant in variants:
        assert not check_case(case, variant).matches, variant


def test_images_need_no_shuffled_view(cases: list[dict[str, Any]]) -> None:
    image = next(case for case in cases if not case["is_video"])
    image["logp_shuffled"] = None
    assert check_case(parse_case(image, "case"), load_preset("video_ktr_official")).matches


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: case.pop("ratio"), "case 2 lacks the key 'ratio'"),
        (lambda case: case["expected"].pop("loss"), "case 2, expected lacks the key 'loss'"),
        (lambda case: case.update(expected=3), "case 2, expected is not an object"),
        (lambda case: case.update(logp=[1.0]), "'logp' has the shape (1,)"),
        (lambda case: case.update(rewards=[1.0]), "'rewards' has the shape (1,); it must be (8,)"),
        (lambda case: case["entropy"][0].pop(), "'entropy' is not a regular grid"),
        (lambda case: case["entropy"][0].insert(0, "x"), "'entropy' is not a regular grid"),
        (lambda case: case["response_mask"][0].__setitem__(0, 2), "'response_mask' must hold 0 and 1"),
        (lambda case: case["expected"]["union"][0].__setitem__(0, None), "'union' must hold 0 and 1"),
        (lambda case: case["logp_masked"][0].__setitem__(0, None), "log-probs of the masked view: nan"),
        (lambda case: case.update(ratio=2.0), "visual_ratio is 2.0"),
    ],
)
def test_bad_cases_are_named(
    cases: list[dict[str, Any]], tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copy.deepcopy(cases)
    change(broken[2])
    assert main([str(write(tmp_path, {"cases": broken}))]) == 2
    assert message in capsys.readouterr().err


def test_bad_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="does not exist"):
        check_file(tmp_path / "nothing.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        check_file(tmp_path / "text.json")
    for content in ([], {}, {"cases": []}, {"cases": {}}):
        with pytest.raises(DataError, match="no list 'cases'"):
            check_file(write(tmp_path, content))
    with pytest.raises(DataError, match="case 0 is not an object"):
        check_file(write(tmp_path, {"cases": [3]}))
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
