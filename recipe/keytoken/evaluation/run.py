"""One evaluation from its options to its reports."""

import asyncio
import hashlib
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from keytoken.block import require
from keytoken.compose import compose_config
from keytoken.data.contract import SamplingContract
from keytoken.data.families import words_of_video
from keytoken.evaluation.frames import Frames, frames_of
from keytoken.evaluation.lookup import look_for_media
from keytoken.evaluation.options import EvaluateOptions
from keytoken.evaluation.report import write_reports
from keytoken.evaluation.rows import Job, plan
from keytoken.evaluation.sources import Source, read_source
from keytoken.evaluation.store import PredictionStore
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.benchmarks.base import Benchmark, question_text
from keytoken.scoring.items import Item, Prediction
from keytoken.scoring.predictions import VERSION
from keytoken.scoring.report import REPORT
from keytoken.verl_adapter.shims.hooks import on_cpu
from keytoken.words import number_of

TEXT_TOKENS = 2048  # room for the words of a question
_WEIGHTS = (".safetensors", ".bin")
_UNTAGGED = (
    "The prompts ask for no <answer> tags, and as in training nothing else is read. Where answers have none: "
    "keytoken score with variant=untagged on the predictions."
)
_NO_DOWNLOAD = (
    "Nothing is downloaded: give the folder of a model (with config.json) or a run of keytoken train."
)


def evaluate(options: EvaluateOptions, announce: Callable[[str], None]) -> Path:
    """Ask what has not been asked yet, and write the reports.

    Args:
        options: What to evaluate.
        announce: Prints a line.

    Returns:
        The folder with ``predictions.jsonl`` and the reports.

    Raises:
        KeyTokenError: what the user can mend: options, questions, media, model or machine.
    """
    benchmark = get_benchmark(options.benchmark)
    require(
        Path(options.model).expanduser().is_dir(), f"model={options.model}: no such folder. {_NO_DOWNLOAD}"
    )
    source = read_source(benchmark, options)
    model = _model_folder(Path(options.model).expanduser())
    frames = frames_of(options, benchmark.sampling, model, source.prepared)
    contract = frames.contract
    platform = options.platform or ("cpu" if on_cpu() else "gpu")
    rollout = compose_config(_rollout_words(options, platform)).actor_rollout_ref.rollout
    folder = _out_folder(options)
    header = _header(options, source, frames, model, {"platform": platform, "dtype": rollout.dtype})
    answers = {decoding: options.answers_of(decoding) for decoding in options.decoding}
    with PredictionStore(folder, header, retry_failed=options.retry_failed) as store:
        jobs = plan(source.items, options.control, answers, store.predictions)
        total = len(source.items) * len(options.control) * sum(answers.values())
        if jobs:
            look_for_media(jobs, source.media_root, options.failure_limit(total), announce)
            asked = number_of(len(source.items), "question")
            announce(f"{number_of(total, 'answer')} to {asked}, into {store.path}")
            announce(f"Frames: {frames.origin}")
            if source.prepared and "<answer>" not in question_text(benchmark, source.items[0], source.style):
                announce(_UNTAGGED)
            _ask(options, benchmark, source, contract, model, rollout, store, jobs, total)
        else:
            announce(f"All {total} answers are there already: {store.path}")
        predictions = list(store.predictions.values())
    announce(write_reports(folder, benchmark, source.items, predictions, header))
    announce(f"Report: {folder / REPORT}")
    return folder


def model_digest(model: Path) -> str:
    """What tells a model from another: its configuration, and names, sizes and times of its weights."""
    digest = hashlib.sha256()
    for path in sorted(model.iterdir()):
        if path.suffix in _WEIGHTS:
            status = path.stat()
            digest.update(f"{path.name}|{status.st_size}|{status.st_mtime_ns}\n".encode())
        elif path.suffix in (".json", ".jinja"):
            digest.update(f"{path.name}|".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def longest_prompt(contract: SamplingContract) -> int:
    """Tokens that a question with one video can have, without the times that some models read."""
    tile = (contract.patch_size * contract.merge_size) ** 2
    return _pictures(contract) * (contract.max_pixels // tile) + TEXT_TOKENS


def _pictures(contract: SamplingContract) -> int:
    """Most temporal patches of a video."""
    return -(-contract.max_frames // contract.temporal_patch_size)


def _ask(
    options: EvaluateOptions,
    benchmark: Benchmark,
    source: Source,
    contract: SamplingContract,
    model: Path,
    rollout: DictConfig,
    store: PredictionStore,
    jobs: list[Job],
    total: int,
) -> None:
    os.environ.setdefault(
        "VLLM_LOGGING_LEVEL", "ERROR"
    )  # read when vLLM is imported, in each of its processes
    with warnings.catch_warnings():
        # verl lists every training engine it could have used but for a missing package.
        warnings.filterwarnings("ignore", message=".* engine is not available", category=UserWarning)
        from keytoken.evaluation.asking import Asker, Asking
        from keytoken.verl_adapter.offline import OfflineEngine, PromptMaker

    reading = {"frame_cache": options.frame_cache, "clip_limit_s": options.clip_limit_s}
    maker = PromptMaker(model, {"sampling_contract": asdict(contract), **reading})
    asking = Asking(
        text=lambda item: question_text(benchmark, item, source.style),
        media_root=source.media_root,
        seed=options.seed,
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=source.max_tokens,
        threads=options.jobs,
        concurrency=options.concurrency,
        max_failures=options.failure_limit(total),
    )

    there = total - sum(len(job.keys) for job in jobs)

    async def ask() -> None:
        times = words_of_video(maker.processor, _pictures(contract))
        wanted = options.max_model_len or longest_prompt(contract) + times + source.max_tokens
        engine = OfflineEngine(model, rollout, maker, min(wanted, maker.context_length))
        try:
            await engine.mask_vision_tokens()
            with _Bar(benchmark, source.items, store, total, there) as bar:
                await Asker(asking, maker, engine, store, bar.seen).ask(jobs)
        finally:
            engine.shutdown()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave by the way that stops the engine
    asyncio.run(ask())


def _rollout_words(options: EvaluateOptions, platform: str) -> list[str]:
    """The overrides that lead to the rollout's settings."""
    rollout = "actor_rollout_ref.rollout"
    words = [f"platform={platform}", f"{rollout}.tensor_model_parallel_size={options.tensor_parallel}"]
    return [*words, *([f"{rollout}.dtype={options.dtype}"] if options.dtype else [])]


def _header(
    options: EvaluateOptions,
    source: Source,
    frames: Frames,
    model: Path,
    engine: dict[str, str],
) -> dict[str, Any]:
    """What the answers depend on."""
    mismatch = {"sampling_mismatch": list(frames.differences)} if frames.differences else {}
    return {
        "keytoken": "predictions",
        "version": VERSION,
        "benchmark": options.benchmark,
        "questions_digest": source.digest,
        "model": str(model),
        "model_digest": model_digest(model),
        "sampling": asdict(frames.contract),
        **mismatch,
        "prompt": source.style,
        "decoding": {
            "seed": options.seed,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": source.max_tokens,
        },
        "engine": engine,
    }


def _model_folder(path: Path) -> Path:
    from keytoken.verl_adapter.merge import model_folder

    return model_folder(path)


def _out_folder(options: EvaluateOptions) -> Path:
    if options.out:
        return Path(options.out).expanduser()
    name = Path(options.model).resolve().name
    return Path("outputs") / "evaluate" / options.benchmark / name


class _Bar:
    """A progress bar with the running accuracy of the answers to the questions as they are."""

    def __init__(
        self, benchmark: Benchmark, items: list[Item], store: PredictionStore, total: int, there: int
    ) -> None:
        self._benchmark = benchmark
        self._items = {item.item_id: item for item in items}
        self._scores: list[float] = []
        self._failed = 0
        self._tqdm = tqdm(total=total, initial=there, desc="answers", unit="answer", dynamic_ncols=True)
        for prediction in store.predictions.values():
            self._count(prediction)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._tqdm.close()

    def seen(self, prediction: Prediction) -> None:
        """Count one more answer."""
        self._count(prediction)
        shown = []
        if self._scores:
            shown.append(f"accuracy {sum(self._scores) / len(self._scores):.3f}")
        if self._failed:
            shown.append(f"failed {self._failed}")
        self._tqdm.set_postfix_str(", ".join(shown), refresh=False)
        self._tqdm.update()

    def _count(self, prediction: Prediction) -> None:
        item = self._items.get(prediction.item_id)
        self._failed += prediction.response is None
        if item is None or prediction.control != "none":
            return
        if prediction.response is None:
            self._scores.append(0.0)
            return
        score = self._benchmark.score(item, prediction.response).score
        if score is not None:
            self._scores.append(score)
