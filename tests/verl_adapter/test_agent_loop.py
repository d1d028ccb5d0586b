"""The agent loop: one preparation for a group, seeds, answers cut at vision tokens, failures that end."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from ray.exceptions import ActorDiedError

from keytoken.data.cache.store import FrameCache
from keytoken.data.clips import Clip, read_clip
from keytoken.data.contract import SamplingContract
from keytoken.demo.render import draw_clip, write_clip
from keytoken.demo.world import make_question
from keytoken.errors import ClipError, ClusterError, ConfigurationError
from keytoken.verl_adapter import dataset
from keytoken.verl_adapter.agent_loop import (
    ANSWER_VISION_TOKENS,
    CLIP_READS,
    MEDIA_PUT_BYTES,
    FailureWatch,
    VideoAgentLoop,
    VideoAgentLoopWorker,
    answer_seed,
    cut_at_vision_token,
)
from keytoken.verl_adapter.compat import AgentLoopOutput
from keytoken.verl_adapter.dataset import VideoDataset
from keytoken.verl_adapter.pictures import Media, shuffled
from keytoken.verl_adapter.prompts import require_one_resize
from keytoken.verl_adapter.reward_manager import LengthAwareRewardManager

CONTRACT = {"fps": 2.0, "min_frames": 4, "max_frames": 8, "min_pixels": 3136, "max_pixels": 3136}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    import numpy as np

    rng = np.random.default_rng(0)
    question = make_question("motion", rng)
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path, draw_clip(question.bodies, rng))
    return str(path)


def messages(clip: str | None) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": "which way ? A up B down"}]
    if clip is not None:
        content.insert(0, {"type": "video", "video": clip})
    return [{"role": "user", "content": content}]


class Server:
    """Stands where verl's client of the rollout server stands: keeps requests, gives a fixed answer."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []

    async def generate(self, **request: Any) -> SimpleNamespace:
        self.requests.append(request)
        log_probs = [-float(place) for place in range(1, len(self.answer) + 1)]
        return SimpleNamespace(
            token_ids=self.answer, log_probs=log_probs, num_preempted=None, extra_fields={"global_steps": 3}
        )


def run_group(
    processor: Any,
    server: Server,
    prompt: list[dict[str, Any]],
    size: int = 3,
    cache: Path | None = None,
    **row: Any,
) -> list[Any]:
    folder = None if cache is None else str(cache)
    data = OmegaConf.create({"sampling_contract": CONTRACT, "mm_processor_kwargs": {}, "frame_cache": folder})
    rollout = {"prompt_length": 192, "response_length": 4}
    config = OmegaConf.create(
        {
            "keytoken": {"seed": 1, "attribution": {"shuffle_seed": 0}},
            "actor_rollout_ref": {"rollout": rollout},
            "data": data,
        }
    )

    async def group() -> list[Any]:
        loop = VideoAgentLoop(
            trainer_config=SimpleNamespace(config=config),
            server_manager=server,
            tokenizer=processor.tokenizer,
            processor=processor,
            dataset_cls=VideoDataset,
            data_config=SimpleNamespace(config=data),
            hf_model_type="qwen2_5_vl",
        )
        runs = [
            loop.run(
                {"temperature": 1.0},
                uid="u",
                raw_prompt=prompt,
                global_steps=3,
                index=7,
                session_id=number,
                **row,
            )
            for number in range(size)
        ]
        return list(await asyncio.gather(*runs))

    return asyncio.run(group())


def worker(processor: Any) -> Any:
    built = object.__new__(VideoAgentLoopWorker)
    built.processor, built.tokenizer, built.mm_processor_kwargs = processor, processor.tokenizer, {}
    return built


def test_group_shares_one_preparation_and_has_distinct_seeds(processor: Any, clip: str) -> None:
    server = Server([8, 9])
    outputs = run_group(processor, server, messages(clip))
    assert all(output._media is outputs[0]._media for output in outputs)
    assert len({request["sampling_params"]["seed"] for request in server.requests}) == 3
    again = Server([8, 9])
    run_group(processor, again, messages(clip))
    seeds = [[request["sampling_params"]["seed"] for request in side.requests] for side in (server, again)]
    assert seeds[0] == seeds[1]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The clips that are really decoded, whoever asks."""
    paths: list[str] = []

    def read(path: str, contract: SamplingContract) -> Clip:
        paths.append(path)
        return read_clip(path, contract)

    monkeypatch.setattr(dataset, "read_clip", read)
    monkeypatch.setattr(dataset, "frame_cache", functools.cache(lambda root: FrameCache(root, read=read)))
    return paths


def reads_of(outputs: list[Any]) -> list[tuple[int, int, int]]:
    reads = [output.extra_fields[CLIP_READS] for output in outputs]
    return [(counts["decodes"], counts["decoded_bytes"], counts["hits"]) for counts in reads]


def test_a_group_decodes_its_clip_once(processor: Any, clip: str, decoded: list[str]) -> None:
    """Eight answers, one decode, counted for one of them."""
    size = 8 * 3 * 56 * 56
    outputs = run_group(processor, Server([8]), messages(clip), size=8, shuffled_answers=4)
    assert decoded == [clip]
    assert reads_of(outputs) == [(1, size, 0)] + [(0, 0, 0)] * 7


def test_a_cached_clip_is_never_decoded_again(
    processor: Any, clip: str, decoded: list[str], tmp_path: Path
) -> None:
    """The first group fills the cache, the second one gets the same frames from it."""
    first, second = Server([8]), Server([8])
    size = 8 * 3 * 56 * 56
    outputs = run_group(processor, first, messages(clip), size=4, cache=tmp_path)
    assert reads_of(outputs) == [(1, size, 0)] + [(0, 0, 0)] * 3
    outputs = run_group(processor, second, messages(clip), size=4, cache=tmp_path)
    assert reads_of(outputs) == [(0, 0, 1)] + [(0, 0, 0)] * 3
    assert decoded == [clip]
    (one,), (two,) = (server.requests[0]["video_data"] for server in (first, second))
    assert torch.equal(one[0], two[0]) and one[1] == two[1]


def test_prompts_that_are_prepared_at_the_same_time_count_their_own_clips(
    processor: Any, clip: str, decoded: list[str]
) -> None:
    text = run_group(processor, Server([8]), messages(None), size=2)
    assert reads_of(text) == [(0, 0, 0)] * 2
    two = [{"role": "user", "content": [*messages(clip)[0]["content"], *messages(clip)[0]["content"]]}]
    assert sum(decodes for decodes, _, _ in reads_of(run_group(processor, Server([8]), two))) == 2
    assert decoded == [clip] * 2


class SeededServer(Server):
    """Answers as the seed says, as an engine does."""

    async def generate(self, **request: Any) -> SimpleNamespace:
        seed = request["sampling_params"]["seed"]
        self.answer = [8 + (seed >> bit) % 2 for bit in range(4)]
        return await super().generate(**request)


def test_shuffled_answers_come_beside_the_others(processor: Any, clip: str) -> None:
    """Two answers of three have one: same ids, same times, the frames in one other order for both."""
    plain, server = SeededServer([]), SeededServer([])
    without = run_group(processor, plain, messages(clip))
    outputs = run_group(processor, server, messages(clip), shuffled_answers=2)
    assert [output._shuffled is not None for output in outputs] == [True, True, False]
    # What is trained on is what it would be without.
    assert [output.response_ids for output in outputs] == [output.response_ids for output in without]
    ((frames, metadata),) = plain.requests[0]["video_data"]
    sides: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for request in server.requests:
        sides[torch.equal(request["video_data"][0][0], frames)].append(request)
    for ordered, numbers in ((True, (0, 1, 2)), (False, (-1, -2))):
        seeds = {request["sampling_params"]["seed"] for request in sides[ordered]}
        assert seeds == {answer_seed(1, 3, 7, number, outputs[0].prompt_ids) for number in numbers}
    for request in sides[False]:
        ((changed, times),) = request["video_data"]
        assert torch.equal(changed, sides[False][0]["video_data"][0][0])
        assert sorted(map(str, changed.flatten(1).tolist())) == sorted(map(str, frames.flatten(1).tolist()))
        assert times == metadata
        for name in ("prompt_ids", "mm_processor_kwargs", "image_data"):
            assert request[name] == plain.requests[0][name]
        assert request["sampling_params"]["temperature"] == 1.0


def frames_sent(processor: Any, clip: str | None, control: str) -> list[Any]:
    """The videos of the request that a row with this control makes."""
    server = Server([8, 9])
    run_group(
        processor, server, messages(clip), size=1, extra_info={"control": control, "prompt_id": "heldout-7"}
    )
    return server.requests[0]["video_data"] or []


def test_a_row_may_ask_for_a_control(processor: Any, clip: str) -> None:
    """Blank frames are the processor's mean colour, shuffled ones those of evaluation; times stay."""
    ((frames, times),) = frames_sent(processor, clip, "none")
    ((grey, times_of_grey),) = frames_sent(processor, clip, "blank")
    mean = torch.tensor(processor.video_processor.image_mean)[:, None, None]
    assert grey.shape == frames.shape and (grey / 255 - mean).abs().max() <= 0.5 / 255 + 1e-6
    ((changed, times_of_changed),) = frames_sent(processor, clip, "shuffled")
    expected = shuffled(Media(videos=[(frames, times)]), 0, "heldout-7").videos
    assert expected is not None and torch.equal(changed, expected[0][0])
    assert not torch.equal(changed, frames)
    assert times == times_of_grey == times_of_changed
    assert frames_sent(processor, None, "blank") == []


def test_an_unknown_control_is_refused(processor: Any, clip: str) -> None:
    with pytest.raises(ConfigurationError, match=r"heldout-7.*'blnk'.*none, blank or shuffled"):
        frames_sent(processor, clip, "blnk")


def test_what_has_no_frames_to_shuffle_has_no_shuffled_answer(processor: Any, tmp_path: Path) -> None:
    import numpy as np

    still = tmp_path / "still.mp4"
    write_clip(still, np.full((16, 64, 64, 3), 90, dtype=np.uint8))
    for prompt in (messages(None), messages(str(still))):
        server = Server([8])
        outputs = run_group(processor, server, prompt, shuffled_answers=3)
        assert len(server.requests) == 3
        assert all(output._shuffled is None for output in outputs)


class Scorer:
    """Stands where verl's handle of a reward worker stands: KeyToken's reward manager without a process."""

    def __init__(self, processor: Any, reward: dict[str, float]) -> None:
        self.compute_score = self
        self.seen: list[str] = []

        def compute_score(solution_str: str, **_: Any) -> dict[str, float]:
            self.seen.append(solution_str)
            return {**reward, "score": float(len(self.seen))}

        self.manager = LengthAwareRewardManager(OmegaConf.create(), processor.tokenizer, compute_score)

    async def remote(self, data: Any) -> Any:
        self.manager.loop = asyncio.get_running_loop()
        return await self.manager.run_single(data)


def stored_by_worker(
    processor: Any, monkeypatch: pytest.MonkeyPatch, scorer: Scorer, output: Any
) -> dict[str, Any]:
    """What the worker puts into storage for an answer."""
    return puts_of_worker(processor, monkeypatch, scorer, output)[-1]


def puts_of_worker(
    processor: Any, monkeypatch: pytest.MonkeyPatch, scorer: Scorer, output: Any, validate: bool = False
) -> list[dict[str, Any]]:
    """All that the worker puts into storage with an answer, in order."""
    puts: list[dict[str, Any]] = []

    async def put(**call: Any) -> None:
        puts.append(call)

    monkeypatch.setattr("verl.trainer.ppo.v1.agent_loop_tq.tq.async_kv_batch_put", put)
    monkeypatch.setattr("keytoken.verl_adapter.media.tq.async_kv_put", put)
    built = worker(processor)
    built.reward_loop_worker_handles, built.distillation_enabled = [scorer], False
    row = {
        "uid": "u",
        "session_id": 0,
        "global_steps": 3,
        "data_source": "test",
        "reward_model": {"ground_truth": "A"},
        "extra_info": {"problem_type": "multiple choice"},
    }
    asyncio.run(built._agent_loop_postprocess(output, validate, **row))
    return puts


def test_pixels_are_stored_once_and_before_any_answer(
    processor: Any, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = run_group(processor, Server([8, 9]), messages(clip), size=3)
    scorer = Scorer(processor, {"acc": 0.25})
    puts = [puts_of_worker(processor, monkeypatch, scorer, output) for output in outputs]
    (pixels, first), *others = puts
    assert pixels["key"] == "u" and list(pixels["fields"]) == ["pixel_values_videos"]
    assert pixels["fields"]["pixel_values_videos"].shape == (64, 3 * 2 * 14 * 14)
    assert [len(calls) for calls in others] == [1, 1]
    for (*_, answer), put in zip(puts, (64 * 3 * 2 * 14 * 14 * 4, 0, 0), strict=True):
        (row,) = answer["fields"]
        assert answer["partition_id"] == first["partition_id"] != pixels["partition_id"]
        assert row["multi_modal_inputs"].prompt == "u"
        assert row["extra_fields"][MEDIA_PUT_BYTES] == put


def test_pixels_of_a_validation_are_not_stored(
    processor: Any, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (output,) = run_group(processor, Server([8, 9]), messages(clip), size=1)
    (answer,) = puts_of_worker(processor, monkeypatch, Scorer(processor, {}), output, validate=True)
    (row,) = answer["fields"]
    assert row["extra_fields"][MEDIA_PUT_BYTES] == 0


@pytest.mark.parametrize("asked", [0, 1])
def test_of_a_shuffled_answer_only_the_accuracy_is_stored(
    processor: Any, clip: str, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    scorer = Scorer(processor, {"acc": 0.25})
    (output,) = run_group(processor, Server([8, 9]), messages(clip), size=1, shuffled_answers=asked)
    if asked:
        output._shuffled.response_ids = [9, 8]
    call = stored_by_worker(processor, monkeypatch, scorer, output)
    texts = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in ([9, 8], [8, 9])]
    assert scorer.seen == texts[1 - asked :]
    assert call["keys"] == ["u_0_0"]
    fields = call["fields"]
    assert fields["responses"][0].tolist() == [8, 9]
    assert fields["rm_scores"][0].tolist() == [0.0, 1.0 + asked]
    (extra,) = fields["extra_fields"]
    assert extra.get("shuffled_accuracy") == (0.25 if asked else None)
    assert extra["reward_extra_info"] == {"acc": 0.25, "score": 1.0 + asked}


def test_a_reward_without_accuracy_ends_the_run(
    processor: Any, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (output,) = run_group(processor, Server([8, 9]), messages(clip), size=1, shuffled_answers=1)
    with pytest.raises(ConfigurationError, match=r"no acc but \['score'\]"):
        stored_by_worker(processor, monkeypatch, Scorer(processor, {}), output)


def test_b3_request_carries_the_clips_metadata(processor: Any, clip: str) -> None:
    server = Server([8])
    run_group(processor, server, messages(clip), size=1)
    (request,) = server.requests
    ((frames, metadata),) = request["video_data"]
    assert frames.shape == (8, 3, 56, 56)
    assert request["mm_processor_kwargs"] == {"video_metadata": [metadata], "do_sample_frames": False}
    assert metadata["fps"] == 2.0
    assert metadata["frames_indices"] == list(range(8))


def test_trainer_gets_what_the_processor_makes_of_the_same_frames(processor: Any, clip: str) -> None:
    server = Server([8, 9])
    (output,) = run_group(processor, server, messages(clip), size=1)
    ids = torch.tensor(output.prompt_ids + output.response_ids)
    mine = output._media.features
    stored = worker(processor)._compute_multi_modal_inputs(output, ids)
    assert (stored.prompt, stored.keys()) == ("u", mine.keys())
    assert stored["video_grid_thw"] is mine["video_grid_thw"]
    stock_output = AgentLoopOutput(
        prompt_ids=output.prompt_ids,
        response_ids=output.response_ids,
        response_mask=output.response_mask,
        metrics=output.metrics,
        multi_modal_data={"videos": server.requests[0]["video_data"]},
    )
    stock = worker(processor)._compute_multi_modal_inputs(stock_output, ids)
    stock.pop("mm_token_type_ids")
    assert mine.keys() == stock.keys()
    assert all(torch.equal(mine[name], stock[name]) for name in stock)
    assert float(mine["second_per_grid_ts"][0]) == 1.0  # two frames to a patch, two frames a second
    assert (ids == processor.video_token_id).sum() == mine["video_grid_thw"].prod() // 4


def test_text_prompt_has_no_features(processor: Any) -> None:
    server = Server([8])
    (output,) = run_group(processor, server, messages(None), size=1)
    assert worker(processor)._compute_multi_modal_inputs(output, torch.tensor([8])) == {}
    assert server.requests[0]["video_data"] is None
    assert not server.requests[0]["mm_processor_kwargs"]
    rows = worker(processor)._compute_position_ids(torch.tensor([[5, 6]]), torch.ones(1, 2), {})
    assert rows.tolist() == [[[0, 1]] * 4]


def test_answer_with_a_vision_token_is_cut_and_counted(processor: Any, clip: str) -> None:
    video, end = processor.video_token_id, processor.tokenizer.eos_token_id
    (output,) = run_group(processor, Server([8, video, 9, video]), messages(clip), size=1)
    assert output.response_ids == [8, end]
    assert output.response_mask == [1, 0]
    assert output.response_logprobs == [-1.0, 0.0]
    assert output.extra_fields[ANSWER_VISION_TOKENS] == 2
    ids = torch.tensor([output.prompt_ids + output.response_ids])
    features = worker(processor)._compute_multi_modal_inputs(output, ids[0])
    assert worker(processor)._compute_position_ids(ids, torch.ones_like(ids), features).shape == (
        1,
        4,
        ids.shape[1],
    )


def test_stored_fields_are_verls(processor: Any, clip: str) -> None:
    """Pixels travel as ``multi_modal_inputs``, never a second time inside the output."""
    (output,) = run_group(processor, Server([8, 9]), messages(clip), size=1)
    stored = output.as_dict()
    assert "_media" not in stored
    assert {"prompts", "responses", "response_mask", "rollout_log_probs", "extra_fields"} <= stored.keys()


@pytest.mark.parametrize(
    ("answer", "ids", "mask"),
    [
        ([5, 6, 7], [5, 6, 7], [1, 1, 1]),
        ([5, 9, 7], [5, 2], [1, 0]),
        ([9, 5], [2], [0]),
        ([5, 8], [5, 2], [1, 0]),
        ([], [], []),
    ],
)
def test_cut(answer: list[int], ids: list[int], mask: list[int]) -> None:
    assert cut_at_vision_token(answer, [8, 9], end_token_id=2) == (ids, mask)


def test_seed_depends_on_each_of_its_parts() -> None:
    base = (1, 2, 3, 4, [5, 6])
    changed = [
        (0, 2, 3, 4, [5, 6]),
        (1, 0, 3, 4, [5, 6]),
        (1, 2, 0, 4, [5, 6]),
        (1, 2, 3, 0, [5, 6]),
        (1, 2, 3, 4, [56]),
    ]
    seeds = {answer_seed(*parts) for parts in [base, *changed]}
    assert len(seeds) == 6
    assert answer_seed(*base) == answer_seed(*base) == 3372749792037131033
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_second_resize_is_refused(processor: Any) -> None:
    frames = torch.zeros(4, 3, 112, 112, dtype=torch.uint8)
    with pytest.raises(ConfigurationError, match=r"\(112, 112\) pixels were resized to \(56, 56\)"):
        require_one_resize([(frames, {})], torch.tensor([[2, 4, 4]]), processor.video_processor)
    require_one_resize([(frames, {})], torch.tensor([[2, 8, 8]]), processor.video_processor)
    assert SamplingContract(**CONTRACT).patch_size == processor.video_processor.patch_size


def test_failures_in_a_row_end_the_run() -> None:
    watch = FailureWatch()
    for answer in range(8):  # one prompt with all its answers is one failure
        watch.failed("a", RuntimeError(f"engine {answer}"))
    watch.raise_if_hopeless()
    watch.failed("b", RuntimeError("engine"))
    watch.succeeded()
    watch.failed("c", RuntimeError("engine"))
    watch.failed("d", RuntimeError("engine"))
    watch.raise_if_hopeless()
    watch.failed("e", RuntimeError("the last one"))
    with pytest.raises(ClusterError, match=r"3 prompts in a row failed.*the last one"):
        watch.raise_if_hopeless()


def test_own_error_ends_the_run_at_once() -> None:
    watch = FailureWatch()
    watch.failed("a", ClipError("clip x: gone"))
    with pytest.raises(ClipError, match="clip x"):
        watch.raise_if_hopeless()


def test_an_engine_that_died_ends_the_run_at_once() -> None:
    watch = FailureWatch()
    watch.failed("a", ActorDiedError())
    with pytest.raises(ClusterError, match=r"process of the run died: .*last complete checkpoint"):
        watch.raise_if_hopeless()


def test_lost_clip_names_itself(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(ClipError, match=r"lost\.mp4"):
        run_group(processor, Server([8]), messages(str(tmp_path / "lost.mp4")), size=2)
