"""A training run that changes its method every second step: all methods on one cluster, one set of pools.

Run as ``keytoken train`` is, with the methods' names in ``KEYTOKEN_TOUR``. What a method sets in the
``keytoken`` block, and how advantages are normalised, is handed to the running workers as it is at the start
of a run. What belongs to other processes stays that of the first method: dynamic sampling, penalties of the
reward, the rollout.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import ray
from omegaconf import open_dict

from keytoken import main
from keytoken.schema import KeyTokenConfig
from keytoken.validate import validate_run
from keytoken.verl_adapter import task_runner

STEPS = 2


def methods_of(names: list[str], overrides: list[str]) -> list[tuple[KeyTokenConfig, bool]]:
    """The block of each method, and whether it divides advantages by a standard deviation."""
    runs = [main.load_config([*overrides, f"method={name}"]) for name in names]
    return [(validate_run(run), bool(run.algorithm.norm_adv_by_std_in_grpo)) for run in runs]


def runner_of(tour: list[tuple[KeyTokenConfig, bool]]) -> Any:
    """KeyToken's task runner with a trainer that takes the tour."""

    class TourRunner(task_runner._plain_class(task_runner.KeyTokenTaskRunner)):  # type: ignore[misc]
        def run(self, config: Any) -> None:
            from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

            from keytoken.verl_adapter import trainer

            class TourTrainer(trainer.SeparateTrainer):
                def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
                    self._take_up(*tour[(self.global_steps - 1) // STEPS])
                    return super()._compute_old_log_prob(batch, metrics)

                def _take_up(self, keytoken: KeyTokenConfig, by_std: bool) -> None:
                    if self.keytoken is not keytoken:
                        self.keytoken = keytoken
                        with open_dict(self.config):
                            self.config.algorithm.norm_adv_by_std_in_grpo = by_std
                        self._hand_over_method()

            TRAINER_REGISTRY["keytoken_separate"] = TourTrainer
            super().run(config)

    return ray.remote(num_cpus=1)(TourRunner)


if __name__ == "__main__":
    names, overrides = os.environ["KEYTOKEN_TOUR"].split(","), sys.argv[1:]
    task_runner.KeyTokenTaskRunner = runner_of(methods_of(names, overrides))
    main.train([*overrides, f"method={names[0]}", f"trainer.total_training_steps={STEPS * len(names)}"])
