"""Engine against actor in every step: log-probs of the answers that are trained on.

The gate (:mod:`keytoken.verl_adapter.parity`) asks a few prompts in some steps; this looks at all answers in
all steps, for nothing: the engine's log-probs of what it sampled are stored, and the actor computes its own
anyway. Answers that were sampled with other weights than the current ones are left out, because they differ
by what was learned since.
"""

from typing import Any

import torch
from torch import Tensor
from transfer_queue import KVBatchMeta

from keytoken.errors import ParityError
from keytoken.verl_adapter.batch import read
from keytoken.verl_adapter.parity_samples import gate_bounds

ROLLOUT_LOG_PROBS = "rollout_log_probs"


def check_drift(trainer: Any, batch: KVBatchMeta, old_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """Compare the engine's log-probs of a batch with the actor's.

    Args:
        trainer: The running trainer.
        batch: The batch, after the pass of old log-probs.
        old_log_probs: ``[B, T]`` of the actor, nats.
        mask: ``[B, T]`` tokens that count.

    Returns:
        ``parity/rollout_gap_max`` and ``parity/rollout_gap_mean``, nats, over answers that were sampled with
        the current weights; nothing if there are none, or if the engine's log-probs are not those of whole
        distributions (``top_p``, ``top_k``) or not stored.

    Raises:
        ParityError: the mean is beyond the bound of the gate.
    """
    rollout = trainer.config.actor_rollout_ref.rollout
    whole = float(rollout.top_p) >= 1.0 and int(rollout.top_k) <= 0
    if trainer.keytoken.parity.prompts == 0 or not (rollout.calculate_log_probs and whole):
        return {}
    fresh = torch.tensor([_is_fresh(tag, trainer.global_steps - 1) for tag in batch.tags])
    counts = mask & fresh[:, None]
    if not bool(counts.any()):
        return {}
    sampled = read(batch, [ROLLOUT_LOG_PROBS])[ROLLOUT_LOG_PROBS].to_padded_tensor(0.0)
    gaps = (sampled - old_log_probs).abs().masked_fill(~counts, 0.0)
    mean, bound = float(gaps.sum() / counts.sum()), gate_bounds(trainer.config, trainer.keytoken.parity).mean
    row, token = divmod(int(gaps.argmax()), gaps.shape[1])
    if not mean <= bound:
        raise ParityError(
            f"Step {trainer.global_steps}: the engine's log-probs of its answers and the actor's differ by "
            f"{mean:.3g} nats on average, more than {bound:.3g} (keytoken.parity.log_prob_tolerance); most "
            f"at token {token} of answer {batch.keys[row]}: {float(sampled[row, token]):.6g} (vLLM engine), "
            f"{float(old_log_probs[row, token]):.6g} (actor). A weight sync was missed, or caches of the "
            "engine have outlived one; keytoken.parity.every_steps=1 asks the same prompts behind every sync "
            "and says more."
        )
    return {"parity/rollout_gap_max": float(gaps[row, token]), "parity/rollout_gap_mean": mean}


def _is_fresh(tag: dict[str, Any], version: int) -> bool:
    """Whether an answer, which is no padding, was sampled with these weights from end to end."""
    if tag.get("is_padding", False):
        return False
    return tag.get("min_global_steps") == tag.get("max_global_steps") == version
