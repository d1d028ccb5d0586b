"""Every method trains two steps on the real stack, all on one cluster (``tour.py``)."""

import math

import numpy as np
import pandas as pd
import pytest

from keytoken.compose import groups
from keytoken.golden import load_preset

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

# T-GRPO is trained in test_training.py, where its rewards are looked at.
METHODS = [name for name in groups()["method"] if name != "t_grpo"]
# Methods that keep every answer token, by what their files say.
KEEP_ALL = {"all", "cispo", "dapo", "dr_grpo", "grpo", "gspo", "papo_dapo", "papo_grpo", "soft", "tw_grpo"}
# Methods whose share by entropy is one of all tokens of a batch.
OF_A_BATCH = ["high_entropy", "tor_dapo", "tor_grpo"]


@pytest.fixture(scope="session")
def tour(launcher):
    """One run through all methods, two steps each, the second with diagnostics."""
    return launcher.tour(
        "tour",
        METHODS,
        "keytoken.export.max_responses=16",
        "keytoken.diagnostics.every_steps=2",
        "trainer.total_epochs=20",
        "trainer.save_freq=-1",
    )


def seen(tour, name: str) -> tuple[list[dict[str, float]], pd.DataFrame]:
    """The metrics of a method's two steps, and its answers with their tokens."""
    first = 2 * METHODS.index(name) + 1
    steps = {int(step["training/global_step"]): step for step in tour.metrics()}
    return [steps[first], steps[first + 1]], pd.concat([tour.tokens(first), tour.tokens(first + 1)])


@pytest.mark.parametrize("name", METHODS)
def test_it_trains(tour, name) -> None:
    steps, tokens = seen(tour, name)
    for step in steps:
        assert math.isfinite(step["actor/loss"]) and step["actor/grad_norm"] > 0
        assert (
            step["attribution/selected_share"] == 1.0
            if name in KEEP_ALL
            else 0.1 < step["attribution/selected_share"] < 0.9
        )
        assert step.get("attribution/base_gap_max", 0.0) <= 1e-5
        assert step.get("kernels/advantage_gap_max", 0.0) <= 1e-5
    assert len(tokens) == 32
    assert steps[1]["diagnostics/gradient/selected/norm"] > 0
    assert not any(key.startswith("diagnostics/") for key in steps[0])


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_the_methods_own(tour, name) -> None:
    """What the actor was trained on, looked at from outside."""
    _, tokens = seen(tour, name)
    weights = [np.asarray(row) for row in tokens["weight"]]
    values = set(np.unique(np.concatenate(weights)))
    if name in ("tor_grpo", "tor_dapo"):
        assert values == {0.0, 0.5, 1.0}
    elif name == "vppo":
        assert 0.0 in values and len(values) > 3  # a factor for each answer
    elif name == "soft":
        assert all(row.mean() == pytest.approx(1.0, rel=1e-5) and row.std() > 0 for row in weights)
    elif name == "tw_grpo":
        assert min(values) == 1.0 and max(values) == pytest.approx(1.7)
    else:
        assert values == ({1.0} if name in KEEP_ALL else {0.0, 1.0})


@pytest.mark.parametrize("name", OF_A_BATCH)
def test_exact_shares_of_a_batch_are_exact(tour, name) -> None:
    selection = load_preset(name).selection
    assert selection is not None and selection.scope == "batch"
    for _, step in seen(tour, name)[1].groupby("step"):
        chosen = np.concatenate([np.asarray(row) for row in step["selected_entropy"]])
        assert chosen.sum() == math.ceil(round(selection.entropy_ratio * len(chosen), 6))


def test_tor_over_dapo_with_its_groups_and_its_penalty(launcher) -> None:
    """With dynamic sampling: every group of a trained batch has answers that differ in their rewards."""
    run = launcher.run(
        "tor_dapo", "method=tor_dapo", "trainer.total_training_steps=2", "trainer.save_freq=-1"
    )
    for step in run.metrics():
        assert step["actor/grad_norm"] > 0 and step["attribution/groups_without_advantage"] == 0.0
    tokens = pd.concat([run.tokens(1), run.tokens(2)])
    assert (tokens.groupby(["step", "prompt_id"])["reward"].nunique() > 1).all()
    assert set(np.unique(np.concatenate(tokens["weight"].tolist()))) == {0.0, 0.5, 1.0}
