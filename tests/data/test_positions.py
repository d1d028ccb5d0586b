"""The position rule against vLLM's own method, and against what makes generation consistent."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from keytoken.data.positions import mrope_positions
from keytoken.errors import DataError

IMAGE, VIDEO, TEXT = 7, 8, 1
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}


def _vllm_positions(ids: list[int], media: list[tuple], tokens_per_second: float) -> torch.Tensor:
    """vLLM's real method on plain feature objects; ``media`` holds (kind, offset, grid, seconds)."""
    pytest.importorskip("keytoken.demo")
    model = pytest.importorskip("vllm.model_executor.models.qwen2_5_vl").Qwen2_5_VLForConditionalGeneration
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=tokens_per_second)
    stand_in = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    stand_in.iter_mm_grid_thw = lambda features: model.iter_mm_grid_thw(stand_in, features)
    features = []
    for kind, offset, grid, seconds in media:
        data = {f"{kind}_grid_thw": SimpleNamespace(data=torch.tensor(grid))}
        if kind == "video":
            data["second_per_grid_ts"] = SimpleNamespace(data=torch.tensor(seconds, dtype=torch.float32))
        features.append(SimpleNamespace(modality=kind, data=data, mm_position=SimpleNamespace(offset=offset)))
    return model.get_mrope_input_positions(stand_in, ids, features)[0]


def _random_sequence(rng: np.random.Generator) -> tuple[list[int], list[tuple]]:
    ids: list[int] = []
    media = []
    for _ in range(int(rng.integers(0, 4))):
        ids += [TEXT] * int(rng.integers(1, 9))
        kind = str(rng.choice(["image", "video"]))
        frames = 1 if kind == "image" else int(rng.integers(1, 9))
        grid = (frames, 2 * int(rng.integers(1, 6)), 2 * int(rng.integers(1, 6)))
        media.append((kind, len(ids), grid, float(rng.choice([0.1, 0.3, 0.7, 2 / 24, 1.0, 2 / 3, 1.9]))))
        ids += [IMAGE if kind == "image" else VIDEO] * (int(np.prod(grid)) // 4)
    return ids + [TEXT] * int(rng.integers(1, 20)), media


@pytest.mark.parametrize("tokens_per_second", [2, 10, 25])
def test_equals_vllm(tokens_per_second: int) -> None:
    rng = np.random.default_rng(tokens_per_second)
    for _ in range(60):
        ids, media = _random_sequence(rng)
        ours = mrope_positions(
            ids,
            **IDS,
            image_grids=[grid for kind, _, grid, _ in media if kind == "image"],
            video_grids=[grid for kind, _, grid, _ in media if kind == "video"],
            seconds_per_grid=[seconds for kind, _, _, seconds in media if kind == "video"],
            tokens_per_second=tokens_per_second,
        )
        assert torch.equal(ours, _vllm_positions(ids, media, tokens_per_second))


def test_text_after_a_long_clip_continues_after_its_last_moment() -> None:
    """Worked by hand: 3 moments of 1 x 1 tokens, 4 positions apart, after 2 tokens of text."""
    ids = [TEXT, TEXT, VIDEO, VIDEO, VIDEO, TEXT, TEXT]
    positions = mrope_positions(
        ids, **IDS, video_grids=[(3, 2, 2)], seconds_per_grid=[2.0], tokens_per_second=2
    )
    assert positions.tolist() == [[0, 1, 2, 6, 10, 11, 12], [0, 1, 2, 2, 2, 11, 12], [0, 1, 2, 2, 2, 11, 12]]


def test_text_only_counts_up() -> None:
    assert torch.equal(mrope_positions([TEXT] * 5, **IDS, tokens_per_second=2), torch.arange(5).expand(3, 5))


def test_sampled_placeholders_count_as_text() -> None:
    prompt = [TEXT, VIDEO, VIDEO, TEXT]
    known = {"video_grids": [(2, 2, 2)], "seconds_per_grid": [1.0], "tokens_per_second": 2}
    plain = mrope_positions([*prompt, TEXT, TEXT, TEXT], **IDS, **known)
    hostile = mrope_positions([*prompt, VIDEO, IMAGE, VIDEO], **IDS, **known)
    assert torch.equal(plain, hostile)


def test_truncated_or_missing_placeholders_are_refused() -> None:
    known = {"video_grids": [(2, 2, 2)], "seconds_per_grid": [1.0], "tokens_per_second": 2}
    for ids in ([TEXT, VIDEO], [TEXT, VIDEO, TEXT, VIDEO], [TEXT, TEXT]):
        with pytest.raises(DataError, match="placeholder"):
            mrope_positions(ids, **IDS, **known)
    with pytest.raises(DataError, match="seconds_per_grid"):
        mrope_positions([VIDEO], **IDS, video_grids=[(1, 2, 2)], tokens_per_second=2)
