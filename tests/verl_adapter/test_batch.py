"""Order, signals, metrics and alarms of a batch, read from verl's own storage metadata and ragged tensors."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from transfer_queue import KVBatchMeta

from keytoken import fields
from keytoken.attribution.types import TokenWeights
from keytoken.attribution.views.frames import step_seed
from keytoken.errors import WeightSyncError
from keytoken.schema import ViewConfig
from keytoken.verl_adapter import batch as batches
from keytoken.verl_adapter.agent_loop import ANSWER_VISION_TOKENS, CLIP_READS, MEDIA_PUT_BYTES
from keytoken.verl_adapter.balance import canonical_order


def ragged(rows: list[list[float]]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def meta(keys: list[str], padding: frozenset[int] = frozenset()) -> KVBatchMeta:
    tags = [{"key": key, "is_padding": number in padding} for number, key in enumerate(keys)]
    return KVBatchMeta(partition_id="train", keys=list(keys), tags=tags)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> TensorDict:
    """Four answers to two prompts as TransferQueue would hand them over; storage itself needs a cluster."""
    data = TensorDict(
        {
            "responses": ragged([[3, 1, 4], [1], [5, 9], [2, 6]]),
            "response_mask": ragged([[1.0] * 3, [1.0], [1.0] * 2, [1.0] * 2]),
            "old_log_probs": ragged([[-1.0, -2.0, -3.0], [-4.0], [-5.0, -6.0], [-7.0, -8.0]]),
            "entropy": ragged([[0.1, 0.2, 0.3], [0.4], [0.5, 0.6], [0.7, 0.8]]),
            "advantages": ragged([[0.0] * 3, [0.0], [1.0] * 2, [-1.0] * 2]),
            "rm_scores": ragged([[0.0, 0.0, 1.0], [1.0], [0.0, 2.0], [0.25, 0.25]]),
            fields.REAL_LOG_PROB: ragged([[-1.0, -2.5, -3.0], [-4.0], [-5.0, -6.0], [-7.0, -8.25]]),
            fields.MASKED_LOG_PROB: ragged([[-9.0] * 3, [-9.0], [-9.0] * 2, [-9.0] * 2]),
            fields.HAS_VISUAL: torch.tensor([1, 1, 0, 0]),
            fields.SHUFFLED_LOG_PROB: ragged([[-8.0] * 3, [-8.0], [-8.0] * 2, [-8.0] * 2]),
            fields.HAS_TEMPORAL: torch.tensor([0, 0, 1, 1]),
            fields.STATIC_CLIP: torch.tensor([1, 1, 0, 0]),
            fields.TRUNCATED_ENTROPY: ragged([[0.0, 0.15, 0.0], [0.35], [0.0, 0.5], [0.6, 0.0]]),
            fields.DISAGREEMENT: ragged([[2.0, 9.0, 4.0], [2.0], [7.0, 1.0], [7.0, 1.0]]),
            fields.COLLISION: ragged([[0.5] * 3, [0.25], [1.0] * 2, [0.75] * 2]),
            fields.VERSION: torch.full((4,), 6),
        },
        batch_size=[4],
    )
    data["uid"] = NonTensorStack(*(NonTensorData(uid) for uid in ("b", "b", "a", "a")))
    decoded, found = (
        {"decodes": 1, "decoded_bytes": 500, "hits": 0},
        {"decodes": 0, "decoded_bytes": 0, "hits": 2},
    )
    none = dict.fromkeys(decoded, 0)
    counts = [
        {ANSWER_VISION_TOKENS: number, CLIP_READS: reads, MEDIA_PUT_BYTES: put}
        for number, reads, put in ((0, decoded, 70), (3, none, 0), (0, found, 0), (4, decoded, 30))
    ]
    data["extra_fields"] = NonTensorStack(*(NonTensorData(count) for count in counts))

    def read(_: KVBatchMeta, names: list[str]) -> TensorDict:
        return data.select(*names)

    monkeypatch.setattr(batches, "read", read)
    return data


KEYS = ["b_0_0", "b_1_0", "a_0_0", "a_1_0"]
VIEWS = (*fields.view_outputs("masked"), *fields.view_outputs("shuffled"))
OUTPUTS = (fields.REAL_LOG_PROB, *VIEWS, fields.STATIC_CLIP, fields.VERSION)


def test_the_order_does_not_depend_on_arrival() -> None:
    """Answers sort as numbers, prompts may hold underscores, and tags move with their keys."""
    wanted = ["0000001-00002_0_0", "0000001-00002_2_0", "0000001-00002_10_0", "p_7_0_0", "p_7_1_0", "p_7_1_1"]
    for seed in range(5):
        keys = random.Random(seed).sample(wanted, len(wanted))
        batch = meta(keys)
        canonical_order(batch)
        assert batch.keys == wanted
        assert [tag["key"] for tag in batch.tags] == wanted


@pytest.mark.usefixtures("stored")
def test_signals_are_the_stored_tensors_padded() -> None:
    signals, _ = batches.read_signals(meta(KEYS), OUTPUTS, ViewConfig())
    assert signals.mask.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert signals.logp[0].tolist() == [-1.0, -2.5, -3.0]  # the group's own, not the actor's
    assert signals.logp_masked is not None and signals.logp_masked[2].tolist() == [-9.0, -9.0, 0.0]
    assert signals.logp_shuffled is not None and signals.logp_shuffled.shape == (4, 3)
    assert signals.group[0] == signals.group[1] != signals.group[2] == signals.group[3]
    assert signals.has_visual.tolist() == [True, True, False, False]
    assert signals.has_temporal.tolist() == [False, False, True, True]


def test_the_signals_come_from_the_views_of_the_method(stored: TensorDict) -> None:
    view = ViewConfig(visual="blank", temporal="reversed")
    names = (*fields.view_outputs("blank"), *fields.view_outputs("reversed"))
    for name, value in zip(names, (-3.0, 1, -4.0, 0), strict=True):
        empty = (
            torch.full((4,), value) if isinstance(value, int) else ragged([[value] * n for n in (3, 1, 2, 2)])
        )
        stored[name] = empty
    signals, _ = batches.read_signals(meta(KEYS), (*names, fields.STATIC_CLIP), view)
    assert signals.logp_masked is not None and signals.logp_masked[2].tolist() == [-3.0, -3.0, 0.0]
    assert signals.logp_shuffled is not None and signals.logp_shuffled[1].tolist() == [-4.0, 0.0, 0.0]
    assert signals.has_visual.all() and not signals.has_temporal.any()


@pytest.mark.usefixtures("stored")
def test_a_method_without_views_reads_the_actors_log_probs() -> None:
    signals, _ = batches.read_signals(meta(KEYS), (), ViewConfig())
    assert signals.logp[0].tolist() == [-1.0, -2.0, -3.0]
    assert signals.logp_masked is None and signals.logp_shuffled is None
    assert not signals.has_visual.any() and not signals.has_temporal.any()
    assert signals.outcomes is None


@pytest.mark.usefixtures("stored")
def test_measures_are_read_if_a_pass_wrote_them() -> None:
    with_measures = (*OUTPUTS, *fields.MEASURES.values())
    signals, _ = batches.read_signals(meta(KEYS), with_measures, ViewConfig())
    assert signals.truncated_entropy is not None and signals.disagreement is not None
    assert signals.truncated_entropy[1].tolist() == [pytest.approx(0.35), 0.0, 0.0]
    assert signals.disagreement.tolist() == [[2, 9, 4], [2, 0, 0], [7, 1, 0], [7, 1, 0]]
    assert signals.collision is not None and signals.collision[1].tolist() == [0.25, 0.0, 0.0]
    plain, _ = batches.read_signals(meta(KEYS), OUTPUTS, ViewConfig())
    assert plain.truncated_entropy is None and plain.disagreement is None and plain.collision is None


@pytest.mark.usefixtures("stored")
def test_draws_know_an_answer_by_its_place_in_the_canonical_order() -> None:
    """Whatever the order in which the ranks hold the answers; and every step draws anew."""
    keys = ["b_0_0", "b_10_0", "a_0_0", "b_2_0"]
    signals, _ = batches.read_signals(meta(keys), OUTPUTS, ViewConfig(), run_seed=3, step=5)
    assert signals.row_keys is not None and signals.row_keys.dtype == torch.int64
    assert signals.row_keys.tolist() == [1, 3, 0, 2]
    assert signals.step == 5
    assert signals.seed == int.from_bytes(hashlib.blake2b(b"3/5", digest_size=8).digest(), "big") // 2
    seeds = {step_seed(run_seed, step) for run_seed in range(5) for step in range(100)}
    assert len(seeds) == 500 and max(seeds) < 2**63


def test_a_request_for_whole_groups_has_an_order_of_its_own() -> None:
    """Six answers to three prompts, in the order that balanced two ranks of the actor, on three ranks."""
    keys = ["b_0_0", "c_1_0", "a_0_0", "b_1_0", "a_1_0", "c_0_0"]
    batch = meta(keys)
    request = batches.pass_request(batch, 7, num_ranks=3)
    assert request.keys == ["a_0_0", "a_1_0", "b_0_0", "b_1_0", "c_0_0", "c_1_0"]
    assert [tag["key"] for tag in request.tags] == request.keys
    assert request.extra_info == {"global_step": 7} and request.fields == list(batches.PASS_INPUTS)
    assert batch.keys == keys and batches.pass_request(batch, 7).keys == keys


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("by_std", [True, False])
def test_rewards_of_an_answer_are_the_sum_over_its_tokens(by_std: bool) -> None:
    signals, _ = batches.read_signals(meta(KEYS), OUTPUTS, ViewConfig(), "rm_scores", by_std)
    assert signals.outcomes is not None
    assert signals.outcomes.rewards.tolist() == [1.0, 1.0, 2.0, 0.5]
    assert signals.outcomes.divide_by_std is by_std


@pytest.mark.usefixtures("stored")
def test_metrics_of_a_batch() -> None:
    signals, data = batches.read_signals(meta(KEYS), OUTPUTS, ViewConfig())
    assert batches.batch_metrics(meta(KEYS), signals, data) == {
        "attribution/groups_without_advantage": 0.5,  # all rewards of prompt b were equal
        "attribution/answer_vision_tokens": 7.0,
        "data/decodes": 2.0,
        "data/decoded_bytes": 1000.0,
        "data/cache_hits": 2.0,
        "data/media_put_bytes": 100.0,
        "attribution/static_clips": 1.0,  # one clip, two answers
    }
    padded = batches.batch_metrics(meta(KEYS, frozenset({3})), signals, data)
    assert padded["attribution/answer_vision_tokens"] == 3.0
    assert padded["data/decodes"] == 1.0


@pytest.mark.usefixtures("stored")
def test_metrics_without_a_shuffled_pass() -> None:
    signals, data = batches.read_signals(meta(KEYS), (), ViewConfig())
    assert "attribution/static_clips" not in batches.batch_metrics(meta(KEYS), signals, data)


@pytest.mark.usefixtures("stored")
def test_base_gap_is_the_largest_difference_at_an_answer_token() -> None:
    signals, data = batches.read_signals(meta(KEYS), OUTPUTS, ViewConfig())
    assert batches.base_gap(signals, data) == 0.5
    signals.logp[1, 2] = 100.0  # padding
    assert batches.base_gap(signals, data) == 0.5
    signals.logp[0, 0] = torch.nan
    assert not batches.base_gap(signals, data) <= 1e9  # the trainer's comparison then refuses it


def test_scores_of_other_weights_are_refused(stored: TensorDict) -> None:
    batches.require_version(stored, 7)
    with pytest.raises(WeightSyncError, match=r"scored step 8 with .* step\(s\) \[6\], not of step 7"):
        batches.require_version(stored, 8)
    stored[fields.VERSION][2] = 5
    with pytest.raises(WeightSyncError, match=r"step\(s\) \[5, 6\], not of step 6"):
        batches.require_version(stored, 7)


@pytest.mark.parametrize("advantages", [None, [0.5, -0.5, 1.0, -1.0]])
def test_weights_are_written_ragged_with_the_counts_of_the_batch(
    stored: TensorDict, monkeypatch: pytest.MonkeyPatch, advantages: list[float] | None
) -> None:
    written: dict[str, Any] = {}
    monkeypatch.setattr(batches.tq, "kv_batch_put", lambda **call: written.update(call))
    signals, data = batches.read_signals(meta(KEYS), OUTPUTS, ViewConfig())
    weights = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0.5, 0, 0], [0, 0, 0]])
    result = TokenWeights(
        weights=weights,
        selected=weights > 0,
        masks={},
        scores={},
        metrics={},
        advantages=None if advantages is None else torch.tensor(advantages),
    )
    batches.write_weights(meta(KEYS), result, signals.mask, data["response_mask"])
    assert written["keys"] == KEYS
    rows = {name: [row.tolist() for row in value.unbind()] for name, value in written["fields"].items()}
    assert rows[fields.TOKEN_WEIGHT] == [[1, 0, 1], [0], [0.5, 0], [0, 0]]
    assert rows[fields.LOSS_TOTALS] == [[4, 8, 3]] * 4
    # verl's own stay where nobody else computed any; the weights are the loss's business.
    assert rows.get("advantages") == (
        None if advantages is None else [[0.5] * 3, [-0.5], [1.0] * 2, [-1.0] * 2]
    )


def test_seconds_of_passes_are_those_of_the_slowest_rank() -> None:
    names = (fields.PASS_SECONDS, fields.pass_seconds("real"), fields.pass_seconds("masked"))
    data = TensorDict(
        {name: torch.tensor([1.0, 1.0, 2.5]) + number for number, name in enumerate(names)}
        | {fields.VERSION: torch.ones(3)},
        batch_size=[3],
    )
    assert batches.pass_metrics(data) == {
        "attribution/pass_s": 2.5,
        "attribution/pass_s/real": 3.5,
        "attribution/pass_s/masked": 4.5,
    }
