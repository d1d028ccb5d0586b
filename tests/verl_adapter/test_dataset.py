"""The dataset: clips through the contract, unusable rows set aside with their reasons."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from transformers import AutoTokenizer

from keytoken.data.cache import store as cache_module
from keytoken.data.clips import Clip, read_clip
from keytoken.data.contract import SamplingContract
from keytoken.demo.render import write_clip
from keytoken.errors import ConfigurationError, DataError
from keytoken.verl_adapter import dataset as dataset_module
from keytoken.verl_adapter.compat import RLHFDataset
from keytoken.verl_adapter.dataset import VideoDataset, counting_reads, sampling_contract

CONTRACT = {"fps": 2.0, "min_frames": 4, "max_frames": 8, "min_pixels": 3136, "max_pixels": 3136}


@pytest.fixture
def clip(tmp_path: Path) -> str:
    path = tmp_path / "clip.mp4"
    write_clip(path, torch.randint(0, 255, (8, 56, 56, 3), dtype=torch.uint8).numpy())
    return str(path)


def row(text: str, index: int = 0, *, video: Any = None, image: str | None = None) -> dict[str, Any]:
    marks = "<video>" * (video is not None) + "<image>" * (image is not None)
    return {
        "data_source": "test",
        "prompt": [{"role": "user", "content": marks + text}],
        "videos": []
        if video is None
        else [{"video": video, "fps": None} if isinstance(video, str) else video],
        "images": [] if image is None else [{"image": image}],
        "extra_info": {"index": index},
    }


def settings(folder: Path, **changes: Any) -> DictConfig:
    return OmegaConf.create(
        {
            "max_prompt_length": 64,
            "sampling_contract": CONTRACT,
            "quarantine_file": str(folder / "run" / "quarantine.jsonl"),
            "cache_dir": str(folder / "cache"),
            **changes,
        }
    )


def open_dataset(processor: Any, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> VideoDataset:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return VideoDataset(str(path), processor.tokenizer, settings(folder, **changes), processor)


def test_unusable_rows_are_set_aside_with_their_reasons(processor: Any, tmp_path: Path, clip: str) -> None:
    empty, cut, no_image = tmp_path / "empty.mp4", tmp_path / "cut.mp4", tmp_path / "broken.png"
    empty.touch()
    cut.write_bytes(Path(clip).read_bytes()[:200])
    no_image.write_bytes(b"not an image")
    rows = [
        row("A B", 0, video={"video": clip, "fps": 2.0}),
        row("A B", 1, video=str(tmp_path / "missing.mp4")),
        row("A B", 2, video=str(empty)),
        row("A B", 3, video=str(cut)),
        row("A B", 4, image=str(no_image)),
        row("A " * 100, 5),
        row("A B", 6),
    ]
    dataset = open_dataset(processor, tmp_path, rows)
    assert [dataset[number]["index"] for number in range(len(dataset))] == [0, 6]
    listed = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {entry["row"]: entry["reason"] for entry in listed}
    assert sorted(reasons) == [1, 2, 3, 4, 5]
    for number, part in {1: "missing.mp4", 2: "empty", 3: "cut.mp4", 4: "image", 5: "64"}.items():
        assert part in reasons[number]
    assert len(dataset.quarantined) == 5


def test_list_of_another_dataset_is_kept(processor: Any, tmp_path: Path) -> None:
    target = tmp_path / "run" / "quarantine.jsonl"
    target.parent.mkdir()
    other = json.dumps({"dataset": "other", "row": 1, "path": "x", "reason": "y"})
    target.write_text(other + "\n")
    rows = [row("A"), row("A " * 100, 1)]
    for _ in range(2):  # opening the same files again replaces their entries
        open_dataset(processor, tmp_path, rows)
        lines = target.read_text().splitlines()
        assert lines[0] == other
        assert [json.loads(line)["row"] for line in lines] == [1, 1]


def test_nothing_left_is_an_error(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 1 rows.*quarantine\.jsonl"):
        open_dataset(processor, tmp_path, [row("A", video=str(tmp_path / "missing.mp4"))])


def test_length_is_what_the_processor_makes(processor: Any, tmp_path: Path, clip: str) -> None:
    from verl.utils.tokenizer import build_multimodal_processor_inputs

    picture = tmp_path / "picture.png"
    Image.new("RGB", (112, 84)).save(picture)
    text = "which way ? A up B down"
    examples = [
        row(text, 0, video=clip),
        row(text, 1, image=str(picture)),
        row(text, 2, video=clip, image=str(picture)),
        row(text, 3),
    ]
    dataset = open_dataset(processor, tmp_path, examples, max_prompt_length=512)
    # The tiny processor would shrink the picture; a real one has these bounds.
    limits = {"images_kwargs": {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}}
    lengths = []
    for number in range(4):
        messages = dataset[number]["raw_prompt"]
        images, videos, _ = VideoDataset._process_multi_modal_info(messages, 14, dataset.config)
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = build_multimodal_processor_inputs(
            processor, text=[prompt], images=images, videos=videos, mm_processor_kwargs=limits
        )
        lengths.append(dataset._prompt_length(messages, sampling_contract(dataset.config, 14), {}))
        assert lengths[-1] == inputs["input_ids"].shape[1]
    assert len(set(lengths)) == 4


def test_frames_are_the_contracts(tmp_path: Path, clip: str) -> None:
    messages = [{"role": "user", "content": [{"type": "video", "video": f"file://{clip}"}]}]
    config = settings(tmp_path)
    images, videos, audio = asyncio.run(VideoDataset.process_multi_modal_info(messages, 14, config))
    expected = read_clip(clip, SamplingContract(**CONTRACT))
    assert images is None
    assert audio is None
    assert torch.equal(videos[0][0], expected.frames)
    assert videos[0][1] == expected.metadata()
    older = asyncio.run(VideoDataset.process_vision_info(messages, 14, config))
    assert torch.equal(older[1][0][0], expected.frames)


def test_row_that_contradicts_the_contract_is_refused(processor: Any, tmp_path: Path, clip: str) -> None:
    with pytest.raises(ConfigurationError, match=r"clip\.mp4.*fps=4\.0.*fps=2\.0"):
        open_dataset(processor, tmp_path, [row("A", video={"video": clip, "fps": 4.0})])


def test_a_row_may_show_a_part_of_a_clip(processor: Any, tmp_path: Path, clip: str) -> None:
    """Eight frames, two a second: the whole clip, frames 2 to 5, and a part that the clip does not have."""
    parts = [{}, {"video_start": 1.0, "video_end": 2.5}, {"video_start": 5.0, "video_end": 6.0}]
    rows = [row("A B", index, video={"video": clip, **part}) for index, part in enumerate(parts)]
    for cache in (None, str(tmp_path / "frames")):
        dataset = open_dataset(processor, tmp_path, rows, frame_cache=cache)
        (refused,) = dataset.quarantined
        assert refused.row == 2 and "starts at 5 s, after the last frame" in refused.reason
        assert refused.path == f"{clip} (5 s to 6 s)"
        whole, part = (
            VideoDataset._process_multi_modal_info(dataset[number]["raw_prompt"], 14, dataset.config)[1][0]
            for number in (0, 1)
        )
        assert torch.equal(part[0], whole[0][2:6])
        assert part[1]["frames_indices"] == [2, 3, 4, 5] and part[1]["total_num_frames"] == 4
    contract = sampling_contract(dataset.config, 14)
    lengths = [dataset._prompt_length(dataset[n]["raw_prompt"], contract, {}) for n in (0, 1)]
    assert lengths[0] - lengths[1] == 2 * 2 * 2


def test_contract_must_be_given_and_known(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="sampling_contract is not set"):
        open_dataset(processor, tmp_path, [row("A")], sampling_contract=None)
    with pytest.raises(ConfigurationError, match="frames_per_second"):
        open_dataset(processor, tmp_path, [row("A")], sampling_contract={"frames_per_second": 2})


def test_text_model_needs_no_processor(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row("A"), row("A " * 100, 1)]), path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    dataset = VideoDataset(str(path), tokenizer, settings(tmp_path), None)
    assert isinstance(dataset, RLHFDataset)
    assert [entry.row for entry in dataset.quarantined] == [1]


@pytest.mark.parametrize("cached", [False, True], ids=["without a cache", "with a cache"])
def test_a_clip_is_decoded_when_the_dataset_is_opened_and_then_not_for_its_length(
    processor: Any, tmp_path: Path, clip: str, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening decodes in a child only, which is not counted here. With a cache nobody decodes again."""
    here: list[str] = []

    def read(path: str, contract: SamplingContract) -> Clip:
        here.append(path)
        return read_clip(path, contract)

    monkeypatch.setattr(dataset_module, "read_clip", read)
    monkeypatch.setattr(cache_module, "read_clip", read)
    folder = str(tmp_path / "frames") if cached else None
    rows = [row("A B", 0, video=clip), row("B A", 1, video=clip)]
    dataset = open_dataset(processor, tmp_path, rows, frame_cache=folder)
    assert len(dataset) == 2
    assert here == []
    with counting_reads() as counts:
        _, videos, _ = asyncio.run(
            VideoDataset.process_multi_modal_info(dataset[0]["raw_prompt"], 14, dataset.config)
        )
    assert (counts.decodes, counts.hits) == ((0, 1) if cached else (1, 0))
    assert here == ([] if cached else [clip])
    assert torch.equal(videos[0][0], read_clip(clip, SamplingContract(**CONTRACT)).frames)
