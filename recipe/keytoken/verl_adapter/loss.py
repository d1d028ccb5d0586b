"""KeyToken's policy loss in the form verl's actor calls it.

A loss registered inside verl sees a fixed list of fields; the outer loss, installed once with
``set_loss_fn``, sees the whole batch and so the token weights (verl 0.9.1, workers/utils/losses.py:59).
"""

from typing import Any

import torch
from tensordict import TensorDict

from keytoken import fields
from keytoken.losses.denominators import LossTotals
from keytoken.losses.policy import PolicyLoss, policy_loss
from keytoken.schema import LossConfig
from keytoken.verl_adapter.compat import AggregationType, Metric, no_padding_2_padding


def token_weighted_loss(
    model_output: dict[str, Any],
    data: TensorDict,
    dp_group: Any = None,
    *,
    config: LossConfig,
    view: str = "masked",
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss of one micro-batch, scaled so that verl's average over ranks gives the whole mini-batch.

    Args:
        model_output: ``log_probs``, ragged over prompt and answer.
        data: the micro-batch, with the fields of :mod:`keytoken.fields`.
        dp_group: unused; verl passes it to every loss.
        config: objective, denominators, clipping and the other terms.
        view: the counterfactual view of the perception term.

    Returns:
        The scalar loss and its metrics.
    """
    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    num_ranks = data["dp_size"]
    totals = LossTotals(**_totals(data))
    names = ["response_mask", "old_log_probs", "advantages", fields.TOKEN_WEIGHT]
    names += ["ref_log_prob"] if config.kl_coef > 0.0 else []
    names += fields.view_outputs(view) if config.perception_coef > 0.0 else []
    padded = data.select(*names).to_padded_tensor()
    result = policy_loss(
        log_prob=log_prob,
        old_log_prob=padded["old_log_probs"],
        advantages=padded["advantages"],
        weights=padded[fields.TOKEN_WEIGHT],
        mask=padded["response_mask"].bool(),
        config=config,
        ref_log_prob=padded["ref_log_prob"] if config.kl_coef > 0.0 else None,
        masked_log_prob=_view_log_prob(padded, log_prob, view) if config.perception_coef > 0.0 else None,
        totals=totals,
    )
    return result.loss * num_ranks, _metrics(result, num_ranks)


def _view_log_prob(padded: TensorDict, log_prob: torch.Tensor, view: str) -> torch.Tensor:
    """[B, T] log-probs of the view; the current ones, which change nothing, in rows that have no such view.

    For those rows the passes write the log-probs of the old policy, from which later updates of the same
    batch would be pushed away.
    """
    view_log_prob, applies = (padded[name] for name in fields.view_outputs(view))
    return torch.where(applies.bool()[:, None], view_log_prob, log_prob.detach())


def _totals(data: TensorDict) -> dict[str, float]:
    responses, tokens, selected = data[fields.LOSS_TOTALS][0].tolist()
    return {"num_responses": responses, "num_tokens": tokens, "num_selected": selected}


def _metrics(result: PolicyLoss, num_ranks: int) -> dict[str, Any]:
    """verl sums a SUM metric over micro-batches and averages it over ranks, hence the factor.

    It also puts ``actor/`` before every name.
    """
    parts = {
        "policy_loss": result.policy_loss,
        "kl_loss": result.kl_loss,
        "perception_kl": result.perception_kl,
        "surprise": result.surprise,
        "clipped_share": result.clipped_share,
        "old_to_new_kl": result.old_to_new_kl,
        "responses_without_selected": result.num_unselected,
    }
    return {
        name: Metric(value=value.detach().float() * num_ranks, aggregation=AggregationType.SUM)
        for name, value in parts.items()
    }
