"""What stops a run before Ray starts, and what is left of an error that passed through Ray."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from keytoken.errors import ClusterError, ConfigurationError
from keytoken.main import load_config
from keytoken.verl_adapter.task_runner import check_by_verl, own_error, run


@pytest.fixture(autouse=True)
def _demo_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_verl_accepts_the_demo() -> None:
    check_by_verl(load_config(["experiment=demo_cpu"]))


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("actor_rollout_ref.rollout.log_prob_micro_batch_size=4", "log_prob_micro_batch_size"),
        ("+actor_rollout_ref.actor.no_such_key=1", "no_such_key"),
    ],
    ids=["an error of verl", "an error of hydra"],
)
def test_what_verl_refuses_is_a_configuration_error(word: str, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^verl refuses the configuration: ") as caught:
        check_by_verl(load_config(["experiment=demo_cpu", word]))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_machine_that_is_too_small_stops_the_run_before_ray(tmp_path: Path) -> None:
    import ray

    config = load_config(["experiment=demo_cpu", "actor_rollout_ref.rollout.n_gpus_per_node=1000000000"])
    with pytest.raises(ClusterError, match="/dev/shm"):
        run(config)
    assert not ray.is_initialized()


def test_an_error_of_ours_comes_out_of_all_wrappings() -> None:
    """One wrapping for each process: worker, trainer."""
    inner = RayTaskError("worker", "a long traceback", ClusterError("the pools need 4 GPUs"))
    outer = RayTaskError("run", "a longer traceback", inner.as_instanceof_cause())
    for problem in (inner, outer, outer.as_instanceof_cause()):
        found = own_error(problem)
        assert type(found) is ClusterError
        assert str(found) == "the pools need 4 GPUs"
    assert own_error(RayTaskError("run", "a traceback", KeyError("x")).as_instanceof_cause()) is None


@pytest.mark.e2e
def test_too_few_slots_are_refused_by_a_real_cluster(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """The error is raised in another process, as in a run, and is one of ours on arrival."""
    done = python(
        "import ray\n"
        "from keytoken.verl_adapter import pools\n"
        "from keytoken.verl_adapter.task_runner import own_error\n"
        "ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)\n"
        "pools.require_slots(1)\n"
        "try:\n"
        "    ray.get(ray.remote(num_cpus=1)(pools.require_slots).remote(2))\n"
        "except ray.exceptions.RayTaskError as problem:\n"
        "    print(type(own_error(problem)).__name__, own_error(problem))\n",
        RAY_ADDRESS="local",
    )
    assert "ClusterError The pools of this run need 2 GPUs, the Ray cluster has 1." in done.stdout, (
        done.stderr
    )
