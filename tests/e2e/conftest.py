"""Real runs: every fixture starts a real Ray cluster, a real vLLM engine and real FSDP workers."""

import dataclasses
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

REWARD = Path(__file__).with_name("reward.py")
TOUR = str(Path(__file__).with_name("tour.py"))
# Enough for answers of about the right form, most of them wrong.
TINY_WARM_START = {"text_steps": 20, "clip_steps": 40, "relabel_steps": 5}
# A start takes about a minute on two idle cores; the bound is for machines that are busy.
RUN_TIMEOUT_S = 900
CLUSTER_TIMEOUT_S = 120

SMALL = (
    "experiment=demo_cpu",
    f"reward.custom_reward_function.path={REWARD}",
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.max_num_seqs=32",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
    "keytoken.attribution.micro_batch_size=8",
    "keytoken.attribution.base_tolerance=1e-5",
    "keytoken.export.every_steps=1",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a finished run left behind.

    Attributes:
        folder: Its run folder.
        listening: Title of the process and address of every listening socket, seen once while it ran.
    """

    folder: Path
    listening: tuple[tuple[str, str], ...] = ()

    def metrics(self) -> list[dict[str, float]]:
        """One for each training step; the step 0 of a validation before training is left out."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [row["data"] for row in rows if row["step"] > 0]

    def validation(self, step: int) -> list[tuple[str, str, str]]:
        """Held-out answers, sorted: prompt, number of the answer, answer."""
        with (self.folder / "validation" / f"{step}.jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return sorted((row["input"], row["uid"].split("_", 1)[1], row["output"]) for row in rows)

    def tokens(self, step: int) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "tokens" / f"step_{step:06d}.parquet")

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"global_step_{step}"

    def weights(self, step: int, rank: int = 0, *, of: int = 1) -> dict[str, torch.Tensor]:
        """What one rank of the actor saved, of so many."""
        path = self.checkpoint(step) / "actor" / f"model_world_size_{of}_rank_{rank}.pt"
        state = torch.load(path, weights_only=False)
        return {
            name: value.to_local() if hasattr(value, "to_local") else value for name, value in state.items()
        }


def _processes_in(ray_dir: str | Path, title: str) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["environ", "cmdline"])
        if (process.info["environ"] or {}).get("RAY_TMPDIR") == str(ray_dir)
        and " ".join(process.info["cmdline"] or ()).startswith(title)
    ]


class Launcher:
    """Starts runs as a user does, each in a Ray session of its own, and cleans up by process id."""

    def __init__(self, demo_dir: Path, folder: Path) -> None:
        self.demo_dir, self.folder = demo_dir, folder

    def start(
        self,
        name: str,
        *overrides: str,
        program: tuple[str, ...] = ("-m", "keytoken.cli", "train"),
        environment: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> "Job":
        # Ray's sockets lie below this folder, and a socket's path may not exceed 107 characters.
        ray_dir = tempfile.mkdtemp(prefix="kt-", dir="/tmp")
        variables = {
            **os.environ,
            **(environment or {}),
            "KEYTOKEN_DEMO_DIR": str(self.demo_dir),
            "RAY_TMPDIR": ray_dir,
            "OMP_NUM_THREADS": "1",
        }
        log = self.folder / f"{name}.log"
        run_dir = self.folder / name
        command = [
            *prefix,
            sys.executable,
            *program,
            *SMALL,
            f"keytoken.run_dir={run_dir}",
            *overrides,
        ]
        with log.open("a") as output:
            process = subprocess.Popen(
                command,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
            )
        return Job(process, Run(run_dir), log, Path(ray_dir))

    def run(self, name: str, *overrides: str, **options: Any) -> Run:
        return self.start(name, *overrides, **options).finish()

    def tour(self, name: str, stops: Sequence[str], *overrides: str) -> Run:
        """One run of several methods, two steps each (``tour.py``)."""
        return self.run(name, *overrides, program=(TOUR,), environment={"KEYTOKEN_TOUR": ",".join(stops)})


@dataclasses.dataclass
class Job:
    process: subprocess.Popen
    run: Run
    log: Path
    ray_dir: Path

    def finish(self) -> Run:
        """Wait for the end of the run; fail with the end of its log if it does not end well."""
        try:
            code = self.process.wait(RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = "time limit"
        finally:
            self.kill()
        if code != 0:
            pytest.fail(f"the run ended with {code}; last lines of its log:\n{self.tail()}", pytrace=False)
        return self.run

    def wait_for(self, ready: Callable[[], bool], timeout_s: float = RUN_TIMEOUT_S) -> None:
        """Wait until a condition holds, while the run is alive."""
        limit = time.monotonic() + timeout_s
        while not ready():
            if self.process.poll() is not None or time.monotonic() > limit:
                self.kill()
                pytest.fail(f"the run ended before it was ready:\n{self.tail()}", pytrace=False)
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL the driver and whatever it started: all processes below it or in its Ray session."""
        family = []
        if self.process.poll() is None:  # else its number may belong to somebody else by now
            family = [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
            family.append(self.process.pid)
        family += [process.pid for process in self.processes()]
        for pid in dict.fromkeys(family):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(30)
        shutil.rmtree(self.ray_dir, ignore_errors=True)

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Those of the run's Ray whose command begins with a title, such as ``ray::AttributionWorker``."""
        return _processes_in(self.ray_dir, title)

    def listening(self) -> tuple[tuple[str, str], ...]:
        """Title and address of every socket that a process of the run listens on."""
        found = []
        for process in self.processes():
            try:
                sockets = process.net_connections("tcp")
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
                continue
            title = " ".join(process.info["cmdline"] or ())
            found += [(title, each.laddr.ip) for each in sockets if each.status == psutil.CONN_LISTEN]
        return tuple(found)

    def tail(self) -> str:
        return "\n".join(line[:500] for line in self.log.read_text(errors="replace").splitlines()[-60:])


class Cluster:
    """A head with logical GPUs; everything it starts carries its folder in the environment."""

    def __init__(self, num_gpus: int) -> None:
        # Ray's sockets lie below this folder, and a socket's path may not exceed 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        self.client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        ports = free_ports(4)
        self.address = f"http://127.0.0.1:{ports[0]}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={self.folder}"]
        command += [
            f"--dashboard-port={ports[0]}",
            f"--port={ports[1]}",
            f"--ray-client-server-port={ports[2]}",
        ]
        command += [f"--dashboard-agent-listen-port={ports[3]}", "--disable-usage-stats"]
        command += [f"--num-gpus={num_gpus}", f"--num-cpus={16 * num_gpus}"]
        self.log = self.folder / "head.log"
        with self.log.open("w") as output:
            self.head = subprocess.Popen(
                command,
                env={**os.environ, **self.client, **self._activated(), "RAY_TMPDIR": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._wait_for_the_job_server(ports[0])

    @staticmethod
    def _activated() -> dict[str, str]:
        """The environment of an activated virtual environment: the `python` of jobs is this one."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "OMP_NUM_THREADS": "1"}

    def _wait_for_the_job_server(self, port: int) -> None:
        limit = time.monotonic() + CLUSTER_TIMEOUT_S
        while not _answers(port):
            if self.head.poll() is not None or time.monotonic() > limit:
                self.stop()
                raise RuntimeError(f"the cluster did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.2)

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Its processes whose command begins with a title, such as ``ray::AttributionWorker``."""
        return _processes_in(self.folder, title)

    def stop(self) -> None:
        """SIGKILL everything of it, by process id."""
        for process in self.processes():
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.head.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo world whose model has seen a few supervised steps only: enough to answer, not to answer well."""
    from keytoken.demo.prepare import DemoConfig, prepare
    from keytoken.demo.validation import write_validation
    from keytoken.demo.warm_start import WarmStartConfig

    torch.set_num_threads(1)
    config = DemoConfig(num_train=28, num_heldout=7, warm_start=WarmStartConfig(**TINY_WARM_START))
    assets = prepare(config, root=tmp_path_factory.mktemp("world"))
    write_validation(assets.heldout_file, assets.root / "validation.parquet")
    return assets.root


@pytest.fixture(scope="session")
def make_launcher(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Launcher]:
    """A launcher for a given demo world."""
    return lambda world: Launcher(world, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def launcher(make_launcher: Callable[[Path], Launcher], tiny_world: Path) -> Launcher:
    return make_launcher(tiny_world)


@pytest.fixture(scope="session")
def straight(launcher: Launcher) -> Run:
    """A validation, then four steps of Video-KTR on three pools with a checkpoint after two and four."""
    job = launcher.start(
        "straight", "trainer.val_before_train=true", "trainer.total_training_steps=4", "trainer.save_freq=2"
    )
    metrics = job.run.folder / "metrics.jsonl"
    job.wait_for(lambda: metrics.exists() and '"step":1' in metrics.read_text().replace(" ", ""))
    listening = job.listening()
    return dataclasses.replace(job.finish(), listening=listening)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster with room for the three pools."""
    started = Cluster(num_gpus=3)
    yield started
    started.stop()
