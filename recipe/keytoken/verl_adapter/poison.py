"""NaN and infinity in a batch: they end the run, or the update is left out, before they reach the weights.

What the trainer reads of a batch is looked at before anything is made of it (:func:`require_finite_batch`). A
gradient that is not finite verl leaves out by itself, with a line in a worker's log (verl 0.9.1,
transformer_impl.py:823); :class:`SkippedUpdates` counts them where the run can be seen.
"""

import math
from typing import Any

from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta

from keytoken.errors import NonFiniteError
from keytoken.verl_adapter.keys import place_of

# One batch may be beyond half precision; a model that is broken gives none but such.
MAX_SKIPPED = 3

_OF_THE_MODEL = (
    "The weights or the pixels hold NaN or infinity, or the precision has no room for them: look at "
    "actor/grad_norm of the steps before, and go on from a checkpoint before them with a lower "
    "actor_rollout_ref.actor.optim.lr."
)
_OF_THE_REWARD = (
    "The reward function gave it (reward.custom_reward_function): let it return a number for any answer; "
    "`keytoken doctor` tries it."
)
_REMEDIES = {
    "old_log_probs": _OF_THE_MODEL,
    "entropy": _OF_THE_MODEL,
    "rm_scores": _OF_THE_REWARD,
    "token_level_rewards": _OF_THE_REWARD,
    "advantages": _OF_THE_REWARD,
}


def require_finite_batch(batch: KVBatchMeta, data: TensorDict, step: int) -> None:
    """Refuse a batch that would poison selection, loss or weights.

    Args:
        batch: Names the rows.
        data: Ragged fields of the batch, a value for each token of an answer.
        step: The global step.

    Raises:
        NonFiniteError: names the step, the field, the prompt, the answer and the token.
    """
    for name, remedy in _REMEDIES.items():
        if name not in data.keys():  # noqa: SIM118 - a TensorDict is no dict
            continue
        values: Tensor = data[name].to_padded_tensor(0.0)
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, token = bad[0].tolist()
            prompt, answer, _ = place_of(batch.keys[row])
            raise NonFiniteError(
                f"Step {step}: {name} of prompt {prompt}, answer {answer}, is {values[row, token].item()} at "
                f"token {token} ({len(bad)} such values in the batch). {remedy}"
            )


class SkippedUpdates:
    """Counts steps whose gradient was not finite, so that verl left an update out."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def note(self, step: int, metrics: dict[str, Any]) -> None:
        """Look at a step that has been made.

        Metrics: ``actor/update_skipped``: 1 if an update of the step was left out.

        Raises:
            NonFiniteError: it was in :data:`MAX_SKIPPED` steps in a row.
        """
        norm = metrics.get("actor/grad_norm", 0.0)
        skipped = not math.isfinite(norm)
        metrics["actor/update_skipped"] = float(skipped)
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row >= MAX_SKIPPED:
            raise NonFiniteError(
                f"Step {step}: the gradient is {norm}, as in the {MAX_SKIPPED - 1} steps before, and none of "
                "them has changed the weights. Lower actor_rollout_ref.actor.optim.lr, or compute in another "
                "precision (actor_rollout_ref.actor.fsdp_config.mixed_precision)."
            )
