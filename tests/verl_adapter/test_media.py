"""Media of a prompt: once through a real TransferQueue, to all who read its answers; gone with it."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta

from keytoken.errors import ClusterError
from keytoken.verl_adapter import media
from keytoken.verl_adapter.compat import ReplayBuffer, extract_multi_modal_inputs, tensordict_utils
from keytoken.verl_adapter.media import MediaReference, PixelCache, PromptMedia
from keytoken.workers.rows import rows_of

pytestmark = pytest.mark.e2e  # starts Ray


@pytest.fixture(scope="module")
def queue(started_queue: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
    with started_queue(num_cpus=2):
        yield


@pytest.fixture
def empty(queue: None) -> Iterator[None]:
    media.set_media_cache(1.0)
    yield
    media.release_media()
    for partition, held in tq.kv_list().items():
        if held:
            tq.kv_clear(list(held), partition)


def features(*kinds: str, patches: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """What Qwen2.5-VL's processor makes of a video, of an image, or of both."""
    random = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    if "video" in kinds:
        made["pixel_values_videos"] = torch.randn(patches, 6, generator=random)
        made["video_grid_thw"] = torch.tensor([[1, 4, patches // 4]])
        made["second_per_grid_ts"] = torch.tensor([1.0])
    if "image" in kinds:
        made["pixel_values"] = torch.randn(8, 6, generator=random)
        made["image_grid_thw"] = torch.tensor([[1, 2, 4]])
        made["images_seqlens"] = torch.tensor([8])
    return made


def register(*prompts: str) -> None:
    """As verl's trainer lists prompts before they are answered."""
    tags = [{"is_prompt": True, "status": "pending", "global_steps": 1} for _ in prompts]
    tq.kv_batch_put(keys=list(prompts), partition_id="train", tags=tags)


def replay_buffer(**filtering: Any) -> Any:
    """verl's, as its synchronous trainer has it."""
    return ReplayBuffer(
        trainer_mode="sync",
        trainer_config=OmegaConf.create(),
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs=OmegaConf.create(),
        poll_interval=0.01,
        **filtering,
    )


def answer(prompt: str, made: dict[str, Tensor], rewards: list[float]) -> int:
    """Answers as verl's agent loop stores them, one for each reward; returns the bytes of pixels put."""
    shared = PromptMedia(prompt, made)

    async def store() -> list[int]:
        return list(await asyncio.gather(*(shared.store() for _ in rewards)))

    counts = asyncio.run(store())
    rows = []
    for number, reward in enumerate(rewards):
        ids = torch.arange(3 + number)
        row = {"input_ids": ids, "responses": ids[1:], "position_ids": ids.expand(4, -1).contiguous()}
        rows.append(row | {"uid": prompt, "multi_modal_inputs": shared.reference()})
        rows[-1]["rm_scores"] = torch.tensor([0.0, reward])
    tq.kv_batch_put(
        keys=[f"{prompt}_{number}_0" for number in range(len(rows))],
        partition_id="train",
        fields=tensordict_utils.list_of_dict_to_tensordict(rows),
        tags=[{"status": "success"} for _ in rows],
    )
    tq.kv_put(key=prompt, partition_id="train", tag={"status": "finished"})
    return sum(counts)


def answers_to(*prompts: str) -> TensorDict:
    """The stored answers, as verl hands them to a worker."""
    keys = [key for key in tq.kv_list("train")["train"] if key.rsplit("_", 2)[0] in prompts and "_" in key]
    return tq.kv_batch_get(keys, "train")


def stored() -> set[str]:
    return set(tq.kv_list(media.PARTITION).get(media.PARTITION, {}))


def bytes_of(made: dict[str, Tensor]) -> int:
    return sum(value.nbytes for name, value in made.items() if name.startswith("pixel"))


@pytest.mark.parametrize("kinds", [("video",), ("image",), ("video", "image"), ()])
def test_the_model_gets_what_the_processor_made(empty: None, kinds: tuple[str, ...]) -> None:
    """Four answers: put once, fetched once, and as many copies in the model's batch as without references."""
    made = features(*kinds)
    assert answer("a", made, [0.0] * 4) == bytes_of(made)
    data = answers_to("a").to("cpu")
    seen = extract_multi_modal_inputs(data.get("multi_modal_inputs"))
    expected = extract_multi_modal_inputs([made] * 4)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    micro_batch = tensordict_utils.index_select_tensor_dict(data, [0, 2])
    again = extract_multi_modal_inputs(micro_batch.get("multi_modal_inputs"))
    assert all(torch.equal(again[name], torch.cat([made[name]] * 2)) for name in made)
    assert media.release_media() == bytes_of(made)


def test_each_prompt_is_fetched_once_in_a_step(empty: None) -> None:
    groups = {"a": features("video", seed=1), "b": features("image", seed=2), "c": {}}
    put = sum(answer(prompt, made, [0.0] * 3) for prompt, made in groups.items())
    assert put == sum(map(bytes_of, groups.values()))
    for _ in range(2):  # two steps
        for _ in range(3):  # log-probs, passes, an update
            for row in rows_of(answers_to(*groups)):
                assert row.media.keys() == groups[row.prompt].keys()
                assert all(torch.equal(row.media[name], made) for name, made in groups[row.prompt].items())
        assert media.release_media() == put


def test_grids_are_read_without_pixels(empty: None) -> None:
    answer("a", features("video", "image"), [0.0])
    (row,) = rows_of(answers_to("a"))
    assert row.media["video_grid_thw"].tolist() == [[1, 4, 4]]
    assert "pixel_values" in row.media and "audio" not in row.media and row.media.get("audio") is None
    assert len(row.media) == len(list(row.media)) == 6
    assert copy.deepcopy(row.media).keys() == pickle.loads(pickle.dumps(row.media)).keys() == row.media.keys()
    assert media.release_media() == 0


def test_a_small_cache_fetches_again(empty: None) -> None:
    made = features("video")
    answer("a", made, [0.0])
    answer("b", made, [0.0])
    media.set_media_cache(bytes_of(made) / 2**30)
    order = ("a", "a", "b", "a")
    for prompt in order:
        assert torch.equal(
            rows_of(answers_to(prompt))[0].media["pixel_values_videos"], made["pixel_values_videos"]
        )
    assert media.release_media() == 3 * bytes_of(made)


def test_media_go_with_their_prompt(empty: None) -> None:
    """verl's own buffer samples one group, drops one without signal and keeps the rest for the next step."""
    made = features("video")
    register("a", "b", "c", "d")
    for prompt, rewards in {"a": [0.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 0.0]}.items():
        answer(prompt, made, rewards)
    assert stored() == {"a", "b", "c"}
    assert media.clear_finished() == 3 * bytes_of(made)
    buffer = replay_buffer()
    batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=1)
    (trained,) = {key.split("_")[0] for key in batch.keys}
    assert trained in "abc" and stored() == {"a", "b", "c"}  # for as long as the step lasts
    kept = sorted({"a", "b", "c"} - {trained})
    assert media.clear_finished() == 2 * bytes_of(made)
    assert stored() == set(kept)
    buffer._sync_metadata_from_transfer_queue()
    buffer._clear_groups("train", {kept[0]})  # verl's way to drop a group: filtered, stale or failed
    assert media.clear_finished() == bytes_of(made)
    assert stored() == {kept[1]}


def test_a_step_may_end_while_pixels_are_put(empty: None) -> None:
    """TransferQueue lists a key before its values are there, and its tag comes after them."""
    register("a")
    tq.get_client().kv_retrieve_meta(["a"], media.PARTITION, create=True)
    assert media.clear_finished() == 0
    assert list(tq.kv_list(media.PARTITION)[media.PARTITION]) == ["a"]


def test_verl_filters_a_group_without_signal(empty: None) -> None:
    """With dynamic sampling verl drops the group of equal rewards, and what it did not need of the others."""
    made = features("video")
    rewards = {"a": [0.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 0.0]}
    register(*rewards)
    for prompt, given in rewards.items():
        answer(prompt, made, given)
    buffer = replay_buffer(
        refill_fn=lambda count: pytest.fail(f"asked for {count} more"),
        filter_groups_metric="reward",
        train_batch_size=1,
        gen_batch_size=1,
    )
    batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=1)
    assert metrics["training/filter_groups/evicted_samples"] == 1
    assert metrics["training/filter_groups/discarded_surplus_samples"] == 1
    assert isinstance(batch, KVBatchMeta) and len(batch.keys) == 2
    assert extract_multi_modal_inputs(answers_to("a", "c").get("multi_modal_inputs"))
    assert media.clear_finished() == 0
    assert stored() == set()


def test_pixels_of_waiting_prompts_outlive_a_restart(empty: None, tmp_path: Path) -> None:
    """The asynchronous modes save the queue with a checkpoint, answers and pixels for later steps in it."""
    groups = {"a": features("video", seed=1), "b": features("image", seed=2)}
    register(*groups)
    put = sum(answer(prompt, made, [0.0, 1.0]) for prompt, made in groups.items())
    tq.save_checkpoint(tmp_path / "queue")
    for partition, held in tq.kv_list().items():
        tq.kv_clear(list(held), partition)
    tq.load_checkpoint(tmp_path / "queue")
    for row in rows_of(answers_to(*groups)):
        assert all(torch.equal(row.media[name], made) for name, made in groups[row.prompt].items())
    assert media.clear_finished() == put


def test_pixels_that_are_gone_are_an_error_that_names_the_prompt(empty: None) -> None:
    answer("0000003-00001", features("video"), [0.0, 0.0])
    data = answers_to("0000003-00001")
    tq.kv_clear("0000003-00001", media.PARTITION)
    with pytest.raises(ClusterError, match=r"pixels of prompt 0000003-00001.*skip\.rollout_tq\.enable"):
        extract_multi_modal_inputs(data.get("multi_modal_inputs"))


def test_a_failed_put_fails_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    puts: list[str] = []

    async def put(key: str, **_: Any) -> None:
        puts.append(key)
        raise ConnectionError("no route")

    monkeypatch.setattr(media.tq, "async_kv_put", put)
    shared = PromptMedia("a", features("video"))

    async def store() -> list[Any]:
        return list(await asyncio.gather(*(shared.store() for _ in range(3)), return_exceptions=True))

    assert [type(result) for result in asyncio.run(store())] == [ConnectionError] * 3
    assert puts == ["a"]


def test_references_are_compared_by_identity() -> None:
    """A mapping compares its values, and these would be fetched."""
    one, other = (MediaReference("a", {}, ("pixel_values",)) for _ in range(2))
    assert one == one and one != other and len({one, other}) == 2


def test_cache_keeps_what_was_used_last_within_its_bytes() -> None:
    def pixels(kilobytes: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.zeros(kilobytes * 1024, dtype=torch.uint8)}

    fetched: list[str] = []

    def get(cache: PixelCache, prompt: str, kilobytes: int = 1) -> None:
        def fetch() -> dict[str, Tensor]:
            fetched.append(prompt)
            return pixels(kilobytes)

        assert cache.get(prompt, fetch)["pixel_values"].nbytes == kilobytes * 1024

    cache = PixelCache(2 * 1024)
    for prompt in "ababcab":
        get(cache, prompt)
    assert "".join(fetched) == "abcab"
    get(cache, "too large", 3)
    assert cache.release() == (5 + 3) * 1024
    assert cache.release() == 0
    fetched.clear()
    for prompt in "aa":
        get(PixelCache(0), prompt)
    assert fetched == ["a", "a"]
