"""Hosts in network namespaces: a Ray cluster of four and a client, on one machine."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

ROOT = Path(__file__).parents[3]
# Enough for two steps between one fault and the next; each is saved, and is where the next try goes on.
STEPS = ("trainer.total_training_steps=15", "trainer.save_freq=1")
ACROSS = (
    "trainer.nnodes=2",
    "trainer.n_gpus_per_node=1",
    *(f"keytoken.cluster.{pool}_hosts={pool}_host" for pool in ("actor", "rollout", "attribution")),
)
# What a run's metrics have of the clock, and of where its workers are.
CLOCK = re.compile(r"timing|perf/|_s$|_s/|seconds|throughput|mfu")
# What compares the engine's log-probs with the actor's. The engine joins the requests that have come to one
# batch, which is another at every run, and rounds otherwise: between two runs on the same hosts these metrics
# differed by up to 5e-7. The gap that they measure is a thousand times as large.
ENGINE = re.compile(r"^rollout_corr/|^training/rollout_|^parity/")
ENGINE_ROUNDING = 5e-6
# The parity gate is asked once a try, so a try that goes on has its answer in another step.
GATE = re.compile(r"^parity/(?!rollout_)")
# The processes of a run; of Ray itself others stay.
OF_A_RUN = re.compile(r"^ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent)|^VLLM::|keytoken\.cli train")
START_LIMIT_S, STOPPED_S, GONE_S = 180, 120.0, 15.0
# A network of its own: nothing outside of the namespaces sees these addresses.
NETWORK, CLIENT = "10.77.0.{}", 254
# One GPU each, and which pool a host takes workers of.
HOSTS = {"h1": "attribution_host", "h2": "rollout_host", "h3": "actor_host", "h4": "actor_host"}
HEAD = "h1"
# What Ray calls the processes of the pools, and the hosts that are theirs.
PLACES = {
    "ray::AttributionWorker": ["h1"],
    "ray::ProbedServer": ["h2"],
    "ray::WorkerDict": ["h3", "h4"],
}
# How soon the head gives up a host that has gone silent; Ray's own values take half a minute or more.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
# Inside a namespace of mounts, process ids and the hostname: files that every machine has of its own.
ENTER = """set -e
hostname {name}
mount -t tmpfs -o size=2g shm /dev/shm
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/resolv.conf /etc/resolv.conf
exec "$@"
"""


class Host:
    """A machine: its network, hostname, process ids, ``/dev/shm`` and Ray's folder are its own."""

    def __init__(self, name: str, number: int, namespace: str, folder: Path) -> None:
        self.name, self.namespace = name, namespace
        self.address = NETWORK.format(number)
        self.folder, self.log = folder / name, folder / f"{name}.log"
        self._process: subprocess.Popen | None = None
        self._init: psutil.Process | None = None

    def start(self, head: str, environment: Mapping[str, str]) -> None:
        """``ray start`` as on a machine that has just been switched on."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        ray += [f"--node-ip-address={self.address}", "--num-gpus=1", "--num-cpus=8"]
        ray += ["--resources", f'{{"{HOSTS[self.name]}": 1}}', "--object-store-memory=300000000"]
        if self.name == HEAD:
            ray += ["--head", "--port=6379", f"--dashboard-host={self.address}", f"--temp-dir={self.folder}"]
        else:
            ray += [f"--address={head}:6379", f"--temp-dir={self.folder}"]
        enter = ENTER.format(name=self.name, folder=self.folder.parent)
        alone = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["ip", "netns", "exec", self.namespace, *alone, "sh", "-c", enter, "sh", *ray]
        with self.log.open("a") as output:
            self._process = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        limit = time.monotonic() + START_LIMIT_S
        while "Ray runtime started" not in self.log.read_text().rpartition("--start--")[2]:
            if self._process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.2)
        (self._init,) = psutil.Process(self._process.pid).children()

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Its processes whose command begins with a title, such as ``ray::AttributionWorker``."""
        found = []
        for process in self._init.children(recursive=True) if self._init and self._init.is_running() else []:
            try:
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self) -> None:
        """SIGKILL to all its processes at once: to the first, with which the kernel ends the others."""
        if self._init is not None and self._init.is_running():
            self._init.send_signal(signal.SIGKILL)
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
        with self.log.open("a") as log:
            log.write("--start--\n")


class HostCluster:
    """Four hosts and, on the bridge that joins them, a client without Ray."""

    def __init__(self) -> None:
        # Ray's sockets lie below this folder, and a socket's path may not exceed 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))
        mark = f"kt{os.getpid()}"
        self.client_namespace = f"{mark}-client"
        self.hosts = {
            name: Host(name, number, f"{mark}-{name}", self.folder)
            for number, name in enumerate(HOSTS, start=1)
        }
        head = self.hosts[HEAD].address
        self.address = f"http://{head}:8265"
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        self.client = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "OMP_NUM_THREADS": "1",
            # Whatever binds or looks for an address of its own has to find that of the network.
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, **self.client, **HEALTH, "PATH": path}
        names = [f"{host.address} {host.name}" for host in self.hosts.values()]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        # Nobody listens there, which is known at once. Behind the machine's own server, out of reach from
        # here, torch waits 10 s for the name of each process that joins a group.
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        try:
            self._connect()
            self.start(HEAD)
            with ThreadPoolExecutor() as pool:
                list(pool.map(self.start, [name for name in self.hosts if name != HEAD]))
        except BaseException:
            self.stop()
            raise

    def _connect(self) -> None:
        gateway, client = NETWORK.format(CLIENT), self.client_namespace
        for namespace in (client, *(host.namespace for host in self.hosts.values())):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", client, "link", "add", "bridge", "type", "bridge")
        _ip("-n", client, "address", "add", f"{gateway}/24", "dev", "bridge")
        _ip("-n", client, "link", "set", "bridge", "up")
        for name, host in self.hosts.items():
            inside = host.namespace
            _ip("-n", client, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", inside)
            _ip("-n", client, "link", "set", name, "master", "bridge", "up")
            _ip("-n", inside, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", inside, "link", "set", "eth0", "up")
            _ip("-n", inside, "route", "add", "default", "via", gateway)

    def start(self, name: str) -> None:
        """Switch a host on."""
        self.hosts[name].start(self.hosts[HEAD].address, self._environment)

    def set_link(self, name: str, state: str) -> None:
        """Plug the network cable of a host in ("up") or out ("down")."""
        _ip("-n", self.client_namespace, "link", "set", name, state)

    @property
    def on_client(self) -> tuple[str, ...]:
        """What to put before a command that is to run on the client."""
        return ("ip", "netns", "exec", self.client_namespace)

    def processes(self, title: str) -> dict[str, list[psutil.Process]]:
        """The processes of that title, by host; hosts without one are left out."""
        found = {name: host.processes(title) for name, host in self.hosts.items()}
        return {name: processes for name, processes in found.items() if processes}

    def stop(self) -> None:
        """End everything that was started, and take the namespaces away."""
        for host in self.hosts.values():
            host.kill()
        for namespace in (*(host.namespace for host in self.hosts.values()), self.client_namespace):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, timeout=30)
        shutil.rmtree(self.folder, ignore_errors=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _why_not() -> str | None:
    """Why namespaces cannot be made here; None where they can."""
    missing = [name for name in ("ip", "unshare", "mount", "hostname") if shutil.which(name) is None]
    if missing:
        return f"hosts in namespaces need {', '.join(missing)} (iproute2, util-linux, hostname)"
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    probe = f"kt{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=30)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, timeout=30)
    return f"hosts in namespaces: {made.stderr.strip()}" if made.returncode else None


@pytest.fixture(scope="module")
def hosts() -> Iterator[HostCluster]:
    """Four hosts with one Ray cluster; gone before the tests of another module want the processors."""
    reason = _why_not()
    if reason is not None:
        pytest.skip(reason)
    started = HostCluster()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def submit_across(hosts: HostCluster, launcher: Any) -> Callable[..., Any]:
    """Submits a run over the hosts from the client; returns its job."""

    def submit(name: str, *flags: str, words: Sequence[str] = ()) -> Any:
        program = ("-m", "keytoken.cli", "submit", "--address", hosts.address, f"--source={ROOT}", *flags)
        options = {"program": program, "environment": hosts.client, "prefix": hosts.on_client}
        return launcher.start(name, *STEPS, *ACROSS, *words, **options)

    return submit


@pytest.fixture(scope="module")
def assert_placed(hosts: HostCluster) -> Callable[[], None]:
    """Every pool is on its own hosts."""

    def look() -> None:
        assert {title: list(hosts.processes(title)) for title in PLACES} == PLACES

    return look


@pytest.fixture(scope="session")
def one_host(launcher: Any) -> Any:
    """The uninterrupted run, with two ranks of the actor on one host."""
    return launcher.run("one_host", *STEPS, "trainer.n_gpus_per_node=2")


@pytest.fixture(scope="module")
def left_over(hosts: HostCluster) -> Callable[..., list[str]]:
    """Tells which processes of a run are on hosts that live, a while after its end."""

    def look(but: Collection[str] = ()) -> list[str]:
        limit = time.monotonic() + GONE_S
        while True:
            there = {name: host.processes() for name, host in hosts.hosts.items() if name not in but}
            titles = [f"{name}: {_title(process)}" for name, found in there.items() for process in found]
            left = [each for each in titles if OF_A_RUN.search(each.partition(": ")[2])]
            if not left or time.monotonic() > limit:
                return left
            time.sleep(0.5)

    return look


@pytest.fixture(scope="module")
def told_to_stop(left_over: Callable[..., list[str]]) -> Callable[[Any], int]:
    """Waits for the end of a job that was told to stop; its last step, which is complete and saved."""

    def wait(job: Any) -> int:
        began, code = time.monotonic(), job.process.wait(STOPPED_S)
        log = job.log.read_text(errors="replace")
        print(f"the job had ended with {code} after {time.monotonic() - began:.1f} s, saying\n{log[-1500:]}")
        assert code == 143
        (step,) = re.findall(r"keytoken: SIGTERM: the run ended after step (\d+), saved in ", log)
        assert job.run.checkpoint(int(step)).is_dir()
        assert left_over() == []
        return int(step)

    return wait


@pytest.fixture(scope="session")
def assert_same_steps() -> Callable[[Any, Any, Sequence[int]], None]:
    """Bit for bit: metrics, answers with all that is known of their tokens, weights of both ranks.

    Only what the engine's own roundings go into may differ by as much as these.
    """

    def compare(run: Any, other: Any, steps: Sequence[int]) -> None:
        for step in steps:
            assert _differences(*(_metrics_of(each, step) for each in (run, other))) == {}
            pd.testing.assert_frame_equal(run.tokens(step), other.tokens(step), check_exact=True)
        last = max(steps)
        for rank in (0, 1):
            one, two = (each.weights(last, rank, of=2) for each in (run, other))
            assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    return compare


def _metrics_of(run: Any, step: int) -> dict[str, float]:
    (row,) = (row for row in run.metrics() if row["training/global_step"] == step)
    return {key: value for key, value in row.items() if not CLOCK.search(key)}


def _differences(one: dict[str, float], two: dict[str, float]) -> dict[str, tuple[Any, Any]]:
    """The metrics of a step that two runs do not share."""
    found, engine = {}, 0.0
    for name in one.keys() | two.keys():
        mine, others = one.get(name), two.get(name)
        if mine is None or others is None:
            if not GATE.search(name):
                found[name] = (mine, others)
            continue
        tolerance = ENGINE_ROUNDING if ENGINE.search(name) else 0.0
        if tolerance:
            engine = max(engine, abs(mine - others))
        if not abs(mine - others) <= tolerance:
            found[name] = (mine, others)
    print(f"step {one['training/global_step']:g}: the engine's roundings made up to {engine:.1e}")
    return found
