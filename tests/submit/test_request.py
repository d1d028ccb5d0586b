"""What is submitted, and the printed command that does the same."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from keytoken.errors import ConfigurationError
from keytoken.submit.request import PACKAGES, Request, source_of, variables_of

ROOT = Path(__file__).parents[2]


def as_a_shell_sees_it(command: str, **variables: str) -> list[str]:
    """The words that a shell makes of a command."""
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"],
        capture_output=True,
        check=True,
        env={"PATH": os.environ["PATH"], **variables},
    ).stdout.decode()
    return printed.split("\0")[:-1]


def test_a_shell_reads_the_printed_command_as_it_was_meant() -> None:
    overrides = (
        "experiment=demo_cpu",
        "data.train_files=[/a b.parquet,'/c$d']",
        'trainer.logger=["console"]',
    )
    variables = {"WANDB_API_KEY": 'its secret\'s "worth" $5', "KEYTOKEN_DEMO_DIR": "/demo"}
    request = Request(overrides, "job-1", variables, Path("/check out"))
    command = request.plain_command("http://head:8265")
    assert "secret" not in command  # a terminal's history and a log are no places for it
    words = as_a_shell_sees_it(command, **{"WANDB_API_KEY": "plain", "KEYTOKEN_DEMO_DIR": "/demo"})
    assert words[:7] == ["ray", "job", "submit", "--address", "http://head:8265", "--submission-id", "job-1"]
    assert words[7] == "--runtime-env-json"
    assert json.loads(words[8]) == {
        "env_vars": {"WANDB_API_KEY": "plain", "KEYTOKEN_DEMO_DIR": "/demo"},
        "py_modules": [f"/check out/{package}" for package in PACKAGES],
        "excludes": ["**/__pycache__/", "*.pyc"],
    }
    assert words[9:] == ["--", "python", "-m", "keytoken.cli", "train", *overrides]
    assert as_a_shell_sees_it(request.entrypoint()) == words[10:]


def test_nothing_beside_the_words_needs_no_environment() -> None:
    request = Request(("method=grpo",), "job", {})
    assert request.runtime_env() == {} and "--runtime-env-json" not in request.plain_command(
        "http://head:8265"
    )


def test_variables_that_go_along(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KEYTOKEN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", "/demo")
    monkeypatch.setenv("TOKEN_OF_A_TRACKER", "its value")
    assert variables_of(["TOKEN_OF_A_TRACKER", "NCCL_DEBUG=", "A=b=c"]) == {
        "KEYTOKEN_DEMO_DIR": "/demo",
        "TOKEN_OF_A_TRACKER": "its value",
        "NCCL_DEBUG": "",
        "A": "b=c",
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("NOT_SET_ANYWHERE", "the variable is not set here"),
        ("1A=x", "no name of a variable"),
        ("=x", "no name"),
    ],
)
def test_variables_that_cannot_go_along(word: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        variables_of([word])


def test_source_is_a_checkout(tmp_path: Path) -> None:
    assert source_of(None) is None and source_of(str(ROOT)) == ROOT
    with pytest.raises(ConfigurationError, match="no recipe/keytoken there"):
        source_of(str(tmp_path))
