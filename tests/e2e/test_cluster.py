"""``keytoken submit`` against the job server of a real Ray cluster; see test_training.py for a whole job."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def submit(cluster: Any, folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess:
    """A job whose files exist on no node."""
    words = [f"data.{name}_files={folder}/{name}.parquet" for name in ("train", "val")]
    words += ["experiment=video_ktr_7b", "platform=cpu", f"keytoken.run_dir={folder}/run"]
    return subprocess.run(
        [sys.executable, "-m", "keytoken.cli", "submit", *options, *words],
        env={**os.environ, **cluster.client, "RAY_API_SERVER_ADDRESS": cluster.address, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_users_error_is_not_tried_twice_and_comes_back_as_it_is(cluster: Any, tmp_path: Path) -> None:
    options = ("--id=mistaken", "--max-restarts=3", "--restart-delay=0")
    failed = submit(cluster, tmp_path, *options)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert f"keytoken: data.train_files: {tmp_path}/train.parquet does not exist" in failed.stdout
    assert failed.stdout.count(": submitted;") == 1
    assert failed.stdout.rstrip().endswith("FAILED: Job entrypoint command failed with exit code 2")
    again = submit(cluster, tmp_path, "--id=mistaken", "--no-wait")
    assert again.returncode == 3
    assert "job mistaken was refused" in again.stderr and "give another by --id" in again.stderr


def test_a_cluster_that_wants_a_token(cluster: Any, tmp_path: Path) -> None:
    refused = submit(cluster, tmp_path, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    assert refused.returncode == 3, refused.stderr
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr and "Traceback" not in refused.stderr
