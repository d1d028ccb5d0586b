"""Checks of a run: its model, its data, its reward, its memory, each sabotaged."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keytoken.doctor import memory, reward
from keytoken.doctor.finding import Finding, Subject

Ask = Callable[..., Finding]


def change_rows(file: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    table = pq.read_table(file)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema if rows else None), file)


def first_with_clip(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["videos"])


@pytest.fixture
def shards(world: Path) -> Path:
    """The model in several files with an index, as large ones are."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(world / "model")
    (world / "model" / "model.safetensors").unlink()
    model.save_pretrained(world / "model", max_shard_size="1MB")
    return world / "model"


def test_a_model_with_everything(finding: Ask) -> None:
    found = finding("model_files")
    assert found.status == "ok" and "1.2 million parameters, 1 weight file complete" in found.found
    assert finding("processor").status == "ok"


def test_the_parameters_are_those_of_the_model(shards: Path, finding: Ask) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(shards)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count / 1e6:,.1f} million" in finding("model_files").found


def test_a_missing_shard(shards: Path, finding: Ask) -> None:
    assert finding("model_files").status == "ok"
    lost = sorted(shards.glob("model-*.safetensors"))[1]
    lost.unlink()
    found = finding("model_files", short=True)
    assert found.status == "fail" and lost.name in found.found and "weight files" in found.found


def test_a_shard_without_one_of_its_tensors(shards: Path, finding: Ask) -> None:
    files = sorted(shards.glob("model-*.safetensors"))
    shutil.copy(files[0], files[1])
    found = finding("model_files")
    assert found.status == "fail" and f"{files[1].name} has no tensor" in found.found


def test_weights_that_were_cut_short(world: Path, finding: Ask) -> None:
    file = world / "model" / "model.safetensors"
    data = file.read_bytes()
    for cut in (data[:-1], data[:100], b"", struct.pack("<Q", 20) + b"{no json" + bytes(20)):
        file.write_bytes(cut)
        found = finding("model_files")
        assert found.status == "fail" and str(file) in found.found, found


@pytest.mark.parametrize("lost", ["tokenizer.json", "processor_config.json", "model.safetensors"])
def test_a_model_without(lost: str, world: Path, finding: Ask) -> None:
    (world / "model" / lost).unlink()
    found = finding("model_files")
    assert found.status == "fail" and lost.split(".")[0].split("_")[0] in found.found


def test_a_model_of_another_family(world: Path, finding: Ask) -> None:
    (world / "model" / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type is llama" in finding("model_files").found
    (world / "model" / "config.json").write_text("{")
    assert "is no JSON" in finding("model_files").found


def test_a_processor_that_does_not_load(world: Path, finding: Ask) -> None:
    file = world / "model" / "processor_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "processor_class": "NoSuchProcessor", "video_processor": 3}))
    assert finding("processor").status == "fail"


def test_a_processor_that_shows_images_and_videos_otherwise(world: Path, finding: Ask) -> None:
    file = world / "model" / "processor_config.json"
    content = json.loads(file.read_text())
    content["video_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    file.write_text(json.dumps(content))
    assert finding("processor").status == "fail"
    assert "for videos" in finding("processor").found


def test_the_contract_has_the_patches_of_the_model(world: Path, subject: Callable[..., Subject]) -> None:
    assert subject().contract.patch_size == 14
    file = world / "model" / "config.json"
    content = json.loads(file.read_text())
    content["vision_config"]["patch_size"] = 16
    file.write_text(json.dumps(content))
    assert subject().contract.patch_size == 16


def test_a_model_of_a_hub_that_is_not_here(finding: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    word = "actor_rollout_ref.model.path=nobody/no-such-model"
    assert finding("model_files", word).status == "warn"
    assert finding("model_files", word, short=True).status == "skip"


def test_rows_that_are_in_order(finding: Ask) -> None:
    assert finding("data_rows").found == "21 rows to train on, 26 held out"
    assert finding("media_files").status == "ok"
    assert finding("clip_sample").status == "ok"


def test_a_row_whose_clip_is_missing(world: Path, finding: Ask) -> None:
    def lose(rows: list[dict[str, Any]]) -> None:
        first_with_clip(rows)["videos"][0]["video"] = "/no/such/clip.mp4"

    change_rows(world / "train.parquet", lose)
    found = finding("media_files", short=True)
    assert found.status == "warn" and "/no/such/clip.mp4" in found.found and "set these rows" in found.remedy


def test_no_clip_at_all(world: Path, finding: Ask) -> None:
    def lose(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for video in row["videos"]:
                video["video"] = f"/moved{video['video']}"

    change_rows(world / "train.parquet", lose)
    assert finding("media_files").status == "fail"


def test_a_clip_that_does_not_decode(world: Path, finding: Ask) -> None:
    broken = world / "broken.mp4"

    def damage(rows: list[dict[str, Any]]) -> None:
        row = first_with_clip(rows)
        data = Path(row["videos"][0]["video"]).read_bytes()
        broken.write_bytes(data[: len(data) // 3])
        row["videos"][0]["video"] = str(broken)

    change_rows(world / "train.parquet", damage)
    found = finding("clip_sample")
    assert found.status == "warn" and str(broken) in found.found


def test_of_a_part_only_the_part_is_decoded(world: Path, finding: Ask) -> None:
    """So a part that the clip does not have is found out."""
    rows = pq.read_table(world / "train.parquet").to_pylist()
    for row in rows:
        row["videos"] = [{"video": video["video"], "video_start": 99.0} for video in row["videos"]]
    pq.write_table(pa.Table.from_pylist(rows), world / "train.parquet")
    found = finding("clip_sample")
    assert found.status == "fail" and "the part starts at 99 s" in found.found
    assert finding("media_files").status == "ok"


def test_clips_that_do_not_fit_into_a_prompt(finding: Ask) -> None:
    found = finding("clip_sample", "data.max_prompt_length=12")
    assert found.status == "fail" and "16 tokens at most; data.max_prompt_length is 12" in found.found


def _no_answer(rows: list[dict[str, Any]]) -> None:
    rows[3]["reward_model"]["ground_truth"] = " "


def _no_place(rows: list[dict[str, Any]]) -> None:
    row = first_with_clip(rows)
    row["prompt"][0]["content"] = row["prompt"][0]["content"].replace("<video>", "")


def _no_prompt(rows: list[dict[str, Any]]) -> None:
    rows[2]["prompt"] = []


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (_no_answer, "row 3 has no reward_model.ground_truth"),
        (_no_place, "has 1 videos and 0 times <video> in its prompt"),
        (_no_prompt, "row 2 has no prompt"),
        (lambda rows: rows.clear(), "it has no rows"),
    ],
    ids=["no answer", "no place for the clip", "no prompt", "empty"],
)
def test_rows_that_cannot_be_used(
    change: Callable[[list[dict[str, Any]]], None], part: str, world: Path, finding: Ask
) -> None:
    change_rows(world / "train.parquet", change)
    found = finding("data_rows", short=True)
    assert found.status == "fail" and part in found.found


@pytest.mark.parametrize(
    ("column", "text", "part"),
    [
        ("prompt", "What moves? <video>", "row 0: prompt is no list of messages"),
        ("reward_model", '{"ground_truth": "A"}', "row 0: reward_model is str"),
        ("extra_info", '{"index": 0}', "row 0: extra_info is str"),
    ],
)
def test_columns_of_text(column: str, text: str, part: str, world: Path, finding: Ask) -> None:
    """JSON that nobody has read: a finding, and no crash of the checks beside it."""
    rows = pq.read_table(world / "train.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([{**row, column: text} for row in rows]), world / "train.parquet")
    found = finding("data_rows", short=True)
    assert found.status == "fail" and part in found.found
    for name in ("media_files", "reward"):
        assert finding(name, short=True).found


def test_columns_of_other_names(world: Path, finding: Ask) -> None:
    names = {"prompt": "messages", "videos": "clips", "images": "pictures"}
    table = pq.read_table(world / "train.parquet")
    for file in ("train.parquet", "validation.parquet"):
        table = pq.read_table(world / file)
        pq.write_table(table.rename_columns([names.get(n, n) for n in table.column_names]), world / file)
    words = ("data.prompt_key=messages", "data.video_key=clips", "data.image_key=pictures")
    assert finding("data_rows", *words).status == "ok"
    assert finding("media_files", *words).status == "ok"
    found = finding("media_files", *words, "keytoken.sampling.max_frames=4")
    assert found.status == "fail" and "max_frames=8 for its clip" in found.found


def test_data_files_of_another_kind(world: Path, finding: Ask) -> None:
    table = pq.read_table(world / "train.parquet")
    pq.write_table(table.drop_columns(["reward_model"]), world / "train.parquet")
    assert "it has no column reward_model" in finding("data_rows").found
    (world / "train.parquet").write_bytes(b"PAR1 and no more")
    assert "no Parquet file" in finding("data_rows").found


def test_fewer_rows_than_a_batch(finding: Ask) -> None:
    found = finding("data_rows", "data.train_batch_size=32", "actor_rollout_ref.actor.ppo_mini_batch_size=32")
    assert found.status == "fail" and "has 21 rows, data.train_batch_size is 32" in found.found


def test_rows_written_for_another_contract(finding: Ask) -> None:
    found = finding("media_files", "keytoken.sampling.max_frames=4")
    assert found.status == "fail" and "max_frames=8 for its clip" in found.found and "=4" in found.found


REWARDS = {
    "the demo's": ("", "ok", "mean acc 1.00 for right, 0.00 for wrong"),
    "0 for the right answer": ("    return 0.0", "warn", "no more than a wrong one"),
    "1 for everything": ("    return {'score': 1.0, 'acc': 1.0}", "warn", "has acc 1"),
    "raises": ("    return 1 / 0", "fail", "ZeroDivisionError: division by zero, File"),
    "no score": ("    return {'acc': 1.0}", "fail", "a dict without 'score'"),
    "not a number": ("    return float('nan')", "fail", "returns score=nan"),
    "None": ("    return None", "fail", "returns score='None'"),
    "dies": ("    import os; os._exit(3)", "fail", "ended with code 3"),
    "prints, and is right": (
        "    print('hello')\n    return float(f'<answer>{ground_truth}<' in solution_str)",
        "ok",
        "mean score 1.00 for right, 0.00",
    ),
    "asynchronous": (
        "    async def wait():\n        return float(f'<answer>{ground_truth}<' in solution_str)\n"
        "    return wait()",
        "ok",
        "mean score 1.00",
    ),
    "half of them": (
        "    right = f'<answer>{ground_truth}<' in solution_str\n"
        "    return float(right and len(ground_truth) == 1 and extra_info['family'] != 'text')",
        "warn",
        "a right answer is worth no more",
    ),
}


@pytest.mark.parametrize(("body", "status", "part"), REWARDS.values(), ids=REWARDS)
def test_the_reward(body: str, status: str, part: str, tmp_path: Path, finding: Ask) -> None:
    words = []
    if body:
        file = tmp_path / "mine.py"
        head = "def compute_score(data_source, solution_str, ground_truth, extra_info, **_):\n"
        file.write_text(head + body + "\n")
        words = [f"reward.custom_reward_function.path={file}"]
    found = finding("reward", *words)
    assert (found.status, part in found.found) == (status, True), found


def _reward(tmp_path: Path, body: str) -> str:
    file = tmp_path / "mine.py"
    head = "import os, time\ndef compute_score(data_source, solution_str, ground_truth, extra_info, **_):\n"
    file.write_text(f"{head}{body}\n")
    return f"reward.custom_reward_function.path={file}"


def test_a_reward_that_is_slow_stops_nobody(
    tmp_path: Path, finding: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward, "_LIMIT_S", 4.0)
    found = finding("reward", _reward(tmp_path, "    time.sleep(60)"), short=True)
    assert found.status == "warn" and "4 answers take it more than 4 s" in found.found


def test_a_reward_has_the_variables_of_the_run(tmp_path: Path, finding: Ask) -> None:
    word = _reward(
        tmp_path, "    return float(os.environ['JUDGE_WEIGHT']) * (f'>{ground_truth}<' in solution_str)"
    )
    assert finding("reward", word).status == "fail"
    found = finding("reward", word, "+ray_kwargs.ray_init.runtime_env.env_vars.JUDGE_WEIGHT=2")
    assert found.status == "ok" and "score 2.00 for right" in found.found


def test_a_reward_model_is_not_asked(finding: Ask) -> None:
    found = finding("reward", "reward.reward_model.enable=true", "reward.reward_model.model_path=/m")
    assert found.status == "skip"


@pytest.mark.parametrize(("truth", "status"), [(0, "ok"), (7, "ok"), ([1, 2], "skip"), ({"a": "b"}, "skip")])
def test_the_reward_gets_the_truth_as_it_is(
    truth: Any, status: str, world: Path, tmp_path: Path, finding: Ask
) -> None:
    rows = pq.read_table(world / "train.parquet").to_pylist()
    for row in rows:
        row["reward_model"] = {"ground_truth": truth}
    pq.write_table(pa.Table.from_pylist(rows), world / "train.parquet")
    body = f"    assert ground_truth == {truth!r}\n    return float(f'>{{ground_truth}}<' in solution_str)"
    assert finding("reward", _reward(tmp_path, body)).status == status
    assert finding("data_rows").status == "ok"


def test_a_reward_that_is_not_there(tmp_path: Path, finding: Ask) -> None:
    found = finding("reward", f"reward.custom_reward_function.path={tmp_path}/none.py")
    assert found.status == "fail" and "is no Python file" in found.found
    found = finding("reward", "reward.custom_reward_function.name=compute_scores")
    assert found.status == "fail" and "has no attribute 'compute_scores'" in found.found


def test_the_memory_of_a_clip_is_what_the_processor_makes() -> None:
    """By the real processor: float32 patches of a clip at the contract's largest size."""
    import torch

    from keytoken.demo.tokenizer import DEMO_CONTRACT, build_processor, build_tokenizer

    frames = torch.zeros(8, 3, 56, 56, dtype=torch.uint8)
    made = build_processor(build_tokenizer()).video_processor(
        videos=[frames], do_sample_frames=False, do_resize=False, return_tensors="pt"
    )["pixel_values_videos"]
    assert memory.clip_bytes(DEMO_CONTRACT) == made.numel() * 4


def test_the_estimate_grows_with_what_it_is_made_of(subject: Callable[..., Subject]) -> None:
    def parts(*words: str) -> dict[str, float]:
        asked = subject(*words)
        return memory.host_parts(asked.run, asked.contract, 1000)

    base, clip = parts(), memory.clip_bytes(subject().contract)
    assert base["media"] == (1 + 3) * 16 * clip, "in the data plane, and in the worker of each slot"
    assert parts("sampling=video_r1_16f", "keytoken.media.cache_gb=0.001")["media"] < 1.1 * 16 * 21_000_000
    assert (base["actor"], base["engines"], base["attribution"]) == (16_000, 4_000, 4_000)
    assert base["KV cache"] == 256 * (1 << 20)
    assert "attribution" not in parts("method=grpo")
    assert "reference" in parts("keytoken.method.loss.kl_coef=0.04")
    assert "reference" not in parts("keytoken.method.loss.kl_coef=0")


def test_a_run_that_is_too_large_for_the_machine(finding: Ask) -> None:
    assert finding("memory").status in ("ok", "warn")
    found = finding("memory", "keytoken.sampling.max_pixels=10000000000", short=True)
    assert found.status == "fail" and "media" in found.found and "sampling=" in found.remedy


def test_a_7b_model_on_gpus(subject: Callable[..., Subject]) -> None:
    """16 bytes a parameter over four ranks, 2 in each engine, 4 in the attribution worker."""

    def parts(*words: str) -> dict[str, float]:
        found = memory.gpu_parts(subject("pools=three_pools", *words).run, 8_000_000_000)
        return {name: value / 1e9 for name, value in found.items()}

    fsdp = "actor_rollout_ref.actor.fsdp_config"
    assert parts() == {"actor": 32.0, "rollout": 16.0, "attribution": 32.0}
    assert parts(f"{fsdp}.offload_policy=true")["actor"] == 0
    assert parts(f"{fsdp}.optimizer_offload=true")["actor"] == 32.0, "it is back for the update"
    assert parts(f"{fsdp}.model_dtype=bf16")["actor"] == 16.0
    assert parts(f"{fsdp}.fsdp_size=2")["actor"] == 64.0


def test_a_configuration_that_does_not_compose(subject: Callable[..., Subject]) -> None:
    from keytoken.doctor.run import examine

    findings = {each.name: each for each in examine(subject("trainer.totl_steps=3", short=True))}
    assert findings["configuration"].status == "fail" and "totl_steps" in findings["configuration"].found
    assert findings["reward"].status == "skip" and findings["python"].status == "ok"


def test_files_that_are_missing(world: Path, finding: Ask) -> None:
    (world / "validation.parquet").unlink()
    found = finding("files", short=True)
    assert (
        found.status == "fail" and "data.val_files" in found.found and "demo --prepare-only" in found.remedy
    )


def test_what_verl_refuses(finding: Ask) -> None:
    assert finding("verl_rules").status == "ok"
    found = finding("verl_rules", "+actor_rollout_ref.actor.no_such_key=1")
    assert found.status == "fail" and "no_such_key" in found.found


def test_a_run_that_joins_a_cluster_asks_little_of_this_machine(
    finding: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for name in ("shared_memory", "memory", "ports"):
        assert finding(name).status == "skip"
    nodes = (
        "data.train_files=/nodes/only.parquet",
        "actor_rollout_ref.model.path=/nodes/model",
        "trainer.default_local_dir=/proc/of/nodes",
        "reward.custom_reward_function.path=/nodes/reward.py",
    )
    statuses = {name: finding(name, *nodes) for name in ("model_files", "data_rows", "disks", "media_files")}
    assert {name: each.status for name, each in statuses.items()} == {
        "model_files": "warn",
        "data_rows": "warn",
        "disks": "warn",
        "media_files": "skip",
    }
    assert "seen from this machine" in statuses["model_files"].found
    assert finding("reward", nodes[3]).status == "warn"
