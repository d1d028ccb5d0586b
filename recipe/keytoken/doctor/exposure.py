"""Who can reach a run's processes, and whose code a run runs. The whole list: recipe/docs/security.md."""

import os
from pathlib import Path

from omegaconf import OmegaConf

from keytoken.compose import leaves
from keytoken.doctor.finding import Finding, Subject, ok, several, warn
from keytoken.verl_adapter.machine import LOOPBACK

_ALL_INTERFACES = ("0.0.0.0", "::", "*")
_DASHBOARD = "ray_kwargs.ray_init.dashboard_host"
_TOKEN_FILE = Path("~/.ray/auth_token")  # where Ray looks if nothing else is said
_PAGE = "recipe/docs/security.md lists what listens where"


def exposure(subject: Subject) -> Finding:
    """Code that comes with a model, a dashboard for everybody, a cluster without a token: warnings."""
    config = subject.run
    plain = OmegaConf.to_container(config, resolve=True)
    remote = [key for key, value in leaves(plain) if key.endswith("trust_remote_code") and value]
    if remote:
        return warn(
            f"{several(remote)}: a run executes what lies beside the model's weights",
            f"Set {remote[0]}=false; the models of this project need no code of their own.",
        )
    host = OmegaConf.select(config, _DASHBOARD)
    if host in _ALL_INTERFACES:
        return warn(
            f"{_DASHBOARD}={host}: whoever reaches this machine and has Ray's token runs programs on it",
            f"Leave {_DASHBOARD} away for loopback, and reach it through ssh -L 8265:127.0.0.1:8265.",
        )
    return _of_a_local_run() if subject.here else _of_a_cluster()


def _of_a_local_run() -> Finding:
    others = [
        f"{name}={os.environ[name]}"
        for name, value in LOOPBACK.items()
        if os.environ.get(name, value) != value
    ]
    if others:
        return warn(
            f"{others[0]}: Ray, vLLM's server and the data plane listen beyond this machine",
            f"Unset the variable; {_PAGE}.",
        )
    return ok("a run on this machine listens on loopback, but for torch's stores")


def _of_a_cluster() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if mode not in ("token", "k8s") and (mode or not (named or _TOKEN_FILE.expanduser().is_file())):
        return warn(
            "no token is set here: if the cluster wants none, whoever reaches its ports runs programs on it",
            "Start it with RAY_AUTH_MODE=token, and set the same here (recipe/docs/cluster.md).",
        )
    return warn(
        "Ray listens on all interfaces of a cluster's nodes; vLLM's server and the data plane listen on its "
        "address, without a password",
        f"Let only the cluster's own machines reach its ports (firewall, network policy); {_PAGE}.",
    )
