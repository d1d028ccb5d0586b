"""The machine below the packages: shared memory, files, ports, network, disks."""

import errno
import os
import resource
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path

from omegaconf import OmegaConf

from keytoken.doctor.finding import GIB, MIB, Finding, Subject, fail, of_error, ok, several, skip, warn
from keytoken.errors import ClusterError
from keytoken.verl_adapter.machine import (
    CLUSTER_REMEDY,
    ENGINE_BYTES,
    LEFTOVERS,
    PORT_KEYS,
    SHARED_MEMORY,
    check_ports,
    check_shared_memory,
    needed_shared_memory,
)

_SOCKET_PATH = 107  # bytes of a Unix socket's path on Linux, without the zero at its end
# What Ray appends to its folder: session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store
_RAY_SOCKET = len("/session_0000-00-00_00-00-00_000000_0000000/sockets/plasma_store")
_FEW_FILES, _TOO_FEW_FILES = 4096, 1024  # Ray warns below the first
_FULL_SHARE = 0.95  # of a disk; Ray moves no more objects there beyond it (local_fs_capacity_threshold)
_LEAST_FREE = GIB // 2
_TEMPORARY = "temporary files"
_OLD_S = 60.0  # a younger segment may belong to a process that has not mapped it yet
_BLOCK = 512  # unit of st_blocks


def shared_memory(subject: Subject, folder: Path = SHARED_MEMORY) -> Finding:
    """Room for the rollout engines, and what killed ones left behind."""
    needed = ENGINE_BYTES if subject.config is None else needed_shared_memory(subject.config)
    try:
        check_shared_memory(needed, folder)
    except ClusterError as problem:
        return of_error(problem)
    if not folder.is_dir():
        return skip(f"this system has no {folder}")
    free = shutil.disk_usage(folder).free
    found = f"{folder}: {free / MIB:.0f} MiB free, {needed / MIB:.0f} MiB needed"
    unused = [] if subject.short else leftovers(folder)
    if unused:
        held = sum(path.stat().st_blocks * _BLOCK for path in unused if path.exists())
        return warn(
            f"{found}; {len(unused)} segments ({held / MIB:.0f} MiB) that no process seen from here uses: "
            f"{several([path.name for path in unused])}",
            "If no other container shares this folder (--ipc=host) and no run is going on, remove them: "
            f"rm {' '.join(map(str, unused[:3]))}{' and so on' if len(unused) > 3 else ''}",
        )
    return ok(found)


def leftovers(folder: Path) -> list[Path]:
    """Own segments of engines that no process has mapped; what others own cannot be told apart."""
    now, mine = time.time(), os.geteuid()
    old = []
    for path in sorted(folder.glob(LEFTOVERS)):
        try:
            state = path.stat()
        except FileNotFoundError:
            continue
        if state.st_uid == mine and now - state.st_mtime > _OLD_S:
            old.append(path)
    used = _mapped(str(folder)) if old else set()
    return [path for path in old if str(path) not in used]


def _mapped(folder: str) -> set[str]:
    """Files below a folder that some readable process has mapped."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:  # it ended, or is somebody else's
            continue
        found |= {line[line.index(folder) :].split(" (deleted)")[0] for line in lines if folder in line}
    return found


def open_files(subject: Subject) -> Finding:
    """The hard limit: Ray raises the soft one to it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard} open files a process"
    if hard == resource.RLIM_INFINITY or hard >= _FEW_FILES:
        return ok(found)
    remedy = "Raise it: ulimit -n 65536 (docker run --ulimit nofile=65536:65536)."
    return fail(found, remedy) if hard < _TOO_FEW_FILES else warn(found, remedy)


def ports(subject: Subject) -> Finding:
    """Configured ports are free, and no Ray cluster runs that a local run would stumble over.

    Ray joins one of its own accord; it refuses to where it is told how many CPUs or GPUs to start with.
    """
    config = subject.run
    named = {key: port for key in PORT_KEYS if (port := OmegaConf.select(config, key))}
    try:
        check_ports(named)
    except ClusterError as problem:
        return of_error(problem)
    init = config.ray_kwargs.ray_init
    address = running_cluster(ray_folder(subject))
    if address and not os.environ.get("RAY_ADDRESS") and not init.get("address"):
        words = f"a Ray cluster runs at {address}, and a local run would join it by accident"
        refused = any(init.get(name) is not None for name in ("num_cpus", "num_gpus"))
        return fail(words, CLUSTER_REMEDY) if refused else warn(words, CLUSTER_REMEDY)
    held = ", ".join(f"{key.rpartition('.')[2]} {port}" for key, port in named.items())
    return ok(f"{held} free" if held else "the configuration names none, and Ray looks for free ones")


def ray_folder(subject: Subject) -> Path:
    """Where Ray puts its sessions."""
    given = OmegaConf.select(subject.config, "ray_kwargs.ray_init._temp_dir") if subject.config else None
    if given:
        return Path(given)
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def running_cluster(folder: Path) -> str:
    """Address of a Ray cluster started on this machine, if it still answers."""
    try:
        address = (folder / "ray_current_cluster").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return ""
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return ""
    return address


def network(subject: Subject) -> Finding:
    """Processes of a run find one another by the machine's address, not by 127.0.0.1 alone."""
    known = [name for _, name in socket.if_nameindex()]
    for variable, names_one in (("GLOO_SOCKET_IFNAME", _gloo_names), ("NCCL_SOCKET_IFNAME", _nccl_names)):
        value = os.environ.get(variable)
        if value and not names_one(value, known):
            return fail(
                f"{variable} names {value}; there are {', '.join(known)}",
                "Name one of them, or unset the variable.",
            )
    address = _own_address()
    for host in dict.fromkeys(("127.0.0.1", address)):
        try:
            _connect_to_itself(host)
        except OSError as problem:
            return fail(
                f"a connection from this machine to its own address {host} failed ({problem})",
                "Allow local connections in the firewall or VPN, or set RAY_NODE_IP_ADDRESS=127.0.0.1 for a "
                "run on this machine alone.",
            )
    return ok(f"127.0.0.1 and {address} reach themselves; interfaces {', '.join(known)}")


def _gloo_names(value: str, known: list[str]) -> bool:
    return set(value.split(",")) <= set(known)


def _nccl_names(value: str, known: list[str]) -> bool:
    """NCCL takes any interface that begins with one of the words; ``^`` excludes, ``=`` wants the whole."""
    words = value.lstrip("=").split(",")
    if value.startswith("^"):
        return True
    return any(name == word if value[0] == "=" else name.startswith(word) for name in known for word in words)


def _own_address() -> str:
    """The address that packets to the outside would carry, found as Ray finds it; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))
        except OSError:  # no route: a machine without network runs on loopback
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _connect_to_itself(host: str) -> None:
    with socket.create_server((host, 0)) as server:
        server.settimeout(2.0)
        with socket.create_connection(server.getsockname()[:2], timeout=2.0):
            server.accept()[0].close()


def socket_paths(subject: Subject) -> Finding:
    """Ray's sockets lie in its temporary folder, and the path of a socket is short."""
    folder = ray_folder(subject)
    length = len(os.fsencode(str(folder.absolute()))) + _RAY_SOCKET
    if length > _SOCKET_PATH:
        return fail(
            f"sockets below {folder} would have paths of {length} bytes, Linux takes {_SOCKET_PATH}",
            "Give Ray a folder with a short name: RAY_TMPDIR=/tmp (or /tmp/me).",
        )
    return ok(f"{folder}: {length} of {_SOCKET_PATH} bytes")


def disks(subject: Subject) -> Finding:
    """Every folder that a run writes to can be written, and has room."""
    folders = {_TEMPORARY: ray_folder(subject)}
    if subject.config is not None:
        folders["keytoken.run_dir"] = Path(subject.config.keytoken.run_dir)
        folders["trainer.default_local_dir"] = Path(subject.config.trainer.default_local_dir)
        cache = subject.config.data.get("frame_cache")
        folders |= {"data.frame_cache": Path(cache)} if cache else {}
    crowded = ""
    for key, folder in folders.items():
        place = _existing(folder)
        reason = _unwritable(place)
        if reason:
            return fail(f"{key}: {folder} cannot be written ({reason})", _where_else(key, reason))
        usage = shutil.disk_usage(place)
        if usage.free < _LEAST_FREE:
            return fail(
                f"{key}: {folder} has {usage.free / MIB:.0f} MiB free", _where_else(key, "no space is left")
            )
        if key == _TEMPORARY and usage.used > _FULL_SHARE * (usage.used + usage.free):
            crowded = f"{key}: the disk of {folder} is {usage.used / usage.total:.0%} full"
    if crowded:
        return warn(
            crowded, "Make room: Ray keeps objects in memory only once a disk is more than 95 % full."
        )
    free = min(shutil.disk_usage(_existing(folder)).free for folder in folders.values())
    return ok(f"{', '.join(folders)} can be written; {free / GIB:.0f} GiB free at least")


def _where_else(key: str, reason: str) -> str:
    if key == _TEMPORARY:
        return "Make room there, or name another folder: RAY_TMPDIR=/another/short/path"
    return f"Name another folder: {key}=/a/folder" + (", or make room there." if "space" in reason else ".")


def _existing(folder: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    folder = folder.expanduser().absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _unwritable(place: Path) -> str:
    """Why a megabyte cannot be written; empty if it can. Permissions alone do not tell, least of all root."""
    if not stat.S_ISDIR(place.stat().st_mode):
        return f"{place} is a file"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(MIB))
            file.flush()
    except OSError as problem:
        return "no space is left" if problem.errno == errno.ENOSPC else problem.strerror or str(problem)
    return ""
