"""Writes the demo's prompts in the schema of verl's RL dataset: parquet rows with paths to mp4 files."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from keytoken.data.contract import SamplingContract
from keytoken.data.verl_rows import row_schema
from keytoken.demo.render import draw_clip, write_clip
from keytoken.demo.world import FAMILIES, Question, make_question

DATA_SOURCE = "keytoken_demo"
_SPLIT_STREAMS = {"train": 11, "heldout": 12}  # keeps the splits' random streams apart

_SCHEMA = row_schema(
    video=[
        ("fps", pa.float64()),
        ("min_frames", pa.int64()),
        ("max_frames", pa.int64()),
        ("min_pixels", pa.int64()),
        ("max_pixels", pa.int64()),
    ],
    extra_info=[
        ("index", pa.int64()),
        ("split", pa.string()),
        ("prompt_id", pa.string()),
        ("family", pa.string()),
        ("problem_type", pa.string()),
        ("question", pa.string()),
        ("answer_word", pa.string()),
    ],
)


def split_question(split: str, index: int, seed: int) -> tuple[Question, np.random.Generator]:
    """Question ``index`` of a split, and the generator to draw its clip with; families take turns."""
    rng = np.random.default_rng([seed, _SPLIT_STREAMS[split], index])
    return make_question(FAMILIES[index % len(FAMILIES)], rng), rng


def question_row(
    question: Question, *, split: str, index: int, clip: Path | None, contract: SamplingContract
) -> dict[str, Any]:
    """One dataset row; ``clip`` is None for a text-only prompt."""
    videos = []
    if clip is not None:
        sampling = {name: getattr(contract, name) for name in ("min_frames", "max_frames")}
        sampling |= {name: getattr(contract, name) for name in ("min_pixels", "max_pixels")}
        videos.append({"video": str(clip), "fps": float(contract.fps), **sampling})
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": ("<video>" if clip else "") + question.prompt}],
        "videos": videos,
        "ability": question.family,
        "reward_model": {"style": "rule", "ground_truth": question.letter},
        "extra_info": {
            "index": index,
            "split": split,
            "prompt_id": f"{split}-{index:05d}",
            "family": question.family,
            "problem_type": "multiple choice",
            "question": question.prompt,
            "answer_word": question.answer,
        },
    }


def write_split(folder: Path, split: str, count: int, *, seed: int, contract: SamplingContract) -> Path:
    """Render a split's clips and write its parquet file; clips that exist already are kept.

    Args:
        folder: The demo's folder; clips go to ``clips/<split>`` below it.
        split: "train" or "heldout".
        count: Number of prompts.
        seed: Seed of the questions and the clips.
        contract: Sampling settings written into each row.

    Returns:
        Path of ``<split>.parquet``.
    """
    clips = folder / "clips" / split
    clips.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in tqdm(range(count), desc=f"clips: {split}", unit="clip", mininterval=1.0):
        question, rng = split_question(split, index, seed)
        path = clips / f"{index:05d}-{question.family}.mp4" if question.bodies else None
        if path is not None and not path.exists():
            write_clip(path, draw_clip(question.bodies, rng))
        rows.append(question_row(question, split=split, index=index, clip=path, contract=contract))
    target = folder / f"{split}.parquet"
    partial = target.with_suffix(f".{os.getpid()}.partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), partial)
    partial.replace(target)
    return target
