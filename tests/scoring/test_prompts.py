"""The wording that training and evaluation share."""

from __future__ import annotations

import pytest

from keytoken.errors import ConfigurationError, DataError
from keytoken.rewards.answers import ACCURACY_REWARDS
from keytoken.rewards.score import compute_score
from keytoken.scoring.items import KINDS
from keytoken.scoring.prompts import KNOWN_KINDS, TEMPLATES, render, with_options


def test_options_stand_below_the_question() -> None:
    assert with_options("Which?", ["red", "blue"]) == "Which?\nOptions:\nA. red\nB. blue"
    assert with_options("Which?", []) == "Which?"
    with pytest.raises(DataError, match="27 options"):
        with_options("Which?", ["red"] * 27)


@pytest.mark.parametrize("style", sorted(TEMPLATES))
@pytest.mark.parametrize("kind", sorted({*KINDS, *ACCURACY_REWARDS}))
def test_every_kind_of_training_and_of_evaluation_has_a_form(kind: str, style: str) -> None:
    text = render("Which?", kind, style)
    assert kind in KNOWN_KINDS
    assert text.startswith("Which?\n") and "{" not in text
    assert ("<answer>" in text) == (style == "reasoning")


def test_kinds_differ_in_the_form_alone() -> None:
    letter, number = render("Which?", "multiple choice"), render("Which?", "numerical")
    assert letter != number
    assert letter.split("</answer>. ")[0] == number.split("</answer>. ")[0]


def test_braces_and_fields_of_a_question_stay_as_they_are() -> None:
    question = "What does f'{x}' print? {form} {0} {question} %s \\boxed{1}"
    assert render(question, "open").startswith(question + "\n")


def test_a_response_in_the_asked_form_earns_format_and_accuracy() -> None:
    """The reasoning prompt asks for exactly what the reward looks for."""
    asked = render("Which?", "multiple choice")
    tags = [tag for tag in ("<think>", "</think>", "<answer>", "</answer>") if tag in asked]
    response = f"{tags[0]}It is red.{tags[1]}\n{tags[2]}A{tags[3]}"
    scores = compute_score("test", response, "A", {"problem_type": "multiple choice"})
    assert (scores["acc"], scores["format"]) == (1.0, 1.0)


def test_a_template_of_ones_own() -> None:
    assert render("Which?", "yes/no", "Q: {question} ({form})") == "Q: Which? (Reply with yes or no.)"


@pytest.mark.parametrize(
    ("kind", "style", "message"),
    [
        pytest.param("multiple-choice", "direct", "Did you mean 'multiple choice'", id="misspelt kind"),
        pytest.param("open", "reasonning", "Did you mean 'reasoning'", id="misspelt style"),
        pytest.param("open", "Q: {Question}", "holds {question}", id="template without its field"),
    ],
)
def test_unknown_names_are_errors(kind: str, style: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        render("Which?", kind, style)
