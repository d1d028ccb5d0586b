"""Which prompts the parity gate asks, how it calls them, and how far answers may be apart."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from keytoken.data.part import named_clip
from keytoken.errors import ConfigurationError
from keytoken.parity import MEAN_GAPS, Bounds, bounds_for
from keytoken.schema import ParityConfig

# Rows that are searched for one of each kind; a data set of a hundred thousand is not read for it.
_SEARCHED = 1000
_NAMES = {
    **dict.fromkeys(("fp32", "float32", "float"), "float32"),
    **dict.fromkeys(("bf16", "bfloat16", "auto"), "bfloat16"),
    **dict.fromkeys(("fp16", "float16", "half"), "float16"),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt that the gate asks.

    Attributes:
        number: Its row among the usable rows of the training data.
        name: What messages call it.
        seed: Sampling seed of its answers; the engine knows the request by it.
    """

    number: int
    name: str
    seed: int


def choose_samples(dataset: Any, count: int, run_seed: int) -> list[Sample]:
    """The first rows of each kind (video, image, both, text), then those from the start.

    The same for every run on these files, so that a run that goes on asks what it asked before.

    Args:
        dataset: :class:`keytoken.verl_adapter.dataset.VideoDataset`.
        count: How many; fewer where the data have fewer rows.
        run_seed: Seed of the run.
    """
    first_of_kind: dict[tuple[bool, bool], int] = {}
    for number in range(min(len(dataset), _SEARCHED)):
        row = dataset.dataframe[number]
        kind = bool(row.get(dataset.video_key)), bool(row.get(dataset.image_key))
        first_of_kind.setdefault(kind, number)
    kinds = sorted(first_of_kind, reverse=True)  # videos first, text last
    kinds.sort(key=lambda kind: kind == (True, True))  # and one kind of media before both at once
    numbers = [first_of_kind[kind] for kind in kinds]
    numbers += [number for number in range(min(len(dataset), count)) if number not in numbers]
    return [
        Sample(number, row_name(number, dataset.dataframe[number], dataset), _seed(run_seed, number))
        for number in numbers[:count]
    ]


def row_name(number: int, row: Mapping[str, Any], dataset: Any) -> str:
    """What messages call a row: its number, the id of its prompt and its clips or images."""
    info = row.get("extra_info") or {}
    parts = [f"prompt {info['prompt_id']}"] if info.get("prompt_id") else []
    parts += [f"clip {named_clip(item)}" for item in row.get(dataset.video_key) or ()]
    parts += [f"image {_file(item)}" for item in row.get(dataset.image_key) or ()]
    return f"row {number} of the training data" + (f" [{', '.join(parts)}]" if parts else "")


def _file(item: Any) -> str:
    name = item.get("image") if isinstance(item, Mapping) else item
    return name if isinstance(name, str) else "in the row"


def _seed(run_seed: int, number: int) -> int:
    """63 bits, like those of answers."""
    digest = hashlib.blake2b(f"parity|{run_seed}|{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def gate_bounds(config: DictConfig, settings: ParityConfig) -> Bounds:
    """How far log-probs of engine and actor may be apart: by a given tolerance, or by the coarser precision.

    Raises:
        ConfigurationError: there is no bound for a precision of the run.
    """
    role = config.actor_rollout_ref
    mixed = role.actor.fsdp_config.get("mixed_precision") or {}
    given = {
        "actor_rollout_ref.rollout.dtype": str(role.rollout.dtype),
        "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": str(
            mixed.get("param_dtype", "bf16")
        ),
    }
    if role.rollout.get("quantization"):
        given["actor_rollout_ref.rollout.quantization"] = str(role.rollout.quantization)
    for key, name in given.items():
        if name not in _NAMES and settings.log_prob_tolerance is None:
            raise ConfigurationError(
                f"keytoken.parity has no bound for {key}={name}; set keytoken.parity.log_prob_tolerance, "
                "such as 0.1 nats, after a look at parity/log_prob_gap_mean of a first run."
            )
    known = [_NAMES[name] for name in given.values() if name in _NAMES]
    return bounds_for(max(known, key=MEAN_GAPS.__getitem__), settings.log_prob_tolerance)
