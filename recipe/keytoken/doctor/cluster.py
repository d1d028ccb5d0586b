"""Ray: one of its own starts and runs a task, or the cluster that the run joins has room for the pools."""

import json
import os

from omegaconf import OmegaConf

from keytoken.doctor.child import run_child
from keytoken.doctor.finding import Finding, Subject, fail, of_error, ok, several, size
from keytoken.errors import ClusterError
from keytoken.resources import num_slots
from keytoken.verl_adapter.machine import LOOPBACK, check_slots

_LIMIT_S = 180.0


def ray(subject: Subject) -> Finding:
    """Start or join Ray in a child, as a run would."""
    address = address_of(subject)
    where = f"the cluster at {address}" if address else "a Ray of its own"
    arguments = ["-m", "keytoken.verl_adapter.ray_probe", *([address] if address else [])]
    done = run_child(arguments, _LIMIT_S, variables={} if address else LOOPBACK)
    if done.error:
        remedy = "Read the logs below /tmp/ray/session_latest/logs; network, disks or ports may say why."
        if address:
            remedy = "Start it (`ray start --head` there), or unset RAY_ADDRESS for a run on this machine."
        return fail(f"{where}: {done.error}", remedy)
    found = json.loads(done.output.splitlines()[-1])
    resources = found["resources"]
    words = (
        f"{where}: Ray {found['version']}, {len(found['nodes'])} nodes ({several(found['nodes'])}), "
        f"{resources['CPU']:.0f} CPUs, {resources['GPU']:.0f} GPUs, {size(resources['memory'])}"
    )
    if not address:
        return ok(f"Ray {found['version']} starts and runs a task ({done.seconds:.0f} s)")
    if subject.config is not None:
        try:
            check_slots(num_slots(subject.config), present=int(resources["GPU"]))
        except ClusterError as problem:
            return of_error(problem)
    return ok(words)


def address_of(subject: Subject) -> str | None:
    """The address that a run would join; None if it starts Ray itself."""
    given = OmegaConf.select(subject.config, "ray_kwargs.ray_init.address") if subject.config else None
    address = os.environ.get("RAY_ADDRESS") or given
    return None if address in (None, "", "local") else str(address)
