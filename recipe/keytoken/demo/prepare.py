"""Prepares everything the demo trains on: clips, prompts, tokenizer, and the warm-started model.

The result depends on the configuration and on the source of the modules that make it; both are hashed
into the folder's name, so a changed world never meets an old cache. An interrupted preparation goes on
after its last finished part; a manifest, written last, marks a complete folder.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import keytoken.data.clips
import keytoken.data.contract
import keytoken.data.families
import keytoken.data.positions
import keytoken.data.timestamps
from keytoken.demo import batches, model, render, rows, tokenizer, warm_start, world
from keytoken.demo.sampling import sample_answers
from keytoken.demo.warm_start import WarmStartConfig
from keytoken.rewards.extract import extract_answer, has_format

CACHE_VARIABLE = "KEYTOKEN_CACHE"
_SOURCES = (
    world,
    render,
    tokenizer,
    model,
    batches,
    warm_start,
    rows,
    keytoken.data.clips,
    keytoken.data.contract,
    keytoken.data.families,
    keytoken.data.positions,
    keytoken.data.timestamps,
)
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "av")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What to prepare.

    Attributes:
        seed: Seed of everything: clips, questions, initial weights, warm start.
        num_train: Prompts to train on.
        num_heldout: Prompts to evaluate on.
        family: ``model_type`` of the model, a line of :data:`keytoken.data.families.FAMILIES`.
        warm_start: Sizes and rates of the supervised warm start.
    """

    seed: int = 0
    num_train: int = 840
    num_heldout: int = 280
    family: str = "qwen2_5_vl"
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)

    def digest(self) -> str:
        """Hex digest of the configuration and of the source that turns it into files."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for module in _SOURCES:
            assert module.__file__ is not None
            digest.update(Path(module.__file__).read_bytes())
        return digest.hexdigest()[:12]


@dataclass(frozen=True)
class DemoAssets:
    """Where the prepared files are.

    Attributes:
        root: The demo's folder.
        model_dir: Hugging Face folder with weights, tokenizer and processor.
        train_file: Parquet file of the training prompts.
        heldout_file: Parquet file of the held-out prompts.
        manifest: Configuration, versions, timings and warm-start accuracies.
    """

    root: Path
    model_dir: Path
    train_file: Path
    heldout_file: Path
    manifest: dict[str, Any]


def cache_root() -> Path:
    """Folder of all prepared demos: ``$KEYTOKEN_CACHE`` or ``~/.cache/keytoken``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "keytoken").expanduser().resolve()


def prepare(config: DemoConfig | None = None, *, root: Path | None = None) -> DemoAssets:
    """Prepare the demo, or find it prepared.

    Args:
        config: What to prepare.
        root: Folder to prepare it in; by default ``demo-<digest>`` below ``cache_root()``.

    Returns:
        The paths and the manifest.
    """
    config = config or DemoConfig()
    digest = config.digest()
    root = root.resolve() if root is not None else cache_root() / f"demo-{digest}"
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / ".lock"):
        manifest_file = root / "manifest.json"
        if manifest_file.exists():
            manifest = json.loads(manifest_file.read_text())
            if manifest["digest"] == digest:
                return _assets(root, manifest)
            _clear(root)
        started = time.monotonic()
        contract = tokenizer.CONTRACTS[config.family]
        rows.write_split(root, "train", config.num_train, seed=config.seed, contract=contract)
        rows.write_split(root, "heldout", config.num_heldout, seed=config.seed, contract=contract)
        clips_s = time.monotonic() - started
        training = _prepare_model(root / "model", config)
        manifest = {
            "digest": digest,
            "config": asdict(config),
            "contract": contract.digest(),
            "versions": {name: metadata.version(name) for name in _PACKAGES},
            "python": platform.python_version(),
            "clips_s": round(clips_s, 1),
            **training,
        }
        _write_json(manifest_file, manifest)
    return _assets(root, manifest)


def _prepare_model(model_dir: Path, config: DemoConfig) -> dict[str, Any]:
    """Warm-start the model and save it with its processor; returns timings, losses and accuracies."""
    with _one_thread():
        return _train_and_save(model_dir, config)


def _train_and_save(model_dir: Path, config: DemoConfig) -> dict[str, Any]:
    wall, cpu = time.monotonic(), time.process_time()
    family = config.family
    processor = tokenizer.build_processor(tokenizer.build_tokenizer(family), family)
    policy = model.build_model(processor.tokenizer, config.seed, family)
    encoder = batches.Encoder(processor, model.TOKENS_PER_SECOND)
    losses = warm_start.warm_start(policy, encoder, config.warm_start, config.seed)
    figures = {
        "warm_start_wall_s": round(time.monotonic() - wall, 1),
        "warm_start_cpu_s": round(time.process_time() - cpu, 1),
        "final_losses": {name: round(fmean(stage[-10:]), 4) for name, stage in losses.items() if stage},
        "greedy": heldout_accuracy(policy, encoder, config, temperature=0.0),
        "sampled": heldout_accuracy(policy, encoder, config, temperature=1.0),
    }
    partial = model_dir.with_name(f"model.{os.getpid()}.partial")
    policy.save_pretrained(partial)
    processor.save_pretrained(partial)
    tokenizer.CONTRACTS[family].write(partial / keytoken.data.contract.CONTRACT_FILE)
    if model_dir.exists():
        shutil.rmtree(model_dir)
    partial.rename(model_dir)
    return figures


def heldout_accuracy(
    policy: model.Model,
    encoder: batches.Encoder,
    config: DemoConfig,
    *,
    temperature: float,
) -> dict[str, float]:
    """Held-out accuracy of each family, of all, and the share of well-formed answers ("format")."""
    questions = [rows.split_question("heldout", index, config.seed) for index in range(config.num_heldout)]
    examples = [batches.clip_example(question, rng) for question, rng in questions]
    answers = sample_answers(policy, encoder, examples, temperature=temperature, seed=config.seed)
    correct: dict[str, list[bool]] = {"all": [], "format": []}
    for (question, _), answer in zip(questions, answers, strict=True):
        hit = extract_answer(answer) == question.letter
        correct["all"].append(hit)
        correct["format"].append(has_format(answer))
        correct.setdefault(question.family, []).append(hit)
    return {name: round(sum(hits) / len(hits), 4) for name, hits in correct.items() if hits}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, so that two runs do not prepare the same folder at once."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: tensors this small run no faster on two, and stall on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _clear(root: Path) -> None:
    """Remove what an earlier configuration left in a folder given by name."""
    for name in ("manifest.json", "train.parquet", "heldout.parquet"):
        (root / name).unlink(missing_ok=True)
    for name in ("clips", "model"):
        shutil.rmtree(root / name, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def _assets(root: Path, manifest: dict[str, Any]) -> DemoAssets:
    return DemoAssets(root, root / "model", root / "train.parquet", root / "heldout.parquet", manifest)
