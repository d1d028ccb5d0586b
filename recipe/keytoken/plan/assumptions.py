"""What a plan cannot know, each with its value and the reason for it; ``plan.KEY=VALUE`` changes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import yaml

from keytoken.block import unknown_name
from keytoken.errors import ConfigurationError

PREFIX = "plan."


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, by its data sheet.

    Attributes:
        memory_gib: Memory.
        tflops: Dense bf16 products, 10^12 a second; of the CPU float32.
        memory_tb_s: Bandwidth of its memory, 10^12 bytes a second.
        link_gb_s: To the others of its node, one direction, 10^9 bytes a second.
    """

    memory_gib: float
    tflops: float
    memory_tb_s: float
    link_gb_s: float


DEVICES = {
    "a100": Device(80.0, 312.0, 2.0, 300.0),
    "h100": Device(80.0, 989.0, 3.35, 450.0),
    "h200": Device(141.0, 989.0, 4.8, 450.0),
    "b200": Device(180.0, 2250.0, 8.0, 900.0),
    "cpu": Device(16.0, 0.06, 0.01, 5.0),  # one core of a server: an order of magnitude, no more
}


def _why(default: Any, reason: str) -> Any:
    return dataclasses.field(default=default, metadata={"why": reason})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """See :data:`DEVICES` for ``device``; every field's reason is in its metadata."""

    device: str = _why("h100", "80 GB, the smallest that such runs are usual on; cpu with platform=cpu")
    gpus_per_node: int = _why(8, "the usual node")
    clip_seconds: float = _why(30.0, "chosen; from 8 s on the 16 frames of the published runs are full")
    clip_fps: float = _why(30.0, "of most videos")
    clip_height: int = _why(720, "a video of 16:9; the contract bounds its area, so the shape matters little")
    clip_width: int = _why(1280, "as clip_height")
    text_tokens: int = _why(300, "chosen: instruction, question and options")
    answer_share: float = _why(
        0.47, "of data.max_response_length, on average: a public reproduction saw 351 to 368 of 768"
    )
    padding: float = _why(1.0, "computed over real tokens; above 1 where batches are padded and not packed")
    prefill_efficiency: float = _why(0.40, "of the device's peak; chosen, as forward_efficiency")
    forward_efficiency: float = _why(
        0.45, "of the peak; chosen: products alone reach 0.8, attention and small operations take the rest"
    )
    update_efficiency: float = _why(0.40, "of the peak; chosen: as forward, and gradients are reduced")
    decode_bandwidth: float = _why(0.60, "of the memory's bandwidth; chosen")
    decode_overhead_s: float = _why(
        0.004, "for each token of the longest answer: scheduler and launches; chosen"
    )
    network_gb_s: float = _why(50.0, "between nodes for each GPU: one adapter of 400 Gb/s")
    network_efficiency: float = _why(0.7, "of the links' rate in collectives; chosen")
    host_gb_s: float = _why(25.0, "between a GPU and its host's memory: the reference lies there; chosen")
    engine_reserve_gib: float = _why(4.0, "of each engine GPU for CUDA graphs and buffers; chosen")
    reserve_gib: float = _why(3.0, "of each GPU for CUDA, NCCL and fragments; chosen")
    decode_s: float = _why(
        0.3, "of one core for a clip; 16 frames of the test clips took 0.01 to 0.46 (docs/speed.md)"
    )
    storage_gb_s: float = _why(5.0, "of the disk that all nodes share, for a checkpoint; chosen")
    restart_s: float = _why(300.0, "from a failure to the first step after it; chosen")
    gpu_hours_to_failure: float = _why(
        50_000.0, "a published run of 16,384 GPUs had 419 unexpected stops in 54 days (Llama 3)"
    )
    step_overhead_s: float = _why(3.0, "polling of the replay buffer (2 s), rewards, selection; chosen")
    sync_overhead_s: float = _why(1.0, "of a weight sync: caches cleared, buckets announced; chosen")

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            name = f"device {PREFIX}device={self.device}"
            raise ConfigurationError(unknown_name(name, str(self.device), DEVICES, "devices"))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = field.type == "int"
            right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if field.name != "device" and not (right and value > 0):
                kind = "whole number" if whole else "number"
                raise ConfigurationError(f"{PREFIX}{field.name} is {value!r}; give it a positive {kind}.")

    @property
    def accelerator(self) -> Device:
        """The device that is assumed."""
        return DEVICES[self.device]


def split_words(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The run's own words, and the values of those that begin with ``plan.``.

    Raises:
        ConfigurationError: such a word without a value, or of an unknown name.
    """
    known = [field.name for field in dataclasses.fields(Assumptions)]
    own, given = [], {}
    for word in words:
        if not word.startswith(PREFIX):
            own.append(word)
            continue
        name, sign, text = word.removeprefix(PREFIX).partition("=")
        if name not in known:
            raise ConfigurationError(
                unknown_name(f"key {PREFIX}{name}", name, known, f"keys of {PREFIX[:-1]}")
            )
        value = yaml.safe_load(text) if sign else None
        if value is None:
            raise ConfigurationError(f"{word!r} has no value; write {PREFIX}{name}=VALUE.")
        given[name] = value
    return own, given
