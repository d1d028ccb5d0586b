"""What the pass over the real input measures beside log-probs, in verl's engine, against transformers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from keytoken import fields
from keytoken.errors import ConfigurationError
from keytoken.golden import load_preset
from keytoken.schema import MethodConfig
from keytoken.workers.attribution import score_views
from keytoken.workers.passes import whole_groups
from keytoken.workers.rows import Row

TW_GRPO, TOR = load_preset("tw_grpo"), load_preset("tor_grpo")
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(params=[True, False], ids=["shared", "separate"], autouse=True)
def prefix(request: pytest.FixtureRequest, worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with a prompt for all its answers, and with one for each."""
    monkeypatch.setattr(worker, "settings", dataclasses.replace(worker.settings, shared=request.param))


@pytest.fixture(scope="module")
def answers(mixed: dict[str, Any]) -> dict[str, Any]:
    """The mixed rows, and a third answer to the first prompt that is empty; the three not side by side."""
    video = mixed["video"]
    cut = len(video.input_ids) - video.response_length
    ended = dataclasses.replace(
        video, input_ids=video.input_ids[:cut], positions=video.positions[:, :cut], response_length=0
    )
    first = ["same video", "text", "video", "image"]
    return {name: mixed[name] for name in first} | {"ended": ended} | mixed


@pytest.fixture
def data(answers: dict[str, Any], as_batch: Callable[..., TensorDict]) -> TensorDict:
    return as_batch(list(answers.values()))


def run(
    worker: Any, data: TensorDict, method: MethodConfig, size: int, check_base: bool, **options: Any
) -> TensorDict:
    attribution = dataclasses.replace(worker.keytoken.attribution, check_base=check_base)
    settings = dataclasses.replace(worker.settings, micro_batch_size=size)
    return score_views(worker.engine, data, method, attribution, settings, version=4, **options)


def true_disagreement(logits: list[torch.Tensor]) -> torch.Tensor:
    """[T] of one group from [R, V] logits of its answers, in float64: TW-GRPO's formula with full arrays."""
    vocab, longest = logits[0].shape[1], max(map(len, logits))
    log_p = torch.full((len(logits), longest, vocab), -math.log(vocab), dtype=torch.float64)
    for own, rows in zip(log_p, logits, strict=True):
        own[: len(rows)] = rows.double().log_softmax(-1)
    d = (log_p.mean(0) - log_p).clamp(-11, 11)
    return (d.exp() - d - 1).sum(-1).mean(0)


def true_nucleus_entropy(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """[R] from [R, V] logits, in float64, by a sort."""
    p = logits.double().softmax(-1).sort(descending=True).values
    kept = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)
    kept /= kept.sum(-1, keepdim=True)
    return torch.special.entr(kept).sum(-1)


@pytest.mark.parametrize(("size", "check_base"), [(16, False), (4, True), (3, False)])
@pytest.mark.usefixtures("engine")
def test_disagreement(
    worker: Any,
    data: TensorDict,
    answers: dict[str, Any],
    truth: dict[str, dict[str, torch.Tensor]],
    size: int,
    check_base: bool,
) -> None:
    """Answers to one prompt meet in one micro-batch wherever they stand; an only answer differs from none."""
    output = run(worker, data, TW_GRPO, size, check_base)
    assert (fields.REAL_LOG_PROB in output.keys()) == check_base  # noqa: SIM118 - a TensorDict is no dict
    assert fields.TRUNCATED_ENTROPY not in output.keys()  # noqa: SIM118
    real = truth["real"]
    vocab = real["video"].shape[1]
    group = true_disagreement([real["video"], real["same video"], torch.zeros(0, vocab)])
    for index, (name, example) in enumerate(answers.items()):
        together = name in ("video", "same video", "ended")
        wanted = group[: example.response_length] if together else torch.zeros(example.response_length)
        found = output[fields.DISAGREEMENT][index]
        torch.testing.assert_close(found, wanted.float(), **TOLERANCE)
    assert group.min() > 1e-2  # else the comparison would show nothing


@pytest.mark.parametrize(("size", "check_base"), [(5, True), (16, False)])
@pytest.mark.usefixtures("engine")
def test_truncated_entropy(
    worker: Any,
    data: TensorDict,
    answers: dict[str, Any],
    truth: dict[str, dict[str, torch.Tensor]],
    size: int,
    check_base: bool,
) -> None:
    output = run(worker, data, TOR, size, check_base)
    assert fields.DISAGREEMENT not in output.keys()  # noqa: SIM118 - a TensorDict is no dict
    for index, name in enumerate(answers):
        logits = truth["real"].get(name, torch.zeros(0, 5))
        wanted = true_nucleus_entropy(logits, 0.95)
        full = torch.special.entr(logits.double().softmax(-1)).sum(-1)
        # A token on the edge of the nucleus may fall on either side of it in float32.
        edges = torch.stack([true_nucleus_entropy(logits, 0.95 + step) for step in (-1e-5, 0.0, 1e-5)])
        found = output[fields.TRUNCATED_ENTROPY][index]
        nearest = edges[(edges - found).abs().argmin(0), torch.arange(len(found))]
        torch.testing.assert_close(found, nearest.float(), **TOLERANCE)
        assert ((full - wanted).abs() > 1e-2).all()  # the share left out is not nothing


@pytest.mark.parametrize(("method", "size"), [(TOR, 5), (TW_GRPO, 16)])
@pytest.mark.usefixtures("engine")
def test_collision(
    worker: Any,
    data: TensorDict,
    answers: dict[str, Any],
    truth: dict[str, dict[str, torch.Tensor]],
    method: MethodConfig,
    size: int,
) -> None:
    """Beside the measures of any method, and where no method asks for the real pass."""
    both = run(worker, data, method, size, check_base=False, collision=True)
    alone = run(worker, data, load_preset("grpo"), size, check_base=False, collision=True)
    for index, name in enumerate(answers):
        logits = truth["real"].get(name, torch.zeros(0, 5))
        wanted = logits.double().softmax(-1).square().sum(-1).float()
        torch.testing.assert_close(both[fields.COLLISION][index], wanted, **TOLERANCE)
        torch.testing.assert_close(alone[fields.COLLISION][index], wanted, **TOLERANCE)
    assert fields.COLLISION not in run(worker, data, method, size, check_base=False).keys()  # noqa: SIM118


@pytest.mark.usefixtures("engine")
def test_a_measure_leaves_the_stand_ins_of_a_view_alone(
    worker: Any, data: TensorDict, answers: dict[str, Any]
) -> None:
    """Without the real log-probs a row without a view holds zeros, though the real pass ran."""
    alone, both = (run(worker, data, TOR, 16, check_base) for check_base in (False, True))
    text, video = list(answers).index("text"), list(answers).index("video")
    assert (alone[fields.MASKED_LOG_PROB][text] == 0).all()
    assert torch.equal(both[fields.MASKED_LOG_PROB][text], both[fields.REAL_LOG_PROB][text])
    assert torch.equal(alone[fields.MASKED_LOG_PROB][video], both[fields.MASKED_LOG_PROB][video])


@pytest.mark.usefixtures("engine")
def test_a_group_that_does_not_fit_is_refused(worker: Any, data: TensorDict) -> None:
    message = r"attribution\.micro_batch_size=2 has no room for the 3 answers to prompt p0.*rollout\.n"
    with pytest.raises(ConfigurationError, match=message):
        run(worker, data, TW_GRPO, 2, check_base=False)
    run(worker, data, TOR, 2, check_base=False)  # which compares no answers


def rows_of_prompts(prompts: str) -> list[Row]:
    return [
        Row(torch.arange(4), torch.zeros(4, 4), 2, {}, prompt=prompt, number=number)
        for number, prompt in enumerate(prompts.split())
    ]


@pytest.mark.parametrize(
    ("prompts", "size", "chunks"),
    [
        ("a b a b", 2, [[0, 2], [1, 3]]),
        ("a b a b", 3, [[0, 2], [1, 3]]),
        ("a b a b", 4, [[0, 2, 1, 3]]),
        ("a a b c", 3, [[0, 1, 2], [3]]),
        ("a pad7 a pad7 pad7", 2, [[0, 2], [1, 3], [4]]),  # rows that verl made up belong to nobody
        ("", 2, []),
    ],
)
def test_groups_stay_whole(prompts: str, size: int, chunks: list[list[int]]) -> None:
    found = whole_groups(rows_of_prompts(prompts), size)
    assert [[row.number for row in chunk] for chunk in found] == chunks
