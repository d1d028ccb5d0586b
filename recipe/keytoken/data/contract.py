"""The sampling contract: how a clip becomes frames, written once and hashed.

Loader, rollout, trainer and evaluation read clips through the same contract, and its digest is saved
with checkpoints: log-probs from different engines can be compared only if both saw the same frames.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from keytoken.errors import ConfigurationError, DataError

_MAX_ASPECT_RATIO = 200  # Qwen2-VL refuses frames longer than this many times their width


@dataclass(frozen=True, kw_only=True)
class SamplingContract:
    """How many frames of a clip are taken and at which size.

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
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 16
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ConfigurationError(f"sampling contract: {name} is {value}; it must be positive")
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

    def digest(self) -> str:
        """Hex digest of all fields; equal contracts have equal digests on every machine."""
        fields = {name: float(value) for name, value in asdict(self).items()}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def select_frames(num_source_frames: int, source_fps: float, contract: SamplingContract) -> list[int]:
    """Choose the frames of a clip that the model sees.

    The rule of qwen_vl_utils: duration times ``contract.fps``, clamped to the contract's bounds and the
    clip's length, floored to a multiple of ``temporal_patch_size``, evenly spaced from the first frame
    to the last. Departure: a clip with fewer frames than one temporal patch is not refused; its last
    frame is repeated to fill that one patch, as the video processor would do.

    Args:
        num_source_frames: Frames in the file.
        source_fps: Average frame rate of the file.
        contract: The sampling contract.

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
        return [min(index, num_source_frames - 1) for index in range(step)]
    wanted = num_source_frames / source_fps * contract.fps
    wanted = min(max(wanted, contract.min_frames), contract.max_frames, num_source_frames)
    count = max(math.floor(wanted / step) * step, step)
    if count == 1:
        return [0]
    return [round(index * (num_source_frames - 1) / (count - 1)) for index in range(count)]


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
