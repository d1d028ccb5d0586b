"""What is read from the comments of the presets, against YAML itself and against comments read by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from keytoken.compose import groups, leaves
from keytoken.explain.notes import METHOD, UNMARKED, read_preset

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "keytoken_configs" / "method"


def content_of(name: str) -> dict[str, Any]:
    """The values of a file below the keys that a run knows them by, without those of its bases."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    values = {key: value for key, value in yaml.safe_load(text).items() if key != "defaults"}
    prefix = "" if "@package _global_" in text else f"{METHOD}."
    return {f"{prefix}{key}": value for key, value in leaves(values)}


@pytest.mark.parametrize("name", groups()["method"])
def test_every_value_of_a_file_has_a_note_of_that_file(name: str) -> None:
    preset, values = read_preset(name), content_of(name)
    assert {key for key, note in preset.notes.items() if note.preset == name} == set(values)
    for key, value in values.items():
        assert preset.notes[key].value == value, key
        assert preset.notes[key].mark in MARKS


MARKS = ("known", "known in kind", "known at second hand", "reconstructed", "chosen", UNMARKED)
# Read in the files: preset, key, mark, remark.
COMMENTS = [
    ("tor_grpo", "selection.scope", "known", "the rollout batch"),
    ("tor_grpo", "selection.rule", "reconstructed", "most truncated entropies are exactly 0"),
    ("tor_grpo", "selection.entropy_top_p", "reconstructed", ""),
    ("tor_grpo", "loss.dual_clip", "chosen", "that framework's default"),
    ("tor_grpo", "loss.level", "reconstructed", "the framework it was run in averages over tokens"),
    ("gspo", "loss.level", "known", "a mean over answers"),
    ("dapo", "loss.level", "known in kind", "the paper counts the tokens of a group, verl those of a batch"),
    ("video_ktr", "selection.score_sign", "known at second hand", ""),
    ("video_ktr", "loss.clip_low", "chosen", "the paper clips; 0.2 is chosen, the usual value"),
    ("video_ktr", "loss.dual_clip", "known at second hand", "none"),
    ("tor_dapo", "selection.rule", "reconstructed", "most truncated entropies are exactly 0"),
    ("grpo", "loss.clip_low", UNMARKED, ""),
    ("grpo", "loss.kl_coef", UNMARKED, "verl's default for the KL loss"),
    ("soft", "options.anneal_steps", UNMARKED, "null: from the first step on"),
]


@pytest.mark.parametrize(("name", "key", "mark", "remark"), COMMENTS)
def test_marks_and_remarks(name: str, key: str, mark: str, remark: str) -> None:
    note = read_preset(name).notes[f"{METHOD}.{key}"]
    assert (note.mark, note.remark) == (mark, remark)


def test_a_comment_above_a_block_is_about_all_in_it() -> None:
    notes = read_preset("dapo").notes
    enable, metric = (notes[f"algorithm.filter_groups.{key}"] for key in ("enable", "metric"))
    assert enable.mark == "known" and enable.remark.startswith("a prompt whose answers are all right or all")
    assert (metric.mark, metric.remark) == (enable.mark, enable.remark)
    overlong = notes["reward.reward_kwargs.overlong_buffer_cfg.enable"]
    assert overlong.remark.startswith("the last fifth of the longest answer")


def test_the_head_of_a_file_is_about_no_key_in_particular() -> None:
    """It stands right above the first key, which in these files has no mark of its own."""
    assert read_preset("dapo").headings["dapo"].startswith("DAPO (arXiv 2503.14476): clip-higher")
    assert read_preset("dapo").notes[f"{METHOD}.loss.objective"].mark == UNMARKED
    assert read_preset("soft").notes[f"{METHOD}.name"].remark == ""


def test_a_head_that_says_all_values_are_known() -> None:
    assert {note.mark for note in read_preset("video_ktr_official").notes.values()} == {"known"}


def test_notes_come_from_the_preset_that_had_the_last_word() -> None:
    preset = read_preset("high_entropy")
    assert list(preset.headings) == ["high_entropy", "dapo"]
    assert preset.notes[f"{METHOD}.loss.clip_high"].preset == "dapo"
    assert preset.notes[f"{METHOD}.loss.dual_clip"].preset == "high_entropy"
    # dapo has selection: null, and a block takes its place.
    assert f"{METHOD}.selection" not in preset.notes


def test_a_block_that_is_switched_off_has_no_notes() -> None:
    below = [key for key in read_preset("all").notes if key.startswith(f"{METHOD}.selection")]
    assert below == [f"{METHOD}.selection"]
