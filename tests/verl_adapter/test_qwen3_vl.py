"""Qwen3-VL: prompts with times in words, their positions, and micro-batches of the actor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from keytoken.data.families import MODEL_TYPES, positions_of
from keytoken.data.timestamps import expanded, one_block_for_each_video, times_of
from keytoken.demo import tokenizer as demo_tokenizer
from keytoken.demo.batches import Encoder, clip_example
from keytoken.demo.model import build_model, model_config
from keytoken.demo.render import write_clip
from keytoken.demo.rows import split_question
from keytoken.demo.run import EXPERIMENTS
from keytoken.demo.tokenizer import CONTRACTS, QWEN3_CONTRACT, build_processor, build_tokenizer
from keytoken.errors import ConfigurationError, DataError
from keytoken.verl_adapter.agent_loop import position_ids
from keytoken.verl_adapter.offline import PromptMaker
from keytoken.verl_adapter.pictures import Media
from keytoken.verl_adapter.prompts import PreparedPrompt

# Frame numbers and rates: even, uneven, a part in the middle of a file, one patch, long after the start.
CLIPS = [
    (tuple(range(8)), 2.0),
    ((0, 1, 3, 4, 6, 7, 9, 10), 4.0),
    ((300, 330, 362, 391), 29.97),
    ((5, 6), 1.0),
    ((90_000, 90_050, 90_100, 90_151), 25.0),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_qwen3")
    tokenizer = build_tokenizer("qwen3_vl")
    build_model(tokenizer, 0, "qwen3_vl").save_pretrained(folder)
    build_processor(tokenizer, "qwen3_vl").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def maker(model_folder: Path) -> PromptMaker:
    return PromptMaker(model_folder, {"sampling_contract": dataclasses.asdict(QWEN3_CONTRACT)})


@pytest.fixture(scope="module")
def processor(maker: PromptMaker) -> Any:
    return maker.processor


def video(numbers: tuple[int, ...], fps: float, seed: int = 0, size: tuple[int, int] = (64, 64)) -> Any:
    """Random frames and their metadata, as the dataset reads them."""
    noise = np.random.default_rng(seed).integers(0, 255, (len(numbers), 3, *size), dtype=np.uint8)
    count = numbers[-1] + 1
    metadata = {
        "fps": fps,
        "frames_indices": list(numbers),
        "total_num_frames": count,
        "duration": count / fps,
    }
    return torch.from_numpy(noise), {**metadata, "video_backend": "pyav"}


def content(words: str) -> list[dict[str, Any]]:
    """``V`` is a video, ``I`` an image, the rest is text."""
    kinds = {"V": {"type": "video"}, "I": {"type": "image"}}
    return [
        {"role": "user", "content": [kinds.get(w, {"type": "text", "text": w}) for w in words.split("|")]}
    ]


def prepared(maker: PromptMaker, words: str, videos: list[Any] | None = None) -> PreparedPrompt:
    noise = np.random.default_rng(5).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(noise)] * words.split("|").count("I")
    return maker.prepare(content(words), Media(images or None, videos))


def vllms_expansion(processor: Any, ids: list[int], videos: list[Any], grids: list[list[int]]) -> list[int]:
    """What vLLM makes of a prompt with one block for each video, by its own functions."""
    from vllm.model_executor.models.qwen3_vl import (
        Qwen3VLMultiModalProcessor,
        Qwen3VLProcessingInfo,
        _replace_video_token_placeholders,
    )

    marks = (processor.vision_start_token_id, processor.video_token_id, processor.vision_end_token_id)
    written = []
    for (_, metadata), (patches, height, width) in zip(videos, grids, strict=True):
        seconds = Qwen3VLProcessingInfo._calculate_timestamps(
            None, metadata["frames_indices"], metadata["fps"], processor.video_processor.temporal_patch_size
        )
        made = Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=[height * width // 4] * patches,
            timestamps=seconds,
            tokenizer=processor.tokenizer,
            vision_start_token_id=marks[0],
            video_token_id=marks[1],
            vision_end_token_id=marks[2],
            select_token_id=True,
        )
        written.append(list(made.full))
    return _replace_video_token_placeholders(ids, list(marks), written)


@pytest.mark.parametrize(("numbers", "fps"), CLIPS)
def test_times_are_those_of_both_processors(processor: Any, numbers: tuple[int, ...], fps: float) -> None:
    from vllm.model_executor.models.qwen3_vl import Qwen3VLProcessingInfo

    found = times_of({"frames_indices": numbers, "fps": fps}, 2)
    assert found == processor._calculate_timestamps(list(numbers), fps, 2)
    assert found == Qwen3VLProcessingInfo._calculate_timestamps(None, list(numbers), fps, 2)
    short = {"frames_indices": numbers[:-1], "fps": fps}  # the last patch repeats its only frame
    assert times_of(short, 2) == processor._calculate_timestamps(list(numbers[:-1]), fps, 2)


@pytest.mark.parametrize("words", ["V|which way ?", "what|V", "V|V|which", "V|then|V|and", "I|V|what|I"])
def test_b7_the_engine_expands_what_it_is_sent_to_the_trainers_ids(maker: PromptMaker, words: str) -> None:
    """The trainer's ids are the processor's, and the engine's are the trainer's."""
    processor = maker.processor
    clips = [video(*CLIPS[1], seed=1), video(*CLIPS[2], seed=2)][: words.split("|").count("V")]
    prompt = prepared(maker, words, clips)
    grids = prompt.features["video_grid_thw"].tolist()
    text = processor.apply_chat_template(content(words), tokenize=False, add_generation_prompt=True)
    stock = processor(
        text=[text],
        videos=[frames for frames, _ in clips],
        images=prompt.images,
        video_metadata=[dict(metadata) for _, metadata in clips],
        do_sample_frames=False,
    )
    assert prompt.token_ids == stock["input_ids"][0]
    assert prompt.engine_ids.count(processor.video_token_id) == len(clips)
    assert vllms_expansion(processor, prompt.engine_ids, clips, grids) == prompt.token_ids
    assert prompt.processor_kwargs == {"do_sample_frames": False}


def test_b7_is_still_there(maker: PromptMaker) -> None:
    """verl shortens each block of the processor's prompt, and leaves as many as the video has patches."""
    from keytoken.verl_adapter.compat import one_placeholder_for_each_picture

    clip = video(*CLIPS[1])
    prompt = prepared(maker, "V|which way ?", [clip])
    sent = one_placeholder_for_each_picture(prompt.token_ids, maker.processor)
    assert sent.count(maker.processor.video_token_id) == 4  # for one video; tests/e2e sends it to an engine


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> PromptMaker:
    """With a tokenizer that has a token for `` <``, as the released one has."""
    folder = tmp_path_factory.mktemp("merging")
    with pytest.MonkeyPatch.context() as patch:
        words = demo_tokenizer.vocabulary()
        patch.setattr(demo_tokenizer, "vocabulary", lambda: [*words, "<"])
        tokenizer = build_tokenizer("qwen3_vl")
    build_processor(tokenizer, "qwen3_vl").save_pretrained(folder)
    model_config(tokenizer, "qwen3_vl").save_pretrained(folder)
    return PromptMaker(folder, {"sampling_contract": dataclasses.asdict(QWEN3_CONTRACT)})


@pytest.mark.parametrize("before", ["look ", "look (", "look at <", "at\n", "<1.0 seconds>", "look <"])
def test_text_that_runs_into_a_time_is_cut_as_the_engine_cuts_it(merging: PromptMaker, before: str) -> None:
    """The processor makes one token of `` <``; the engine tokenizes the time alone. The text is the same."""
    tokenizer = merging.processor.tokenizer
    assert len(tokenizer.encode("look <")) == len(tokenizer.encode("look")) + 1
    clip = video(*CLIPS[0])
    prompt = prepared(merging, f"{before}|V|what", [clip])
    assert f"{before}<0.2 seconds><|vision_start|>" in tokenizer.decode(prompt.token_ids)
    assert f"{before}<|vision_start|><|video_pad|><|vision_end|>what" in tokenizer.decode(prompt.engine_ids)
    grids = prompt.features["video_grid_thw"].tolist()
    assert vllms_expansion(merging.processor, prompt.engine_ids, [clip], grids) == prompt.token_ids


def test_another_form_of_prompt_is_refused(processor: Any) -> None:
    times, grids = [[0.25, 1.25]], [(2, 4, 4)]
    marks = (processor.vision_start_token_id, processor.video_token_id, processor.vision_end_token_id)
    ids = expanded([5, *marks, 6], grids, times, processor)
    assert one_block_for_each_video(ids, grids, times, processor)[0] == 5
    for wrong in ([5, 6], ids[:-3], [token for token in ids if token != marks[2]]):
        with pytest.raises(DataError, match="install the locked version"):
            one_block_for_each_video(wrong, grids, times, processor)
    with pytest.raises(DataError, match="3 temporal patches"):
        one_block_for_each_video(ids, grids, [[0.25, 1.25, 2.25]], processor)
    with pytest.raises(DataError, match=r"'<9\.2 seconds>' before it"):
        one_block_for_each_video(ids, grids, [[9.25, 1.25]], processor)


def vllm_positions(config: Any, ids: list[int], features: list[tuple[str, int, list[int]]]) -> torch.Tensor:
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as Model

    given = [
        SimpleNamespace(
            modality=kind,
            mm_position=SimpleNamespace(offset=offset),
            data={f"{kind}_grid_thw": SimpleNamespace(data=torch.tensor(grid))},
        )
        for kind, offset, grid in features
    ]
    return Model._get_mrope_input_positions(ids, given, config)[0]


@pytest.mark.parametrize("words", ["V|which", "which", "I|what", "V|I|V|what", "I|I|what|V"])
@pytest.mark.parametrize("tail", [[8, 9], [8, "<|video_pad|>", 9, "<|image_pad|>"]])
def test_positions_are_those_of_both_engines(maker: PromptMaker, words: str, tail: list[Any]) -> None:
    """Times, heights and widths of transformers and of vLLM, also behind an answer with placeholders."""
    processor = maker.processor
    clips = [video(*CLIPS[2], seed=1), video(*CLIPS[0], seed=2)][: words.split("|").count("V")]
    prompt = prepared(maker, words, clips or None)
    answer = [processor.tokenizer.convert_tokens_to_ids(t) if isinstance(t, str) else t for t in tail]
    ids = [*prompt.token_ids, *answer]
    found = positions_of(processor, ids, prompt.features)
    rows = position_ids(processor, torch.tensor([ids]), torch.ones(1, len(ids)), prompt.features)
    assert torch.equal(rows[0, 1:], found) and rows[0, 0].tolist() == list(range(len(ids)))
    offsets = []
    queues = {
        processor.image_token_id: (
            "image",
            prompt.features.get("image_grid_thw", torch.zeros(0, 3)).tolist(),
        ),
        processor.video_token_id: (
            "video",
            prompt.features.get("video_grid_thw", torch.zeros(0, 3)).tolist(),
        ),
    }
    for place, token in enumerate(prompt.token_ids):
        kind, grids = queues.get(token, ("", []))
        covered = offsets and place < offsets[-1][3]
        if grids and not covered:
            grid = [int(edge) for edge in grids.pop(0)]
            times = 1 if kind == "image" else grid[0]
            length = grid[1] * grid[2] // 4
            # To the end of a video's last block; the stamps of the others lie between.
            end, seen = place, 0
            while seen < times * length:
                seen += prompt.token_ids[end] == token
                end += 1
            offsets.append((kind, place if kind == "image" else place - 1, grid, end))
    expected = vllm_positions(processor.config, ids, [entry[:3] for entry in offsets])
    assert torch.equal(found, expected)
    if answer == [8, 9]:
        tokens = torch.tensor([ids])
        types = (tokens == processor.image_token_id) * 1 + (tokens == processor.video_token_id) * 2
        shown = {
            name: prompt.features[name]
            for name in ("image_grid_thw", "video_grid_thw")
            if name in prompt.features
        }
        stock = stock_positions(processor.config, tokens, types, shown)
        assert torch.equal(found, stock)


def stock_positions(
    config: Any, tokens: torch.Tensor, types: torch.Tensor, shown: dict[str, Any]
) -> torch.Tensor:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = lambda *args, **kwargs: Qwen3VLModel.get_vision_position_ids(
        model, *args, **kwargs
    )
    return Qwen3VLModel.get_rope_index(model, input_ids=tokens, mm_token_type_ids=types, **shown)[0][:, 0]


def test_b8_an_image_and_a_video_have_to_look_alike(model_folder: Path) -> None:
    odd = PromptMaker(model_folder, {"sampling_contract": dataclasses.asdict(QWEN3_CONTRACT)})
    odd.processor.image_processor.image_mean = [0.48, 0.46, 0.41]
    with pytest.raises(
        ConfigurationError, match=r"image_mean=\[0.48, 0.46, 0.41\] for images.*both the same"
    ):
        prepared(odd, "V|which", [video(*CLIPS[0])])
    prepared(odd, "I|which")  # nothing to compare with


def test_frames_are_resized_once_only(maker: PromptMaker, model_folder: Path) -> None:
    """By the contract, to multiples of 32; the processor's own bounds are of whole clips."""
    with pytest.raises(ConfigurationError, match="were resized to"):
        prepared(maker, "V|which", [video(*CLIPS[0], size=(56, 56))])
    with pytest.raises(ConfigurationError, match="patches of 14 pixels"):
        other = dataclasses.replace(QWEN3_CONTRACT, patch_size=14)
        PromptMaker(model_folder, {"sampling_contract": dataclasses.asdict(other)})


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32).eval()


def test_n5_images_and_videos_share_one_run_of_the_tower(model: Any, maker: PromptMaker) -> None:
    """verl runs it once for each kind; the features, deeper ones too, are the same."""
    from verl.models.transformers import qwen3_vl

    prompt = prepared(maker, "V|what|I|then|V", [video(*CLIPS[0], seed=1), video(*CLIPS[3], seed=2)])
    names = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
    inputs = {"input_ids": torch.tensor([prompt.token_ids]), **{n: prompt.features[n] for n in names}}
    runs: list[int] = []
    handle = model.model.visual.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        mine = qwen3_vl._get_input_embeds(model.model, **inputs)
        assert len(runs) == 1
        stock = qwen3_vl._get_input_embeds.__wrapped__(model.model, **inputs)
        assert len(runs) == 3
    handle.remove()
    torch.testing.assert_close(mine["inputs_embeds"], stock["inputs_embeds"], atol=1e-5, rtol=0)
    assert torch.equal(mine["visual_pos_masks"], stock["visual_pos_masks"])
    for one, two in zip(mine["deepstack_visual_embeds"], stock["deepstack_visual_embeds"], strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    inputs["input_ids"][inputs["input_ids"] == model.config.video_token_id] = 5
    with pytest.raises(ValueError, match="Video features and video tokens do not match: tokens: 0"):
        qwen3_vl._get_input_embeds(model.model, **inputs)


def test_b5_a_batch_without_pixels_runs_the_tower_for_nothing(model: Any) -> None:
    """Its parameters get a zero gradient, not none, and no deeper features are added."""
    from verl.models.transformers import qwen3_vl

    model.zero_grad()
    made = qwen3_vl._get_input_embeds(model.model, torch.tensor([[5, 6]]))
    assert torch.equal(made["inputs_embeds"], model.get_input_embeddings()(torch.tensor([[5, 6]])))
    assert made["visual_pos_masks"] is None and made["deepstack_visual_embeds"] is None
    made["inputs_embeds"].sum().backward()
    gradients = [parameter.grad for parameter in model.model.visual.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert max(float(gradient.abs().max()) for gradient in gradients) == 0.0
    model.zero_grad()


def test_the_warm_start_sees_what_training_sees(maker: PromptMaker, tmp_path: Path) -> None:
    """Ids, pixels and positions of a drawn clip, and of the same clip written, decoded and enlarged."""
    question, rng = split_question("train", 1, 0)
    example = clip_example(question, rng)
    write_clip(tmp_path / "clip.mp4", example.frames)
    shown = [
        {"type": "video", "video": str(tmp_path / "clip.mp4")},
        {"type": "text", "text": question.prompt},
    ]
    messages = [{"role": "user", "content": shown}]
    prompt = maker.prepare(messages, maker.read(messages))
    encoder = Encoder(maker.processor, 2.0)
    grid = encoder.grid(example)
    assert grid is not None and prompt.features["video_grid_thw"].tolist() == [list(grid)]
    assert encoder.prompt_ids(example, grid) == prompt.token_ids
    vision = encoder.vision([example])
    assert torch.equal(vision["pixel_values_videos"], prompt.features["pixel_values_videos"])
    found = position_ids(
        maker.processor,
        torch.tensor([prompt.token_ids]),
        torch.ones(1, len(prompt.token_ids)),
        prompt.features,
    )
    assert torch.equal(encoder.positions(prompt.token_ids, grid), found[0, 1:])


def test_the_demo_knows_every_family() -> None:
    assert set(EXPERIMENTS) == set(CONTRACTS) == set(MODEL_TYPES)
