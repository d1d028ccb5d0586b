"""What one run trains with, read from the configuration that ``keytoken train`` would read for it.

An arm is composed and validated as a whole run of ``experiment=demo_cpu``, so a method has its preset's
values, and a combination that the real stack refuses is refused here. What the one-process trainer does not
do is refused by name: nothing of a configuration is left out in silence.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from keytoken.block import unknown_name
from keytoken.demo.run import DEMO_VARIABLE
from keytoken.errors import ConfigurationError
from keytoken.main import load_config
from keytoken.schema import KeyTokenConfig, MethodConfig
from keytoken.study.config import START, ArmConfig, SectionConfig, StudyConfig
from keytoken.study.warm import WarmStart

EXPERIMENT = "experiment=demo_cpu"
# What dynamic sampling may look at: values of the reward function, and the whole reward.
FILTER_METRICS = ("acc", "format", "reward")

# Keys that change the training and that one process has no equivalent of: the value it works with, and why.
FIXED: dict[str, tuple[Any, str]] = {
    "algorithm.adv_estimator": ("keytoken_grpo", "advantages are those of groups"),
    "algorithm.use_kl_in_reward": (False, "the KL term is in the loss"),
    "actor_rollout_ref.actor.ppo_epochs": (1, "every batch is used once"),
    "trainer.v1.separate_async.parameter_sync_step": (1, "every batch is one update"),
    "actor_rollout_ref.actor.optim.lr_scheduler_type": ("constant", "the rate stays where it is"),
    "actor_rollout_ref.rollout.top_p": (1, "all of the distribution is sampled"),
    "actor_rollout_ref.rollout.top_k": (-1, "all of the distribution is sampled"),
    "keytoken.method.order_bonus": (None, "no answers to shuffled clips are sampled; use the real stack"),
    "keytoken.attribution.every_steps": (1, "the views are scored in every step"),
    "algorithm.rollout_correction.rollout_is": (None, "the policy that samples is the one that trains"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlong:
    """DAPO's penalty, see :func:`keytoken.rewards.length.overlong_penalty`."""

    max_tokens: int
    buffer: int
    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that one run's updates depend on.

    Attributes:
        method: The method, typed.
        seed: Order of prompts, sampling, random tokens.
        shuffle_seed: Seed of what views draw.
        num_prompts: Prompts of an update.
        num_answers: Answers to each.
        max_tokens: Longest answer.
        temperature: Of sampling, and of the log-probs.
        lr: Learning rate after the warm-up.
        warm_up: Steps over which it rises from 0, as verl's schedule does: step 1 has a rate of 0.
        betas: Of AdamW.
        weight_decay: Of AdamW.
        grad_clip: Largest norm of the gradient.
        divide_by_std: Whether advantages are divided by their group's standard deviation.
        filter_metric: With dynamic sampling, what has to differ within a group ("acc", "reward", ...).
        reward_weights: Keyword arguments of :func:`keytoken.rewards.score.compute_score`.
        overlong: Penalty for overlong answers, if any.
    """

    method: MethodConfig
    seed: int
    shuffle_seed: int
    num_prompts: int
    num_answers: int
    max_tokens: int
    temperature: float
    lr: float
    warm_up: int
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float
    divide_by_std: bool
    filter_metric: str | None
    reward_weights: dict[str, Any]
    overlong: Overlong | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run: an arm of a section with one seed.

    Attributes:
        study: Name of the study.
        section: Name of the section.
        arm: Name of the arm; "start" for the warm start without training.
        seed: Seed of the run.
        start: The warm start that it begins with.
        steps: Updates; 0 for the arm "start".
        words: The hydra overrides of the arm, complete but for ``keytoken.seed``.
        splits: What is evaluated after the last step.
        train_prompts: Prompts to train on.
        eval_prompts: Prompts of each evaluated split.
        eval_samples: Answers at temperature 1 to each of them.
        max_refills: Most batches drawn to replace prompts without a signal.
        backend: ``process`` or ``stack``, see :class:`keytoken.study.config.StudyConfig`.
    """

    study: str
    section: str
    arm: str
    seed: int
    start: WarmStart
    steps: int
    words: tuple[str, ...]
    splits: tuple[str, ...]
    train_prompts: int
    eval_prompts: int
    eval_samples: int
    max_refills: int
    backend: str = "process"

    @property
    def name(self) -> str:
        """Name of its file, without the ending."""
        return f"{self.section}/{self.arm}-s{self.seed}"

    def digest(self, settings: TrainSettings | None) -> str:
        """Hex digest of all that the numbers of the run depend on, but for the code that trains.

        Without settings, on the real stack, the words stand for them.
        """
        plan = dataclasses.asdict(self) | {"start": self.start.digest()}
        for name in ("study", "section", *(() if settings is None else ("words",))):
            del plan[name]
        trained_with = None if settings is None else dataclasses.asdict(settings)
        values = json.dumps([plan, trained_with], sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:12]


def plans_of(study: StudyConfig) -> Iterator[RunPlan]:
    """Every run of a study, section by section; within a section seed by seed, the untrained arm first."""
    for name, section in study.sections.items():
        for seed in section.seeds:
            yield _plan(study, name, section, START, ArmConfig(method="grpo"), seed)
            for arm in section.arms:
                yield _plan(study, name, section, arm, study.arms[arm], seed)


def warm_start_of(study: StudyConfig, section: SectionConfig) -> WarmStart:
    """The warm start of a section."""
    config = study.warm_starts[section.warm_start]
    return WarmStart(world=section.world, config=config, seed=section.warm_seed)


def _plan(
    study: StudyConfig, name: str, section: SectionConfig, arm_name: str, arm: ArmConfig, seed: int
) -> RunPlan:
    words = [
        EXPERIMENT,
        f"method={arm.method}",
        f"actor_rollout_ref.actor.optim.lr={study.lr if section.lr is None else section.lr}",
        f"trainer.total_training_steps={study.steps}",
        *study.overrides,
        *arm.overrides,
    ]
    return RunPlan(
        study=study.name,
        section=name,
        arm=arm_name,
        seed=seed,
        start=warm_start_of(study, section),
        steps=0 if arm_name == START else study.steps,
        words=tuple(words),
        splits=tuple(section.splits),
        train_prompts=study.train_prompts,
        eval_prompts=study.eval_prompts,
        eval_samples=study.eval_samples,
        max_refills=study.max_refills,
        backend=study.backend,
    )


def load_settings(plan: RunPlan) -> TrainSettings | None:
    """Compose and check the configuration of a run.

    Returns:
        What one process trains with; None for a run of the real stack, which composes again.

    Raises:
        ConfigurationError: what ``keytoken train`` would refuse, or what only the real stack can do.
    """
    if plan.backend == "stack":
        _config_of(plan.words)
        return None
    return dataclasses.replace(_settings_of(plan.words, plan.arm), seed=plan.seed)


@functools.cache
def _settings_of(words: tuple[str, ...], arm: str) -> TrainSettings:
    return read_settings(_config_of(words), f"arm {arm}")


@functools.cache
def _config_of(words: tuple[str, ...]) -> DictConfig:
    """Composing takes seconds, and all seeds of an arm have the same words."""
    with demo_folder(Path("not-read")):
        return load_config(words)


def read_settings(config: DictConfig, what: str) -> TrainSettings:
    """Read a composed, validated configuration; ``what`` names it in messages."""
    for key, (needed, reason) in FIXED.items():
        value = OmegaConf.select(config, key, default=needed)
        if value != needed:
            raise ConfigurationError(
                f"{what}: {key} is {OmegaConf.to_container(value) if OmegaConf.is_config(value) else value}; "
                f"a study in one process needs {str(needed).lower().replace('none', 'null')}: {reason}."
            )
    block: Any = OmegaConf.to_container(config.keytoken)
    keytoken = KeyTokenConfig.from_mapping(block)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    filtering = config.algorithm.get("filter_groups") or {}
    metric = filtering.get("metric") if filtering.get("enable") else None
    if metric is not None and metric not in FILTER_METRICS:
        raise ConfigurationError(
            unknown_name(f"metric algorithm.filter_groups.metric={metric}", metric, FILTER_METRICS, "metrics")
        )
    return TrainSettings(
        method=keytoken.method,
        seed=keytoken.seed,
        shuffle_seed=keytoken.attribution.shuffle_seed,
        num_prompts=config.data.train_batch_size,
        num_answers=rollout.n,
        max_tokens=config.data.max_response_length,
        temperature=rollout.temperature,
        lr=actor.optim.lr,
        warm_up=_warm_up(actor.optim, config.trainer.total_training_steps),
        betas=(actor.optim.betas[0], actor.optim.betas[1]),
        weight_decay=actor.optim.weight_decay,
        grad_clip=actor.grad_clip,
        divide_by_std=bool(config.algorithm.get("norm_adv_by_std_in_grpo", True)),
        filter_metric=metric,
        reward_weights=dict(config.reward.custom_reward_function.get("reward_kwargs") or {}),
        overlong=_overlong(config),
    )


def _warm_up(optim: DictConfig, steps: int) -> int:
    """As verl reads it: steps if there are any, else a share of the run."""
    if optim.lr_warmup_steps is not None and optim.lr_warmup_steps > 0:
        return int(optim.lr_warmup_steps)
    return int((optim.lr_warmup_steps_ratio or 0.0) * steps)


def _overlong(config: DictConfig) -> Overlong | None:
    options = config.reward.reward_kwargs
    buffer = options.overlong_buffer_cfg
    if not buffer.enable:
        return None
    return Overlong(max_tokens=options.max_resp_len, buffer=buffer.len, factor=float(buffer.penalty_factor))


@contextmanager
def demo_folder(folder: Path) -> Iterator[None]:
    """Name the folder that the demo's configuration reads from the environment."""
    before = os.environ.get(DEMO_VARIABLE)
    os.environ[DEMO_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[DEMO_VARIABLE]
        else:
            os.environ[DEMO_VARIABLE] = before
