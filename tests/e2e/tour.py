"""A training run that changes its method every second step: all methods on one cluster, one set of pools.

Run as ``keytoken train`` is, with the stops in ``KEYTOKEN_TOUR``, separated by commas: the name of a method,
and behind blanks the overrides that hold for it alone. What a method sets in the ``keytoken`` block, and how
advantages are normalised, is handed to the running workers as it is at the start of a run, before the first
prompt of a step is sent out. What else belongs to a method is that of Video-KTR, which has a view of each
kind and a reference policy: dynamic sampling, penalties of the reward, the pools.
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
POOLS_OF = "video_ktr"


def blocks_of(stops: list[str], overrides: list[str]) -> list[tuple[KeyTokenConfig, bool]]:
    """The block of each stop, and whether it divides advantages by a standard deviation."""
    runs = [main.load_config([*overrides, *f"method={stop}".split()]) for stop in stops]
    return [(validate_run(run), bool(run.algorithm.norm_adv_by_std_in_grpo)) for run in runs]


def runner_of(tour: list[tuple[KeyTokenConfig, bool]]) -> Any:
    """KeyToken's task runner with a trainer that takes the tour."""

    class TourRunner(task_runner._plain_class(task_runner.KeyTokenTaskRunner)):  # type: ignore[misc]
        def run(self, config: Any) -> None:
            from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

            from keytoken.verl_adapter import trainer

            class TourTrainer(trainer.SeparateTrainer):
                def _fetch_one_gen_batch(self) -> Any:
                    self._take_up(*tour[(self.global_steps - 1) // STEPS])
                    return super()._fetch_one_gen_batch()

                def _take_up(self, keytoken: KeyTokenConfig, by_std: bool) -> None:
                    if self.keytoken != keytoken:
                        self.keytoken = keytoken
                        with open_dict(self.config):
                            self.config.algorithm.norm_adv_by_std_in_grpo = by_std
                        self._hand_over_method()

            TRAINER_REGISTRY["keytoken_separate"] = TourTrainer
            super().run(config)

    return ray.remote(num_cpus=1)(TourRunner)


if __name__ == "__main__":
    stops, overrides = os.environ["KEYTOKEN_TOUR"].split(","), sys.argv[1:]
    task_runner.KeyTokenTaskRunner = runner_of(blocks_of(stops, overrides))
    main.train([*overrides, f"method={POOLS_OF}", f"trainer.total_training_steps={STEPS * len(stops)}"])
