"""The sampling contract: how a clip becomes frames, written once and hashed.

Loader, rollout, trainer and evaluation read clips through the same contract, and it is saved with runs and
checkpoints: log-probs from different engines can be compared only if both saw the same frames.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from keytoken.block import unknown_name
from keytoken.errors import ConfigurationError, DataError

DECODERS = ("auto", "torchcodec", "decord", "pyav")
CONTRACT_FILE = "sampling_contract.json"  # beside a run and in each of its checkpoints
PRESETS = "sampling"  # the folder of the package keytoken_configs with the named contracts

_MAX_ASPECT_RATIO = 200  # Qwen2-VL refuses frames longer than this many times their width


@dataclass(frozen=True, kw_only=True)
class SamplingContract:
    """How many frames of a clip are taken, at which size, and who decodes them.

    Example: a clip of 10 s at 30 fps under ``fps=2, min_frames=4, max_frames=16`` gives 16 of its 300
    frames (20 wanted, 16 allowed), spread evenly from the first to the last.

    Attributes:
        fps: Frames taken per second of clip.
        min_frames: Fewest frames taken, if the clip has them.
        max_frames: Most frames taken.
        min_pixels: Smallest area of a frame; smaller ones are enlarged.
        max_pixels: Largest area of a frame; larger ones are reduced.
        patch_size: Edge of a vision patch in pixels.
        merge_size: Patches merged along each spatial axis into one vision token.
        temporal_patch_size: Frames merged into one patch; every frame count is a multiple of it.
        decoder: ``auto``, or the only one of :mod:`keytoken.data.decoders` that may read a video file.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 16
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    decoder: str = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is not str:
                _check_number(field.name, getattr(self, field.name), whole=field.type is int)
        if self.decoder not in DECODERS:
            raise ConfigurationError(
                unknown_name(f"decoder {self.decoder!r}", str(self.decoder), DECODERS, "decoders")
            )
        if self.max_frames < self.temporal_patch_size:
            raise ConfigurationError(
                f"sampling contract: max_frames {self.max_frames} is below temporal_patch_size "
                f"{self.temporal_patch_size}; raise max_frames"
            )
        for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
            if getattr(self, low) > getattr(self, high):
                raise ConfigurationError(
                    f"sampling contract: {low} {getattr(self, low)} exceeds {high} {getattr(self, high)}"
                )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: str = "sampling contract") -> "SamplingContract":
        """Build a contract from a plain mapping; fields that are left out have their defaults.

        Args:
            mapping: Fields and values.
            where: What the mapping is, for messages only.

        Raises:
            ConfigurationError: for an unknown field or a value that cannot be.
        """
        known = [field.name for field in fields(cls)]
        for key in mapping:
            if key not in known:
                raise ConfigurationError(unknown_name(f"key {where}.{key}", str(key), known, "keys"))
        return cls(**mapping)

    @classmethod
    def preset(cls, name: str) -> "SamplingContract":
        """A contract by its name in the configuration group ``sampling``, such as ``eval_64f``.

        Raises:
            ConfigurationError: there is no preset of this name.
        """
        if name not in preset_names():
            raise ConfigurationError(unknown_name(f"preset sampling={name}", name, preset_names(), "presets"))
        text = _preset_folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        return cls.from_mapping(yaml.safe_load(text), where=f"{PRESETS}/{name}.yaml")

    def digest(self) -> str:
        """Hex digest of all fields; equal contracts have equal digests on every machine."""
        plain = {n: value if isinstance(value, str) else float(value) for n, value in asdict(self).items()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: "SamplingContract", own: str = "here", others: str = "there") -> list[str]:
        """What distinguishes two contracts, one sentence for each field; empty for equal ones.

        Args:
            other: The contract to compare with.
            own: Where this contract holds, such as "in this run".
            others: Where the other one holds.
        """
        pairs = zip(asdict(self).items(), asdict(other).values(), strict=True)
        return [f"{name} is {one} {own} and {two} {others}" for (name, one), two in pairs if one != two]

    def write(self, path: Path) -> None:
        """Save as JSON: fields and digest. The file appears under its name only when it is complete."""
        content = {"digest": self.digest(), "fields": asdict(self)}
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> "SamplingContract":
        """Load what :meth:`write` saved.

        Raises:
            DataError: the file is no such file, or its digest is not that of its fields.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            contract, digest = cls.from_mapping(content["fields"], where=str(path)), content["digest"]
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise DataError(
                f"{path}: no sampling contract ({type(problem).__name__}: {problem}); "
                "it was changed or cut short, restore it or start from another checkpoint"
            ) from problem
        if digest != contract.digest():
            raise DataError(
                f"{path}: the digest {digest} is not that of its fields, {contract.digest()}; it was changed "
                "by hand or written by another version of KeyToken. Restore it"
            )
        return contract


def preset_names() -> list[str]:
    """Names of the contracts in the configuration group ``sampling``."""
    return sorted(file.name[:-5] for file in _preset_folder().iterdir() if file.name.endswith(".yaml"))


def _preset_folder() -> Any:
    return resources.files("keytoken_configs").joinpath(PRESETS)


def _check_number(name: str, value: Any, whole: bool) -> None:
    kind = "whole number" if whole else "number"
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not (right and math.isfinite(value) and value > 0):
        raise ConfigurationError(f"sampling contract: {name} is {value!r}; it must be a positive {kind}")


def select_frames(
    num_source_frames: int, source_fps: float, contract: SamplingContract, first: int = 0
) -> list[int]:
    """Choose the frames of a clip that the model sees.

    The rule of qwen_vl_utils: duration times ``contract.fps``, clamped to the contract's bounds and the
    clip's length, floored to a multiple of ``temporal_patch_size``, evenly spaced from the first frame
    to the last. Departure: a clip with fewer frames than one temporal patch is not refused; its last
    frame is repeated to fill that one patch, as the video processor would do.

    Args:
        num_source_frames: Frames in the file, or in the part of it that is shown.
        source_fps: Average frame rate of the file.
        contract: The sampling contract.
        first: Number of the first of these frames.

    Returns:
        Frame numbers in ascending order; their count is a multiple of ``temporal_patch_size``.

    Raises:
        DataError: If the clip has no frames or no frame rate.
    """
    if num_source_frames < 1:
        raise DataError(f"a clip with {num_source_frames} frames has nothing to select")
    if not (math.isfinite(source_fps) and source_fps > 0):
        raise DataError(f"a clip with frame rate {source_fps} cannot be sampled by time; re-encode it")
    step = contract.temporal_patch_size
    if num_source_frames < step:
        return [first + min(index, num_source_frames - 1) for index in range(step)]
    wanted = num_source_frames / source_fps * contract.fps
    wanted = min(max(wanted, contract.min_frames), contract.max_frames, num_source_frames)
    count = max(math.floor(wanted / step) * step, step)
    if count == 1:
        return [first]
    return [round(first + index * (num_source_frames - 1) / (count - 1)) for index in range(count)]


def resized_shape(height: int, width: int, contract: SamplingContract) -> tuple[int, int]:
    """Frame size after resizing: multiples of patch x merge, area within the contract's bounds.

    The rule of Qwen2-VL's ``smart_resize``, so a frame resized here is left alone by the processor.

    Args:
        height: Height of the decoded frame in pixels.
        width: Width of the decoded frame in pixels.
        contract: The sampling contract.

    Returns:
        Height and width in pixels.

    Raises:
        DataError: If the frame is empty or its aspect ratio is beyond 200.
    """
    if min(height, width) < 1 or max(height, width) / min(height, width) > _MAX_ASPECT_RATIO:
        raise DataError(f"frames of {height}x{width} pixels are empty or too elongated for Qwen2-VL")
    factor = contract.patch_size * contract.merge_size
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > contract.max_pixels:
        shrink = math.sqrt(height * width / contract.max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < contract.min_pixels:
        grow = math.sqrt(contract.min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width
