"""Warm starts of studies: the demo's three stages on the training part of a world, cached.

Rates, stages and examples are those of :mod:`keytoken.demo.warm_start`; the questions are a world's, without
the parameters that it keeps for the test. ``relabel_steps=0`` leaves the last stage out: a clean start, whose
sampled answers are about as often right as its greedy ones.

The folder's name has a digest of the configuration and of the sources that make it, so a changed world never
meets an old cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import keytoken.data.contract
import keytoken.data.positions
from keytoken.demo import batches, model, render, tokenizer, warm_start, world
from keytoken.demo.batches import Encoder, Example, clip_example, draw_batches
from keytoken.demo.prepare import cache_root
from keytoken.demo.warm_start import WarmStartConfig, relabelled, run_stage
from keytoken.demo.world import LETTERS
from keytoken.study import worlds
from keytoken.study.worlds import WORLDS, World

_STREAMS = {"text": 31, "clips": 32, "relabelled": 33}  # keeps the stages' random streams apart
_SOURCES = (
    *(world, render, tokenizer, model, batches, warm_start, worlds),
    *(keytoken.data.contract, keytoken.data.positions),
)
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """One warm start.

    Attributes:
        world: A key of :data:`keytoken.study.worlds.WORLDS`.
        config: Sizes and rates.
        seed: Seed of the initial weights and of all examples.
    """

    world: str
    config: WarmStartConfig
    seed: int

    def digest(self) -> str:
        """Hex digest of what makes it: values, sources, the version of torch."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        digest.update(f"{metadata.version('torch')} {metadata.version('transformers')}".encode())
        for path in (str(module.__file__) for module in _SOURCES):
            digest.update(Path(path).read_bytes())
        digest.update(Path(__file__).read_bytes())
        return digest.hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Where it lies, prepared or not."""
        return cache_root() / f"study-{self.world}-{self.digest()}"


def prepare(start: WarmStart) -> Path:
    """Train a warm start, or find it trained.

    Returns:
        Hugging Face folder with weights, tokenizer and processor, and a ``manifest.json``.
    """
    folder = start.folder
    if folder.exists():
        return folder
    wall, cpu = time.monotonic(), time.process_time()
    processor = tokenizer.build_processor(tokenizer.build_tokenizer())
    policy = model.build_model(processor.tokenizer, start.seed)
    losses = _train(policy, Encoder(processor, model.TOKENS_PER_SECOND), start)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    policy.save_pretrained(partial)
    processor.save_pretrained(partial)
    manifest = {
        **asdict(start),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "wall_s": round(time.monotonic() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "final_losses": {name: round(fmean(stage[-10:]), 4) for name, stage in losses.items() if stage},
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    if folder.exists():  # another process was quicker; both made the same
        shutil.rmtree(partial)
    else:
        partial.rename(folder)
    return folder


def _train(policy: Any, encoder: Encoder, start: WarmStart) -> dict[str, list[float]]:
    """The three stages, in place; losses of each stage in nats a token. See the demo's ``warm_start``."""
    config, known = start.config, WORLDS[start.world]
    share = config.relabel_share
    # The text stage ends at half its rate: the lookup is still growing there.
    stages: tuple[tuple[str, int, float, float, Callable[[np.random.Generator], Example]], ...] = (
        (
            "text",
            config.text_steps,
            config.text_lr,
            0.5,
            lambda rng: text_example(known, rng, config.drill_share),
        ),
        ("clips", config.clip_steps, config.clip_lr, 1.0, lambda rng: answered(known, rng, 0.0)),
        ("relabelled", config.relabel_steps, config.relabel_lr, 1.0, lambda rng: answered(known, rng, share)),
    )
    losses = {}
    for name, steps, lr, decay, draw in stages:
        if steps:
            batches = draw_batches(
                encoder, draw, stream=_STREAMS[name], steps=steps, size=config.batch_size, seed=start.seed
            )
            losses[name] = run_stage(policy, batches, steps=steps, lr=lr, name=name, decay=decay)
    policy.eval()
    return losses


def text_example(known: World, rng: np.random.Generator, drill_share: float) -> Example:
    """An example without a clip: an option listing, or a question with its caption in the prompt."""
    question = known.any_question(rng)
    if rng.random() >= drill_share:
        return Example(f"{question.caption} . {question.prompt}", question.response)
    pairs = [f"{question.options[i]} {LETTERS[i]}" for i in rng.permutation(len(LETTERS))]
    return Example(f"list {question.prompt}", f"<think> {' '.join(pairs)}")


def answered(known: World, rng: np.random.Generator, relabel_share: float) -> Example:
    """A question about a clip with its answer, or with one that names a uniformly drawn option."""
    question = known.any_question(rng)
    if rng.random() < relabel_share:
        return clip_example(question, rng, relabelled(question, rng))
    return clip_example(question, rng)
