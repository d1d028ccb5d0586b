"""The process that drives a run: verl's task runner, with KeyToken's trainer modes registered first."""

from typing import Any

import ray
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from ray.exceptions import RayTaskError

from keytoken.errors import ClusterError, ConfigurationError, KeyTokenError
from keytoken.resources import runs_here, validate_files
from keytoken.schema import KeyTokenConfig
from keytoken.verl_adapter.compat import (
    TaskRunnerV1,
    need_critic,
    need_reference_policy,
    run_ppo,
    validate_config,
)
from keytoken.verl_adapter.lost import LOSSES, lost_process
from keytoken.verl_adapter.machine import CLUSTER_REMEDY, check_machine
from keytoken.verl_adapter.stack import check_stack
from keytoken.verl_adapter.stopping import SigtermWatch


def _plain_class(actor_class: Any) -> type:
    """The class under a Ray actor class: subclassing the actor class itself is refused by Ray."""
    return actor_class.__ray_metadata__.modified_class


# What verl's checks raise; hydra's errors wrap those of verl's dataclasses.
_REFUSALS = (
    HydraException,
    OmegaConfBaseException,
    AssertionError,
    ValueError,
    TypeError,
    NotImplementedError,
)

_TaskRunner: Any = _plain_class(TaskRunnerV1)


@ray.remote(num_cpus=1)
class KeyTokenTaskRunner(_TaskRunner):
    """Registers the modes before verl looks one up and looks for files on all nodes; the rest is verl's."""

    def run(self, config: DictConfig) -> None:
        """Run the training job to its end."""
        from keytoken.verl_adapter import trainer  # noqa: F401  (importing it registers the modes)
        from keytoken.verl_adapter.shared_files import require_seen_by_all

        validate_files(config)
        require_seen_by_all(config)
        super().run(config)
        self.trainer.raise_if_stopped()


class _Watched:
    """The task runner's class, as verl starts it: right after Ray, which is when SIGTERM can be taken."""

    def __init__(self, watch: SigtermWatch) -> None:
        self._watch = watch

    def remote(self) -> Any:
        self._watch.start()
        return KeyTokenTaskRunner.remote()

    def options(self, **options: Any) -> Any:
        self._watch.start()
        return KeyTokenTaskRunner.options(**options)


def run(config: DictConfig) -> None:
    """Validate by verl's rules and run the job on the cluster that Ray finds, or on a local one.

    Raises:
        ConfigurationError: verl refuses the configuration, or the installed stack cannot run it.
        ClusterError: the machine or the cluster cannot hold the run, or one of its processes died.
        StoppedError: SIGTERM ended it early.
        KeyTokenError: whatever a process of the run raised of these.
    """
    check_by_verl(config)
    if runs_here(config):
        check_stack(config)
    check_machine(config)
    block: Any = OmegaConf.to_container(config.keytoken, resolve=True)
    watch = SigtermWatch(KeyTokenConfig.from_mapping(block))
    try:
        with watch.watching():
            run_ppo(config, task_runner_class=_Watched(watch))
    except (RayTaskError, *LOSSES) as problem:
        raise own_error(problem) or lost_process(problem) or problem from problem
    except ValueError as problem:
        if "existing cluster" not in str(problem):
            raise
        raise ClusterError(
            "A Ray cluster is running on this machine, and a local run would join it by accident. "
            f"{CLUSTER_REMEDY}"
        ) from problem


def check_by_verl(config: DictConfig) -> None:
    """verl's own checks, each of which raises another kind of error.

    Raises:
        ConfigurationError: with verl's words.
    """
    try:
        validate_config(
            config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
        )
    except _REFUSALS as problem:
        words = " ".join(str(problem).split()) or type(problem).__name__
        raise ConfigurationError(f"verl refuses the configuration: {words}") from problem


def own_error(problem: BaseException) -> KeyTokenError | None:
    """The error of ours below Ray's wrappings, one for each process it passed through; None without one."""
    while isinstance(problem, RayTaskError):
        problem = problem.cause
    return problem if isinstance(problem, KeyTokenError) else None
