"""The same job for a scheduler: a Slurm script, or a RayJob of KubeRay, from the values of the run."""

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml
from omegaconf import DictConfig

from keytoken.block import require
from keytoken.resources import INPUTS, OUTPUTS, paths_of
from keytoken.submit.request import Request
from keytoken.submit.shape import Shape

RAY_VERSION = "2.60.0"  # of the lock; KubeRay has a token from 2.52 on
SECRET = "keytoken"  # the Kubernetes Secret with the variables that are not printed
_SHM_GIB_OF_A_SLOT = 8
_NOTICE_S = 60  # of a scheduler, on top of what the job has to save its step


@dataclasses.dataclass(frozen=True)
class Values:
    """What a template is filled with.

    Attributes:
        request: The job.
        shape: The machines it needs.
        shared: Folders that all of them see, from the paths of the configuration.
        image: Of the containers; None for the packages of the nodes.
        max_restarts: Tries after the first.
        options: Words of ``keytoken submit`` that go along.
    """

    request: Request
    shape: Shape
    shared: tuple[str, ...]
    image: str | None
    max_restarts: int
    options: tuple[str, ...] = ()

    @property
    def printed(self) -> Mapping[str, str]:
        """Variables with their values; those that are hidden have only names."""
        variables: dict[str, str] = self.request.runtime_env()["env_vars"]
        return {name: text for name, text in variables.items() if name not in self.request.hidden}


def shared_folders(config: DictConfig) -> tuple[str, ...]:
    """The first folder of each path that the nodes open: a disk of all of them."""
    paths = [PurePosixPath(path) for _, path in paths_of(config, (*INPUTS, *OUTPUTS))]
    return tuple(sorted({f"/{path.parts[1]}" for path in paths if len(path.parts) > 1}))


_SLURM = """\
#!/bin/bash
#SBATCH --job-name=@NAME@
#SBATCH --nodes=@NODES@
#SBATCH --ntasks-per-node=1
@GPUS@#SBATCH --exclusive
#SBATCH --signal=B:TERM@@NOTICE@
#SBATCH --output=%x-%j.log
# Printed by `keytoken submit --template slurm`. Add what your cluster wants: --partition, --account, --time.
# SIGTERM, which comes @NOTICE@ s before the time is over, stops the job; the same script, queued again, goes
# on from the last complete checkpoint. The exit code is that of the job.
set -euo pipefail
@VARIABLES@
# One token for this cluster of Ray's: whoever reaches its ports without it can run nothing.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=@TOKEN@-$SLURM_JOB_ID
mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on=(srun --overlap --nodes=1 --ntasks=1@CONTAINER@)
first=${nodes[0]}
address=$("${on[@]}" --nodelist="$first" hostname -I | awk '{print $1}')
"${on[@]}" --nodelist="$first" \\
  ray start --block --head --node-ip-address="$address" --port=6379 --num-gpus=@SLOTS@ &
for node in "${nodes[@]:1}"; do
  "${on[@]}" --nodelist="$node" ray start --block --address="$address:6379" --num-gpus=@SLOTS@ &
done
joined='import ray, sys; ray.init(sys.argv[1], log_to_driver=False)
sys.exit(sum(node["Alive"] for node in ray.nodes()) < @NODES@)'
until "${on[@]}" --nodelist="$first" python -c "$joined" "$address:6379" 2>/dev/null; do
  ((SECONDS < 600)) || { echo "after 600 s not all of @NODES@ nodes have joined Ray" >&2; exit 1; }
  sleep 5
done

"${on[@]}" --nodelist="$first" \\
  @COMMAND@ &
job=$!
trap 'kill -TERM "$job" 2>/dev/null || true' TERM
code=0
wait "$job" || code=$?
while kill -0 "$job" 2>/dev/null; do # the signal ended the first wait, not the job
  code=0
  wait "$job" || code=$?
done
exit "$code"
"""


def slurm(values: Values) -> str:
    """A script for ``sbatch``."""
    request, shape = values.request, values.shape
    name = shlex.quote(request.name)
    submit = ["keytoken", "submit", "--address", "http://127.0.0.1:8265", *values.options]
    command = f'{shlex.join(submit)} --id {name}-"$SLURM_JOB_ID" {shlex.join(request.overrides)}'
    exports = [f"export {key}={shlex.quote(text)}" for key, text in sorted(values.printed.items())]
    wanted = [f': "${{{key}:?export {key} before sbatch}}"' for key in sorted(request.hidden)]
    mounts = ",".join(f"{folder}:{folder}" for folder in values.shared)
    container = f" --container-image={_quoted(values.image)} --container-mounts={_quoted(mounts)}"
    words = {
        "NAME": request.name,
        "NODES": shape.nodes,
        "SLOTS": shape.slots,
        "GPUS": f"#SBATCH --gpus-per-node={shape.slots}\n" if shape.gpus else "",
        "NOTICE": request.stop_grace_s + _NOTICE_S,
        "VARIABLES": "\n".join([*exports, *wanted]) or "# (no variables go along)",
        "TOKEN": shlex.quote(f"{request.run_dir}.ray-token"),
        "CONTAINER": container if values.image else "",
        "COMMAND": command,
    }
    return re.sub(r"@([A-Z]+)@", lambda found: str(words[found[1]]), _SLURM)


def _quoted(text: str | None) -> str:
    """Always in quotes, which shlex leaves away round a comma, and a comma looks like a mistake in bash."""
    return "'{}'".format(str(text).replace("'", "'\\''"))


def rayjob(values: Values) -> str:
    """A RayJob (``ray.io/v1``) for ``kubectl apply``; each try gets a cluster of its own.

    Raises:
        ConfigurationError: no image was named, or the packages of a checkout would have to be sent.
    """
    require(values.image is not None, "--template rayjob: name the image of the containers by --image.")
    request, shape = values.request, values.shape
    require(
        request.source is None,
        "--template rayjob with --source: Kubernetes does not see this checkout; put it into the image.",
    )
    # An experiment's name may hold what a name of Kubernetes may not.
    name = "".join(letter if letter.isalnum() else "-" for letter in request.name.lower()).strip("-")
    head = {"rayStartParams": _start_params(shape), "template": _pod("ray-head", values)}
    workers = {
        "groupName": "workers",
        "replicas": shape.nodes - 1,
        "minReplicas": shape.nodes - 1,
        "maxReplicas": shape.nodes - 1,
        "rayStartParams": _start_params(shape),
        "template": _pod("ray-worker", values),
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": request.entrypoint(),
            "metadata": request.metadata(),
            "backoffLimit": values.max_restarts,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {
                "rayVersion": RAY_VERSION,
                "authOptions": {"mode": "token"},
                "headGroupSpec": head,
                **({"workerGroupSpecs": [workers]} if shape.nodes > 1 else {}),
            },
        },
    }
    note = "# Printed by `keytoken submit --template rayjob`; KubeRay 1.5.1 or later (authOptions).\n"
    if request.hidden:
        words = " ".join(f'--from-literal={key}="${key}"' for key in sorted(request.hidden))
        note += f"# Before it: kubectl create secret generic {SECRET} {words}\n"
    return note + yaml.safe_dump(job, sort_keys=False, width=1000)


def _start_params(shape: Shape) -> dict[str, str]:
    """KubeRay reads GPUs from the limits of the container; logical slots have to be said."""
    return {} if shape.gpus else {"num-gpus": str(shape.slots)}


def _pod(name: str, values: Values) -> dict[str, Any]:
    shape, request = values.shape, values.request
    shm = {
        "name": "shm",
        "emptyDir": {"medium": "Memory", "sizeLimit": f"{_SHM_GIB_OF_A_SLOT * shape.slots}Gi"},
    }
    disks = [
        {"name": f"shared-{number}", "hostPath": {"path": folder, "type": "Directory"}}
        for number, folder in enumerate(values.shared)
    ]
    mounts = [
        {"name": f"shared-{number}", "mountPath": folder} for number, folder in enumerate(values.shared)
    ]
    variables: list[dict[str, Any]] = [
        {"name": key, "value": text} for key, text in sorted(values.printed.items())
    ]
    variables += [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": key}}}
        for key in sorted(request.hidden)
    ]
    container = {
        "name": name,
        "image": values.image,
        "env": variables,
        **({"resources": {"limits": {"nvidia.com/gpu": shape.slots}}} if shape.gpus else {}),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *mounts],
    }
    return {
        "spec": {
            "securityContext": {"runAsNonRoot": True},
            "containers": [container],
            "volumes": [shm, *disks],
        }
    }


TEMPLATES: dict[str, Callable[[Values], str]] = {"slurm": slurm, "rayjob": rayjob}
