"""T-GRPO in verl: answers on shuffled frames beside the others, and the bonus that they decide.

The rules are in :mod:`keytoken.rewards.order`; here is what carries them:

1. The trainer asks for shuffled answers in every prompt that it sends out (:func:`request`). Validation sends
   its prompts out by itself, and so has none.
2. The agent loop of each of a prompt's first answers samples one more, with the frames of
   :func:`shuffled_videos`. It is scored by the run's own reward, as any answer, and never stored: only its
   accuracy travels, in the ``extra_fields`` of the answer beside it.
3. Before advantages are computed, the trainer raises the rewards (:func:`raise_rewards`).
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta

from keytoken.attribution.views.frames import changing_order
from keytoken.errors import ConfigurationError
from keytoken.rewards.order import order_bonuses
from keytoken.schema import OrderBonusConfig
from keytoken.verl_adapter.compat import tensordict_utils
from keytoken.verl_adapter.keys import place_of

# A field of a prompt: how many shuffled answers it is to have.
SHUFFLED_ANSWERS = "shuffled_answers"
# Key in ``extra_fields`` of an answer: accuracy of the shuffled answer that was sampled beside it.
SHUFFLED_ACCURACY = "shuffled_accuracy"

Video = tuple[Tensor, dict[str, Any]]  # uint8 frames [F, C, H, W] and their metadata


def request(prompts: TensorDict, config: OrderBonusConfig, group_size: int) -> None:
    """Ask for shuffled answers to prompts that are about to be sent out.

    Args:
        prompts: The prompts; get the field :data:`SHUFFLED_ANSWERS`.
        config: The bonus of order.
        group_size: Answers to each prompt that are trained on.
    """
    count = config.shuffled_answers or group_size // 2
    # A stack and not one value for all: verl keeps stacks when it saves the prompts of a running batch.
    tensordict_utils.assign_non_tensor_stack(prompts, SHUFFLED_ANSWERS, [count] * len(prompts))


def shuffled_videos(videos: Sequence[Video] | None, seed: int, prompt: str) -> list[Video] | None:
    """The videos of a prompt with their frames in another order, the one of the view ``shuffled``.

    Metadata stays, and with it every position: the model is told that these frames were seen at those times.

    Args:
        videos: Frames and metadata, or None.
        seed: Seed of the orders.
        prompt: Name of the prompt; its answers share the orders.

    Returns:
        New frames and the same metadata. A video that shows one picture is left as it is; None if there is
        no other.
    """
    changed = False
    result: list[Video] = []
    for number, (frames, metadata) in enumerate(videos or ()):
        order = changing_order(frames, seed, f"{prompt}/{number}")
        changed = changed or order is not None
        result.append((frames if order is None else frames[list(order)], metadata))
    return result if changed else None


def accuracy_of(extra_fields: Mapping[str, Any]) -> float:
    """The accuracy that the reward function gave an answer.

    Raises:
        ConfigurationError: It gave none.
    """
    info = extra_fields.get("reward_extra_info") or {}
    accuracy = info.get("acc")
    if not isinstance(accuracy, numbers.Real) or not math.isfinite(accuracy):
        raise ConfigurationError(
            "keytoken.method.order_bonus compares accuracies, and the reward function gave "
            f"{'acc=' + repr(accuracy) if 'acc' in info else 'no acc but ' + repr(sorted(info))}: return a "
            "number under 'acc' beside 'score' from reward.custom_reward_function, as "
            "keytoken.rewards.score does, or set keytoken.method.order_bonus=null."
        )
    return float(accuracy)


def raise_rewards(batch: KVBatchMeta, config: OrderBonusConfig) -> dict[str, float]:
    """Add the bonus to the rewards of a batch, before anything is computed from them.

    It changes ``rm_scores`` in storage, at the last token of an answer, where verl puts the reward: all that
    is later computed or written of the training rewards has the bonus in it. ``acc`` is left alone, and with
    it dynamic sampling by accuracy.

    Args:
        batch: The batch; rows that only fill it up are left out.
        config: The bonus of order.

    Returns:
        The metrics of :class:`keytoken.rewards.order.OrderBonuses`.

    Raises:
        ConfigurationError: The reward function gives no accuracy.
    """
    pairs = zip(batch.keys, batch.tags, strict=True)
    keys = [key for key, tag in pairs if not tag.get("is_padding", False)]
    data = tq.kv_batch_get(
        keys=keys, partition_id=batch.partition_id, select_fields=["extra_fields", "rm_scores"]
    )
    extra = [dict(getattr(value, "data", value)) for value in data["extra_fields"]]
    result = order_bonuses(
        [accuracy_of(row) for row in extra],
        [row.get(SHUFFLED_ACCURACY) for row in extra],
        [place_of(key)[0] for key in keys],
        config,
    )
    if any(result.bonuses):
        rewards = [row.clone() for row in data["rm_scores"].unbind()]
        for row, bonus in zip(rewards, result.bonuses, strict=True):
            row[-1] += bonus
        raised = {"rm_scores": torch.nested.as_nested_tensor(rewards, layout=torch.jagged)}
        tq.kv_batch_put(
            keys=keys, partition_id=batch.partition_id, fields=TensorDict(raised, batch_size=len(keys))
        )
    return result.metrics
