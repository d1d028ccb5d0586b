"""``keytoken submit`` before it talks to any cluster."""

import shlex

import pytest

from keytoken.cli import main

PATHS = (
    "keytoken.run_dir=/shared/run",
    "data.train_files=/shared/train.parquet",
    "data.val_files=/shared/val.parquet",
)


def test_dry_run_prints_the_command_of_ray(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=video_ktr_7b", *PATHS]
    assert main(["submit", "--dry-run", "--id", "first", *words]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert command[:4] == ["RAY_API_SERVER_ADDRESS=http://HEAD:8265", "ray", "job", "submit"]
    assert command[4:6] == ["--submission-id", "first"]
    assert command[command.index("--") + 1 :] == ["exec", "python", "-m", "keytoken.cli", "train", *words]


def test_the_address_comes_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:8265")
    assert main(["submit", "--dry-run", "experiment=video_ktr_7b", *PATHS]) == 0
    assert "RAY_API_SERVER_ADDRESS=http://elsewhere:8265 ray job" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train_files=train.parquet"], "data.train_files=train.parquet is no absolute path"),
        (["data.val_files=[/a.parquet,b.parquet]"], "data.val_files=b.parquet is no absolute path"),
        (["data.val_files='~/b.parquet'"], "data.val_files=~/b.parquet is no absolute path"),
        (["keytoken.run_dir=outputs/run"], "keytoken.run_dir=outputs/run is no absolute path"),
        (["data.frame_cache=frames"], "data.frame_cache=frames is no absolute path"),
        (
            ["actor_rollout_ref.model.path=./model"],
            "actor_rollout_ref.model.path=./model is no absolute path",
        ),
        (["trainer.default_local_dir=checkpoints"], "trainer.default_local_dir=checkpoints is no absolute"),
        (["data.quarantine_file=bad.jsonl"], "data.quarantine_file=bad.jsonl is no absolute path"),
        (["methd=grpo"], "methd"),
        (["--max-restarts=2", "trainer.resume_mode=disable"], "trainer.resume_mode=disable: each try"),
        (["--max-restarts=2", "trainer.save_freq=-1"], "without checkpoints"),
        (["--max-restarts=-1"], "--max-restarts -1"),
        (["--stop-grace=0"], "--stop-grace 0"),
        (["--restart-delay=-1"], "--restart-delay -1"),
        (["--max-restarts=2", "--no-wait"], "nobody would see"),
        (["--id=a/b"], "--id a/b"),
        (["--env=NOT_SET_ANYWHERE"], "not set here"),
        (["--source=/nowhere"], "--source /nowhere"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for word in words if word.startswith("--")]
    overrides = [word for word in words if not word.startswith("--")]
    assert main(["submit", "--dry-run", *options, "experiment=video_ktr_7b", *PATHS, *overrides]) == 2
    assert message in capsys.readouterr().err


def test_no_cluster_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert main(["submit", "experiment=video_ktr_7b", *PATHS]) == 2
    assert "give --address http://HEAD:8265" in capsys.readouterr().err


def test_an_address_without_its_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--address", "HEAD:8265", "experiment=video_ktr_7b", *PATHS]) == 2
    assert "write http://HEAD:8265" in capsys.readouterr().err


def test_an_address_where_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--address", "http://127.0.0.1:9", "experiment=video_ktr_7b", *PATHS]) == 3
    assert "no job server of a Ray cluster answers there" in capsys.readouterr().err
