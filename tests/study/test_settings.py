"""An arm is what the real stack would read, or it is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from keytoken.demo.warm_start import WarmStartConfig
from keytoken.errors import ConfigurationError
from keytoken.golden import load_preset
from keytoken.study.config import StudyConfig, load_study, parse_study, studies
from keytoken.study.settings import EXPERIMENT, RunPlan, TrainSettings, load_settings, plans_of
from keytoken.study.warm import WarmStart
from keytoken.study.worlds import WORLDS


def settings_of(*words: str) -> TrainSettings:
    start = WarmStart(world="standard", config=WarmStartConfig(), seed=0)
    plan = RunPlan(
        study="test",
        section="test",
        arm="arm",
        seed=3,
        start=start,
        steps=40,
        words=(EXPERIMENT, *words),
        splits=("test",),
        train_prompts=8,
        eval_prompts=8,
        eval_samples=1,
        max_refills=1,
    )
    found = load_settings(plan)
    assert found is not None
    return found


def test_values_of_the_demo_and_of_the_preset() -> None:
    found = settings_of("method=tor_dapo", "actor_rollout_ref.actor.optim.lr=2e-4")
    assert (found.num_prompts, found.num_answers, found.max_tokens, found.temperature) == (16, 8, 40, 1.0)
    assert (found.lr, found.warm_up, found.betas, found.weight_decay) == (2e-4, 5, (0.9, 0.95), 0.0)
    assert (found.grad_clip, found.seed, found.divide_by_std) == (1.0, 3, True)
    assert found.filter_metric == "acc"
    assert found.overlong is not None and dataclasses.astuple(found.overlong) == (40, 8, 1.0)
    assert found.method == load_preset("tor_dapo")
    assert not settings_of("method=dr_grpo").divide_by_std


REFUSED = {
    "order bonus": (["method=t_grpo"], r"order_bonus.*use the real stack"),
    "epochs": (["actor_rollout_ref.actor.ppo_epochs=2"], "ppo_epochs is 2.*needs 1"),
    "schedule": (["actor_rollout_ref.actor.optim.lr_scheduler_type=cosine"], "lr_scheduler_type is cosine"),
    "reuse of scores": (["keytoken.attribution.every_steps=4"], "every_steps is 4"),
    "nucleus": (["actor_rollout_ref.rollout.top_p=0.9"], "top_p is 0.9"),
    "estimator": (["algorithm.adv_estimator=rloo"], "adv_estimator is rloo"),
    "kl in reward": (["algorithm.use_kl_in_reward=true"], "use_kl_in_reward is True"),
    "filter": (["method=dapo", "algorithm.filter_groups.metric=length_bonus"], "Unknown metric"),
    "stack": (["actor_rollout_ref.rollout.n=1"], "a group of one answer"),
    "unknown key": (["keytoken.method.los.kl_coef=0"], "Did you mean"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_what_one_process_cannot_do_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        settings_of(*words)


@pytest.mark.parametrize("name", studies())
def test_every_study_composes(name: str) -> None:
    """Arms differ in their method, and in the rate where a study is about it; in no other setting."""
    study = load_study([f"study={name}"])
    plans = list(plans_of(study))
    assert {plan.start.world for plan in plans} <= set(WORLDS)
    assert len({plan.name for plan in plans}) == len(plans)
    if name == "tuning":  # composing takes a second an arm, and its arms differ in one number
        plans = [plan for plan in plans if plan.arm in ("grpo_1e-4", "video_ktr_1e-4")]
    loaded = [(plan, found) for plan in plans if (found := load_settings(plan)) is not None]
    one_seed = {plan.arm: found for plan, found in loaded}
    if name != "tuning":
        rates = {key: section.lr or study.lr for key, section in study.sections.items()}
        assert {(plan.section, found.lr) for plan, found in loaded} == set(rates.items())
    shared = ("num_prompts", "num_answers", "max_tokens", "temperature", "warm_up", "betas", "grad_clip")
    assert all(len({getattr(found, key) for found in one_seed.values()}) == 1 for key in shared)


def test_the_first_study_compares_token_weights_only() -> None:
    """The arms without a published loss share one, and select what their titles say."""
    study = load_study(["study=first"])
    loaded = {plan.arm: load_settings(plan) for plan in plans_of(study)}
    found = {arm: settings.method for arm, settings in loaded.items() if settings is not None}
    ratios = {
        "entropy": (0, 0, 0.2),
        "visual": (0.2, 0, 0),
        "temporal": (0, 0.2, 0),
        "visual_entropy": (0.2, 0, 0.2),
        "visual_temporal": (0.2, 0.2, 0),
        "temporal_entropy": (0, 0.2, 0.2),
        "video_ktr": (0.2, 0.2, 0.2),
        "random": (0.2, 0.2, 0.2),
        "random_small": (0, 0, 0.2),
    }
    for arm, expected in ratios.items():
        selection = found[arm].selection
        assert selection is not None
        values = (selection.visual_ratio, selection.temporal_ratio, selection.entropy_ratio)
        assert values == expected, arm
        assert found[arm].loss == found["grpo"].loss and found[arm].loss.kl_coef == 0
        assert found[arm].control == ("random" if arm.startswith("random") else "none")
    assert found["grpo"].selection is None
    for published in ("video_ktr_official", "tor_grpo", "tor_dapo", "high_entropy"):
        assert found[published] == load_preset(published)
    assert all(len(section.seeds) >= 5 for section in study.sections.values())


MINIMAL: dict[str, Any] = {
    "name": "made",
    "lr": 1e-3,
    "steps": 2,
    "arms": {"grpo": {"method": "all"}},
    "warm_starts": {"tiny": {"text_steps": 1}},
    "sections": {"one": {"world": "standard", "warm_start": "tiny", "seeds": [1], "arms": ["grpo"]}},
}


def test_a_minimal_study_has_a_run_without_training_too() -> None:
    study = parse_study(MINIMAL)
    assert isinstance(study, StudyConfig)
    plans = list(plans_of(study))
    assert [(plan.name, plan.steps) for plan in plans] == [("one/start-s1", 0), ("one/grpo-s1", 2)]
    assert plans[0].start.config == WarmStartConfig(text_steps=1)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The minimal study with one key replaced."""
    *parents, last = path.split(".")
    made: dict[str, Any] = {**MINIMAL}
    node = made
    for parent in parents:
        node[parent] = {**node[parent]}
        node = node[parent]
    node[last] = value
    return made


WRONG = {
    "arm": ("sections.one.arms", ["gpro"], "Did you mean 'grpo'"),
    "warm start": ("sections.one.warm_start", "tny", "Did you mean 'tiny'"),
    "split": ("sections.one.splits", ["tests"], "Did you mean 'test'"),
    "world": ("sections.one.world", "standart", "Did you mean 'standard'"),
    "seeds": ("sections.one.seeds", ["a"], "whole numbers"),
    "twice": ("sections.one.seeds", [1, 1], "each once"),
    "rate": ("lr", 0.0, "such as 3.0e-4"),
    "steps": ("steps", 0, "1 or more"),
    "samples": ("eval_samples", 10, "at most"),
    "key": ("stepps", 3, "Did you mean 'steps'"),
    "rates of the warm start": ("warm_starts.tiny.text_step", 3, "Did you mean 'text_steps'"),
    "name": ("arms", {"start": {"method": "all"}}, "arm without training"),
    "path": ("arms", {"a/b": {"method": "all"}}, "cannot be the name"),
    "none": ("sections", {}, "some entries"),
    "backend": ("backend", "stak", "use one of process, stack"),
}


@pytest.mark.parametrize(("path", "value", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_study_is_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_study(changed(path, value))


def test_words_of_the_command_line() -> None:
    study = load_study(["study=smoke", "steps=7", "sections.standard.seeds=[4]", "folder=/x"])
    assert (study.steps, study.sections["standard"].seeds, study.folder) == (7, [4], "/x")
    for words, message in (
        ([], "Name one study"),
        (["study=frist"], "Did you mean 'first'"),
        (["study=smoke", "steps"], "KEY=VALUE"),
        (["study=smoke", "stesp=3"], "Did you mean 'steps'"),
        (["study=smoke", "steps=many"], "type int"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            load_study(words)
