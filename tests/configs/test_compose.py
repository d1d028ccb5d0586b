"""Every file below configs/ composes into a configuration that passes all rules, and says known values."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from keytoken.attribution.methods import METHODS
from keytoken.compose import STUDIES, groups
from keytoken.data.contract import SamplingContract
from keytoken.golden import load_preset
from keytoken.main import load_config
from keytoken.schema import LossConfig, MethodConfig, SelectionConfig

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "keytoken_configs"
DEMO = ["experiment=demo_cpu"]

# Options that do not fit the demo are composed into the default run; experiments stand alone.
ALONE = (
    *("experiment=", "platform=gpu", "policy=qwen", "policy=video_r1", "dataset=video_r1"),
    *("pools=two_nodes", "pools=eight_nodes"),
)

# The whole keytoken block. A key is added here by decision: it is one more thing to know and to keep.
KEYS = """
attribution.base_tolerance attribution.check_base attribution.every_steps attribution.micro_batch_size
attribution.num_workers attribution.on_failure
attribution.pass_timeout_s attribution.placement attribution.shuffle_seed attribution.sync_timeout_s
prefix diagnostics.every_steps diagnostics.word_classes.color diagnostics.word_classes.direction
diagnostics.word_classes.event diagnostics.word_classes.number diagnostics.word_classes.shape doctor
export.enabled export.every_steps export.max_responses export.pictures
cluster.actor_hosts cluster.answers_timeout_s cluster.attribution_hosts cluster.data_timeout_s
cluster.rollout_hosts cluster.start_timeout_s
kernels.head kernels.impl media.cache_gb
method.advantage_epsilon method.loss.clip_high method.loss.clip_low method.loss.constant_length
method.loss.dual_clip method.loss.entropy_penalty method.loss.kl_clamp method.loss.kl_coef method.loss.level
method.loss.mask_kl method.loss.normalizer method.loss.objective method.loss.perception_clip
method.loss.perception_coef method.control method.name method.options method.order_bonus method.positions
method.selection.advantage_conditioned method.selection.entropy_top_p method.selection.entropy_weight
method.selection.probability_floor method.selection.rule method.selection.score
method.selection.temporal_weight method.selection.visual_weight
method.selection.entropy_ratio method.selection.floor method.selection.scope method.selection.score_sign
method.selection.temporal_ratio method.selection.visual_ratio
method.view.blackened.p method.view.blackened.per method.view.blackened.size
method.view.temporal method.view.visual
parity.answer_tokens parity.every_steps parity.log_prob_tolerance parity.prompts
on_sigterm run_dir save_timeout_s
sampling.decoder sampling.fps sampling.max_frames sampling.max_pixels sampling.min_frames sampling.min_pixels
seed
"""


# What our files set that verl's configuration does not list, and who reads it: verl's code with a default of
# its own, vLLM, Ray, or KeyToken.
UNLISTED = """
actor_rollout_ref.actor.fsdp_config.mixed_precision.* actor_rollout_ref.ref.fsdp_config.mixed_precision.*
actor_rollout_ref.model.override_config.attn_implementation
actor_rollout_ref.rollout.agent.agent_loop_manager_class actor_rollout_ref.rollout.enable_sleep_mode
actor_rollout_ref.rollout.engine_kwargs.vllm.*
data.clip_check data.clip_check_jobs data.frame_cache data.quarantine_file data.sampling_contract.*
reward.reward_kwargs.max_resp_len reward.reward_kwargs.overlong_buffer_cfg.*
ray_kwargs.ray_init.include_dashboard ray_kwargs.ray_init.log_to_driver ray_kwargs.ray_init.num_gpus
ray_kwargs.ray_init.runtime_env.env_vars.*
trainer.v1.keytoken_separate.* trainer.v1.keytoken_sync
"""


@functools.cache
def run_of(*words: str) -> DictConfig:
    """Composing does not look at files, but the demo's configuration reads the name of its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEYTOKEN_DEMO_DIR", "/somewhere/demo")
        return load_config(words)


def run_with(option: str) -> DictConfig:
    return run_of(option) if option.startswith(ALONE) else run_of(*DEMO, option)


OPTIONS = [f"{group}={option}" for group, options in groups().items() for option in options]


def test_every_yaml_file_is_an_option_or_the_root() -> None:
    found = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml")}
    runs = {path for path in found if not path.startswith(f"{STUDIES}/")}
    assert runs == {"train.yaml"} | {f"{option.replace('=', '/')}.yaml" for option in OPTIONS}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_and_validates(option: str) -> None:
    config = run_with(option)
    assert "${" not in OmegaConf.to_yaml(config, resolve=False)


@pytest.mark.parametrize("option", [option for option in OPTIONS if not option.startswith("experiment=")])
def test_every_value_of_a_file_reaches_the_run(option: str) -> None:
    """Nothing that a chosen file says is overridden by another file, unless by the experiment itself."""
    path = FOLDER / f"{option.replace('=', '/')}.yaml"
    text = path.read_text(encoding="utf-8")
    package = text.split()[2]
    values = {key: value for key, value in yaml.safe_load(text).items() if key != "defaults"}
    block = run_with(option) if package == "_global_" else OmegaConf.select(run_with(option), package)
    for key, value in leaves(values):
        if not (isinstance(value, str) and "${" in value):
            assert OmegaConf.select(block, key) == value, key


def test_the_block_of_keytoken_is_frozen() -> None:
    config = run_of(*DEMO)
    assert sorted(key for key, _ in leaves(plain(config.keytoken))) == sorted(KEYS.split())


@pytest.mark.parametrize("option", groups()["experiment"])
def test_every_other_key_is_one_that_verl_lists(option: str) -> None:
    """A key in the wrong place is read by nobody and says so to nobody."""
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base="1.3"):
        listed = {key for key, _ in leaves(plain(compose("ppo_trainer")))}
    for key, _ in leaves(plain(run_with(f"experiment={option}"))):
        known = key in listed or key.startswith("keytoken.")
        assert known or any(fnmatch(key, pattern) for pattern in UNLISTED.split()), key


def test_every_method_has_a_file_that_names_it() -> None:
    named = {run_with(f"method={option}").keytoken.method.name for option in groups()["method"]}
    assert named == set(METHODS)


def test_options_that_a_method_may_leave_out_have_the_defaults_of_the_schema() -> None:
    """Once where hydra knows them as keys, once where a method file is read without hydra."""
    given = yaml.safe_load((FOLDER / "train.yaml").read_text(encoding="utf-8"))["keytoken"]["method"]
    for block, kind in (("loss", LossConfig), ("selection", SelectionConfig)):
        fields = {field.name: field.default for field in dataclasses.fields(kind)}
        assert given[block] == {name: fields[name] for name in given[block]}


# What a base loss says, typed from its paper, and what it sets beyond the method.
BASE_LOSSES: dict[str, dict[str, object]] = {
    "dapo": {
        "loss.clip_low": 0.2,
        "loss.clip_high": 0.28,
        "loss.level": "batch",
        "loss.normalizer": "all",
        "algorithm.filter_groups.enable": True,
        "algorithm.filter_groups.metric": "acc",
        "reward.reward_kwargs.overlong_buffer_cfg.enable": True,
        "reward.reward_kwargs.overlong_buffer_cfg.len": 8,
        "reward.reward_kwargs.max_resp_len": 40,
        "algorithm.norm_adv_by_std_in_grpo": True,
    },
    "dr_grpo": {
        "loss.normalizer": "constant",
        "loss.constant_length": 40,
        "algorithm.norm_adv_by_std_in_grpo": False,
    },
    "gspo": {
        "loss.objective": "gspo",
        "loss.clip_low": 3e-4,
        "loss.clip_high": 4e-4,
        "loss.level": "response",
    },
    "cispo": {"loss.objective": "cispo", "loss.clip_low": 1.0, "loss.level": "batch"},
}


@pytest.mark.parametrize(("name", "values"), BASE_LOSSES.items(), ids=BASE_LOSSES)
def test_base_losses(name: str, values: dict[str, object]) -> None:
    """The demo's longest answer has 40 tokens."""
    run = run_with(f"method={name}")
    assert run.keytoken.method.selection is None and run.keytoken.method.loss.kl_coef == 0.0
    assert run.actor_rollout_ref.actor.use_kl_loss is False
    for key, value in values.items():
        where = f"keytoken.method.{key}" if key.startswith("loss.") else key
        assert OmegaConf.select(run, where) == value, key


@pytest.mark.parametrize("name", [name for name in groups()["method"] if name != "dr_grpo"])
def test_a_method_file_says_the_same_without_hydra(name: str) -> None:
    """dr_grpo alone cannot be read so: it takes the longest answer from the dataset's file."""
    composed = plain(run_with(f"method={name}").keytoken.method)
    assert load_preset(name) == MethodConfig.from_mapping(composed)


def test_other_methods_inherit_nothing_from_dapo_and_dr_grpo() -> None:
    """The keys of verl that those set are at verl's defaults."""
    run = run_with("method=grpo")
    assert run.algorithm.norm_adv_by_std_in_grpo is True
    assert run.algorithm.filter_groups.enable is False
    assert run.reward.reward_kwargs.overlong_buffer_cfg.enable is False


@pytest.fixture(scope="module")
def published() -> DictConfig:
    return run_with("experiment=video_ktr_7b")


def test_the_published_run(published: DictConfig) -> None:
    """Values of the published script, typed from it and not from the file under test."""
    actor, rollout = published.actor_rollout_ref.actor, published.actor_rollout_ref.rollout
    assert (actor.optim.lr, actor.optim.lr_scheduler_type, actor.optim.weight_decay) == (2e-6, "cosine", 0.01)
    assert (actor.grad_clip, published.trainer.total_epochs) == (5.0, 1)
    assert (rollout.n, rollout.temperature, rollout.top_p) == (8, 1.0, 0.95)
    assert (published.data.max_prompt_length, published.data.max_response_length) == (16384, 768)
    assert published.keytoken.method.loss.kl_coef == 0.04
    assert published.keytoken.sampling.max_pixels == int(1.05 * 128 * 28 * 28)
    assert (published.keytoken.sampling.fps, published.keytoken.sampling.max_frames) == (2.0, 16)
    gpus = (
        published.trainer.n_gpus_per_node
        + rollout.n_gpus_per_node
        + published.keytoken.attribution.num_workers
    )
    assert gpus == 8
    assert published.actor_rollout_ref.model.path == "Video-R1/Qwen2.5-VL-7B-COT-SFT"
    assert published.keytoken.method.name == "video_ktr_official"


def test_the_baseline_differs_in_the_selection_only(published: DictConfig) -> None:
    baseline = run_of("experiment=grpo_7b", "trainer.experiment_name=video_ktr_7b")
    assert baseline.keytoken.method.selection is None
    baseline.keytoken.method.selection = published.keytoken.method.selection
    assert baseline == published


def test_an_experiment_leaves_the_choice_of_the_policy() -> None:
    chosen = run_of("experiment=video_ktr_7b", "policy=qwen2_5_vl_3b")
    assert chosen.actor_rollout_ref.model.path == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_the_presets_of_sampling_and_single_keys_of_them() -> None:
    """What the command line names comes before what an experiment chose."""
    assert plain(run_of(*DEMO).keytoken.sampling) == plain(run_of(*DEMO).data.sampling_contract)
    for name, words in (("demo", ()), ("eval_64f", ("sampling=eval_64f",))):
        given = plain(run_of(*DEMO, *words, "keytoken.sampling.fps=1.0").keytoken.sampling)
        preset = SamplingContract.preset(name)
        assert SamplingContract.from_mapping(given) == dataclasses.replace(preset, fps=1.0)
    assert SamplingContract.from_mapping(plain(run_of().keytoken.sampling)) == SamplingContract.preset(
        "video_r1_16f"
    )


def test_gpus_train_in_bf16_with_fp32_weights(published: DictConfig) -> None:
    model, actor = published.actor_rollout_ref.model, published.actor_rollout_ref.actor
    assert (actor.strategy, model.enable_gradient_checkpointing, model.use_remove_padding) == (
        "fsdp2",
        True,
        True,
    )
    assert actor.fsdp_config.mixed_precision.param_dtype == "bf16"
    assert published.actor_rollout_ref.ref.fsdp_config == {
        **actor.fsdp_config,
        "forward_only": True,
    }


def plain(config: DictConfig) -> dict:
    tree = OmegaConf.to_container(config, resolve=True)
    assert isinstance(tree, dict)
    return tree


def leaves(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found += leaves(value, f"{name}.") if isinstance(value, dict) and value else [(name, value)]
    return found


def test_composing_imports_none_of_the_stack() -> None:
    """A misspelt word is reported in a second; verl's files are read without verl, which takes five."""
    code = (
        "import sys; from keytoken.compose import compose_config; compose_config(['policy=qwen2_5_vl_7b']); "
        "print([name for name in ('torch', 'ray', 'verl', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_patches_are_the_models() -> None:
    """verl's default of 14 is wrong for Qwen3-VL, and would be taken before the processor's."""
    assert run_of("experiment=video_ktr_7b").data.image_patch_size is None
