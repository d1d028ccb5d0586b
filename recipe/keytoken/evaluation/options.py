"""The options of ``keytoken evaluate`` and what they have to satisfy."""

import dataclasses
from collections.abc import Sequence

from keytoken.block import require, unknown_name
from keytoken.data.sampling_words import SAMPLING
from keytoken.scoring.items import CONTROLS

COMMAND = "evaluate"
DECODINGS = ("greedy", "sampled")
PLATFORMS = ("cpu", "gpu")
MISMATCHES = ("refuse", "allow")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_TOKENS = 1024  # what the evaluation of Video-R1 gives an answer
_COUNTS = ("samples", "max_tokens", "max_model_len", "limit", "jobs", "concurrency", "tensor_parallel")
LEAST_FAILURES, FAILED_SHARE = 20, 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to evaluate, and how.

    Attributes:
        benchmark: A key of :data:`keytoken.scoring.benchmarks.BENCHMARKS`.
        model: Hugging Face folder, or a checkpoint or run folder of ``keytoken train``.
        questions: The benchmark's official question files, or datasets of ``keytoken data prepare`` for
            benchmark=own; the demo brings its own.
        media_root: Folder below which the questions' media lie; null for where a prepared dataset says.
        out: Folder for answers and reports; null for ``outputs/evaluate/<benchmark>/<model>``.
        sampling: The sampling contract: a preset, or the file of a run or checkpoint, with or without
            changed keys (``sampling.max_frames=8``); null for the one that the checkpoint was trained by, or,
            where that is not known, the benchmark's own.
        sampling_mismatch: "refuse" or "allow" a ``sampling`` that the checkpoint was not trained by.
        style: "reasoning", "direct", a template, or "official" for the benchmark's own wording, that of
            the rows for benchmark=own; null for what suits the benchmark.
        control: What is done to the picture, of none, blank, shuffled, text; one evaluation each.
        decoding: "greedy", "sampled" or both.
        samples: Answers to each question with decoding=sampled.
        temperature: Of sampled answers.
        top_p: Of sampled answers.
        seed: Seeds the sampled answers and the shuffled frames.
        max_tokens: Longest answer; null for 1024, or what the demo trains with.
        max_model_len: Longest prompt and answer; null for what the sampling contract can need.
        limit: Only this many questions, the first ones; null for all.
        jobs: Clips decoded at the same time.
        clip_limit_s: Seconds that decoding a clip may take; more is a failed answer.
        concurrency: Questions in the engine or on their way to it; bounds the memory for frames.
        max_failures: More failed answers than this stop the run; null for 5 %, but at least 20.
        retry_failed: Ask again where an earlier call of the same command has failed.
        frame_cache: Folder of the frame cache; null for none.
        platform: "cpu" or "gpu"; null for what this installation computes on.
        tensor_parallel: GPUs of the engine.
        dtype: Of weights and computation; null for that of the platform's rollout.
    """

    benchmark: str
    model: str
    questions: tuple[str, ...] = ()
    media_root: str | None = None
    out: str | None = None
    sampling: str | None = dataclasses.field(default=None, metadata=SAMPLING)
    sampling_mismatch: str = MISMATCHES[0]
    style: str | None = None
    control: tuple[str, ...] = ("none",)
    decoding: tuple[str, ...] = ("greedy",)
    samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int | None = None
    max_model_len: int | None = None
    limit: int | None = None
    jobs: int = 2
    clip_limit_s: float = 60.0
    concurrency: int = 16
    max_failures: int | None = None
    retry_failed: bool = False
    frame_cache: str | None = None
    platform: str | None = None
    tensor_parallel: int = 1
    dtype: str | None = None

    def __post_init__(self) -> None:
        for key, values in (("control", CONTROLS), ("decoding", DECODINGS)):
            given = getattr(self, key)
            require(bool(given), f"{COMMAND}: {key} is empty; name at least one of {', '.join(values)}.")
            for name in given:
                _require_known(key, name, values)
            require(len(set(given)) == len(given), f"{COMMAND}: {key}={','.join(given)} names one twice.")
        _require_known("sampling_mismatch", self.sampling_mismatch, MISMATCHES)
        _require_known("platform", self.platform, PLATFORMS)
        _require_known("dtype", self.dtype, DTYPES)
        for key in _COUNTS:
            value = getattr(self, key)
            require(value is None or value >= 1, f"{COMMAND}: {key} is {value}; give it at least 1.")
        require(self.clip_limit_s > 0.0, f"{COMMAND}: clip_limit_s is {self.clip_limit_s}; give it some.")
        for key in ("max_failures", "seed"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"{COMMAND}: {key} is {value}; give it at least 0.")
        require(
            self.temperature > 0.0,
            f"{COMMAND}: temperature is {self.temperature}; use a number above 0, and decoding=greedy for "
            "the likeliest answer.",
        )
        require(0.0 < self.top_p <= 1.0, f"{COMMAND}: top_p is {self.top_p}; use a number in (0, 1].")

    def answers_of(self, decoding: str) -> int:
        """Answers to each question under a kind of decoding; the likeliest answer is one."""
        return self.samples if decoding == "sampled" else 1

    def failure_limit(self, num_samples: int) -> int:
        """Most failed answers with which a run goes on."""
        if self.max_failures is not None:
            return self.max_failures
        return max(LEAST_FAILURES, int(FAILED_SHARE * num_samples))


def _require_known(key: str, value: str | None, known: Sequence[str]) -> None:
    message = unknown_name(f"{COMMAND}: {key}={value}", str(value), known, "values")
    require(value is None or value in known, message)
