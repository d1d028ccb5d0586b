"""The Slurm script and the RayJob: values, form, and what the script does with signals and exit codes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from keytoken.cli import main
from keytoken.compose import compose_config
from keytoken.errors import ConfigurationError
from keytoken.submit.shape import Shape, shape_of
from keytoken.submit.templates import RAY_VERSION

ROOT = Path(__file__).parents[2]
WORDS = (
    "experiment=video_ktr_7b",
    "keytoken.run_dir=/shared/runs/first",
    "data.train_files=/shared/train.parquet",
    "data.val_files=/data/val.parquet",
    "trainer.save_freq=20",
)
FIVES_AND_THREES = (
    "trainer.nnodes=2",
    "trainer.n_gpus_per_node=5",
    "actor_rollout_ref.rollout.nnodes=2",
    "actor_rollout_ref.rollout.n_gpus_per_node=3",
)
TWO_NODES = ("trainer.nnodes=2", "trainer.n_gpus_per_node=8")


def printed(capsys: pytest.CaptureFixture[str], kind: str, *options: str) -> str:
    words = [*WORDS]
    assert main(["submit", "--template", kind, "--id", "first", *options, *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "gpus_per_node", "shape"),
    [
        ((), 8, Shape(1, 8, True)),  # 4 actor + 3 rollout + 1 attribution
        (("pools=laptop",), 8, Shape(1, 3, True)),
        (("pools=one_device",), 8, Shape(1, 1, True)),
        ((), 4, Shape(2, 4, True)),
        (TWO_NODES, 8, Shape(3, 8, True)),
        ((*TWO_NODES, "actor_rollout_ref.rollout.nnodes=2"), 8, Shape(3, 8, True)),  # 3 + 3 + 1 on the third
        (("pools=two_nodes",), 8, Shape(2, 8, True)),
        (("pools=eight_nodes",), 8, Shape(8, 8, True)),  # its 16 attribution workers on two of them
        (("method=grpo",), 8, Shape(1, 7, True)),  # nothing to attribute
        (("method=grpo", *FIVES_AND_THREES), 8, Shape(2, 8, True)),
        (("platform=cpu", "pools=laptop"), 8, Shape(1, 3, False)),
    ],
)
def test_pools_are_laid_onto_nodes(words: tuple[str, ...], gpus_per_node: int, shape: Shape) -> None:
    assert shape_of(compose_config(["experiment=video_ktr_7b", *words]), gpus_per_node) == shape


def test_a_pool_that_no_node_holds() -> None:
    with pytest.raises(ConfigurationError, match="--gpus-per-node 2: a pool of this run wants 4 GPUs"):
        shape_of(compose_config(["experiment=video_ktr_7b"]), 2)


def test_the_script_for_slurm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "its-value")
    options = (
        "--env=WANDB_API_KEY",
        "--env=NOTE=a 'b' $c",
        "--max-restarts=3",
        "--image=registry/kt:gpu",
        "--stop-grace=120",
    )
    text = printed(capsys, "slurm", *options, *TWO_NODES)
    assert re.findall(r"@[A-Z]+@", text) == [] and "its-value" not in text
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
    assert directives["nodes"] == "3" and directives["gpus-per-node"] == "8"
    assert directives["signal"] == "B:TERM@180" and "--stop-grace 120" in text
    assert "--container-image='registry/kt:gpu' --container-mounts='/data:/data,/shared:/shared'" in text
    script = tmp_path / "job.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", script], check=True)
    exports = "\n".join(re.findall(r"^export NOTE.*$", text, re.MULTILINE))
    seen = subprocess.run(["bash", "-c", f'{exports}; echo "$NOTE"'], capture_output=True, text=True)
    assert seen.stdout == "a 'b' $c\n"


def test_the_script_has_no_fault_that_shellcheck_knows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    script = tmp_path / "job.sh"
    script.write_text(printed(capsys, "slurm", "--env=A=1", "--image=x", *TWO_NODES))
    found = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


PROGRAMS = {  # stand-ins for what a node of Slurm has; each says what it was asked
    "scontrol": "echo node1; echo node2; echo node3",
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "hostname": "echo 10.0.0.1 10.0.0.2",
    "python": "exit 0",
    "ray": 'echo "ray $*" >>"$SAID"; exec sleep 60',
    "keytoken": 'echo "keytoken $*" >>"$SAID"; cat "$RAY_AUTH_TOKEN_PATH" >>"$SAID.token"\n'
    'trap "echo stopped >>$SAID; exit 5" TERM\n'
    'if [[ -n ${CODE:-} ]]; then exit "$CODE"; fi\n'
    "while true; do sleep 0.05; done",
}


@pytest.fixture
def node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """A folder of programs, the script, and the environment that Slurm would give it."""
    for name, body in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    text = printed(capsys, "slurm", "--max-restarts=2", *TWO_NODES)
    (tmp_path / "job.sh").write_text(text.replace("/shared/runs/first.ray-token", f"{tmp_path}/runs/token"))
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {
        "PATH": path,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SAID": str(tmp_path / "said"),
    }


@pytest.mark.parametrize("code", [0, 2, 137])
def test_the_scripts_exit_code_is_that_of_the_job(node: dict[str, str], tmp_path: Path, code: int) -> None:
    done = subprocess.run(
        ["bash", tmp_path / "job.sh"],
        env={**node, "CODE": str(code)},
        timeout=60,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert done.returncode == code
    said = Path(node["SAID"]).read_text().splitlines()
    heads = [line for line in said if line.startswith("ray start --block --head")]
    assert len(heads) == 1 and "--node-ip-address=10.0.0.1 --port=6379 --num-gpus=8" in heads[0]
    assert said.count("ray start --block --address=10.0.0.1:6379 --num-gpus=8") == 2
    (submitted,) = [line for line in said if line.startswith("keytoken")]
    assert submitted.startswith(
        "keytoken submit --address http://127.0.0.1:8265 --max-restarts 2 --stop-grace 900 --id first-7 "
    )
    assert re.fullmatch(r"[0-9a-f]{64}", Path(f"{node['SAID']}.token").read_text())
    assert list((tmp_path / "runs").iterdir()) == []  # the token is gone


def test_the_script_hands_sigterm_on_and_waits(node: dict[str, str], tmp_path: Path) -> None:
    script = subprocess.Popen(
        ["bash", tmp_path / "job.sh"], env=node, stdout=subprocess.DEVNULL, start_new_session=True
    )
    said, limit = Path(node["SAID"]), time.monotonic() + 60
    while not (said.exists() and "keytoken" in said.read_text()) and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(0.3)  # until the stand-in has its trap
    script.send_signal(signal.SIGTERM)  # as Slurm does with B: to the script alone
    assert script.wait(30) == 5
    assert said.read_text().splitlines()[-1] == "stopped"


# The fields of ray.io/v1 that a RayJob may have, by the Go types of KubeRay 1.5 (rayjob_types.go,
# raycluster_types.go) and of Kubernetes' core/v1; an unknown one is refused, as by the API server.
def strict(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


TEXT, WHOLE, YES = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
REFERENCE = strict("secretKeyRef", secretKeyRef=strict("key name", key=TEXT, name=TEXT, optional=YES))
CONTAINER = strict(
    "name",
    name=TEXT,
    image=TEXT,
    env=listed(strict("name", name=TEXT, value=TEXT, valueFrom=REFERENCE)),
    resources=strict(
        limits={"type": "object", "additionalProperties": {"type": ["integer", "string"]}},
        requests={"type": "object"},
    ),
    volumeMounts=listed(strict("mountPath name", mountPath=TEXT, name=TEXT, readOnly=YES, subPath=TEXT)),
)
VOLUME = strict(
    "name",
    name=TEXT,
    emptyDir=strict(medium={"enum": ["", "Memory"]}, sizeLimit={"pattern": r"^\d+Gi$"}),
    hostPath=strict("path", path={"pattern": "^/"}, type={"enum": ["Directory", "DirectoryOrCreate"]}),
)
POD = strict(
    spec=strict(
        "containers",
        securityContext=strict(runAsNonRoot=YES, runAsUser=WHOLE, runAsGroup=WHOLE, fsGroup=WHOLE),
        containers={**listed(CONTAINER), "minItems": 1},
        volumes=listed(VOLUME),
    )
)
GROUP = strict(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=TEXT,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    numOfHosts=WHOLE,
    rayStartParams=TEXTS,
    template=POD,
)
RAYJOB = strict(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    # A label of DNS; KubeRay appends to it.
    metadata=strict(
        "name", name={"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", "maxLength": 47}
    ),
    spec=strict(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        metadata=TEXTS,
        backoffLimit=WHOLE,
        shutdownAfterJobFinishes=YES,
        ttlSecondsAfterFinished=WHOLE,
        activeDeadlineSeconds=WHOLE,
        runtimeEnvYAML=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        rayClusterSpec=strict(
            "headGroupSpec",
            rayVersion=TEXT,
            authOptions=strict(mode={"enum": ["disabled", "token"]}),
            headGroupSpec=strict("template", rayStartParams=TEXTS, template=POD),
            workerGroupSpecs=listed(GROUP),
        ),
    ),
)


def rayjobs(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    one = printed(capsys, "rayjob", "--image=registry/kt:gpu")
    three = printed(
        capsys,
        "rayjob",
        "--image=registry/kt:gpu",
        "--env=NOTE=a",
        "--env=HF_TOKEN=its-value",
        "--max-restarts=3",
        *TWO_NODES,
    )
    cpu = printed(capsys, "rayjob", "--image=kt:cpu", "platform=cpu", "pools=laptop")
    assert "its-value" not in three and '--from-literal=HF_TOKEN="$HF_TOKEN"' in three
    return [yaml.safe_load(text) for text in (one, three, cpu)]


def test_a_rayjob_has_the_fields_of_kuberay(capsys: pytest.CaptureFixture[str]) -> None:
    for job in rayjobs(capsys):
        jsonschema.validate(job, RAYJOB)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**job, "spec": {**job["spec"], "entryPoint": "x"}}, RAYJOB)


def test_a_rayjob_keeps_kuberays_own_definition(capsys: pytest.CaptureFixture[str]) -> None:
    """Against ray.io_rayjobs.yaml of a KubeRay release, where somebody has put it."""
    path = os.environ.get("KEYTOKEN_RAYJOB_CRD")
    if not path:
        pytest.skip("KEYTOKEN_RAYJOB_CRD names no ray.io_rayjobs.yaml of KubeRay (1 MB, not kept here)")
    versions = yaml.safe_load(Path(path).read_text())["spec"]["versions"]
    (schema,) = [each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1"]
    for job in rayjobs(capsys):
        jsonschema.validate(job, schema)


def test_the_values_of_a_rayjob(capsys: pytest.CaptureFixture[str]) -> None:
    one, three, cpu = rayjobs(capsys)
    assert "workerGroupSpecs" not in one["spec"]["rayClusterSpec"]
    spec = three["spec"]
    assert spec["backoffLimit"] == 3 and spec["metadata"] == {"keytoken_run_dir": "/shared/runs/first"}
    assert shlex.split(spec["entrypoint"])[:5] == ["exec", "python", "-m", "keytoken.cli", "train"]
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 2
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {"name": "NOTE", "value": "a"} in container["env"]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "900"} in container["env"]
    secret = {"secretKeyRef": {"name": "keytoken", "key": "HF_TOKEN"}}
    assert {"name": "HF_TOKEN", "valueFrom": secret} in container["env"]
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounted) == {"/dev/shm", "/shared", "/data"}
    assert set(mounted.values()) == {volume["name"] for volume in pod["volumes"]}
    head = cpu["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"] == {"num-gpus": "3"}
    assert "resources" not in head["template"]["spec"]["containers"][0]


def test_the_version_of_ray_is_the_locks() -> None:
    for lock in ("cpu", "gpu"):
        assert f"\nray=={RAY_VERSION} " in (ROOT / "requirements" / f"{lock}.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--template=rayjob"], "name the image of the containers by --image"),
        (["--template=rayjob", "--image=x", f"--source={ROOT}"], "does not see this checkout"),
        (["--template=slurm", "--gpus-per-node=2"], "--gpus-per-node 2: a pool"),
        (["--template=slurm", "--gpus-per-node=0"], "--gpus-per-node 0: give at least 1"),
        (["--template=slurm", "--no-wait"], "--no-wait with --template slurm says nothing"),
        (["--template=rayjob", "--restart-delay=1"], "--restart-delay with --template rayjob says nothing"),
        (["--dry-run", "--image=x"], "--image without --template says nothing"),
    ],
)
def test_what_no_template_can_be_made_of(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *options, *WORDS]) == 2
    assert message in capsys.readouterr().err
