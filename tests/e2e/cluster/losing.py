"""A training run whose attribution worker kills itself at a chosen moment of a chosen step.

Run as ``keytoken train`` is, with ``KEYTOKEN_LOSES`` in the environment: ``pass@2`` in the passes of step 2,
``sync@3`` in the middle of the weight broadcast that follows step 3.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import ray

from keytoken.cli import main
from keytoken.verl_adapter import task_runner


def in_a_pass(worker: Any) -> None:
    import os
    import signal

    worker.engine.eval_mode = lambda: os.kill(os.getpid(), signal.SIGKILL)


def in_a_broadcast(worker: Any) -> None:
    import os
    import signal

    receive = worker.checkpoint_engine.receive_weights

    async def half(global_steps: int) -> Any:
        async for number_and_tensor in receive(global_steps=global_steps):
            yield number_and_tensor
            os.kill(os.getpid(), signal.SIGKILL)

    worker.checkpoint_engine.receive_weights = half


def losing_trainer(moment: str, step: int) -> type:
    from keytoken.verl_adapter import trainer

    class LosingTrainer(trainer.SeparateTrainer):
        def on_step_begin(self) -> None:
            if self.global_steps == step and moment == "pass":
                self.arm(in_a_pass)
            super().on_step_begin()

        def on_step_end(self) -> None:
            if self.global_steps == step and moment == "sync":
                self.arm(in_a_broadcast)
            super().on_step_end()

        def arm(self, what: Any) -> None:
            ray.get([worker.__ray_call__.remote(what) for worker in self.attribution_wg.workers])

    return LosingTrainer


class LosingRunner(task_runner._plain_class(task_runner.KeyTokenTaskRunner)):  # type: ignore[misc]
    def run(self, config: Any) -> None:
        from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

        moment, step = os.environ["KEYTOKEN_LOSES"].split("@")
        TRAINER_REGISTRY["keytoken_separate"] = losing_trainer(moment, int(step))
        super().run(config)


if __name__ == "__main__":
    task_runner.KeyTokenTaskRunner = ray.remote(num_cpus=1)(LosingRunner)
    sys.exit(main(["train", *sys.argv[1:]]))
