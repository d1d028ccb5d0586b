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
    variables = {"WANDB_API_KEY": "its secret's worth $5", "KEYTOKEN_DEMO_DIR": '/"demo"', "LEVEL": "a b"}
    hidden = frozenset({"WANDB_API_KEY"})
    request = Request(overrides, "job-1", "/runs/1", variables, hidden, Path("/check out"))
    command = request.plain_command("http://head:8265")
    assert "secret" not in command  # a terminal's history and a log are no places for it
    words = as_a_shell_sees_it(command, WANDB_API_KEY=variables["WANDB_API_KEY"])
    assert words[0] == "RAY_API_SERVER_ADDRESS=http://head:8265"
    assert words[1:6] == ["ray", "job", "submit", "--submission-id", "job-1"]
    assert words[6] == "--runtime-env-json"
    assert json.loads(words[7]) == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "900", **variables},
        "py_modules": [f"/check out/{package}" for package in PACKAGES],
        "excludes": ["**/__pycache__/", "*.pyc"],
    }
    assert words[8] == "--metadata-json" and json.loads(words[9]) == {"keytoken_run_dir": "/runs/1"}
    assert words[10:] == ["--", "exec", "python", "-m", "keytoken.cli", "train", *overrides]
    assert as_a_shell_sees_it(request.entrypoint()) == words[11:]


@pytest.mark.parametrize("value", ['a"b', "a\\b", "a\nb"])
def test_a_hidden_value_that_no_shell_can_put_into_json_is_refused(value: str) -> None:
    request = Request(("method=grpo",), "job", "/runs/1", {"KEY": value}, frozenset({"KEY"}))
    with pytest.raises(ConfigurationError, match="--env KEY: its value holds"):
        request.plain_command("http://head:8265")
    plain = Request(("method=grpo",), "job", "/runs/1", {"KEY": value})
    words = as_a_shell_sees_it(plain.plain_command("http://head:8265"))
    environment = json.loads(words[words.index("--runtime-env-json") + 1])
    assert environment["env_vars"]["KEY"] == value


def test_a_stopped_job_has_time_to_save_its_step() -> None:
    """Ray would kill it after three seconds; who sets Ray's own variable has the last word."""
    request = Request(("method=grpo",), "job", "/runs/1", {}, stop_grace_s=60)
    assert request.runtime_env() == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    own = Request(("method=grpo",), "job", "/runs/1", {"RAY_JOB_STOP_WAIT_TIME_S": "5"})
    assert own.runtime_env()["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "5"}


def test_variables_that_go_along(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KEYTOKEN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", "/demo")
    monkeypatch.setenv("TOKEN_OF_A_TRACKER", "its value")
    variables, hidden = variables_of(["TOKEN_OF_A_TRACKER", "NCCL_DEBUG=", "A=b=c"])
    assert variables == {
        "KEYTOKEN_DEMO_DIR": "/demo",
        "TOKEN_OF_A_TRACKER": "its value",
        "NCCL_DEBUG": "",
        "A": "b=c",
    }
    assert hidden == {"TOKEN_OF_A_TRACKER"}


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
