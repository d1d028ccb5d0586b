"""Every rule: the demo passes it; who breaks it gets a message with the key and the remedy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from keytoken.errors import ConfigurationError
from keytoken.loss_rules import INERT, PENALTY
from keytoken.main import load_config
from keytoken.validate import FUSED_HEAD_NEEDS, RULES, validate_run

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
LOSS = "keytoken.method.loss"
FUSED = {"keytoken.kernels.head": "fused"}
# Without views, whose own rules would be broken first, and with ranks that sequences could be split over.
FUSED_ON_TWO = {**FUSED, "keytoken.method.selection": None, "trainer.n_gpus_per_node": 2}
FILTER = {"algorithm.filter_groups.enable": True}
# An estimator for single answers, in micro-batches that divide the fewer answers.
UNGROUPED = {
    "algorithm.adv_estimator": "reinforce_plus_plus",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": 16,
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 16,
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 16,
}
# Passes of four answers, which any share of a batch divides into here.
SMALL_PASSES = {
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 4,
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 4,
}
ORDER = "keytoken.method.order_bonus"
DIAGNOSED = {"keytoken.method.selection": None, "keytoken.diagnostics.every_steps": 5}
# TW-GRPO compares the answers to a prompt.
COMPARING = {"keytoken.method.name": "tw_grpo", "keytoken.method.selection": None}
PENALIZE = {f"{PENALTY}.enable": True}
MAX_LENGTH = "reward.reward_kwargs.max_resp_len"

# rule: list of (values to set on the demo, what the message must say: the key, then the remedy)
STANDING_IN = {"keytoken.attribution.on_failure": "actor"}
BROKEN: dict[str, list[tuple[dict[str, Any], list[str]]]] = {
    "_types": [
        ({"trainer.nnodes": "abc"}, ["trainer.nnodes is 'abc'", "whole number of at least 1"]),
        ({"data.train_batch_size": 0}, ["data.train_batch_size is 0", "at least 1"]),
        ({f"{ROLLOUT}.n": 2.5}, [f"{ROLLOUT}.n is 2.5", "whole number"]),
        ({f"{ACTOR}.optim.lr": "fast"}, [f"{ACTOR}.optim.lr is 'fast'", "number of at least 0"]),
        ({f"{ROLLOUT}.temperature": -1.0}, [f"{ROLLOUT}.temperature is -1.0", "at least 0"]),
        ({"reward": 3}, ["reward is 3", "reward.KEY=VALUE"]),
    ],
    "_no_secrets": [
        (
            {"ray_kwargs.ray_init.runtime_env.env_vars.JUDGE_KEY": "mine"},
            ["env_vars.JUDGE_KEY holds", "export"],
        ),
        ({"trainer.project_name": "hf_" + 34 * "a"}, ["trainer.project_name holds", "not shown here"]),
        ({"trainer.logger": ["console", "sk-" + 48 * "a"]}, ["trainer.logger.1 holds", "--env NAME"]),
    ],
    "_method": [
        ({"keytoken.method.name": "video_krt"}, ["keytoken.method.name=video_krt", "mean 'video_ktr'?"]),
        ({"keytoken.method.name": "grpo"}, ["keytoken.method.name=grpo", "keytoken.method.selection=null"]),
    ],
    "_views": [
        ({"keytoken.method.view.visual": "blakened"}, ["view.visual=blakened", "mean 'blackened'?"]),
        ({"keytoken.method.view.visual": "frozen"}, ["visual=frozen is a temporal view", "masked, blank"]),
        ({"keytoken.method.view.temporal": "masked"}, ["temporal=masked is a visual view", "shuffled"]),
    ],
    "_sampling": [
        ({"keytoken.sampling.max_frame": 8}, ["keytoken.sampling.max_frame", "mean 'max_frames'?"]),
        ({"keytoken.sampling.fps": "two"}, ["fps is 'two'", "positive number"]),
        ({"keytoken.sampling.decoder": "ffmpeg"}, ["decoder 'ffmpeg'", "torchcodec", "pyav"]),
    ],
    "_clip_check": [
        ({"data.clip_check": "nwe"}, ["data.clip_check=nwe", "mean 'new'?"]),
        ({"data.clip_check_jobs": 0}, ["data.clip_check_jobs=0", "above 0"]),
    ],
    "_mode": [
        ({"trainer.v1.trainer_mode": "sync"}, ["trainer.v1.trainer_mode is 'sync'", "keytoken_separate"]),
        ({"trainer.use_v1": False}, ["trainer.use_v1=false", "trainer.use_v1=true"]),
        (
            {"trainer.v1.trainer_mode": "keytoken_sync"},
            ["trainer.v1.trainer_mode=keytoken_sync", "hybrid_engine=true", "pools=one_device"],
        ),
        (
            {"trainer.v1.trainer_mode": "keytoken_sync", "actor_rollout_ref.hybrid_engine": True},
            ["keytoken.attribution.placement=pool", "keytoken.attribution.placement=actor"],
        ),
    ],
    "_weight_transport": [
        ({f"{ROLLOUT}.checkpoint_engine.backend": "naive"}, ["backend=naive", "need nccl"]),
        ({f"{ROLLOUT}.checkpoint_engine.backend": "nccl"}, ["backend=nccl", "keytoken_gloo"]),
        ({f"{ROLLOUT}.nnodes": 0}, [f"{ROLLOUT}.nnodes=0", "set it to 1"]),
    ],
    "_advantage": [
        ({"algorithm.adv_estimator": "grpo"}, ["algorithm.adv_estimator=grpo", "keytoken_grpo"]),
        ({"algorithm.adv_estimator": "gae"}, ["algorithm.adv_estimator=gae", "critic"]),
        ({f"{ROLLOUT}.n": 1}, [f"{ROLLOUT}.n=1", f"{ROLLOUT}.n=8"]),
        ({f"{ROLLOUT}.temperature": 0}, [f"{ROLLOUT}.temperature=0", "above 0"]),
    ],
    "_mini_batch": [
        ({f"{ACTOR}.ppo_mini_batch_size": 8}, [f"{ACTOR}.ppo_mini_batch_size=8", "data.train_batch_size=8"]),
        (
            {"trainer.v1.separate_async.parameter_sync_step": 2},
            ["data.train_batch_size=16 over 2", "data.train_batch_size=32"],
        ),
    ],
    "_micro_batches": [
        ({"trainer.n_gpus_per_node": 3}, ["128 answers", "3 actor ranks", "data.train_batch_size"]),
        (
            {f"{ACTOR}.ppo_micro_batch_size_per_gpu": 48},
            ["ppo_micro_batch_size_per_gpu=48", "use_dynamic_bsz=true"],
        ),
        (
            {f"{ACTOR}.ppo_micro_batch_size_per_gpu": None},
            ["ppo_micro_batch_size_per_gpu=None", "use_dynamic_bsz"],
        ),
        (
            {f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 48},
            ["rollout.log_prob_micro_batch_size_per_gpu=48", "128 answers", "use_dynamic_bsz=true"],
        ),
        (
            {"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 256},
            ["ref.log_prob_micro_batch_size_per_gpu=256", "128 answers", "use_dynamic_bsz=true"],
        ),
        (
            {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_max_token_len_per_gpu": 200},
            ["ppo_max_token_len_per_gpu=200", "232", "raise it"],
        ),
    ],
    "loss": [
        ({f"{ACTOR}.use_kl_loss": False}, [f"{ACTOR}.use_kl_loss", f"{LOSS}.kl_coef"]),
        (
            {f"{LOSS}.clip_low": None, f"{LOSS}.clip_high": None, f"{ACTOR}.ppo_epochs": 2},
            [f"{LOSS}.clip_low=null", "ppo_epochs=2", "such as 0.2"],
        ),
    ],
    "inert_keys": [
        ({f"{ACTOR}.clip_ratio": 0.1}, ["clip_ratio=0.1", f"{LOSS}.clip_low"]),
        ({f"{ACTOR}.clip_ratio_low": 0.1}, ["clip_ratio_low=0.1", f"{LOSS}.clip_low"]),
        ({f"{ACTOR}.clip_ratio_high": 0.28}, ["clip_ratio_high=0.28", f"{LOSS}.clip_high"]),
        ({f"{ACTOR}.clip_ratio_c": 5.0}, ["clip_ratio_c=5.0", f"{LOSS}.dual_clip"]),
        ({f"{ACTOR}.kl_loss_coef": 0.04}, ["kl_loss_coef=0.04", f"{LOSS}.kl_coef"]),
        ({f"{ACTOR}.kl_loss_type": "k1"}, ["kl_loss_type=k1", f"{LOSS}.kl_clamp"]),
        ({f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean"}, ["loss_agg_mode=seq", f"{LOSS}.level"]),
        ({f"{ACTOR}.loss_scale_factor": 100}, ["loss_scale_factor=100", f"{LOSS}.constant_length"]),
        ({f"{ACTOR}.policy_loss.loss_mode": "gspo"}, ["policy_loss.loss_mode=gspo", f"{LOSS}.objective"]),
        ({f"{ACTOR}.entropy_coeff": 0.01}, ["entropy_coeff=0.01", "no bonus", f"{LOSS}.entropy_penalty"]),
        ({f"{ACTOR}.ppo_micro_batch_size": 8}, ["ppo_micro_batch_size=8", "ppo_micro_batch_size_per_gpu"]),
        ({"algorithm.filter_groups.max_num_gen_batches": 2}, ["=2", "until the batch is full"]),
        ({"algorithm.filter_groups.max_inflight_gen_batches": 2}, ["=2", "in flight as the batch lacks"]),
        ({"critic.enable": True}, ["critic.enable=True", "no"]),
        ({"trainer.v1.separate_async.hybrid_rollout.enable_switch": True}, ["enable_switch=True", "Leave"]),
    ],
    "dynamic_sampling": [
        (
            {**FILTER, **UNGROUPED, f"{ROLLOUT}.n": 1},
            ["algorithm.filter_groups.enable=true", f"{ROLLOUT}.n=1", f"{ROLLOUT}.n=8"],
        ),
        ({**FILTER, "algorithm.filter_groups.metric": None}, ["needs algorithm.filter_groups.metric", "acc"]),
    ],
    "overlong_penalty": [
        ({**PENALIZE, MAX_LENGTH: None}, [f"{MAX_LENGTH} is None", "data.max_response_length=40"]),
        ({**PENALIZE, MAX_LENGTH: 41}, [f"{MAX_LENGTH} is 41", "between 1 and"]),
        ({**PENALIZE, f"{PENALTY}.len": 41}, [f"{PENALTY}.len is 41", "a fifth, 8"]),
        ({**PENALIZE, f"{PENALTY}.len": 0.2}, [f"{PENALTY}.len is 0.2", "tokens"]),
        ({**PENALIZE, f"{PENALTY}.penalty_factor": -1}, [f"{PENALTY}.penalty_factor is -1", "above 0"]),
        (
            {**PENALIZE, "reward.reward_manager.name": "naive"},
            ["no effect on reward.reward_manager.name=naive", "LengthAwareRewardManager"],
        ),
    ],
    "order_bonus": [
        ({ORDER: {}, f"{ROLLOUT}.n": 1, **UNGROUPED}, [ORDER, f"{ROLLOUT}.n=1", f"{ROLLOUT}.n=8"]),
        (
            {ORDER: {"shuffled_answers": 9}, f"{ROLLOUT}.n": 8},
            [f"{ORDER}.shuffled_answers=9", f"{ROLLOUT}.n=8", "or null"],
        ),
        (
            {ORDER: {}, f"{ROLLOUT}.agent.default_agent_loop": "single_turn_agent"},
            ["default_agent_loop=single_turn_agent", "keytoken_single_turn"],
        ),
        (
            {ORDER: {}, "reward.reward_model.enable": True},
            ["reward.reward_model.enable_resource_pool=false", "set it to true"],
        ),
    ],
    "_rollout_correction": [
        ({"algorithm.rollout_correction.bypass_mode": True}, ["bypass_mode=True", "Leave it at false"]),
        ({"algorithm.rollout_correction.rollout_is": "token"}, ["rollout_is=token", "Leave it at null"]),
        (
            {"algorithm.rollout_correction.rollout_rs": "token_k1"},
            ["rollout_rs=token_k1", "Leave it at null"],
        ),
    ],
    "_rollout": [
        ({f"{ROLLOUT}.name": "sglang"}, [f"{ROLLOUT}.name=sglang", "vllm"]),
        ({f"{ROLLOUT}.max_model_len": 200}, [f"{ROLLOUT}.max_model_len=200", "232", "Raise it"]),
        ({f"{ROLLOUT}.max_num_batched_tokens": 128}, ["max_num_batched_tokens=128", "256", "raise it"]),
        ({f"{ROLLOUT}.tensor_model_parallel_size": 2}, ["tensor_model_parallel_size=2", "n_gpus_per_node=1"]),
    ],
    "_model": [
        ({f"{ACTOR}.strategy": "fsdp"}, [f"{ACTOR}.strategy=fsdp", "needs fsdp2"]),
        (
            {f"{ACTOR}.ulysses_sequence_parallel_size": 2, "trainer.n_gpus_per_node": 2},
            ["ulysses_sequence_parallel_size > 1", "set it to 1"],
        ),
        (
            {
                f"{ACTOR}.fsdp_config.mixed_precision.param_dtype": "bf16",
                "keytoken.attribution.check_base": False,
            },
            ["keytoken.attribution.check_base=false", "set it to true"],
        ),
        ({"actor_rollout_ref.model.lora_rank": 8}, ["actor_rollout_ref.model.lora_rank > 0", "set it to 0"]),
        ({"actor_rollout_ref.model.lora.rank": 8}, ["lora", "set it to 0"]),
        (  # diagnostics run a pass for a method that has none
            {**DIAGNOSED, "actor_rollout_ref.model.lora_rank": 8},
            ["actor_rollout_ref.model.lora_rank > 0", "set it to 0"],
        ),
    ],
    "_kernels": [
        ({"keytoken.kernels.impl": "triton"}, ["keytoken.kernels.impl=triton needs a GPU", "impl=auto"]),
    ],
    "_head": [
        ({**FUSED_ON_TWO, key: value}, [f"{key}={value}", f"needs {key}={needed}", "head=verl"])
        for key, value, needed in (
            (f"{ACTOR}.strategy", "fsdp", "fsdp2"),
            (f"{ACTOR}.ulysses_sequence_parallel_size", 2, 1),
            (f"{ACTOR}.calculate_sum_pi_squared", True, "false"),
            ("actor_rollout_ref.model.use_fused_kernels", True, "false"),
            ("distillation.enabled", True, "false"),
        )
    ],
    "_prefix": [
        ({"keytoken.kernels.head": "verl"}, ["keytoken.kernels.head=verl", "keytoken.prefix=separate"]),
        (
            {"actor_rollout_ref.model.override_config.attn_implementation": "eager"},
            ["attn_implementation=eager cannot", "sdpa, flash_attention", "keytoken.prefix=separate"],
        ),
    ],
    "_attribution_rows": [
        ({"keytoken.attribution.num_workers": 3}, ["keytoken.attribution.num_workers=3", "128 answers"]),
    ],
    "_reuse": [
        (
            {"keytoken.attribution.every_steps": 4, "trainer.save_freq": 10},
            ["trainer.save_freq=10", "keytoken.attribution.every_steps=4", "save_freq=12"],
        ),
        (
            {"keytoken.attribution.every_steps": 4, "keytoken.method.loss.perception_coef": 0.01},
            ["keytoken.attribution.every_steps=4", "the perception term", "every_steps=1"],
        ),
        (
            {"keytoken.attribution.every_steps": 2, "keytoken.method.selection": None},
            ["keytoken.attribution.every_steps=2", "has none"],
        ),
        (
            {"keytoken.attribution.every_steps": 2, "keytoken.diagnostics.every_steps": 10},
            ["keytoken.diagnostics.every_steps", "every_steps=1"],
        ),
    ],
    "_on_failure": [
        ({**STANDING_IN, "keytoken.attribution.placement": "actor"}, ["placement=actor", "on_failure=stop"]),
        ({**STANDING_IN, "keytoken.attribution.every_steps": 2}, ["every_steps=2", "every_steps=1"]),
        (
            {**STANDING_IN, "trainer.device": "cuda", f"{ROLLOUT}.checkpoint_engine.backend": "nccl"},
            ["backend=nccl", f"++{ROLLOUT}.checkpoint_engine.engine_kwargs.nccl.rebuild_group=true"],
        ),
    ],
    "_whole_groups": [
        (
            {**COMPARING, "keytoken.attribution.micro_batch_size": 6},
            ["micro_batch_size=6", f"{ROLLOUT}.n=8", "tw_grpo", "such as 8"],
        ),
        (
            # 128 answers divide, the 16 prompts do not.
            {**COMPARING, "keytoken.attribution.num_workers": 32},
            ["keytoken.attribution.num_workers=32", "16 prompts", "data.train_batch_size"],
        ),
        (
            {
                **COMPARING,
                "keytoken.attribution.placement": "actor",
                "trainer.n_gpus_per_node": 32,
                **SMALL_PASSES,
                f"{ACTOR}.ppo_micro_batch_size_per_gpu": 4,
            },
            ["trainer.nnodes x trainer.n_gpus_per_node=32", "16 prompts"],
        ),
    ],
}
CASES = [(rule, changes, parts) for rule, cases in BROKEN.items() for changes, parts in cases]


@pytest.fixture(scope="module")
def demo() -> DictConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEYTOKEN_DEMO_DIR", "/somewhere/demo")
        return load_config(["experiment=demo_cpu"])


def changed(config: DictConfig, changes: dict[str, Any]) -> DictConfig:
    config = copy.deepcopy(config)
    for key, value in changes.items():
        OmegaConf.update(config, key, value, force_add=True)
    return config


def test_the_demo_passes(demo: DictConfig) -> None:
    assert validate_run(demo).method.views == ("masked", "shuffled")


@pytest.mark.parametrize(("rule", "changes", "parts"), CASES, ids=lambda value: str(value)[:60])
def test_broken(demo: DictConfig, rule: str, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        validate_run(changed(demo, changes))
    assert rule in [entry.name for entry in caught.traceback], caught.value
    for part in parts:
        assert part in str(caught.value)


def test_every_rule_and_every_inert_key_is_tried() -> None:
    assert {rule.__name__ for rule in RULES} | {"_types"} == set(BROKEN)
    assert {key for changes, _ in BROKEN["inert_keys"] for key in changes} == set(INERT)
    tried = {key for changes, _ in BROKEN["_head"] for key in changes} - set(FUSED_ON_TWO)
    assert tried == set(FUSED_HEAD_NEEDS)


ALLOWED: dict[str, dict[str, Any]] = {
    "KL in the reward is verl's own code": {"algorithm.use_kl_in_reward": True},
    "groups without a signal replaced": {"algorithm.filter_groups.enable": True},
    "the actor's workers stand in": STANDING_IN,
    "a prompt for each answer": {"keytoken.kernels.head": "verl", "keytoken.prefix": "separate"},
    "one step off policy": {"trainer.v1.separate_async.num_warmup_batches": 1},
    "several updates on a batch": {f"{ACTOR}.ppo_epochs": 2},
    "advantages without division": {"algorithm.norm_adv_by_std_in_grpo": False},
    "no group needed": {**UNGROUPED, f"{ROLLOUT}.n": 1},
    "an earlier penalty, all of it a straight line": {**PENALIZE, MAX_LENGTH: 30, f"{PENALTY}.len": 30},
    "verl's own manager of penalties": {**PENALIZE, "reward.reward_manager.name": "dapo"},
    "perception without a selection": {"keytoken.method.selection": None, f"{LOSS}.perception_coef": 0.01},
    "other fsdp without views, with verl's head": {
        "keytoken.method.selection": None,
        "keytoken.kernels.head": "verl",
        "keytoken.prefix": "separate",
        f"{ACTOR}.strategy": "fsdp",
    },
    "the head for answers": FUSED,
    "a shuffled answer beside every answer": {ORDER: {"shuffled_answers": 8}, f"{ROLLOUT}.n": 8},
    "scores of a reward model with devices of its own": {
        ORDER: {},
        "reward.reward_model": {"enable": True, "enable_resource_pool": True},
    },
    "prompts in chunks": {
        f"{ROLLOUT}.enable_chunked_prefill": True,
        f"{ROLLOUT}.max_num_batched_tokens": 128,
    },
    "plain torch by name": {"keytoken.kernels.impl": "reference"},
    "answers compared on two ranks, in micro-batches of no multiple": {
        **COMPARING,
        "keytoken.attribution.num_workers": 2,
        "keytoken.attribution.micro_batch_size": 11,
    },
    "measures in bf16, which are of one input and no difference": {
        **COMPARING,
        f"{ACTOR}.fsdp_config.mixed_precision.param_dtype": "bf16",
        "keytoken.attribution.check_base": False,
    },
    "attribution in the actor": {
        "keytoken.attribution.placement": "actor",
        "keytoken.attribution.num_workers": 3,
    },
}


@pytest.mark.parametrize("changes", ALLOWED.values(), ids=ALLOWED)
def test_allowed(demo: DictConfig, changes: dict[str, Any]) -> None:
    validate_run(changed(demo, changes))
