"""B1, B2, B4-B6, B9, B10, N1, N4: video and batch bugs of the stack, and what keeps them away."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transformers import AutoConfig

from keytoken.errors import ConfigurationError
from keytoken.verl_adapter import compat
from keytoken.verl_adapter.agent_loop import position_ids
from keytoken.verl_adapter.shims.hooks import on_cpu
from keytoken.verl_adapter.stack import check_stack, check_vocabulary

# --- B1 -------------------------------------------------------------------------------------------


def position_batch(lengths: list[int]) -> tuple[list[torch.Tensor], TensorDict]:
    rows = [torch.arange(4 * length).reshape(4, length) for length in lengths]
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return rows, TensorDict({"position_ids": nested}, batch_size=[len(rows)])


@pytest.mark.parametrize("lengths", [[7, 7], [5, 7], [4, 4, 4], [6]])
def test_b1_position_rows_come_back_whole(lengths: list[int]) -> None:
    rows, data = position_batch(lengths)
    compat.tensordict_utils.maybe_fix_3d_position_ids(data)
    for row, restored in zip(rows, data["position_ids"].unbind(), strict=True):
        assert torch.equal(row, restored)


def test_b1_is_still_there() -> None:
    _, data = position_batch([7, 7])
    compat.tensordict_utils.maybe_fix_3d_position_ids.__wrapped__(data)
    with pytest.raises(RuntimeError):
        data["position_ids"].unbind()


# --- B2, B4 ---------------------------------------------------------------------------------------


def vllm_positions(
    config: Any, ids: list[int], media: list[tuple[str, int, list[int], float]]
) -> torch.Tensor:
    """vLLM's own positions [3, L]; media are (modality, offset, grid, seconds per grid)."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model

    features = [
        SimpleNamespace(
            modality=modality,
            mm_position=SimpleNamespace(offset=offset),
            data={
                f"{modality}_grid_thw": SimpleNamespace(data=torch.tensor(grid)),
                "second_per_grid_ts": SimpleNamespace(data=torch.tensor(seconds)),
            },
        )
        for modality, offset, grid, seconds in media
    ]
    model = SimpleNamespace(config=config)
    model.iter_mm_grid_thw = lambda given: Model.iter_mm_grid_thw(model, given)
    return Model.get_mrope_input_positions(model, ids, features)[0]


def sequence(
    processor: Any, media: list[tuple[str, list[int]]], answer: list[int]
) -> tuple[list[int], list[int]]:
    """Token ids with each medium's placeholders, and the offsets of the media."""
    ids, offsets = [5, 6], []
    for modality, (frames, height, width) in media:
        token = processor.video_token_id if modality == "video" else processor.image_token_id
        offsets.append(len(ids))
        ids += [token] * (frames * height * width // 4) + [7]
    return [*ids, *answer], offsets


def ours(processor: Any, ids: list[int], features: dict[str, Any]) -> torch.Tensor:
    return position_ids(processor, torch.tensor([ids]), torch.ones(1, len(ids)), features)[0, 1:]


def transformers_positions(processor: Any, ids: list[int], features: dict[str, Any]) -> torch.Tensor:
    tokens = torch.tensor([ids])
    types = (tokens == processor.image_token_id) * 1 + (tokens == processor.video_token_id) * 2
    return processor.get_rope_index(input_ids=tokens, mm_token_type_ids=types, **features)[0][:, 0]


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 2.7, 8.0, 24.0, 29.97])
@pytest.mark.parametrize("grid", [[4, 4, 4], [1, 4, 8], [16, 4, 4]])
def test_b2_positions_are_vllms(processor: Any, fps: float, grid: list[int]) -> None:
    ids, (offset,) = sequence(processor, [("video", grid)], [8, 9])
    features = {
        "video_grid_thw": torch.tensor([grid]),
        "second_per_grid_ts": torch.tensor([2 / fps]),
    }
    expected = vllm_positions(processor.config, ids, [("video", offset, grid, 2 / fps)])
    assert torch.equal(ours(processor, ids, features), expected)


def test_b2_mixed_media_and_text(processor: Any) -> None:
    media = [("image", [1, 4, 4]), ("video", [4, 4, 4]), ("image", [1, 8, 4])]
    ids, offsets = sequence(processor, media, [8])
    features = {
        "image_grid_thw": torch.tensor([media[0][1], media[2][1]]),
        "video_grid_thw": torch.tensor([media[1][1]]),
        "second_per_grid_ts": torch.tensor([0.25]),
    }
    given = [(kind, offset, grid, 0.25) for (kind, grid), offset in zip(media, offsets, strict=True)]
    assert torch.equal(ours(processor, ids, features), vllm_positions(processor.config, ids, given))
    assert torch.equal(ours(processor, [5, 6, 7], {}), torch.arange(3).expand(3, 3))


def test_b2_is_still_there(processor: Any) -> None:
    grid = [8, 4, 4]
    ids, (offset,) = sequence(processor, [("video", grid)], [8])
    features = {"video_grid_thw": torch.tensor([grid]), "second_per_grid_ts": torch.tensor([0.25])}
    expected = vllm_positions(processor.config, ids, [("video", offset, grid, 0.25)])
    assert not torch.equal(transformers_positions(processor, ids, features), expected)


def test_b2_text_row_counts_and_padding_is_one(processor: Any) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    rows = position_ids(processor, torch.tensor([[0, 0, 5, 6, 7]]), mask, {})
    assert rows.tolist() == [[[1, 1, 0, 1, 2]] * 4]


def test_b2_other_models_are_refused() -> None:
    class Glm4vProcessor:
        pass

    with pytest.raises(ConfigurationError, match="Glm4vProcessor"):
        position_ids(Glm4vProcessor(), torch.ones(1, 2), torch.ones(1, 2), {})


@pytest.mark.parametrize("last", ["<|video_pad|>", "<|vision_start|>", "<|image_pad|>"])
def test_b4_sampled_vision_tokens_get_positions(processor: Any, last: str) -> None:
    grid = [4, 4, 4]
    answer = [8, processor.tokenizer.convert_tokens_to_ids(last)]
    ids, (offset,) = sequence(processor, [("video", grid)], answer)
    features = {"video_grid_thw": torch.tensor([grid]), "second_per_grid_ts": torch.tensor([0.25])}
    expected = vllm_positions(processor.config, ids, [("video", offset, grid, 0.25)])
    assert torch.equal(ours(processor, ids, features), expected)


def test_b4_is_still_there(processor: Any) -> None:
    grid = [4, 4, 4]
    ids, _ = sequence(processor, [("video", grid)], [8, processor.video_token_id])
    features = {"video_grid_thw": torch.tensor([grid]), "second_per_grid_ts": torch.tensor([0.25])}
    with pytest.raises((StopIteration, RuntimeError)):
        transformers_positions(processor, ids, features)


def test_b4_all_vision_tokens_are_banned_from_sampling(processor: Any) -> None:
    from verl.workers.rollout.utils import get_vision_placeholder_token_ids
    from verl.workers.rollout.vllm_rollout import vllm_async_server

    names = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    wanted = sorted(processor.tokenizer.convert_tokens_to_ids(list(names)))
    assert get_vision_placeholder_token_ids(processor) == wanted
    assert len(get_vision_placeholder_token_ids.__wrapped__(processor)) == 2
    # The server bans what this very function returns.
    assert vllm_async_server.get_vision_placeholder_token_ids is get_vision_placeholder_token_ids
    assert get_vision_placeholder_token_ids(None) == []


# --- B5, B6 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()


def test_b5_batch_without_pixels_embeds_its_text(model: Any) -> None:
    from verl.models.transformers import qwen2_vl

    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3)
    with torch.no_grad():
        embeds, kept_mask = qwen2_vl._get_input_embeds(model.model, ids, mask)
        assert torch.equal(embeds, model.get_input_embeddings()(ids))
        assert torch.equal(kept_mask, mask)
        with pytest.raises(AttributeError, match="mean"):
            qwen2_vl._get_input_embeds.__wrapped__(model.model, ids, mask)


def test_b5_vision_tower_takes_part(model: Any) -> None:
    """Its parameters get a zero gradient, not none: FSDP ranks must run the same collectives."""
    from verl.models.transformers import qwen2_vl

    model.zero_grad()
    embeds, _ = qwen2_vl._get_input_embeds(model.model, torch.tensor([[5, 6]]))
    embeds.sum().backward()
    gradients = [parameter.grad for parameter in model.model.visual.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert max(float(gradient.abs().max()) for gradient in gradients) == 0.0
    model.zero_grad()


def test_b5_batch_with_pixels_is_verls_own(model: Any, processor: Any) -> None:
    from verl.models.transformers import qwen2_vl

    frames = torch.randint(0, 255, (4, 3, 56, 56), dtype=torch.uint8)
    media = processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    ids, _ = sequence(processor, [("video", media["video_grid_thw"][0].tolist())], [8])
    inputs = {"pixel_values_videos": media["pixel_values_videos"], "video_grid_thw": media["video_grid_thw"]}
    with torch.no_grad():
        mine, _ = qwen2_vl._get_input_embeds(model.model, torch.tensor([ids]), **inputs)
        stock, _ = qwen2_vl._get_input_embeds.__wrapped__(model.model, torch.tensor([ids]), **inputs)
    assert torch.equal(mine, stock)


def test_n5_images_and_videos_share_one_run_of_the_tower(model: Any, processor: Any) -> None:
    """verl runs it once for each kind, and FSDP ranks without both kinds then wait for one run more."""
    from verl.models.transformers import qwen2_vl

    frames = torch.randint(0, 255, (4, 3, 56, 56), dtype=torch.uint8)
    videos = processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    images = processor.image_processor(images=[frames[0]], return_tensors="pt")
    grids = videos["video_grid_thw"][0].tolist(), images["image_grid_thw"][0].tolist()
    ids, _ = sequence(processor, [("video", grids[0]), ("image", grids[1])], [8])
    inputs = {"input_ids": torch.tensor([ids]), **videos, **images}
    runs: list[int] = []
    handle = model.model.visual.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        mine, _ = qwen2_vl._get_input_embeds(model.model, **inputs)
        assert len(runs) == 1
        stock, _ = qwen2_vl._get_input_embeds.__wrapped__(model.model, **inputs)
        assert len(runs) == 3
    handle.remove()
    torch.testing.assert_close(mine, stock, atol=1e-5, rtol=0)
    inputs["input_ids"][inputs["input_ids"] == model.config.video_token_id] = 5
    with pytest.raises(ValueError, match="Video features and video tokens do not match: tokens: 0"):
        qwen2_vl._get_input_embeds(model.model, **inputs)


def run_config(model: Path, **changes: Any) -> Any:
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {
                "model": {"path": str(model), "use_remove_padding": False},
                "actor": {"strategy": "fsdp2", "fsdp_config": {"param_offload": False}},
                "ref": {"strategy": "fsdp2", "fsdp_config": {"param_offload": False}},
                "rollout": {"enable_chunked_prefill": False},
            }
        }
    )
    for key, value in changes.items():
        OmegaConf.update(config, f"actor_rollout_ref.{key}", value)
    return config


def test_stack_accepts_what_runs(tiny_model: Path) -> None:
    check_stack(run_config(tiny_model))


def test_b6_unpadded_batches_need_flash_attention(tiny_model: Path) -> None:
    from verl.models.transformers import qwen2_vl

    if hasattr(qwen2_vl, "_flash_use_top_left_mask"):
        pytest.skip("flash-attn is installed")
    with pytest.raises(ConfigurationError, match=r"use_remove_padding=true.*flash-attn"):
        check_stack(run_config(tiny_model, **{"model.use_remove_padding": True}))


@pytest.mark.skipif(not on_cpu(), reason="a GPU can do all of these")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("actor.fsdp_config.param_offload", True),
        ("ref.fsdp_config.param_offload", True),
        ("actor.strategy", "fsdp"),
        ("rollout.enable_chunked_prefill", True),
    ],
)
def test_cpu_refuses_what_only_accelerators_do(tiny_model: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=key.rsplit(".", 1)[-1]):
        check_stack(run_config(tiny_model, **{key: value}))


# --- B9 -------------------------------------------------------------------------------------------


class Recorder:
    """Notes the names of the methods called on it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        async def note(**_: Any) -> None:
            self.calls.append(name)

        return note


def test_b9_server_resets_every_cache_after_a_weight_sync() -> None:
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    server = SimpleNamespace(node_rank=0, engine=Recorder())
    asyncio.run(vLLMHttpServer.clear_kv_cache(server))
    assert set(server.engine.calls) == {"reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"}


def test_b9_pause_before_a_sync_resets_every_cache() -> None:
    from vllm.v1.engine.core import EngineCore

    calls: list[str] = []
    names = ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache")
    core = SimpleNamespace(**{name: lambda name=name, **_: calls.append(name) for name in names})
    EngineCore._reset_caches(core)
    assert calls == list(names)


# --- B10 ------------------------------------------------------------------------------------------


def padded_copy(model: Path, folder: Path, rows: int) -> Path:
    from transformers import AutoTokenizer

    config = copy.deepcopy(AutoConfig.from_pretrained(model))
    config.get_text_config().vocab_size = rows
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def test_b10_vocabulary_must_fit_the_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    rows = AutoConfig.from_pretrained(tiny_model).get_text_config().vocab_size
    check_vocabulary(str(tiny_model))
    check_vocabulary(str(padded_copy(tiny_model, tmp_path / "few", rows + 1)))  # as real checkpoints do
    with pytest.raises(ConfigurationError, match=rf"40 of {rows + 40} vocabulary rows"):
        check_vocabulary(str(padded_copy(tiny_model, tmp_path / "many", rows + 40)))
    with pytest.raises(ConfigurationError, match=f"{rows} tokens, the model {rows - 1} embeddings"):
        check_vocabulary(str(padded_copy(tiny_model, tmp_path / "short", rows - 1)))
    check_vocabulary("Qwen/Qwen2.5-VL-7B-Instruct")  # not local: left to the download


# --- N1, N4 ---------------------------------------------------------------------------------------


def test_n1_setup_does_not_reach_the_raising_log_call() -> None:
    from verl.trainer.ppo.v1 import trainer_separate_async as module

    assert "flush=True" in inspect.getsource(module.PPOTrainerSeparateAsync._setup)
    level = module.logger.level
    module.logger.setLevel(logging.INFO)
    try:
        with pytest.raises(TypeError, match="flush"):
            module.logger.info("message", flush=True)
        with compat.quiet_separate_async_logger():
            module.logger.info("message", flush=True)
        assert module.logger.level == logging.INFO
    finally:
        module.logger.setLevel(level)


def test_n4_padding_stops_at_the_longest_row() -> None:
    values, offsets = torch.arange(7.0), torch.tensor([0, 2, 7])
    assert compat.jagged(values, offsets).to_padded_tensor(0.0).shape == (2, 5)
    assert torch.nested.nested_tensor_from_jagged(values, offsets).to_padded_tensor(0.0).shape == (2, 7)
