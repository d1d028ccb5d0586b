"""A training run whose processes are broken while it runs, one bug at a time, and the parity gate asked.

Run as ``keytoken train`` is; what the gate said of each bug goes to the file in ``KEYTOKEN_SABOTAGE``, as
JSON: null where it noticed nothing. Every bug is one that the stack had or has, brought back by undoing what
stands against it, in the process where it lives; then it is mended again, so that all share one start of the
pools.
The engine's workers take functions in this run: ``VLLM_ALLOW_INSECURE_SERIALIZATION=1``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from keytoken import main
from keytoken.verl_adapter import task_runner


def saved() -> dict[str, Any]:
    """What was swapped in this process; in a module, because every function brings globals of its own."""
    import keytoken

    return vars(keytoken).setdefault("_swapped", {})


def swap(owner: Any, name: str, value: Any) -> None:
    """Give an attribute another value until :func:`restore`."""
    saved().setdefault(f"{id(owner)}.{name}", (owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def restore(*_: Any) -> None:
    for owner, name, value in saved().values():
        setattr(owner, name, value)
    saved().clear()


def without_b1(_: Any) -> None:
    """verl declares the wrong axis of positions ragged where all rows are equally long."""
    from verl.utils import tensordict_utils
    from verl.workers import engine_workers
    from verl.workers.engine import base

    fixed = tensordict_utils.maybe_fix_3d_position_ids
    for module in (tensordict_utils, engine_workers, base):
        swap(module, "maybe_fix_3d_position_ids", fixed.__wrapped__)


def without_b5(_: Any) -> None:
    """verl takes the mean of a model output where a micro-batch has no vision."""
    from verl.models.transformers import qwen2_vl

    swap(qwen2_vl, "_get_input_embeds", qwen2_vl._get_input_embeds.__wrapped__)


def positions_of_transformers(_: Any) -> None:
    """B2: text goes on behind a video at its height or width, and seconds are cut to whole ones."""
    import torch

    from keytoken.verl_adapter import agent_loop

    def by_transformers(processor: Any, ids: Any, mask: Any, features: Any) -> Any:
        kinds = (ids == processor.image_token_id).int() + 2 * (ids == processor.video_token_id).int()
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        given = {name: features[name] for name in names if name in features}
        rows, _ = processor.get_rope_index(
            input_ids=ids, mm_token_type_ids=kinds, attention_mask=mask, **given
        )
        return torch.cat([torch.arange(ids.shape[1]).expand(1, 1, -1), rows.transpose(0, 1)], dim=1)

    swap(agent_loop, "position_ids", by_transformers)


def positions_of_verl(_: Any) -> None:
    """B4: verl's own rule looks behind every start of a picture."""
    import torch
    from verl.models.transformers import qwen2_vl

    from keytoken.verl_adapter import agent_loop

    def by_verl(processor: Any, ids: Any, mask: Any, features: Any) -> Any:
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        given = {name: features[name] for name in names if name in features}
        rows = qwen2_vl.get_rope_index(processor, ids[0], attention_mask=mask[0], **given)
        return torch.cat([torch.arange(ids.shape[1])[None], rows.reshape(3, -1)])[None]

    swap(agent_loop, "position_ids", by_verl)


def forget_failures(worker: Any) -> None:
    """A failed answer of ours ends a run; this one goes on."""
    from keytoken.verl_adapter.failures import FailureWatch

    restore()
    worker._failures = FailureWatch()


def changing_prompts(change: Callable[[Any], dict[str, Any]]) -> Callable[[Any], None]:
    """The engine gets another request than the trainer thinks."""

    def sabotage(_: Any) -> None:
        import dataclasses

        from keytoken.verl_adapter import agent_loop

        pack = agent_loop.pack_prompt

        def changed(*args: Any) -> Any:
            prompt = pack(*args)
            return dataclasses.replace(prompt, **change(prompt)) if prompt.videos else prompt

        swap(agent_loop, "pack_prompt", changed)

    return sabotage


def without_metadata(prompt: Any) -> dict[str, Any]:
    """B3: vLLM drops the times of the frames unless they are sent a second time."""
    return {"processor_kwargs": {}}


def other_pixels(prompt: Any) -> dict[str, Any]:
    """What B8 does to a video, without its cause."""
    return {"videos": [(frames // 2, metadata) for frames, metadata in prompt.videos]}


def as_verl_sends(prompt: Any) -> dict[str, Any]:
    """B7: a block of placeholders for each temporal patch of Qwen3-VL, of which vLLM expands the first."""
    return {"engine_ids": prompt.token_ids}


def normalised_otherwise(worker: Any) -> None:
    """B8: the engine shows the model pixels of another mean and deviation than the trainer."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    for side in (worker.processor.image_processor, worker.processor.video_processor):
        swap(side, "image_mean", OPENAI_CLIP_MEAN)
        swap(side, "image_std", OPENAI_CLIP_STD)


def without_ban(worker: Any) -> None:
    """B4: the engine samples vision tokens, because nothing masks them."""
    model = worker.model_runner.model
    model.masked, model.compute_logits = model.compute_logits, type(model).compute_logits.__get__(model)


def with_padded_vocabulary(worker: Any) -> None:
    """B10: tokens that the tokenizer does not know are masked in the engine only; here the last third."""
    model = worker.model_runner.model
    model.masked = masked = model.compute_logits

    def padded(*args: Any, **kwargs: Any) -> Any:
        logits = masked(*args, **kwargs)
        logits[..., 2 * logits.shape[-1] // 3 :] = float("-inf")
        return logits

    model.compute_logits = padded


def with_masks_again(worker: Any) -> None:
    worker.model_runner.model.compute_logits = worker.model_runner.model.masked


def without_resets(server: Any) -> None:
    """B9: caches of the engine outlive a weight sync."""

    async def nothing(*_: Any, **__: Any) -> None:
        return None

    pause = server.engine.pause_generation

    async def keep(**options: Any) -> Any:
        return await pause(**{**options, "clear_cache": False})

    for name in ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"):
        swap(server.engine, name, nothing)
    swap(server.engine, "pause_generation", keep)


def broken_trainer() -> type:
    """KeyToken's trainer; before its first step and behind it, it is broken on purpose."""
    from keytoken.errors import ParityError
    from keytoken.verl_adapter import trainer

    class BrokenTrainer(trainer.SeparateTrainer):
        def on_train_begin(self) -> None:
            self.said: dict[str, str | None] = {}
            self._pass_gate_once(0)
            if "Qwen3" in type(self.processor).__name__:
                self.break_qwen3()
            else:
                self.break_qwen2_5()
            self.ask("nothing", [], restore)
            super().on_train_begin()

        def break_qwen3(self) -> None:
            loops = self.agent_loop_manager.agent_loop_workers
            self.ask("B7", loops, changing_prompts(as_verl_sends), forget_failures)
            self.ask("B8", loops, normalised_otherwise, forget_failures)

        def break_qwen2_5(self) -> None:
            actors, scorers = self.actor_rollout_wg.workers, self.attribution_wg.workers
            loops = self.agent_loop_manager.agent_loop_workers
            self.ask("B1 in the actor", actors, without_b1)
            self.ask("B5 in the actor", actors, without_b5)
            self.ask("B5 in the attribution group", scorers, without_b5)
            self.ask("B5 in a view", scorers, without_b5, samples=1)
            self.ask("B2", loops, positions_of_transformers, forget_failures)
            self.ask("B4 in positions", loops, positions_of_verl, forget_failures)
            self.ask("B3", loops, changing_prompts(without_metadata), forget_failures)
            self.ask("other pixels", loops, changing_prompts(other_pixels), forget_failures)
            self.ask_engine("B4 in the engine", without_ban)
            self.ask_engine("B10", with_padded_vocabulary)

        def ask(
            self,
            name: str,
            actors: list[Any],
            sabotage: Callable[[Any], None],
            mend: Callable[[Any], None] | None = None,
            samples: int | None = None,
        ) -> None:
            """Break these processes, ask the gate, mend them."""
            gate: Any = self._parity
            everything = gate._samples
            gate._samples = everything[:samples]
            ray.get([actor.__ray_call__.remote(sabotage) for actor in actors])
            self.say(name, lambda: gate.check(0))
            ray.get([actor.__ray_call__.remote(mend or restore) for actor in actors])
            gate._samples = everything

        def say(self, name: str, check: Callable[[], Any]) -> None:
            try:
                check()
                self.said[name] = None
            except ParityError as problem:
                self.said[name] = str(problem)
            Path(os.environ["KEYTOKEN_SABOTAGE"]).write_text(json.dumps(self.said, indent=1))

        def servers(self) -> list[Any]:
            return [server for replica in self._parity._replicas() for server in replica.servers]

        def ask_engine(self, name: str, sabotage: Callable[[Any], None]) -> None:
            """The same in the processes of the engine's workers."""
            ray.get([server.collective_rpc.remote(sabotage) for server in self.servers()])
            self.ask(name, [], restore)
            ray.get([server.collective_rpc.remote(with_masks_again) for server in self.servers()])

        def on_step_end(self) -> None:
            if self.keytoken.parity.every_steps != 1:  # the gate is not asked behind this step
                return super().on_step_end()
            servers = self.servers()
            ray.get([server.__ray_call__.remote(without_resets) for server in servers])
            self.say("B9", super().on_step_end)
            ray.get([server.__ray_call__.remote(restore) for server in servers])

    return BrokenTrainer


class SabotageRunner(task_runner._plain_class(task_runner.KeyTokenTaskRunner)):  # type: ignore[misc]
    def run(self, config: Any) -> None:
        from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

        TRAINER_REGISTRY["keytoken_separate"] = broken_trainer()
        super().run(config)


if __name__ == "__main__":
    task_runner.KeyTokenTaskRunner = ray.remote(num_cpus=1)(SabotageRunner)
    main.train(sys.argv[1:])
