"""Checks this project against outputs of the published Video-KTR code.

``keytoken golden FILE`` runs the preset ``video_ktr_official``, through the same selection and loss functions
as training, on the cases of a JSON file and compares with what the published code gave. Selections must be
equal; advantage, loss and gradient must agree to 1e-6.

The file holds ``{"cases": [...]}``. A case has B responses of one prompt, T tokens each:

- ``ratio``, ``beta``, ``is_video``; optional ``seed`` as its name;
- [B, T] ``logp``, ``logp_masked``, ``logp_shuffled`` (null for images), ``entropy``, ``logp_ref``,
  ``response_mask``; [B] ``rewards``;
- ``expected``: [B, T] ``visual``, ``entropy``, ``temporal`` (null for images), ``union``, ``grad_logp``;
  [B] ``advantage``; the number ``loss``. A null stands for the published code's NaN.

Where a response has no selected token the published code divides 0 by 0. Here that response adds 0 to the
loss and gets a gradient of 0, and the others are as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.errors import DataError, KeyTokenError
from keytoken.losses.advantage import group_advantages
from keytoken.losses.policy import policy_loss
from keytoken.schema import MethodConfig

PRESET = "video_ktr_official"
TOLERANCE = 1e-6
CASE_GRIDS = ("logp", "logp_masked", "logp_shuffled", "entropy", "logp_ref")
EXPECTED_FLAGS = ("visual", "entropy", "temporal", "union")
VIDEO_ONLY = ("logp_shuffled", "temporal")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One case of a golden file. ``mask`` is [B, T] bool, grids [B, T] float32 (None: not for images)."""

    name: str
    ratio: float
    beta: float
    is_video: bool
    mask: torch.Tensor
    grids: dict[str, torch.Tensor | None]
    rewards: torch.Tensor
    expected: dict[str, torch.Tensor | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CaseResult:
    """How one case compares.

    Attributes:
        name: The case.
        shape: B and T.
        wrong_tokens: Tokens whose selection differs, for each signal and the union.
        errors: Largest absolute differences of advantage, loss and gradient, over the values the published
            code has; 0 if it has none.
        notes: What is done where the published code has NaN.
        problems: Why the case does not match; empty for a match.
    """

    name: str
    shape: tuple[int, int]
    wrong_tokens: dict[str, int]
    errors: dict[str, float]
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def matches(self) -> bool:
        return not self.problems

    def line(self) -> str:
        """The result as one line of text."""
        wrong = " ".join(f"{name} {count}" for name, count in self.wrong_tokens.items())
        errors = " ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        remarks = "".join(f"; {text}" for text in (*self.problems, *self.notes))
        verdict = "ok      " if self.matches else "MISMATCH"
        size = f"{self.shape[0]} x {self.shape[1]}"
        return f"{verdict} case {self.name} ({size}): wrong tokens {wrong}; errors {errors}{remarks}"


def load_preset(name: str) -> MethodConfig:
    """Read the method of one method file of the package ``keytoken_configs``, and of those it builds on.

    Some of them set keys of verl as well, which are left out here, and one takes the longest answer from the
    dataset's file, so that hydra alone can read it.
    """
    return MethodConfig.from_mapping(_read_preset(name), where="keytoken.method")


def _read_preset(name: str) -> dict[str, Any]:
    text = resources.files("keytoken_configs").joinpath("method", f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    bases = [base for base in content.pop("defaults", []) if base != "_self_"]
    own = content["keytoken"]["method"] if "keytoken" in content else content
    return reduce(_merged, (*(_read_preset(base) for base in bases), own))


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Both, block by block; where both have a value, that of ``own``."""
    blocks = [key for key in own if isinstance(own[key], dict) and isinstance(base.get(key), dict)]
    return {**base, **own, **{key: _merged(base[key], own[key]) for key in blocks}}


def check_file(path: str | Path) -> list[CaseResult]:
    """Check every case of a file.

    Raises:
        DataError: If the file is missing, is not JSON, or a case lacks a key or has a wrong shape.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"Golden file {file} does not exist; pass the path of a JSON file of cases.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"Golden file {file} is not JSON ({error}); write it anew.") from error
    cases = content.get("cases") if isinstance(content, Mapping) else None
    if not isinstance(cases, list) or not cases:
        raise DataError(f"Golden file {file} has no list 'cases'; put the cases under that key.")
    method = load_preset(PRESET)
    parsed = [parse_case(case, f"{file.name}, case {index}") for index, case in enumerate(cases)]
    return [check_case(case, method) for case in parsed]


def parse_case(raw: Any, where: str) -> Case:
    """Turn the JSON of one case into tensors.

    Raises:
        DataError: Naming the case and the key.
    """
    top = _Reader(raw, where)
    outcome = _Reader(top.get("expected"), f"{where}, expected")
    is_video = bool(top.get("is_video"))
    shape = tuple(torch.as_tensor(top.numbers("logp", None)).shape)
    if len(shape) != 2 or 0 in shape:
        raise DataError(f"{where}: 'logp' has the shape {shape}; it must be responses by tokens.")
    absent = () if is_video else VIDEO_ONLY
    grids = {key: None if key in absent else top.numbers(key, shape) for key in CASE_GRIDS}
    expected = {key: None if key in absent else outcome.flags(key, shape) for key in EXPECTED_FLAGS}
    expected["grad_logp"] = outcome.numbers("grad_logp", shape)
    expected["advantage"] = outcome.numbers("advantage", shape[:1])
    expected["loss"] = outcome.numbers("loss", ())
    return Case(
        name=str(top.get("seed")) if "seed" in raw else where,
        ratio=float(top.numbers("ratio", ())),
        beta=float(top.numbers("beta", ())),
        is_video=is_video,
        mask=top.flags("response_mask", shape),
        grids=grids,
        rewards=top.numbers("rewards", shape[:1]),
        expected=expected,
    )


class _Reader:
    """Reads one JSON object and says what is wrong with it."""

    def __init__(self, raw: Any, where: str) -> None:
        if not isinstance(raw, Mapping):
            raise DataError(f"{where} is not an object; write keys and values.")
        self._raw = raw
        self._where = where

    def get(self, key: str) -> Any:
        if key not in self._raw:
            raise DataError(f"{self._where} lacks the key {key!r}; add it (schema: keytoken.golden).")
        return self._raw[key]

    def numbers(self, key: str, shape: tuple[int, ...] | None) -> torch.Tensor:
        """A float32 tensor; nulls become NaN."""
        what = f"{self._where}: {key!r}"
        try:
            values = torch.tensor(_nan_for_null(self.get(key)), dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"{what} is not a regular grid of numbers ({error}).") from error
        if shape is not None and tuple(values.shape) != shape:
            raise DataError(f"{what} has the shape {tuple(values.shape)}; it must be {shape}.")
        return values

    def flags(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A bool tensor from 0 and 1."""
        values = self.numbers(key, shape)
        if not bool(((values == 0) | (values == 1)).all()):
            raise DataError(f"{self._where}: {key!r} must hold 0 and 1 only.")
        return values.bool()


def _nan_for_null(value: Any) -> Any:
    if isinstance(value, list):
        return [_nan_for_null(item) for item in value]
    return math.nan if value is None else value


def check_case(case: Case, method: MethodConfig) -> CaseResult:
    """Run one case through the method and the loss, and compare."""
    chosen, results = _run(case, method)
    selections = {**chosen.masks, "union": chosen.selected}
    wrong_tokens = {
        name: int((selections[name] != theirs).sum())
        for name in EXPECTED_FLAGS
        if (theirs := case.expected[name]) is not None
    }
    undefined = ~chosen.selected.any(dim=1)
    errors: dict[str, float] = {}
    problems = [f"{count} tokens of {name} differ" for name, count in wrong_tokens.items() if count]
    for name, ours in results.items():
        theirs = case.expected[name]
        assert theirs is not None
        errors[name], problem = _compare(name, ours, theirs, undefined)
        problems += [problem] if problem else []
    return CaseResult(
        name=case.name,
        shape=(case.mask.shape[0], case.mask.shape[1]),
        wrong_tokens=wrong_tokens,
        errors=errors,
        notes=_notes(undefined, float(results["loss"])),
        problems=tuple(problems),
    )


def _run(case: Case, method: MethodConfig) -> tuple[TokenWeights, dict[str, torch.Tensor]]:
    """The selection, and advantage, loss and gradient, as in one training step without an old policy."""
    assert method.selection is not None
    selection = dataclasses.replace(
        method.selection, visual_ratio=case.ratio, temporal_ratio=case.ratio, entropy_ratio=case.ratio
    )
    loss_config = dataclasses.replace(method.loss, kl_coef=case.beta)
    method = dataclasses.replace(method, selection=selection, loss=loss_config)
    logp, entropy, mask = case.grids["logp"], case.grids["entropy"], case.mask
    assert logp is not None and entropy is not None
    group = torch.zeros(mask.shape[0], dtype=torch.long)
    signals = Signals(
        logp=logp,
        logp_masked=case.grids["logp_masked"],
        logp_shuffled=case.grids["logp_shuffled"],
        entropy=entropy,
        mask=mask,
        group=group,
        has_visual=torch.ones_like(group, dtype=torch.bool),
        has_temporal=torch.full_like(group, case.is_video, dtype=torch.bool),
    )
    chosen = compute_token_weights(signals, method)
    advantage = group_advantages(case.rewards, group, method.advantage_epsilon)
    current = logp.clone().requires_grad_()
    loss = policy_loss(
        log_prob=current,
        old_log_prob=logp,
        advantages=advantage[:, None].expand_as(logp),
        weights=chosen.weights,
        mask=mask,
        config=loss_config,
        ref_log_prob=case.grids["logp_ref"],
    ).loss
    (gradient,) = torch.autograd.grad(loss, current)
    return chosen, {"advantage": advantage, "loss": loss.detach(), "grad_logp": gradient}


def _compare(
    name: str, ours: torch.Tensor, theirs: torch.Tensor, undefined: torch.Tensor
) -> tuple[float, str | None]:
    """Largest difference where the published code has a number, and what is wrong, if anything is."""
    if not bool(torch.isfinite(ours).all()):
        return math.nan, f"{name} is not finite here"
    has_nan = torch.isnan(theirs)
    explained = undefined.any() if theirs.dim() == 0 else undefined.view(-1, *[1] * (theirs.dim() - 1))
    if bool((has_nan & ~explained).any()):
        return 0.0, f"{name} is null in the file although every response concerned has selected tokens"
    difference = (ours - theirs).abs()[~has_nan]
    error = float(difference.max()) if difference.numel() else 0.0
    return error, f"{name} differs by {error:.1e}" if error > TOLERANCE else None


def _notes(undefined: torch.Tensor, loss: float) -> tuple[str, ...]:
    rows = undefined.nonzero().squeeze(1).tolist()
    if not rows:
        return ()
    which = f"response {rows[0]} has" if len(rows) == 1 else f"responses {', '.join(map(str, rows))} have"
    note = f"{which} no selected token: published code 0/0 = NaN, here it adds 0 (loss {loss:.6f})"
    return (note,)


def main(argv: Sequence[str]) -> int:
    """``keytoken golden FILE``: one line a case.

    Returns:
        0 if all cases match, 1 if one does not, 2 if the file cannot be used.
    """
    if len(argv) != 1:
        print("usage: keytoken golden FILE", file=sys.stderr)
        return 2
    try:
        results = check_file(argv[0])
    except KeyTokenError as error:
        print(error, file=sys.stderr)
        return 2
    for result in results:
        print(result.line())
    failed = sum(not result.matches for result in results)
    print(f"{len(results) - failed} of {len(results)} cases match the preset {PRESET}.")
    return 1 if failed else 0
