"""Between TransferQueue and the pure core: read the signals of a batch, write its token weights."""

from collections import Counter

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta

from keytoken import fields
from keytoken.attribution.types import Outcomes, Signals, TokenWeights
from keytoken.attribution.views.frames import step_seed
from keytoken.errors import WeightSyncError
from keytoken.losses.policy import loss_totals
from keytoken.schema import ViewConfig
from keytoken.verl_adapter.agent_loop import ANSWER_VISION_TOKENS, CLIP_READS, MEDIA_PUT_BYTES
from keytoken.verl_adapter.balance import canonical, order_of_whole_groups
from keytoken.verl_adapter.compat import response_to_nested

# What the attribution passes read; everything else stays in storage.
PASS_INPUTS = ("input_ids", "position_ids", "responses", "multi_modal_inputs", "uid")
# What the trainer reads back, besides the outputs of the passes.
SIGNAL_FIELDS = (
    "uid",
    "responses",
    "response_mask",
    "old_log_probs",
    "entropy",
    "advantages",
    "extra_fields",
)


def pass_request(
    batch: KVBatchMeta, global_step: int, num_ranks: int | None = None, *, strict: bool = True
) -> KVBatchMeta:
    """The batch as the attribution passes ask for it.

    Args:
        batch: the batch, in the order of the actor's ranks.
        global_step: step that the scores are for.
        num_ranks: ranks that share the passes, if all answers to a prompt should come to the same one. Then
            the request has an order of its own; what a pass writes is known by its key, not by its place.
        strict: whether they have to.

    Raises:
        ConfigurationError: see :func:`keytoken.verl_adapter.balance.order_of_whole_groups`.
    """
    request = KVBatchMeta(
        partition_id=batch.partition_id,
        keys=list(batch.keys),
        tags=batch.tags,
        fields=list(PASS_INPUTS),
        extra_info={"global_step": global_step},
    )
    if num_ranks is not None:
        request.reorder(order_of_whole_groups(request, num_ranks, strict=strict))
    return request


def read(batch: KVBatchMeta, names: list[str]) -> TensorDict:
    """Fetch fields of a batch."""
    return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)


def read_signals(
    batch: KVBatchMeta,
    outputs: tuple[str, ...],
    view: ViewConfig,
    reward: str | None = None,
    divide_by_std: bool = True,
    *,
    run_seed: int = 0,
    step: int = 1,
) -> tuple[Signals, TensorDict]:
    """The signals of a batch, padded, and the ragged tensors they came from.

    Args:
        batch: the batch, after the old-log-prob pass and the attribution passes.
        outputs: the pass outputs that were written; empty for a method without passes.
        view: the views behind the visual and the temporal signal.
        reward: the field of the token-level rewards; None if nobody needs them.
        divide_by_std: whether advantages are divided by a standard deviation.
        run_seed: seed of the run; with the step it gives that of the method's ties and draws.
        step: the global step.
    """
    data = read(batch, [*SIGNAL_FIELDS, *outputs, *([reward] if reward else [])])
    padded = {
        name: data[name].to_padded_tensor(0.0) if data[name].is_nested else data[name]
        for name in ("responses", "response_mask", "old_log_probs", "entropy", *outputs)
    }
    groups = np.unique(np.array([str(uid) for uid in data["uid"]]), return_inverse=True)[1]
    size = len(batch)
    real = padded.get(fields.REAL_LOG_PROB, padded["old_log_probs"])
    (visual, has_visual), (temporal, has_temporal) = map(fields.view_outputs, (view.visual, view.temporal))
    outcomes = None
    if reward:
        outcomes = Outcomes(
            rewards=data[reward].to_padded_tensor(0.0).sum(dim=-1), divide_by_std=divide_by_std
        )
    signals = Signals(
        logp=real,
        logp_masked=padded.get(visual),
        logp_shuffled=padded.get(temporal),
        entropy=padded["entropy"],
        mask=padded["response_mask"].bool(),
        group=torch.from_numpy(groups),
        has_visual=padded.get(has_visual, torch.zeros(size)).bool(),
        has_temporal=padded.get(has_temporal, torch.zeros(size)).bool(),
        outcomes=outcomes,
        truncated_entropy=padded.get(fields.TRUNCATED_ENTROPY),
        disagreement=padded.get(fields.DISAGREEMENT),
        collision=padded.get(fields.COLLISION),
        tokens=padded["responses"].long(),
        row_keys=torch.tensor(canonical(batch.keys)).argsort(),
        seed=step_seed(run_seed, step),
        step=step,
    )
    return signals, data


def write_weights(
    batch: KVBatchMeta, result: TokenWeights, mask: Tensor, response_mask: Tensor
) -> KVBatchMeta:
    """Write token weights, the counts that the loss divides by, and advantages if there are any.

    The advantages of a row's tokens are those of the row: the loss multiplies by the weights.

    Returns:
        The batch that holds them.
    """
    totals = loss_totals(result.weights, mask)
    counts = torch.tensor([totals.num_responses, totals.num_tokens, totals.num_selected])
    output = {
        fields.TOKEN_WEIGHT: response_to_nested(result.weights, response_mask),
        fields.LOSS_TOTALS: counts.expand(len(batch), 3).contiguous(),
    }
    if result.advantages is not None:
        output["advantages"] = response_to_nested(result.advantages[:, None] * mask, response_mask)
    return tq.kv_batch_put(
        keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(output, batch_size=len(batch))
    )


def batch_metrics(batch: KVBatchMeta, signals: Signals, data: TensorDict) -> dict[str, float]:
    """What a batch holds that teaches nothing, or that should not be there.

    Returns:
        ``attribution/groups_without_advantage``: share of prompts whose answers all have the advantage 0,
        because their rewards are equal. ``attribution/answer_vision_tokens``: vision tokens that the policy
        put into its answers and that were cut off. ``attribution/static_clips``: prompts whose videos show
        one picture only and so have no temporal score. ``data/decodes`` and ``data/decoded_bytes``: clips
        decoded for these answers, and the bytes of their frames. ``data/cache_hits``: clips that the frame
        cache had. ``data/media_put_bytes``: bytes of pixels put into the data plane for these answers, once
        for each prompt (:mod:`keytoken.verl_adapter.media`).
    """
    real = [not tag.get("is_padding", False) for tag in batch.tags]
    advantages = data["advantages"].to_padded_tensor(0.0)
    groups = signals.group[real].unique()
    taught = signals.group[(advantages != 0).any(dim=1)].unique()
    stored = zip(data["extra_fields"], real, strict=True)
    extra = [dict(getattr(value, "data", value)) for value, counts in stored if counts]
    reads = Counter[str]()
    for row in extra:
        reads.update(row[CLIP_READS])
    metrics = {
        "attribution/groups_without_advantage": 1.0 - len(taught) / max(len(groups), 1),
        "attribution/answer_vision_tokens": float(sum(row[ANSWER_VISION_TOKENS] for row in extra)),
        "data/decodes": float(reads["decodes"]),
        "data/decoded_bytes": float(reads["decoded_bytes"]),
        "data/cache_hits": float(reads["hits"]),
        "data/media_put_bytes": float(sum(row[MEDIA_PUT_BYTES] for row in extra)),
    }
    if fields.STATIC_CLIP in data.keys():  # noqa: SIM118 - a TensorDict is no dict
        static = signals.group[data[fields.STATIC_CLIP].bool()]
        metrics["attribution/static_clips"] = float(len(static.unique()))
    return metrics


def pass_metrics(data: TensorDict) -> dict[str, float]:
    """What the passes took on the slowest rank, in seconds.

    Returns:
        ``attribution/pass_s`` for all of them, ``attribution/pass_s/<view>`` for each; ``real`` is the one
        over the real input, with its measures.
    """
    timed = [name for name in data.keys() if name.startswith(fields.PASS_SECONDS)]  # noqa: SIM118
    views = [name.removeprefix(fields.PASS_SECONDS).replace("_", "/", 1) for name in timed]
    return {
        f"attribution/pass_s{view}": float(data[name].max()) for name, view in zip(timed, views, strict=True)
    }


def base_gap(signals: Signals, data: TensorDict) -> float:
    """Largest difference between the real log-probs of the attribution group and the actor's, in nats."""
    actor = data["old_log_probs"].to_padded_tensor(0.0)
    gap = (signals.logp - actor).abs().masked_fill(~signals.mask, 0.0)
    return float(gap.max()) if gap.numel() else 0.0


def require_version(data: TensorDict, global_step: int) -> None:
    """Refuse scores of weights that are not the ones the actor trained last.

    Raises:
        WeightSyncError: some row was scored with other weights.
    """
    versions = {int(version) for version in data[fields.VERSION]}
    if versions != {global_step - 1}:
        raise WeightSyncError(
            f"The attribution group scored step {global_step} with the weights of step(s) "
            f"{sorted(versions)}, not of step {global_step - 1}: a weight sync was missed. Restart the run; "
            "trainer.resume_mode=auto continues from the last checkpoint."
        )
