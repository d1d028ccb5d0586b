"""Bytes of a step through the data plane: ``python tests/verl_adapter/bench_media.py [PROMPTS [ANSWERS]]``.

A real TransferQueue with its own processes holds the answers of a step and hands them to the readers of a run
on three pools: the actor for its log-probs, the reference's and the update, the attribution group for its
passes. Once pixels are stored with each answer, as verl does, and once for each prompt. Counted are the bytes
of all messages to and from the queue, for clips with the most frames and pixels that a sampling contract
allows; that the pixels arrive unchanged is checked as well.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from torch import Tensor
from transfer_queue.utils.zmq_utils import ZMQMessage

from keytoken.data.contract import SamplingContract
from keytoken.verl_adapter import media
from keytoken.verl_adapter.compat import extract_multi_modal_inputs, tensordict_utils
from keytoken.verl_adapter.media import PromptMedia

# Calls of a step by the process that makes them, each of which reads all answers.
READERS = {"actor": ("old log-probs", "reference", "update"), "attribution": ("passes",)}
PATCH_VALUES = 3 * 2 * 14 * 14


class Wire:
    """Bytes of the messages that this process sends and receives."""

    def __init__(self) -> None:
        self.sent = self.received = 0

    @contextmanager
    def counted(self) -> Iterator[Wire]:
        serialize, deserialize = ZMQMessage.serialize, ZMQMessage.deserialize

        def counting_serialize(message: ZMQMessage) -> list:
            frames = serialize(message)
            self.sent += sum(memoryview(frame).nbytes for frame in frames)
            return frames

        def counting_deserialize(frames: list) -> ZMQMessage:
            self.received += sum(memoryview(frame).nbytes for frame in frames)
            return deserialize(frames)

        ZMQMessage.serialize, ZMQMessage.deserialize = counting_serialize, staticmethod(counting_deserialize)
        try:
            yield self
        finally:
            ZMQMessage.serialize, ZMQMessage.deserialize = serialize, deserialize


def features_of(contract: SamplingContract, seed: int) -> dict[str, Tensor]:
    """The features of a clip with the most frames and pixels of a contract; the values are noise."""
    grids, patches = contract.max_frames // 2, contract.max_pixels // 14**2
    random = torch.Generator().manual_seed(seed)
    return {
        "pixel_values_videos": torch.randn(grids * patches, PATCH_VALUES, generator=random),
        "video_grid_thw": torch.tensor([[grids, 1, patches]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }


def store(prompt: str, made: dict[str, Tensor], num_answers: int, ours: bool) -> None:
    shared, ids = PromptMedia(prompt, made), torch.arange(200)
    if ours:
        asyncio.run(shared.store())
    row = {
        "input_ids": ids,
        "responses": ids[:50],
        "position_ids": ids.expand(4, -1).contiguous(),
        "uid": prompt,
    }
    carried: Mapping[str, Tensor] = shared.reference() if ours else made
    for number in range(num_answers):  # one message for each answer, as verl sends them
        tq.kv_batch_put(
            keys=[f"{prompt}_{number}_0"],
            partition_id="train",
            fields=tensordict_utils.list_of_dict_to_tensordict([row | {"multi_modal_inputs": carried}]),
            tags=[{"status": "success"}],
        )


def step(prompts: Mapping[str, dict[str, Tensor]], num_answers: int, ours: bool) -> tuple[Wire, Wire, float]:
    """One step; what was put, what was got, and the seconds it took."""
    start, put, got = time.perf_counter(), Wire(), Wire()
    with put.counted():
        for prompt, made in prompts.items():
            store(prompt, made, num_answers, ours)
    keys = [f"{prompt}_{number}_0" for prompt in prompts for number in range(num_answers)]
    for calls in READERS.values():
        for _ in calls:
            with got.counted():
                data = tq.kv_batch_get(keys, "train")
                seen = extract_multi_modal_inputs(data.get("multi_modal_inputs")[:num_answers])
            first = next(iter(prompts.values()))["pixel_values_videos"]
            assert torch.equal(seen["pixel_values_videos"], first.repeat(num_answers, 1))
            with got.counted():
                for row in data.get("multi_modal_inputs"):
                    assert row.data["pixel_values_videos"].shape == first.shape
        media.release_media()  # another process has fetched nothing yet
    seconds = time.perf_counter() - start
    tq.kv_clear(keys, "train")
    media.clear_finished()
    return put, got, seconds


def main(num_prompts: int = 16, num_answers: int = 8) -> None:
    torch.set_num_threads(1)
    media.set_media_cache(64.0)
    print(f"{num_prompts} prompts x {num_answers} answers; MB put / MB got / seconds")
    for name in ("demo", "video_r1_16f"):
        made = [features_of(SamplingContract.preset(name), seed) for seed in range(num_prompts)]
        prompts = {f"{number:07d}": clip for number, clip in enumerate(made)}
        rows = {way: step(prompts, num_answers, way == "once") for way in ("each", "once")}
        for way, (put, got, seconds) in rows.items():
            print(f"{name:<14} {way:<5} {put.sent / 1e6:10.1f} {got.received / 1e6:10.1f} {seconds:8.2f}")
        (put, got, _), (our_put, our_got, _) = rows.values()
        print(f"{name:<14} ratio {put.sent / our_put.sent:10.1f} {got.received / our_got.received:10.1f}")


@contextmanager
def queue() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="kt-", dir="/tmp")  # a socket's path may not exceed 107 characters
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    try:
        yield
    finally:
        tq.close()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    with queue():
        main(*map(int, sys.argv[1:]))
