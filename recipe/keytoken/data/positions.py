"""M-RoPE positions of Qwen2.5-VL sequences, by the rule of vLLM.

Each token has three positions (time, height, width). transformers and vLLM disagree on them for videos:
transformers 5.x (``modeling_qwen2_5_vl.py: get_rope_index``) truncates the seconds per temporal patch to
an integer and continues the text after a video at ``max(height, width)``; vLLM 0.27.1
(``qwen2_5_vl.py: get_mrope_input_positions``) keeps the fraction and continues after the largest of
all three. Sampling with one rule and training with the other costs more than a nat per token, so one
function serves the supervised warm start, the trainer and the attribution passes.
"""

from collections.abc import Sequence

import numpy as np
import torch

from keytoken.errors import DataError

Grid = tuple[int, int, int]


def mrope_positions(
    input_ids: Sequence[int],
    *,
    image_token_id: int,
    video_token_id: int,
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
    seconds_per_grid: Sequence[float] = (),
    tokens_per_second: float,
    merge_size: int = 2,
) -> torch.Tensor:
    """Positions of one unpadded sequence, prompt and answer together.

    Placeholder tokens beyond the given grids (a policy may sample them in its answer) count as text,
    as they do in vLLM, which places only the media of the prompt.

    Args:
        input_ids: L token ids, without padding.
        image_token_id: Id of the image placeholder.
        video_token_id: Id of the video placeholder.
        image_grids: (t, h, w) in patches, one for each image, in prompt order.
        video_grids: (t, h, w) in patches, one for each video, in prompt order.
        seconds_per_grid: Seconds between temporal patches, one for each video.
        tokens_per_second: ``vision_config.tokens_per_second``; temporal positions advance by
            ``seconds_per_grid * tokens_per_second``, truncated.
        merge_size: Patches merged along each spatial axis into one token.

    Returns:
        int64 positions [3, L]: time, height, width.

    Raises:
        DataError: If a grid has no placeholders in ``input_ids``, or not as many as it needs.
    """
    if len(video_grids) != len(seconds_per_grid):
        raise DataError(
            f"{len(video_grids)} video grids but {len(seconds_per_grid)} seconds_per_grid values; "
            "pass the processor's second_per_grid_ts"
        )
    ids = np.asarray(input_ids, dtype=np.int64)
    images, videos = list(image_grids), list(zip(video_grids, seconds_per_grid, strict=True))
    pieces: list[np.ndarray] = []
    start = 0  # first token without a position
    next_position = 0
    for offset in np.flatnonzero((ids == image_token_id) | (ids == video_token_id)):
        if offset < start:
            continue
        if ids[offset] == image_token_id and images:
            grid, seconds = images.pop(0), None
        elif ids[offset] == video_token_id and videos:
            grid, seconds = videos.pop(0)
        else:
            continue
        block = _grid_positions(grid, seconds, tokens_per_second, merge_size)
        end = int(offset) + block.shape[1]
        if not (ids[offset:end] == ids[offset]).all() or end > len(ids):
            raise DataError(
                f"grid {grid} needs {block.shape[1]} placeholder tokens from position {offset}, "
                "but the sequence has fewer; was the prompt truncated?"
            )
        pieces.append(_text_positions(int(offset) - start, next_position))
        next_position += int(offset) - start
        pieces.append(block + next_position)
        next_position = int(pieces[-1].max()) + 1
        start = end
    if images or videos:
        raise DataError(
            f"{len(images)} image and {len(videos)} video grids have no placeholder tokens in the sequence"
        )
    pieces.append(_text_positions(len(ids) - start, next_position))
    return torch.from_numpy(np.concatenate(pieces, axis=1))


def _text_positions(length: int, first: int) -> np.ndarray:
    return np.broadcast_to(np.arange(first, first + length), (3, length))


def _grid_positions(
    grid: Grid, seconds: float | None, tokens_per_second: float, merge_size: int
) -> np.ndarray:
    """Positions of one image or video relative to its first token, [3, t*h*w / merge^2]."""
    frames, height, width = (int(axis) for axis in grid)
    indices = np.indices((frames, height // merge_size, width // merge_size))
    if seconds is not None:
        # The processor hands seconds over as float32; truncating the float64 value can differ by one.
        step = float(np.float32(seconds)) * tokens_per_second
        indices[0] = (indices[0] * step).astype(np.int64)
    return indices.reshape(3, -1)
