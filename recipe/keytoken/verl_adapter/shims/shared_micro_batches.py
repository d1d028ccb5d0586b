"""N12: micro-batches of answers that share their prompts.

Breaks nothing but costs: with dynamic batch sizes verl counts a prompt once for each answer to it, and puts
   answers into micro-batches by length, wherever their prompts are. A pack (:mod:`keytoken.workers.packed`)
   would find little to share, and fill a fraction of the tokens that a micro-batch may have.
Where: verl 0.9.1, workers/engine/utils.py:93-131, which fsdp/transformer_impl.py:739 calls.
Bound: verl==0.9.1.
Does: fills a micro-batch by the tokens of its pack, with whole groups where they have room. With a fixed
   number of answers in a micro-batch nothing changes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tensordict import TensorDict
from verl.utils import tensordict_utils
from verl.utils.device import get_device_name

from keytoken.errors import ConfigurationError
from keytoken.prefix.layout import Tree, bundled
from keytoken.workers.ranks import largest_over_ranks

# Set in a batch whose answers share prompts.
SHARED = "keytoken_shared"


def apply(transformer_impl: Any) -> None:
    """Replace the name by which verl's engine calls ``prepare_micro_batches``."""
    original = transformer_impl.prepare_micro_batches

    @functools.wraps(original)
    def prepare(data: TensorDict, dp_group: Any = None, **options: Any) -> tuple[list[TensorDict], Any]:
        read = functools.partial(tensordict_utils.get_non_tensor_data, data)
        if not (read(SHARED, default=False) and read("use_dynamic_bsz", default=True)):
            return original(data, dp_group=dp_group, **options)
        chosen = micro_batches(
            prompts=[str(uid) for uid in data["uid"]],
            lengths=[len(row) for row in data["input_ids"].unbind()],
            answers=[len(row) for row in data["responses"].unbind()],
            max_tokens=int(data["max_token_len_per_gpu"]),
        )
        chosen = at_least(chosen, largest_over_ranks(len(chosen), dp_group, get_device_name()))
        return [tensordict_utils.index_select_tensor_dict(data, rows) for rows in chosen], chosen

    transformer_impl.prepare_micro_batches = prepare


def micro_batches(
    prompts: Sequence[str], lengths: Sequence[int], answers: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Which rows go into which micro-batch; the answers to a prompt in as few as their tokens allow.

    Args:
        prompts: Of the rows.
        lengths: Tokens of prompt and answer.
        answers: Tokens of the answers.
        max_tokens: Most tokens of the pack that a micro-batch becomes.

    Raises:
        ConfigurationError: A prompt with one answer to it has more.
    """
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        if length - 1 > max_tokens:
            raise ConfigurationError(
                f"Row {row} (prompt {prompt}) has {length} tokens, more than the {max_tokens} of a "
                "micro-batch; raise actor_rollout_ref.actor.ppo_max_token_len_per_gpu, and "
                "log_prob_max_token_len_per_gpu of rollout and ref if they were set."
            )
    members = list(groups.values())
    trees = [
        Tree(lengths[rows[0]] - answers[rows[0]] - 1, tuple(max(answers[row], 1) for row in rows))
        for rows in members
    ]
    return [
        [members[number][place] for number, part in bundle for place in part]
        for bundle in bundled(trees, max_tokens)
    ]


def at_least(chosen: list[list[int]], count: int) -> list[list[int]]:
    """The same rows in ``count`` micro-batches: those with the most rows are halved."""
    chosen = list(chosen)
    while len(chosen) < count:
        largest = max(range(len(chosen)), key=lambda place: len(chosen[place]))
        rows = chosen[largest]
        if len(rows) == 1:
            raise ConfigurationError(
                f"Another rank needs {count} micro-batches for its answers, and this one has {len(chosen)} "
                "answers only. Raise actor_rollout_ref.actor.ppo_max_token_len_per_gpu."
            )
        chosen[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return chosen
