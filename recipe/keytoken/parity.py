"""Do two parties see the same prompt, and give the same answer the same log-probs?

A :class:`Reading` is what one party, such as the rollout engine or the actor, made of one prompt and an
answer to it. :func:`compare` takes two of them, field by field, in the order in which one field decides the
next: token ids, grids, seconds, pixels, positions, log-probs. The first difference is a :class:`ParityError`
that names the field, the sample, the place, both values and what usually lies behind it.

Legend: ``P`` tokens of the prompt, ``R`` of the answer, ``L = P + R``, ``M`` images and videos.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keytoken.errors import ParityError

# The largest difference of one token, as a multiple of the largest mean difference of an answer.
SPREAD = 20.0
# Largest mean differences of an answer's log-probs between two implementations of one model, in nats. In
# float32 hardly rounding, but the probability of vision tokens: the engine masks them, the trainer counts it.
MEAN_GAPS = {"float32": 5e-3, "bfloat16": 0.05, "float16": 0.02}
# Differences of one sign, up to this share of their mean, in an answer of at least so many tokens.
ONE_SIDED, FEWEST_ONE_SIDED = 0.01, 8
# The engine keeps pixels in its own precision; a wrong normalisation moves these figures by a tenth and more.
PIXEL_TOLERANCE = 0.02
# The processor counts in float32.
SECONDS_TOLERANCE = 1e-5

_AXES = ("time", "height", "width")
_OWN_RULE = "The trainer has to count positions by keytoken.data.positions."
# What code that looks for a picture which is not there runs into.
_CRASHES = (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError)
_CAUSES = {
    "ids": "The engine's processor made another prompt of the same request, for instance another number of "
    "placeholders: compare the versions of vLLM and transformers with the project's lock, and see what "
    "keytoken.verl_adapter.prompts sends.",
    "grids": "One side resized or resampled the frames once more: keep min_pixels and max_pixels of the "
    "sampling contract within the processor's bounds, and data.mm_processor_kwargs empty.",
    "seconds": "The engine did not get the times of the frames, and assumes 24 a second: the request has to "
    "carry video_metadata (keytoken.verl_adapter.prompts), which an agent loop of your own must do as well.",
    "pixels": "One side normalises with other means and deviations: image_mean and image_std must be the "
    "same in preprocessor_config.json and video_preprocessor_config.json of the model, or the engine takes "
    "those of the other file.",
    "positions": "The trainer counts M-RoPE positions by another rule than the engine. "
    "They have to come from keytoken.data.positions, not from transformers.",
    "log-probs": "Ids, positions and pixels agree, so weights or caches differ: a weight sync was missed, "
    "caches of the engine that outlived one (prefix, multi-modal, encoder), or another precision. If the run "
    "computes in lower precision on purpose, raise keytoken.parity.log_prob_tolerance.",
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """Largest allowed differences of log-probs, in nats: the mean of an answer and a single token."""

    mean: float
    largest: float


def bounds_for(precision: str, tolerance: float | None = None) -> Bounds:
    """The bounds of a precision (a key of :data:`MEAN_GAPS`), or those that a tolerance asks for."""
    mean = MEAN_GAPS[precision] if tolerance is None else tolerance
    return Bounds(mean=mean, largest=SPREAD * mean)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one party made of one prompt and an answer; None for what it cannot tell.

    Attributes:
        party: Who, as in "vLLM engine".
        sample: Which prompt, as in "row 3 of the training data".
        ids: [L] int64, prompt and answer, placeholders expanded.
        prompt_length: P.
        positions: [3, L] int64: time, height, width.
        grids: [M, 3] patches, images first.
        seconds: Seconds between temporal patches, one for each video.
        pixels: [M, 2] mean and root mean square of what the vision tower is given.
        log_probs: [R] nats.
    """

    party: str
    sample: str
    ids: Tensor
    prompt_length: int
    positions: Tensor | None = None
    grids: Tensor | None = None
    seconds: Tensor | None = None
    pixels: Tensor | None = None
    log_probs: Tensor | None = None

    @classmethod
    def of(cls, party: str, sample: str, found: Mapping[str, Any]) -> Reading:
        """A reading from plain numbers, which cross the borders of processes and of verl."""

        def tensor(name: str, dtype: torch.dtype, *shape: int) -> Tensor | None:
            values = found.get(name)
            return None if values is None else torch.tensor(values, dtype=dtype).reshape(*shape)

        return cls(
            party=party,
            sample=sample,
            ids=torch.tensor(found["ids"], dtype=torch.int64),
            prompt_length=int(found["prompt_length"]),
            positions=tensor("positions", torch.int64, 3, -1),
            grids=tensor("grids", torch.int64, -1, 3),
            seconds=tensor("seconds", torch.float64, -1),
            pixels=tensor("pixels", torch.float64, -1, 2),
            log_probs=tensor("log_probs", torch.float64, -1),
        )


@dataclass(frozen=True, slots=True)
class Gap:
    """Differences of an answer's log-probs, in nats."""

    mean: float = 0.0
    largest: float = 0.0


def compare(one: Reading, other: Reading, bounds: Bounds, hints: Sequence[str] = ()) -> Gap:
    """Compare two readings of one sample.

    Args:
        one: A reading.
        other: Another party's.
        bounds: Of the log-probs.
        hints: What is known of this run and may lie behind a difference of log-probs.

    Returns:
        How far the log-probs are apart; zeros where one side has none.

    Raises:
        ParityError: the first field that differs.
    """
    _compare_ids(one, other)
    _compare_rows("grids", one, other, one.grids, other.grids, 0.0)
    _compare_rows("seconds", one, other, one.seconds, other.seconds, SECONDS_TOLERANCE)
    _compare_rows("pixels", one, other, one.pixels, other.pixels, PIXEL_TOLERANCE)
    _compare_positions(one, other)
    return _compare_log_probs(one, other, bounds, hints)


def _compare_ids(one: Reading, other: Reading) -> None:
    (a, b), (p, q) = (one.ids, other.ids), (one.prompt_length, other.prompt_length)
    if torch.equal(a, b) and p == q:
        return
    common = min(len(a), len(b))
    differs = (a[:common] != b[:common]).nonzero()
    place = int(differs[0]) if len(differs) else common
    values = [str(int(ids[place])) if place < len(ids) else "no more" for ids in (a, b)]
    if len(differs) == 0 and len(a) == len(b):  # the same tokens, cut elsewhere into prompt and answer
        raise _error("ids", one, other, "length of the prompt", (str(p), str(q)), "")
    lengths = f" Their prompts have {p} and {q} tokens." if p != q else ""
    raise _error("ids", one, other, _place(place, one), (values[0], values[1]), lengths)


def _compare_rows(
    name: str, one: Reading, other: Reading, a: Tensor | None, b: Tensor | None, tolerance: float
) -> None:
    """Of each image or video."""
    if a is None or b is None:
        return
    if len(a) != len(b):
        raise _error(name, one, other, "number of images and videos", (str(len(a)), str(len(b))), "")
    for number, (x, y) in enumerate(zip(a.double(), b.double(), strict=True)):
        # Not ">": a NaN has to count as a difference.
        if not bool(((x - y).abs() <= tolerance).all()):
            raise _error(name, one, other, f"image or video {number}", (_short(x), _short(y)), "")


def _compare_positions(one: Reading, other: Reading) -> None:
    if one.positions is None or other.positions is None:
        return
    differs = (one.positions != other.positions).any(dim=0).nonzero()
    if not len(differs):
        return
    token = int(differs[0])
    a, b = one.positions[:, token], other.positions[:, token]
    axis = int((a != b).nonzero()[0])
    rest = f" {len(differs)} of {len(one.ids)} tokens have other positions."
    place = f"{_AXES[axis]} of {_place(token, one)}"
    raise _error("positions", one, other, place, (str(int(a[axis])), str(int(b[axis]))), rest)


def _compare_log_probs(one: Reading, other: Reading, bounds: Bounds, hints: Sequence[str]) -> Gap:
    if one.log_probs is None or other.log_probs is None:
        return Gap()
    a, b = one.log_probs.double(), other.log_probs.double()
    num_answer = len(one.ids) - one.prompt_length
    if not len(a) == len(b) == num_answer:
        values = (str(len(a)), str(len(b)))
        raise _error("log-probs", one, other, f"number for an answer of {num_answer} tokens", values, "")
    if not num_answer:
        return Gap()
    gaps = (a - b).abs()
    bad = (~torch.isfinite(gaps)).nonzero()
    token = int(bad[0]) if len(bad) else int(gaps.argmax())
    gap = Gap(mean=float(gaps.mean()), largest=float(gaps.max()))
    if not len(bad) and gap.mean <= bounds.mean and gap.largest <= bounds.largest:
        return gap
    values = (f"{float(a[token]):.6g}", f"{float(b[token]):.6g}")
    rest = (
        f" The answer's mean difference is {gap.mean:.3g} nats (bound {bounds.mean:.3g}), that of this token "
        f"{float(gaps[token]):.3g} (bound {bounds.largest:.3g})."
    )
    hints = [*hints, *_masked_hint(one, other, a - b)]
    raise _error("log-probs", one, other, _place(one.prompt_length + token, one), values, rest, hints)


def _masked_hint(one: Reading, other: Reading, differences: Tensor) -> list[str]:
    """Rounding and wrong weights go both ways; a token that only one side masks makes all others likelier."""
    noise = ONE_SIDED * differences.abs().mean()
    if len(differences) < FEWEST_ONE_SIDED or not bool((differences.abs() > noise).any()):
        return []
    for likelier, counting, signed in ((one, other, differences), (other, one, -differences)):
        if bool((signed >= -noise).all()):
            return [
                f"Every token is likelier to the {likelier.party}, so it masks tokens whose probability the "
                f"{counting.party} counts. The engine masks vision tokens: a model that has hardly been "
                "trained still gives them some, and keytoken.parity.log_prob_tolerance allows for it."
            ]
    return []


def _place(token: int, reading: Reading) -> str:
    """Where a token stands, in words."""
    answer = token - reading.prompt_length
    if answer >= 0:
        return f"token {answer} of the answer"
    return f"token {token} of the prompt"


def _error(
    field: str,
    one: Reading,
    other: Reading,
    place: str,
    values: tuple[str, str],
    rest: str,
    hints: Sequence[str] = (),
) -> ParityError:
    causes = " ".join([*hints, _CAUSES[field]])
    return ParityError(
        f"Parity: {field} of {one.sample} differ between {one.party} and {other.party}: {place}: "
        f"{values[0]} ({one.party}), {values[1]} ({other.party}).{rest} {causes}"
    )


def _short(values: Tensor) -> str:
    numbers = [f"{float(value):.6g}" for value in values.flatten()]
    return numbers[0] if len(numbers) == 1 else f"({', '.join(numbers)})"


def require_positions_of_any_answer(
    positions: Callable[[list[int]], Tensor], prompt: list[int], answer: list[int], start: int
) -> None:
    """An answer that ends in the start of a picture which never comes has the positions of any other.

    Args:
        positions: Of prompt and answer, by the trainer's rule.
        prompt: Prompt ids.
        answer: Answer ids.
        start: The token that begins an image or video.

    Raises:
        ParityError: such an answer has other positions, or none.
    """
    whole, cut = [*prompt, *answer], [*prompt, *answer[:-1], start]
    try:
        same = torch.equal(positions(whole), positions(cut))
    except _CRASHES as problem:
        raise ParityError(
            f"Parity: positions of an answer that ends in token {start}, the start of a picture, cannot be "
            f"computed ({type(problem).__name__}: {problem}). {_OWN_RULE}"
        ) from problem
    if not same:
        raise ParityError(
            f"Parity: positions of an answer change when its last token is {start}, the start of a picture. "
            f"{_OWN_RULE}"
        )


def with_answer(note: Mapping[str, Any], answer: list[int], log_probs: list[float]) -> dict[str, Any]:
    """An engine's note of a prompt, continued by the answer to it.

    Args:
        note: ``ids`` and ``positions`` ([3][P], or None) of the prompt, and ``delta``: text behind the prompt
            goes on at its place plus this.
        answer: Answer ids.
        log_probs: Of the answer, nats.
    """
    length, positions = len(note["ids"]), note["positions"]
    if positions is not None:
        places = [length + note["delta"] + number for number in range(len(answer))]
        positions = [[*axis, *places] for axis in positions]
    return {
        **note,
        "ids": [*note["ids"], *answer],
        "prompt_length": length,
        "positions": positions,
        "log_probs": log_probs,
    }


def pixel_figures(pixels: Tensor, grids: Tensor) -> Tensor:
    """Mean and root mean square of each image or video.

    Args:
        pixels: [patches, D], those of one image or video behind the other.
        grids: [M, 3] patches.

    Returns:
        float64 [M, 2].
    """
    counts = [math.prod(grid) for grid in grids.tolist()]
    parts = pixels.double().split(counts)
    return torch.stack([torch.stack([part.mean(), part.square().mean().sqrt()]) for part in parts])
