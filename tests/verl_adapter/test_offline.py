"""Evaluation's side of the engine: prompts as in training, controls on frames, settings, model folders."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from keytoken.attribution.views.frames import changing_order
from keytoken.compose import compose_config
from keytoken.data import timed
from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.part import Part
from keytoken.demo.render import draw_clip, write_clip
from keytoken.demo.rows import question_row, split_question
from keytoken.errors import ClipError, ConfigurationError, DataError
from keytoken.evaluation.rows import conversation, media_of
from keytoken.scoring.benchmarks import mvbench
from keytoken.verl_adapter.agent_loop import VideoAgentLoop
from keytoken.verl_adapter.dataset import VideoDataset
from keytoken.verl_adapter.merge import model_folder
from keytoken.verl_adapter.offline import PromptMaker, engine_settings, sampling_of
from keytoken.verl_adapter.pictures import Media, shuffled

CONTRACT = {"fps": 2.0, "min_frames": 4, "max_frames": 8, "min_pixels": 3136, "max_pixels": 3136}


@pytest.fixture(scope="module")
def maker(tiny_model: Path) -> PromptMaker:
    return PromptMaker(tiny_model, {"sampling_contract": CONTRACT})


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    question, rng = split_question("heldout", 0, 0)
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path, draw_clip(question.bodies, rng))
    return path


class Server:
    """Keeps what training sends to its rollout."""

    async def generate(self, **request: Any) -> SimpleNamespace:
        self.request = request
        return SimpleNamespace(token_ids=[8], log_probs=[-1.0], num_preempted=None, extra_fields={})


def training_side(processor: Any, folder: Path, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Request and trainer's features of a row, by verl's dataset and KeyToken's agent loop."""
    path = folder / "row.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    data = {"max_prompt_length": 512, "sampling_contract": CONTRACT, "cache_dir": str(folder / "cache")}
    settings = OmegaConf.create(
        {**data, "quarantine_file": str(folder / "q.jsonl"), "mm_processor_kwargs": {}}
    )
    drawn = VideoDataset(str(path), processor.tokenizer, settings, processor)[0]
    rollout = {"prompt_length": 512, "response_length": 4}
    config = {"keytoken": {"seed": 1}, "actor_rollout_ref": {"rollout": rollout}, "data": data}
    server = Server()

    async def answer() -> Any:
        loop = VideoAgentLoop(
            trainer_config=SimpleNamespace(config=OmegaConf.create(config)),
            server_manager=server,
            tokenizer=processor.tokenizer,
            processor=processor,
            dataset_cls=VideoDataset,
            data_config=SimpleNamespace(config=settings),
            hf_model_type="qwen2_5_vl",
        )
        return await loop.run(
            {}, uid="u", raw_prompt=drawn["raw_prompt"], global_steps=0, index=0, session_id=0
        )

    output = asyncio.run(answer())
    return server.request, output._media.features


@pytest.mark.parametrize("shows", ["video", "part", "image", "text"])
def test_evaluation_sends_what_training_sends(
    shows: str, maker: PromptMaker, processor: Any, clip: Path, tmp_path: Path
) -> None:
    """Prompt ids, frames, metadata and the engine's arguments; pixel values, grids and seconds per grid."""
    question, _ = split_question("heldout", 0, 0)
    contract = SamplingContract(**CONTRACT)
    video = clip if shows in ("video", "part") else None
    row = question_row(question, split="heldout", index=0, clip=video, contract=contract)
    picture = tmp_path / "picture.png"
    if shows == "image":
        noise = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(noise).save(picture)
        row |= {
            "prompt": [{"role": "user", "content": "<image>" + question.prompt}],
            "images": [{"image": str(picture)}],
        }
    if shows == "part":
        row["videos"] = [{"video": str(clip), "video_start": 1.0, "video_end": 2.5}]
    request, features = training_side(processor, tmp_path, row)
    videos = {"video": [clip], "part": [Part(str(clip), 1.0, 2.5)]}.get(shows, [])
    messages = conversation(question.prompt, videos, [picture] if shows == "image" else [])
    media = maker.read(messages)
    prompt = maker.prepare(messages, media)
    assert prompt.token_ids == request["prompt_ids"]
    assert prompt.processor_kwargs == request["mm_processor_kwargs"]
    assert prompt.features.keys() == features.keys()
    for name, value in features.items():
        assert torch.equal(torch.as_tensor(prompt.features[name]), torch.as_tensor(value)), name
    if video is not None:
        ((frames, metadata),), ((trained, trained_metadata),) = prompt.videos, request["video_data"]
        assert torch.equal(frames, trained)
        assert metadata == trained_metadata
        assert {"pixel_values_videos", "video_grid_thw", "second_per_grid_ts"} <= features.keys()
        assert metadata["frames_indices"] == (list(range(8)) if shows == "video" else [2, 3, 4, 5])
        assert features["second_per_grid_ts"].tolist() == [1.0]  # two of the clip's frames, two in a second
    else:
        assert prompt.videos == request["video_data"] is None
    if shows == "image":
        assert prompt.images == request["image_data"]


def test_question_about_a_part_of_a_video_shows_that_part(
    maker: PromptMaker, clip: Path, tmp_path: Path
) -> None:
    """From MVBench's file to the prompt: frames, and as many placeholders as they need."""
    fields = {"question": "which way ?", "candidates": ["left", "right"], "answer": "left"}
    folder = tmp_path / "star" / "Charades_v1_480"
    folder.mkdir(parents=True)
    shutil.copy(clip, folder / "a.mp4")
    rows = [{"video": "a.mp4", "start": start, "end": end, **fields} for start, end in ((1.0, 2.5), (0.0, 9))]
    (tmp_path / "action_sequence.json").write_text(json.dumps(rows))
    shown, prompts = [], []
    for item in mvbench.read([tmp_path / "action_sequence.json"]):
        messages = conversation(mvbench.prompt(item), *media_of(item, tmp_path))
        media = maker.read(messages)
        shown += [frames for frames, _ in media.videos or []]
        prompts.append(maker.prepare(messages, media))
    whole = read_clip(clip, SamplingContract(**CONTRACT)).frames
    assert torch.equal(shown[0], whole[2:6]) and torch.equal(shown[1], whole)
    part, all_of_it = (len(prompt.token_ids) for prompt in prompts)
    assert all_of_it - part == 2 * 2 * 2  # two temporal patches of four tokens


@pytest.mark.parametrize("cached", [False, True])
def test_clip_that_takes_too_long_is_an_error(cached: bool, tiny_model: Path, tmp_path: Path) -> None:
    """A second clip is read all the same, and is that of a reader without a limit."""
    slow = tmp_path / "slow.mp4"  # enough to decode for the limit to be over whenever it is looked at
    write_clip(slow, np.random.default_rng(0).integers(0, 256, (300, 112, 112, 3), dtype=np.uint8))
    messages = conversation("", [slow])
    data = {"sampling_contract": CONTRACT, "frame_cache": str(tmp_path / "cache") if cached else None}
    hurried = PromptMaker(tiny_model, {**data, "clip_limit_s": 1e-6})
    with pytest.raises(ClipError, match="not decoded within"):
        hurried.read(messages)
    patient = PromptMaker(tiny_model, {**data, "clip_limit_s": 120.0})
    ((frames, metadata),), ((free, free_metadata),) = (
        maker.read(messages).videos or [] for maker in (patient, PromptMaker(tiny_model, data))
    )
    assert torch.equal(frames, free)
    assert metadata == free_metadata
    for idle in timed._IDLE.values():
        for process in idle:
            process.stop()


def test_blank_is_the_processors_mean_colour(maker: PromptMaker, clip: Path) -> None:
    messages = conversation("which way ?", [clip])
    media = maker.read(messages)
    real, blank = (
        maker.prepare(messages, media),
        maker.prepare(messages, maker.controlled(media, "blank", 0, "q")),
    )
    assert float(real.features["pixel_values_videos"].abs().max()) > 1.0
    assert float(blank.features["pixel_values_videos"].abs().max()) < 0.01
    assert blank.token_ids == real.token_ids
    assert blank.processor_kwargs == real.processor_kwargs
    picture = Media(images=[Image.new("RGB", (56, 84), (255, 0, 0))])
    (grey,) = maker.controlled(picture, "blank", 0, "q").images or []
    assert (grey.size, grey.getpixel((5, 5))) == ((56, 84), (123, 117, 104))


def test_shuffled_is_the_view_and_keeps_the_times(maker: PromptMaker, clip: Path) -> None:
    media = maker.read(conversation("", [clip]))
    ((frames, times),) = media.videos or []
    ((changed, kept_times),) = shuffled(media, 3, "item").videos or []
    order = changing_order(frames, 3, "item/0")
    assert order is not None
    assert torch.equal(changed, frames[list(order)])
    assert not torch.equal(changed, frames)
    assert kept_times is times
    assert not torch.equal(changed, (shuffled(media, 3, "other item").videos or [])[0][0])
    still = Media(videos=[(torch.full((8, 3, 56, 56), 9, dtype=torch.uint8), times)])
    assert shuffled(still, 3, "item") is still


def test_engine_has_the_rollouts_settings() -> None:
    """What verl's server hands on; a prefill that is not cut into chunks must fit into one batch."""
    rollout = compose_config(["platform=cpu"]).actor_rollout_ref.rollout
    settings = engine_settings(rollout, 30_000)
    expected = {
        "dtype": "float32",
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "kv_cache_memory_bytes": rollout.engine_kwargs.vllm.kv_cache_memory_bytes,
        "mm_processor_cache_gb": 0,
        "max_model_len": 30_000,
        "max_num_batched_tokens": 30_000,
        "tensor_parallel_size": 1,
    }
    assert {name: settings[name] for name in expected} == expected
    # vLLM and verl may not read an OmegaConf node.
    assert json.loads(json.dumps(settings)) == settings


def test_every_request_has_a_seed() -> None:
    """The CPU engine ignores the seeds of a batch in which one request has none."""
    assert sampling_of("greedy", 5, 0.7, 0.9) == {"temperature": 1.0, "top_p": 1.0, "top_k": 1, "seed": 5}
    assert sampling_of("sampled", 5, 0.7, 0.9) == {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "seed": 5}


def test_model_without_a_processor_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text_only"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*processor*"))
    with pytest.raises(ConfigurationError, match="no processor"):
        PromptMaker(folder, {"sampling_contract": CONTRACT})


def write_checkpoint(tiny_model: Path, run: Path, step: int, world_size: int) -> dict[str, torch.Tensor]:
    """A checkpoint as verl's FSDP2 engine saves it: rows of each weight on each rank, scalars on all."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import Qwen2_5_VLForConditionalGeneration

    actor = run / "checkpoints" / f"global_step_{step}" / "actor"
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_model, actor / "huggingface", ignore=ignored)
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world_size}))
    weights = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    weights = {name: value + step for name, value in weights.items()}
    for rank in range(world_size):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("fsdp",))
        shard = {}
        for number, (name, value) in enumerate(weights.items()):
            pieces = value.chunk(world_size, dim=0)
            local = pieces[rank] if rank < len(pieces) else value[:0]
            shard[name] = DTensor.from_local(local.clone(), mesh, [Shard(0)], run_check=False)
            if number % 7 == 0:
                shard[name] = DTensor.from_local(value, mesh, [Replicate()], run_check=False)
            if number % 7 == 1:
                shard[name] = value
        torch.save(shard, actor / f"model_world_size_{world_size}_rank_{rank}.pt")
        torch.distributed.destroy_process_group()
    return weights


@pytest.mark.parametrize("given", ["run", "checkpoints", "global_step_20", "actor"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_checkpoint_becomes_a_model(given: str, world_size: int, tiny_model: Path, tmp_path: Path) -> None:
    """The weights of the last step, uneven shards joined, under the names that the original file has."""
    run = tmp_path / "run"
    write_checkpoint(tiny_model, run, 3, 1)
    weights = write_checkpoint(tiny_model, run, 20, world_size)
    step = run / "checkpoints" / "global_step_20"
    named = {"run": run, "checkpoints": run / "checkpoints", "global_step_20": step, "actor": step / "actor"}
    folder = model_folder(named[given])
    assert folder == step / "merged"
    saved, original = load_file(folder / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(value, original[name] + 20) for name, value in saved.items())
    assert len(weights) >= len(saved)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert model_folder(named[given]) == folder  # made once
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_model_folder_is_itself(tiny_model: Path) -> None:
    assert model_folder(tiny_model) == tiny_model


class Program:
    """What a pickle can do to who loads it."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


def test_a_shard_that_would_run_a_program_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    write_checkpoint(tiny_model, tmp_path, 4, 1)
    (shard,) = tmp_path.glob("checkpoints/*/actor/*.pt")
    torch.save({"weight": Program(tmp_path / "made")}, shard)
    with pytest.raises(
        DataError, match=r"rank_0\.pt: this is no shard of a model that can be loaded safely .*mkdir"
    ):
        model_folder(tmp_path)
    assert not (tmp_path / "made").exists()


def test_what_is_no_model_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="neither a Hugging Face folder"):
        model_folder(tmp_path)
    write_checkpoint(tiny_model, tmp_path, 4, 2)
    lost = tmp_path / "checkpoints" / "global_step_4" / "actor" / "model_world_size_2_rank_1.pt"
    lost.unlink()
    with pytest.raises(DataError, match=r"rank_1\.pt: this shard"):
        model_folder(tmp_path)
    assert not (lost.parents[1] / "merged").exists()
