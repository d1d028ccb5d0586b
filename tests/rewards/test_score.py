import inspect

import pytest

from keytoken.errors import ConfigurationError, DataError
from keytoken.rewards.score import compute_score

CHOICE = {"problem_type": "multiple choice"}
RIGHT = "<think> the square is red . so the answer is red B . </think> <answer> B </answer>"


def test_right_and_well_formed() -> None:
    assert compute_score("demo", RIGHT, "B", CHOICE) == {
        "score": 2.0,
        "acc": 1.0,
        "format": 1.0,
        "length_bonus": 0.0,
    }


@pytest.mark.parametrize(
    ("response", "acc", "well_formed"),
    [
        ("<answer>B</answer>", 1, 0),
        (RIGHT.replace("B", "C"), 0, 1),
        (RIGHT + " and more", 1, 0),
        ("", 0, 0),
        ("<|video_pad|>" * 9, 0, 0),
    ],
)
def test_accuracy_and_format_are_independent(response: str, acc: float, well_formed: float) -> None:
    result = compute_score("demo", response, "<answer>B</answer>", CHOICE)
    assert (result["acc"], result["format"], result["score"]) == (acc, well_formed, acc + well_formed)


def test_weights_and_real_length() -> None:
    info = {**CHOICE, "response_length": 400}
    result = compute_score(
        "demo", RIGHT, "B", info, accuracy_weight=2.0, format_weight=0.5, length_weight=0.2
    )
    assert result["score"] == pytest.approx(2.7) and result["length_bonus"] == 1.0
    with pytest.raises(ConfigurationError, match="response_length"):
        compute_score("demo", RIGHT, "B", CHOICE, length_weight=0.2)


def test_missing_problem_type_names_the_dataset() -> None:
    with pytest.raises(DataError, match="demo"):
        compute_score("demo", RIGHT, "B", {})


def test_verl_passes_these_names_and_maybe_more() -> None:
    """verl's reward managers call with four keywords, plus router settings and ``reward_kwargs``."""
    arguments = {"data_source": "demo", "solution_str": RIGHT, "ground_truth": "B", "extra_info": CHOICE}
    inspect.signature(compute_score).bind(**arguments)
    assert compute_score(**arguments, reward_router_address="x", reward_model_tokenizer=None)["acc"] == 1.0
