"""One real vLLM engine with KeyToken's worker extension: S3, S5, S7, B2, B3, B4, B9 and seeds, end to end.

And the parity gate's comparison of this engine with a forward pass of transformers: it passes, and each bug
that lives in the engine, brought back, is named.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from keytoken.errors import ParityError
from keytoken.main import EXTERNAL_MODULE
from keytoken.parity import Gap, Reading, bounds_for, compare, with_answer
from keytoken.verl_adapter.agent_loop import position_ids
from keytoken.verl_adapter.engine_probe import EXTENSION
from keytoken.verl_adapter.shims.hooks import on_cpu
from keytoken.verl_adapter.shims.vision_tokens import vision_token_ids
from keytoken.workers.parity import media_of

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not on_cpu(), reason="starts the CPU engine")]

FPS = 3.0  # neither vLLM's assumed 24 nor a whole number of seconds per patch
METADATA = {
    "fps": FPS,
    "frames_indices": list(range(8)),
    "total_num_frames": 8,
    "duration": 8 / FPS,
    "video_backend": "test",
}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_USE_EXTERNAL_MODULES", EXTERNAL_MODULE)
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("TORCH_COMPILE_DISABLE", "1")  # as in a run; else log-probs want a C++ compiler
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        patch.setenv("VERL_RAY_JOB_ID", f"test-{os.getpid()}")
        from vllm import LLM

        yield LLM(
            str(tiny_model),
            dtype="float32",
            enforce_eager=True,
            kv_cache_memory_bytes=64 << 20,
            max_model_len=256,
            max_num_seqs=64,
            max_num_batched_tokens=4096,
            enable_chunked_prefill=False,
            enable_prefix_caching=True,
            mm_processor_cache_gb=0,
            distributed_executor_backend="mp",
            worker_extension_cls=EXTENSION,
        )


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.randint(
        0, 255, (8, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )


def prompt(processor: Any, frames: torch.Tensor, *, with_metadata: bool = True) -> dict[str, Any]:
    """The request as the agent loop makes it, with one placeholder."""
    content = [{"type": "video", "video": "x"}, {"type": "text", "text": "which way ? A up B down"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    request: dict[str, Any] = {
        "prompt_token_ids": processor.tokenizer(text)["input_ids"],
        "multi_modal_data": {"video": [(frames, METADATA)]},
    }
    if with_metadata:
        request["mm_processor_kwargs"] = {"video_metadata": [METADATA], "do_sample_frames": False}
    return request


def answer(
    engine: Any, request: dict[str, Any], **sampling: Any
) -> tuple[list[int], torch.Tensor, list[int]]:
    """Answer ids, their log-probs, and the expanded prompt ids."""
    from vllm import SamplingParams

    options = {"max_tokens": 12, "temperature": 1.0, "logprobs": 0, "seed": 5, "ignore_eos": True, **sampling}
    (result,) = engine.generate([request], SamplingParams(**options), use_tqdm=False)
    output = result.outputs[0]
    ids = list(output.token_ids)
    log_probs = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
    return ids, torch.tensor(log_probs), list(result.prompt_token_ids)


def trainer_log_probs(
    model: Any, processor: Any, frames: torch.Tensor, prompt_ids: list[int], ids: list[int]
) -> torch.Tensor:
    media = processor.video_processor(
        videos=[frames], video_metadata=[METADATA], do_sample_frames=False, return_tensors="pt"
    )
    features = {
        "video_grid_thw": media["video_grid_thw"],
        "second_per_grid_ts": torch.tensor([2 / FPS]),
    }
    tokens = torch.tensor([prompt_ids + ids])
    positions = position_ids(processor, tokens, torch.ones_like(tokens), features)
    with torch.no_grad():
        logits = model(
            input_ids=tokens,
            position_ids=positions.transpose(0, 1),
            pixel_values_videos=media["pixel_values_videos"],
            video_grid_thw=media["video_grid_thw"],
        ).logits[0]
    steps = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return steps.gather(1, torch.tensor(ids)[:, None])[:, 0]


def send_weights(engine: Any, model: Any) -> None:
    """Refresh the engine's weights as verl does: its sender here, its receiver in the worker."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    handle = f"ipc:///tmp/rl-colocate-zmq-{os.environ['VERL_RAY_JOB_ID']}-replica-0-rank-0.sock"
    sender = BucketedWeightSender(zmq_handle=handle, bucket_size_mb=1, use_shm=True)
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(engine.collective_rpc, "update_weights_from_ipc", kwargs={"use_shm": True})
        asyncio.run(sender.async_send_weights(iter(model.state_dict().items())))
        receiving.result(timeout=60)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()


def test_b2_b3_rollout_and_trainer_agree(
    engine: Any, processor: Any, frames: torch.Tensor, model: Any
) -> None:
    ids, rollout, prompt_ids = answer(engine, prompt(processor, frames))
    trainer = trainer_log_probs(model, processor, frames, prompt_ids, ids)
    assert (rollout - trainer).abs().max() < 1e-5
    ids, rollout, prompt_ids = answer(engine, prompt(processor, frames, with_metadata=False))
    trainer = trainer_log_probs(model, processor, frames, prompt_ids, ids)
    assert (rollout - trainer).abs().max() > 1e-3  # what dropping the metadata costs


def engine_reading(engine: Any, request: dict[str, Any]) -> Reading:
    """What the probe in the engine's worker noted of a request, and the log-probs of the answer."""
    engine.collective_rpc("keytoken_watch", args=([5],))
    ids, log_probs, _ = answer(engine, request)
    ((note,),) = engine.collective_rpc("keytoken_seen")
    return Reading.of("vLLM engine", "the test", with_answer(note, ids, log_probs.tolist()))


def trainer_reading(
    model: Any, processor: Any, frames: torch.Tensor, engine: Reading, *, own_positions: bool = True
) -> Reading:
    """The same answer by transformers, with its positions if they are not to be our own."""
    media = processor.video_processor(
        videos=[frames], video_metadata=[METADATA], do_sample_frames=False, return_tensors="pt"
    )
    features = {**media, "second_per_grid_ts": torch.tensor([2 / FPS])}
    text = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "video"}, {"type": "text", "text": "which way ? A up B down"}],
            }
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    block = processor.video_token * int(features["video_grid_thw"].prod() // 4)
    prompt_ids = processor.tokenizer(text.replace(processor.video_token, block))["input_ids"]
    answer_ids = engine.ids[engine.prompt_length :]
    ids = torch.cat([torch.tensor(prompt_ids), answer_ids])[None]
    if own_positions:
        positions = position_ids(processor, ids, torch.ones_like(ids), features)[0, 1:]
    else:
        positions = model.model.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=2 * (ids == processor.video_token_id).int(),
            video_grid_thw=features["video_grid_thw"],
            second_per_grid_ts=features["second_per_grid_ts"],
        )[0][:, 0]
    log_probs = trainer_log_probs(model, processor, frames, prompt_ids, answer_ids.tolist())
    found = {
        "ids": ids[0].tolist(),
        "prompt_length": len(prompt_ids),
        "positions": positions.tolist(),
        "log_probs": log_probs.tolist(),
        **media_of(features),
    }
    return Reading.of("trainer", "the test", found)


def compared(model: Any, processor: Any, frames: torch.Tensor, seen: Reading, **options: Any) -> Gap:
    return compare(seen, trainer_reading(model, processor, frames, seen, **options), bounds_for("float32"))


def test_the_parity_gate_passes_this_engine(
    engine: Any, processor: Any, frames: torch.Tensor, model: Any
) -> None:
    """All fields are equal, of a prompt that the engine knows already as of a new one."""
    for request in (prompt(processor, frames), prompt(processor, frames), prompt(processor, frames.flip(0))):
        seen = engine_reading(engine, request)
        assert all(value is not None for value in (seen.positions, seen.grids, seen.seconds, seen.pixels))
        shown = request["multi_modal_data"]["video"][0][0]
        assert compared(model, processor, shown, seen).largest < 1e-5
    assert engine.collective_rpc("keytoken_watch", args=([9],)) == [None]
    answer(engine, prompt(processor, frames))
    assert engine.collective_rpc("keytoken_seen") == [[]]  # nobody watched for seed 5


def test_the_parity_gate_names_b2(engine: Any, processor: Any, frames: torch.Tensor, model: Any) -> None:
    seen = engine_reading(engine, prompt(processor, frames))
    with pytest.raises(ParityError, match=r"^Parity: positions .* transformers\.$"):
        compared(model, processor, frames, seen, own_positions=False)


def test_the_parity_gate_names_b3(engine: Any, processor: Any, frames: torch.Tensor, model: Any) -> None:
    seen = engine_reading(engine, prompt(processor, frames, with_metadata=False))
    with pytest.raises(ParityError, match=r"seconds .* 0\.0833333 \(vLLM engine\), 0\.666667 \(trainer\)"):
        compared(model, processor, frames, seen)


def test_the_parity_gate_names_b8(engine: Any, processor: Any, frames: torch.Tensor, model: Any) -> None:
    request = prompt(processor, frames)
    request["mm_processor_kwargs"] |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with pytest.raises(ParityError, match=r"^Parity: pixels .*image_mean"):
        compared(model, processor, frames, engine_reading(engine, request))


def test_seeded_answers_do_not_depend_on_their_company(
    engine: Any, processor: Any, frames: torch.Tensor
) -> None:
    from vllm import SamplingParams

    request = prompt(processor, frames)
    sampling = [
        SamplingParams(max_tokens=16, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(24)
    ]
    together = engine.generate([request] * 24, sampling, use_tqdm=False)
    backwards = engine.generate([request] * 24, sampling[::-1], use_tqdm=False)[::-1]
    answers = [tuple(result.outputs[0].token_ids) for result in together]
    assert answers == [tuple(result.outputs[0].token_ids) for result in backwards]
    assert answers[7] == tuple(answer(engine, request, seed=7, max_tokens=16)[0])
    assert len(set(answers)) == 24


def test_s5_b9_weights_can_be_refreshed(
    engine: Any, processor: Any, frames: torch.Tensor, model: Any
) -> None:
    """After a refresh and the three resets the engine answers with the new weights, not with old caches."""
    request = prompt(processor, frames)
    _, before, _ = answer(engine, request)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    send_weights(engine, model)

    def gap() -> float:
        ids, rollout, prompt_ids = answer(engine, request)
        return float((rollout - trainer_log_probs(model, processor, frames, prompt_ids, ids)).abs().max())

    stale = gap()
    engine.reset_prefix_cache()
    engine.llm_engine.reset_mm_cache()
    engine.llm_engine.reset_encoder_cache()
    fresh = gap()
    assert fresh < 1e-5
    assert stale > 100 * fresh
    assert not torch.equal(before, answer(engine, request)[1])


def test_b4_vision_tokens_cannot_be_sampled(engine: Any, processor: Any, frames: torch.Tensor) -> None:
    """Runs last: the ban stays in the engine."""
    from verl.workers.rollout.utils import get_vision_placeholder_token_ids
    from vllm import SamplingParams

    request = prompt(processor, frames)
    sampling = [
        SamplingParams(max_tokens=48, temperature=2.0, seed=seed, ignore_eos=True) for seed in range(48)
    ]
    vision = set(vision_token_ids(processor))

    def count() -> int:
        results = engine.generate([request] * 48, sampling, use_tqdm=False)
        return sum(token in vision for result in results for token in result.outputs[0].token_ids)

    assert count() > 0
    banned = get_vision_placeholder_token_ids(processor)
    engine.collective_rpc(
        "monkey_patch_model", kwargs={"vocab_size": len(processor.tokenizer), "banned_token_ids": banned}
    )
    assert count() == 0
