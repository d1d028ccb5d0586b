"""Nothing foreign is run, nothing secret is written down, nothing listens further than it has to."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from keytoken.compose import compose_config, groups, leaves
from keytoken.doctor.exposure import exposure
from keytoken.doctor.finding import Subject
from keytoken.errors import ConfigurationError
from keytoken.secret import is_secret, is_secret_name, shown
from keytoken.submit.request import variables_of
from keytoken.validate import validate_run
from keytoken.verl_adapter.machine import LOOPBACK, stay_on_loopback

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for root in ("recipe", "kernels", "configs") for path in (ROOT / root).rglob("*.py"))
# Calls that run what they read, and what makes each of them harmless.
DANGEROUS = {
    "pickle.load": None,
    "pickle.loads": None,
    "cloudpickle.loads": None,
    "marshal.loads": None,
    "joblib.load": None,
    "pd.read_pickle": None,
    "yaml.load": None,
    "yaml.unsafe_load": None,
    "eval": None,
    "exec": None,
    "os.system": None,
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
}


def calls(path: Path) -> list[ast.Call]:
    return [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ]


def constants(call: ast.Call) -> dict[str | None, object]:
    return {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}


def test_no_call_runs_what_it_reads() -> None:
    found = []
    for path in SOURCES:
        for call in calls(path):
            name, given = ast.unparse(call.func), constants(call)
            needed = DANGEROUS.get(name, ())
            if needed is None or (needed and given.get(needed[0]) is not needed[1]):
                found.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
            if given.get("trust_remote_code") or given.get("shell"):
                found.append(f"{path.relative_to(ROOT)}:{call.lineno} {ast.unparse(call)}")
    assert found == []


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_no_experiment_trusts_code_or_holds_a_secret(
    experiment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", str(tmp_path))
    config = compose_config([f"experiment={experiment}"])
    trusted = {
        key: value
        for key, value in leaves(OmegaConf.to_container(config))
        if key.endswith("trust_remote_code")
    }
    assert trusted and not any(trusted.values())
    validate_run(config)


SECRETS = (
    "HF_TOKEN MY_TOKEN WANDB_API_KEY JUDGE_KEY AWS_SECRET_ACCESS_KEY DB_PASSWORD env_vars.OPENAI_API_KEY "
    "api_key trainer.access_token hub_token a.password"
)
NO_SECRETS = (
    "data.prompt_key video_key eos_token pad_token num_tokens max_tokens keytoken.run_dir tokenizer "
    "KEYTOKEN_DEMO_DIR KEYTOKEN_CI reward_fn_key token_level NCCL_DEBUG"
)


@pytest.mark.parametrize(("names", "secret"), [(SECRETS, True), (NO_SECRETS, False)])
def test_secrets_are_known_by_name(names: str, secret: bool) -> None:
    assert [name for name in names.split() if is_secret_name(name) is not secret] == []


def test_secrets_are_known_by_form() -> None:
    forms = {"hf_": 34, "sk-": 48, "sk-proj-": 40, "ghp_": 36, "github_pat_": 82, "AKIA": 16, "AIza": 35}
    assert all(is_secret("note", f"its {form}{length * 'A'}.") for form, length in forms.items())
    assert is_secret("url", "https://me:pass@host/v1")
    for path in ("/data/sk-learn-models/hf_home", "/shared/hf_checkpoints_of_2026", "/task-0123456789/ghp_x"):
        assert not is_secret("path", path)
    assert not is_secret("url", "http://127.0.0.1:8000/v1")
    assert not is_secret("api_key", "") and not is_secret("api_key", None)


def test_what_is_printed_of_a_word() -> None:
    assert shown("+a.api_key=abc") == "+a.api_key=***"
    assert shown(f"x=[sk-{32 * 'a'}]") == "x=[***]"
    assert shown("url=https://me:pass@host/v1") == "url=https://***@host/v1"
    assert shown("trainer.save_freq=10") == "trainer.save_freq=10"


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.api_key=my,own"],
        ["trainer.api_key=mine"],
        ["+trainer.api_key=mine"],
        ["trainer.api_key=[mine"],
        ["+ray_kwargs.ray_init.runtime_env.env_vars.HF_TOKEN=mine"],
    ],
)
def test_no_message_about_a_configuration_quotes_a_secret(words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        validate_run(compose_config(["experiment=grpo_7b", *words]))
    assert "mine" not in str(caught.value) and "my" not in str(caught.value)


def test_a_submission_hides_what_looks_like_a_secret() -> None:
    variables, hidden = variables_of(["NCCL_DEBUG=INFO", "HF_TOKEN=mine", "NOTE=hf_" + 34 * "a"])
    assert {"HF_TOKEN", "NOTE"} <= hidden and "NCCL_DEBUG" not in hidden
    assert variables["HF_TOKEN"] == "mine"


def test_loopback_is_chosen_before_ray_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray reads the variable once. What `keytoken train` imports before that may not import Ray."""
    program = (
        "import sys, keytoken.main, keytoken.doctor.run; assert 'ray' not in sys.modules;"
        "keytoken.main.stay_on_loopback();"
        "from ray._private.services import get_node_ip_address; print(get_node_ip_address())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in LOOPBACK}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split()[-1:] == ["127.0.0.1"], done.stderr
    ((name, value),) = LOOPBACK.items()
    monkeypatch.setenv(name, "1")
    stay_on_loopback()
    assert os.environ[name] == "1" != value


def run_of(**keys: object) -> Subject:
    config = OmegaConf.create(
        {"ray_kwargs": {"ray_init": {}}, "actor_rollout_ref": {"model": {"trust_remote_code": False}}}
    )
    for key, value in keys.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    return Subject(config)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A user without Ray's token and variables."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", *LOOPBACK):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_exposure_of_a_local_run(bare: pytest.MonkeyPatch) -> None:
    assert exposure(run_of()).status == "ok"
    trusting = exposure(run_of(actor_rollout_ref__model__trust_remote_code=True))
    assert trusting.status == "warn" and "model.trust_remote_code=false" in trusting.remedy
    open_to_all = exposure(run_of(ray_kwargs__ray_init__dashboard_host="0.0.0.0"))
    assert open_to_all.status == "warn" and "dashboard_host=0.0.0.0" in open_to_all.found
    assert exposure(run_of(ray_kwargs__ray_init__dashboard_host="127.0.0.1")).status == "ok"
    bare.setenv(*next((name, "1") for name in LOOPBACK))
    assert exposure(run_of()).status == "warn"


def test_exposure_of_a_cluster(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "no token" in exposure(run_of()).found
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    assert "all interfaces" in exposure(run_of()).found  # Ray takes the token that lies there
    bare.setenv("RAY_AUTH_MODE", "disabled")
    assert "no token" in exposure(run_of()).found
    bare.setenv("RAY_AUTH_MODE", "token")
    assert "all interfaces" in exposure(run_of()).found
