"""Checks of the machine, each against a machine that is broken for real where that can be had."""

from __future__ import annotations

import multiprocessing.shared_memory
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from keytoken.doctor import child, cluster, codecs, devices, memory, packages, system
from keytoken.doctor.finding import MIB, Finding, Subject

MACHINE = Subject()
Ask = Callable[..., Finding]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "keytoken-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_package_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.packages(MACHINE).status == "ok"
    find = metadata.version
    changed = {"numpy": "1.26.4"}
    monkeypatch.setattr(metadata, "version", lambda name: changed.get(name) or find(name))
    other = packages.packages(MACHINE)
    assert other.status == "warn" and "1 of" in other.found
    assert f"numpy 1.26.4 (locked: {find('numpy')})" in other.found


def test_another_verl_is_a_failure(tmp_path: Path) -> None:
    """A real one, as metadata finds it, in an interpreter of its own."""
    found = tmp_path / "verl-0.8.0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.8.0\n")
    done = subprocess.run(
        [sys.executable, "-m", "keytoken.cli", "doctor", "--short"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "fail   packages" in done.stdout and "found 0.8.0, KeyToken needs ==0.9.1" in done.stdout


def test_a_part_of_the_stack_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensordict.py").write_text("raise ImportError('libnuma.so.1: cannot open shared object')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(packages, "STACK", ("torch", "tensordict"))
    found = packages.imports(MACHINE)
    assert found.status == "fail"
    assert found.found == "importing tensordict: ImportError: libnuma.so.1: cannot open shared object"


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 9), "fail"), ((3, 10), "warn"), ((3, 11), "ok"), ((3, 12), "warn"), ((3, 13), "fail")],
)
def test_pythons_that_setup_admits_stop_nobody(
    version: tuple[int, int], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages.sys, "version_info", (*version, 0, "final", 0))
    assert packages.python(MACHINE).status == status


def test_shared_memory_that_is_too_small(small_disk: Path) -> None:
    found = system.shared_memory(MACHINE, small_disk)
    assert found.status == "fail"
    assert "4 MiB free, the run needs 400 MiB" in found.found and "--shm-size" in found.remedy


def test_segments_of_processes_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nobody has mapped is named; one of the same age that this process has mapped is not."""
    segments = [multiprocessing.shared_memory.SharedMemory(create=True, size=MIB) for _ in range(2)]
    paths = [system.SHARED_MEMORY / segment.name for segment in segments]
    try:
        segments[0].close()
        old = time.time() - 3600
        assert not set(paths) & set(system.leftovers(system.SHARED_MEMORY)), "both are too young"
        for path in paths:
            os.utime(path, (old, old))
        found = system.leftovers(system.SHARED_MEMORY)
        assert paths[0] in found and paths[1] not in found
        assert system.shared_memory(MACHINE).status == "warn"
        assert system.shared_memory(Subject(short=True)).status == "ok"
    finally:
        segments[1].close()
        for segment in segments:
            segment.unlink()


def test_a_full_disk(small_disk: Path, finding: Ask) -> None:
    found = finding(
        "disks", f"keytoken.run_dir={small_disk}/run", "+ray_kwargs.ray_init.address=10.0.0.1:6379"
    )
    assert (found.status, "from this machine" in found.found) == ("warn", True), "of a cluster"
    found = finding("disks", f"keytoken.run_dir={small_disk}/run")
    assert (found.status, found.remedy[:27]) == ("fail", "Name another folder: keytok")
    assert f"{small_disk}/run has 4 MiB free" in found.found
    (small_disk / "filler").write_bytes(bytes(4 * MIB - 8192))
    assert "no space is left" in finding("disks", f"keytoken.run_dir={small_disk}/run").found


def test_a_run_folder_that_cannot_be_written(tmp_path: Path, finding: Ask) -> None:
    """Below a system's folder, which not even root can write; and below a file."""
    found = finding("disks", "keytoken.run_dir=/proc/keytoken")
    assert found.status == "fail" and "keytoken.run_dir: /proc/keytoken cannot be written" in found.found
    (tmp_path / "file").touch()
    assert "is a file" in finding("disks", f"keytoken.run_dir={tmp_path}/file/run").found
    assert finding("disks", f"keytoken.run_dir={tmp_path}/run").status == "ok"
    assert not (tmp_path / "run").exists()


def test_a_port_that_somebody_holds(finding: Ask) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        found = finding("ports", f"+ray_kwargs.ray_init.dashboard_port={port}", short=True)
        assert (
            found.status == "fail" and f"dashboard_port={port}" in found.found and "ss -ltnp" in found.remedy
        )
    assert finding("ports", f"+ray_kwargs.ray_init.dashboard_port={port}").status == "ok"


def test_a_cluster_that_a_local_run_would_join(
    tmp_path: Path, finding: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    note = tmp_path / "ray" / "ray_current_cluster"
    note.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        note.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        found = finding("ports")
        assert found.status == "fail" and "RAY_ADDRESS=local" in found.remedy
        on_gpus = finding("ports", "trainer.device=cuda", "ray_kwargs.ray_init.num_cpus=null")
        assert on_gpus.status == "warn", "Ray joins it where nobody says what it has"
        moved = finding("ports", f"+ray_kwargs.ray_init._temp_dir={tmp_path}/other")
        assert moved.status == "ok", "a Ray with another folder does not find it"
        monkeypatch.setenv("RAY_ADDRESS", "local")
        assert finding("ports").status == "ok"
        monkeypatch.delenv("RAY_ADDRESS")
    assert finding("ports").status == "ok", "the cluster is gone, its note is still there"


def test_paths_of_sockets_that_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is that of the kernel: one byte less can be bound, one more cannot."""
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    found = system.socket_paths(MACHINE)
    assert found.status == "fail" and "RAY_TMPDIR" in found.remedy
    folder = tmp_path / "s"
    folder.mkdir()
    rest = system._SOCKET_PATH - len(str(folder)) - 1
    with socket.socket(socket.AF_UNIX) as fits:
        fits.bind(f"{folder}/{'x' * rest}")
    with socket.socket(socket.AF_UNIX) as long, pytest.raises(OSError, match="too long"):
        long.bind(f"{folder}/{'x' * (rest + 1)}")


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert system.network(MACHINE).status == "ok"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    found = system.network(MACHINE)
    assert found.status == "fail" and "names ib7; there are lo" in found.found
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert system.network(MACHINE).status == "ok"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=l")
    assert system.network(MACHINE).status == "fail", "both are looked at"


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ("en,eth,em,bond", True),
        ("eth0", True),
        ("ib", False),
        ("=eth", False),
        ("=ib0,eth0", True),
        ("^ib", True),
    ],
)
def test_names_of_interfaces_are_prefixes_to_nccl(value: str, good: bool) -> None:
    """By NCCL's manual: a list of prefixes, of names after =, of what is left out after ^."""
    assert system._nccl_names(value, ["lo", "eth0"]) is good


def test_few_open_files() -> None:
    """In a child, whose limit is lowered for real."""
    code = "from keytoken.doctor import finding, system; print(system.open_files(finding.Subject()).status)"

    def limited(count: int) -> str:
        lower = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))  # noqa: E731
        return subprocess.run(
            [sys.executable, "-c", code], preexec_fn=lower, capture_output=True, text=True, timeout=120
        ).stdout.strip()

    assert (limited(512), limited(2048)) == ("fail", "warn")


def test_a_control_group_bounds_the_memory(tmp_path: Path) -> None:
    """The limit of a parent counts as well; pages of files that can be dropped are free."""
    own = tmp_path / "own"
    group = tmp_path / "cg" / "pod" / "box"
    group.mkdir(parents=True)
    for folder, limit, used, cached in ((group, "max", 30, 0), (group.parent, str(100 * MIB), 60, 20)):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(used * MIB))
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached * MIB}\n")
    own.write_text("0::/pod/box\n")
    room = memory.memory_room(tmp_path / "cg", own)
    assert (room.available, room.total) == (60 * MIB, 100 * MIB) and room.limit.endswith("/pod")
    own.write_text("4:memory:/old\n")
    old = tmp_path / "cg" / "memory" / "old"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(str(50 * MIB))
    (old / "memory.usage_in_bytes").write_text(str(10 * MIB))
    assert memory.memory_room(tmp_path / "cg", own).available == 40 * MIB
    (old / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert memory.memory_room(tmp_path / "cg", own).limit == "the machine's"


def test_every_decoder_reads_what_it_should() -> None:
    found = codecs.decoders(MACHINE)
    assert found.status == "ok", found
    assert "pyav reads h264, hevc, vp9, av1" in found.found


def test_a_decoder_that_shows_other_frames_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pictures are checked, not only that there are some: a clip whose bars stand still."""
    from keytoken.doctor import tiny_clips

    path = tmp_path / "clip.mp4"
    tiny_clips.write_clip("h264", str(path))
    assert codecs.probe(str(path), "pyav") == ""
    monkeypatch.setattr(tiny_clips, "_BRIGHT", tiny_clips._DARK)
    tiny_clips.write_clip("h264", str(path))
    assert codecs.probe(str(path), "pyav").startswith("shows frames [")
    path.write_bytes(path.read_bytes()[:900])
    assert "cannot be decoded" in codecs.probe(str(path), "pyav")


def test_what_decoders_mean_for_a_run() -> None:
    good, none = dict.fromkeys(codecs.CODECS, ""), dict.fromkeys(codecs.CODECS, "not installed")
    lacking = {**good, "av1": "no decoder"}
    broken = dict.fromkeys(codecs.CODECS, "crashed")

    def status(chosen: str, pyav: dict[str, str], decord: dict[str, str]) -> str:
        return codecs.judge(chosen, {"torchcodec": none, "pyav": pyav, "decord": decord}, []).status

    assert status("auto", good, broken) == "ok"
    assert status("auto", lacking, good) == "warn"
    assert status("auto", broken, good) == "fail"
    assert status("decord", broken, good) == "ok"
    assert status("torchcodec", good, good) == "fail"
    nothing = codecs.judge("auto", {"pyav": {}, "decord": {}}, list(codecs.CODECS))
    assert nothing.status == "warn" and "nothing here writes a clip" in nothing.found


def test_a_clip_of_the_user(tmp_path: Path) -> None:
    from keytoken.doctor import tiny_clips

    path = tmp_path / "mine.mp4"
    tiny_clips.write_clip("h264", str(path))
    found = codecs.clip(Subject(clip=path))
    assert found.status == "ok" and found.found.startswith("mine.mp4: 4 of 8 frames")
    data = bytearray(path.read_bytes())
    data[300:-300] = bytes(len(data) - 600)
    path.write_bytes(data)
    assert codecs.clip(Subject(clip=path)).status == "fail"
    assert codecs.clip(Subject(clip=tmp_path / "none.mp4")).status == "fail"


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cluster, "_LIMIT_S", 5.0)
    found = cluster.ray(MACHINE)
    assert found.status == "fail" and "127.0.0.1:1" in found.found and "RAY_ADDRESS" in found.remedy


def test_children_that_hang_or_die() -> None:
    late = child.run_child(["-c", "import time; time.sleep(60)"], 1.0)
    assert late.error == "no answer within 1 s" and late.seconds < 30
    assert child.run_child(["-c", "import os; os.abort()"], 60.0).error == "killed by SIGABRT"
    wrong = child.run_child(["-c", "print(1)\nint('x')"], 60.0)
    assert wrong.output == "1\n" and wrong.error.startswith("ValueError") and "line 2" in wrong.place


def test_a_child_that_leaves_others_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold its pipes: one of its group is killed, one that left the group is not waited for."""
    monkeypatch.setattr(child, "_KILL_LIMIT_S", 0.5)
    code = (
        "import subprocess\n"
        "for away in (False, True):\n"
        "    print(subprocess.Popen(['sleep', '60'], start_new_session=away).pid, flush=True)\n"
    )
    done = child.run_child(["-c", code], 6.0)
    assert (done.error, done.late) == ("", False) and done.seconds < 30
    inside, away = map(int, done.output.split())
    os.kill(away, signal.SIGKILL)  # it is still there
    assert ends(inside)


def test_an_interrupt_ends_the_child(tmp_path: Path) -> None:
    """Ctrl-C reaches only this process: the child has a group of its own."""
    note = tmp_path / "pid"
    inner = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    outer = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from keytoken.doctor.child import run_child; run_child(['-c', {inner!r}], 60.0)"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (note.exists() and note.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert ends(int(note.read_text()))


def ends(pid: int) -> bool:
    """Whether a process is gone, or only waits to be collected, within a few seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A program named nvidia-smi, found first, that prints what it is given."""

    def write(text: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(devices.torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "driver_cuda", lambda: (13, 0))
    monkeypatch.setattr(devices, "count_by_driver", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return write


H100 = "NVIDIA H100 80GB HBM3, 580.65.06, 81559"


@pytest.mark.parametrize(
    ("lines", "words", "visible", "status", "part"),
    [
        ((f"0, {H100}, 81000, 9.0",), ("pools=one_device",), None, "ok", "1 x NVIDIA H100 80GB HBM3, 79 GiB"),
        ((f"0, {H100}, 81000, 9.0",), (), None, "fail", "the pools need 3 GPUs together, 1 are visible"),
        ((f"0, {H100}, 20000, 9.0",), ("pools=one_device",), None, "warn", "GPU 0: 20 of 80 GiB free"),
        ((f"0, {H100}, 81000, 7.5",), ("pools=one_device",), None, "fail", "compute capability 7.5"),
        ((f"0, {H100}, 81000, 9.0",), ("pools=one_device",), "", "fail", "CUDA_VISIBLE_DEVICES hides others"),
        (("NVIDIA-SMI has failed",), ("pools=one_device",), None, "fail", "NVIDIA-SMI has failed"),
    ],
)
def test_gpus_as_the_driver_lists_them(
    lines: tuple[str, ...],
    words: tuple[str, ...],
    visible: str | None,
    status: str,
    part: str,
    driver: Callable[[str], None],
    finding: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The listing is nvidia-smi's own form, of a machine that had such GPUs."""
    driver("\n".join(lines))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = finding("gpu", "trainer.device=cuda", *words)
    assert (found.status, part in found.found) == (status, True), found


def test_a_driver_that_is_too_old(
    driver: Callable[[str], None], finding: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(f"0, {H100}, 81000, 9.0")
    monkeypatch.setattr(devices, "driver_cuda", lambda: (12, 4))
    found = finding("gpu", "trainer.device=cuda", "pools=one_device")
    assert found.status == "fail" and "goes up to CUDA 12.4" in found.found


def test_a_run_on_gpus_with_a_torch_for_the_cpu(finding: Ask) -> None:
    if devices.torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    found = finding("gpu", "trainer.device=cuda")
    assert found.status == "fail" and "platform=cpu" in found.remedy


def test_gpus_without_nvidia_smi(
    driver: Callable[[str], None], finding: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may have the driver's library and not its program."""
    monkeypatch.setenv("PATH", "/no/programs")
    words = ("gpu", "trainer.device=cuda", "pools=one_device")
    assert finding(*words).status == "fail"
    monkeypatch.setattr(devices, "count_by_driver", lambda: 8)
    found = finding(*words)
    assert found.status == "warn" and "8 GPUs" in found.found and "nvidia-smi is not on" in found.found


def test_a_machine_without_a_driver_has_no_gpu() -> None:
    if devices.driver_cuda() is not None:
        pytest.skip("this machine has a driver")
    assert devices.count_by_driver() == 0


def test_an_nvidia_smi_that_hangs(
    driver: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver("")
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr(devices, "_QUERY_LIMIT_S", 0.5)
    assert devices.devices() == ([], "nvidia-smi: no answer within 0.5 s")


@pytest.mark.parametrize(
    ("lines", "visible", "words", "status"),
    [
        ((f"0, {H100}, 81000, 9.0",), None, (), "ok"),
        (("0, Small, 580.65.06, 6, 6, 9.0", f"1, {H100}, 81000, 9.0"), "1", (), "ok"),
        (("0, Small, 580.65.06, 6, 6, 9.0",), None, (), "warn"),
        (
            ("0, Small, 580.65.06, 6, 6, 9.0",),
            None,
            ("actor_rollout_ref.actor.fsdp_config.offload_policy=true",),
            "ok",
        ),
        (("0, GB10, 580.65.06, [N/A], [N/A], 12.1",), None, (), "skip"),
    ],
    ids=["fits", "small one hidden", "too small", "offloaded", "memory not known"],
)
def test_the_memory_of_gpus_stops_nobody(
    lines: tuple[str, ...],
    visible: str | None,
    words: tuple[str, ...],
    status: str,
    driver: Callable[[str], None],
    finding: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The demo's 1.2 million parameters on cards of 6 MiB: 18 MiB to train them, 2.3 MiB for an engine."""
    driver("\n".join(lines))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = finding("gpu_memory", "trainer.device=cuda", *words)
    assert found.status == status, found
