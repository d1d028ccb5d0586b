"""The process that drives a run: verl's task runner, with KeyToken's trainer modes registered first."""

from typing import Any

import ray
from omegaconf import DictConfig

from keytoken.verl_adapter.compat import (
    TaskRunnerV1,
    need_critic,
    need_reference_policy,
    run_ppo,
    validate_config,
)


def _plain_class(actor_class: Any) -> type:
    """The class under a Ray actor class: subclassing the actor class itself is refused by Ray."""
    return actor_class.__ray_metadata__.modified_class


@ray.remote(num_cpus=1)
class KeyTokenTaskRunner(_plain_class(TaskRunnerV1)):
    """Registers the modes before verl looks one up; the rest is verl's."""

    def run(self, config: DictConfig) -> None:
        """Run the training job to its end."""
        from keytoken.verl_adapter import trainer  # noqa: F401  (importing it registers the modes)

        super().run(config)


def run(config: DictConfig) -> None:
    """Validate by verl's rules and run the job on the cluster that Ray finds, or on a local one."""
    validate_config(
        config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
    )
    run_ppo(config, task_runner_class=KeyTokenTaskRunner)
