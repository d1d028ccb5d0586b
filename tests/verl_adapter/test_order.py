"""Answers on shuffled frames: asked for in training, shuffled as the view is, turned into rewards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from transfer_queue import KVBatchMeta

from keytoken.attribution.views import VIEWS, ModelInput, ViewContext, VisionFormat
from keytoken.errors import ConfigurationError
from keytoken.schema import OrderBonusConfig
from keytoken.verl_adapter import order

METADATA = {"fps": 2.0, "frames_indices": list(range(8)), "total_num_frames": 8, "duration": 4.0}


def frames_of(*looks: int) -> torch.Tensor:
    """One 56 by 56 frame for each number; equal numbers look alike."""
    pictures = torch.randint(0, 256, (10, 3, 56, 56), generator=torch.Generator().manual_seed(0))
    return pictures[list(looks)].to(torch.uint8)


@pytest.mark.parametrize(("shuffled", "group_size", "count"), [(None, 8, 4), (None, 3, 1), (2, 8, 2)])
def test_half_the_group_or_as_many_as_the_method_says(
    shuffled: int | None, group_size: int, count: int
) -> None:
    prompts = TensorDict({"index": torch.arange(3)}, batch_size=3)
    order.request(prompts, OrderBonusConfig(shuffled_answers=shuffled), group_size)
    assert prompts[order.SHUFFLED_ANSWERS] == [count] * 3
    # What verl does with a batch: it splits it over workers, and saves what is no single value.
    (*_, last) = prompts.chunk(2)
    assert [row.data for row in last.get(order.SHUFFLED_ANSWERS)] == [count] * len(last)
    assert not isinstance(prompts.get(order.SHUFFLED_ANSWERS), NonTensorData)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("prompt", ["0000001-00002", "0000001-00003"])
@pytest.mark.parametrize("looks", [range(8), (0, 0, 0, 1, 1, 1, 2, 2)])
def test_frames_are_shuffled_as_in_the_view(processor: Any, seed: int, prompt: str, looks: Any) -> None:
    """The processor makes of the shuffled frames what the shuffled view makes of the processor's pixels."""
    frames = frames_of(*looks)
    ((shuffled, metadata),) = order.shuffled_videos([(frames, METADATA)], seed, prompt) or []
    assert metadata == METADATA
    assert not torch.equal(shuffled, frames)
    real, wanted = (
        processor.video_processor(videos=[video], do_sample_frames=False, return_tensors="pt")
        for video in (frames, shuffled)
    )
    ids = torch.zeros(3, dtype=torch.int64)
    inputs = ModelInput(
        input_ids=ids, position_ids=ids[None], prompt_length=2, media=dict(real), prompt=prompt
    )
    format_ = VisionFormat(token_ids=(1, 2), temporal_patch_size=2)
    view = VIEWS["shuffled"].build(inputs, ViewContext(vision=format_, seed=seed))
    assert view is not None
    assert torch.equal(view.media["pixel_values_videos"], wanted["pixel_values_videos"])


def test_what_has_no_other_order_has_no_shuffled_answer() -> None:
    still = (frames_of(3, 3, 3, 3), METADATA)
    assert order.shuffled_videos(None, 0, "p") is None
    assert order.shuffled_videos([], 0, "p") is None
    assert order.shuffled_videos([still], 0, "p") is None
    assert order.shuffled_videos([(frames_of(3), METADATA)], 0, "p") is None
    moving = (frames_of(0, 1, 2, 3), METADATA)
    first, second = order.shuffled_videos([still, moving], 0, "p") or []
    assert first[0] is still[0]
    assert sorted(map(str, second[0].flatten(1).tolist())) == sorted(map(str, moving[0].flatten(1).tolist()))
    assert not torch.equal(second[0], moving[0])


@pytest.mark.parametrize("accuracy", [1, 0.25, True, np.float32(0.5)])
def test_an_accuracy_is_any_number(accuracy: Any) -> None:
    found = order.accuracy_of({"reward_extra_info": {"score": 2.0, "acc": accuracy}})
    assert found == float(accuracy) and type(found) is float


@pytest.mark.parametrize(
    ("extra_fields", "said"),
    [
        ({}, r"no acc but \[\]"),
        ({"reward_extra_info": {"score": 1.0, "format": 1.0}}, r"no acc but \['format', 'score'\]"),
        ({"reward_extra_info": {"acc": None}}, "acc=None"),
        ({"reward_extra_info": {"acc": float("nan")}}, "acc=nan"),
        ({"reward_extra_info": {"acc": "right"}}, "acc='right'"),
    ],
)
def test_a_reward_without_accuracy_is_refused(extra_fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"order_bonus.*{said}.*order_bonus=null"):
        order.accuracy_of(extra_fields)


# Key, whether it only fills the batch, rewards by token, accuracy, accuracy of the shuffled answer beside it.
# Prompt a gets the bonus (1/2 against 1/2), prompt b not (1/2 against 1), prompt c has no video.
ROWS: list[tuple[str, bool, list[float], float, float | None]] = [
    ("1-a_0_0", False, [0.0, 0.0, 1.75], 1.0, 0.0),
    ("1-b_0_0", False, [1.0], 1.0, 1.0),
    ("1-c_0_0", False, [0.0, 1.0], 1.0, None),
    ("1-a_1_0", False, [0.0, 0.25], 0.0, 1.0),
    ("1-b_1_0", False, [0.0, 0.0], 0.0, None),
    ("pad7_0_0", True, [0.0], 1.0, 0.0),  # verl copies the first row's extra_fields
    ("1-c_1_0", False, [0.0, 0.0], 0.0, None),
]
RAISED = {"1-a_0_0": [0.0, 0.0, 2.25]}


class Storage:
    """Stands where TransferQueue stands: rows by key."""

    def __init__(self, rows: list[tuple[str, bool, list[float], float, float | None]]) -> None:
        self.rewards = {key: rewards for key, _, rewards, _, _ in rows}
        self.extra = {
            key: {"reward_extra_info": {"acc": accuracy}}
            | ({} if beside is None else {"shuffled_accuracy": beside})
            for key, _, _, accuracy, beside in rows
        }
        self.asked: list[str] = []
        self.written: list[dict[str, Any]] = []

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        self.asked += keys
        assert partition_id == "train"
        rewards = [torch.tensor(self.rewards[key]) for key in keys]
        data = TensorDict(
            {"rm_scores": torch.nested.as_nested_tensor(rewards, layout=torch.jagged)}, batch_size=len(keys)
        )
        data["extra_fields"] = NonTensorStack(*(NonTensorData(self.extra[key]) for key in keys))
        return data.select(*select_fields)

    def kv_batch_put(self, **call: Any) -> None:
        self.written.append(call)


def raise_rewards(
    monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, bool, list[float], float, float | None]]
) -> tuple[Storage, dict[str, float]]:
    storage = Storage(rows)
    monkeypatch.setattr(order, "tq", storage)
    tags = [{"is_padding": True} if padding else {} for _, padding, _, _, _ in rows]
    batch = KVBatchMeta(partition_id="train", keys=[row[0] for row in rows], tags=tags)
    return storage, order.raise_rewards(batch, OrderBonusConfig(bonus=0.5))


def test_the_bonus_is_added_where_the_reward_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, metrics = raise_rewards(monkeypatch, ROWS)
    (call,) = storage.written
    assert call["partition_id"] == "train"
    written = dict(zip(call["keys"], call["fields"]["rm_scores"].unbind(), strict=True))
    real = {key: rewards for key, padding, rewards, _, _ in ROWS if not padding}
    assert {key: row.tolist() for key, row in written.items()} == real | RAISED
    assert "pad7_0_0" not in storage.asked
    assert metrics == {
        "reward/order_bonus_share": 0.5,
        "reward/ordered_accuracy": 0.5,
        "reward/shuffled_accuracy": 0.75,
    }


def test_nothing_is_written_where_no_bonus_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, metrics = raise_rewards(monkeypatch, [row for row in ROWS if "-a_" not in row[0]])
    assert storage.written == []
    assert metrics["reward/order_bonus_share"] == 0.0


def test_answers_without_an_accuracy_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Storage):
        def __init__(self, rows: Any) -> None:
            super().__init__(rows)
            self.extra = {key: {"reward_extra_info": {"score": 1.0}} for key in self.extra}

    monkeypatch.setattr(order, "tq", Silent(ROWS))
    batch = KVBatchMeta(partition_id="train", keys=["1-a_0_0"], tags=[{}])
    with pytest.raises(ConfigurationError, match="no acc but"):
        order.raise_rewards(batch, OrderBonusConfig())
