"""What a user gets wrong on the command line becomes one message that names it and the closest right word."""

from __future__ import annotations

import pytest

from keytoken.compose import compose_config
from keytoken.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _demo_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", "/somewhere/demo")


# The words after experiment=demo_cpu, and what the message must say.
WRONG = {
    "unknown key of keytoken": (
        "keytoken.method.selecton.visual_ratio=0.3",
        ["keytoken.method.selecton.visual_ratio", "keytoken.method.selection.visual_ratio?"],
    ),
    "unknown key of verl": (
        "trainer.totl_training_steps=3",
        ["trainer.totl_training_steps", "trainer.total_training_steps?", "+trainer.totl_training_steps=3"],
    ),
    "last name of a key, without its place": (
        "learning.kl_coef=1e-5",
        ["Unknown key learning.kl_coef", "keytoken.method.loss.kl_coef"],
    ),
    "unknown option": ("method=video_krt", ["method=video_krt", "video_ktr_official", "mean 'video_ktr'?"]),
    "unknown group": ("methd=grpo", ["Unknown key methd", "method?"]),
    "no override": ("a b", ["'a b'", "KEY=VALUE"]),
    "no equals sign": ("trainer.save_freq", ["'trainer.save_freq'", "KEY=VALUE"]),
    "no value": ("trainer.save_freq=", ["'trainer.save_freq='", "has no value", "trainer.save_freq=null"]),
    "mandatory value left open": ("data.seed=???", ["'data.seed=???'", "has no value"]),
    "several values": ("keytoken.seed=1,2", ["'keytoken.seed=1,2'", "several values", "[a,b]"]),
    "several options": ("method=[grpo,video_ktr]", ["several values"]),
    "open bracket": ("keytoken.seed=[1", ["'keytoken.seed=[1'", "KEY=VALUE"]),
    "key below a value": ("trainer.nnodes.x=3", ["trainer.nnodes.x", "trainer.nnodes?"]),
    "block replaced by a value": ("trainer=abc", ["trainer is a block", "trainer.KEY=VALUE"]),
    "removed key that others read": ("~keytoken.seed", ["keytoken.seed", "data.seed", "restore it"]),
    "removing what is not there": ("~keytoken.sed", ["keytoken.sed", "keytoken.seed?"]),
    "interpolation of nothing": ("keytoken.seed=${keytoken.sed}", ["keytoken.sed, used by keytoken.seed"]),
    "variable that is not set": (
        "keytoken.seed=${oc.env:NO_SUCH}",
        ["NO_SUCH", "keytoken.seed", "export it"],
    ),
    "key added twice": ("+trainer.nnodes=1", ["trainer.nnodes", "++trainer.nnodes=1"]),
}


@pytest.mark.parametrize(("word", "parts"), WRONG.values(), ids=WRONG)
def test_wrong_words(word: str, parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        compose_config(["experiment=demo_cpu", word])
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message
    assert "hydra.cc" not in message and "LexerNoViable" not in message and "provider=" not in message


def test_the_demo_without_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYTOKEN_DEMO_DIR")
    with pytest.raises(ConfigurationError) as caught:
        compose_config(["experiment=demo_cpu"])
    for part in ("KEYTOKEN_DEMO_DIR", "data.train_files", "actor_rollout_ref.model.path", "`keytoken demo`"):
        assert part in str(caught.value)


def test_suggestions_know_the_chosen_options() -> None:
    """grpo has no selection to suggest a key of."""
    with pytest.raises(ConfigurationError, match=r"mean keytoken\.method\.selection\?"):
        compose_config(["experiment=demo_cpu", "method=grpo", "keytoken.method.selecton.visual_ratio=0.3"])


def test_quoted_empty_values_and_lists_are_values() -> None:
    config = compose_config(["experiment=demo_cpu", "trainer.project_name=''", "trainer.logger=[console]"])
    assert config.trainer.project_name == ""
    assert config.trainer.logger == ["console"]
