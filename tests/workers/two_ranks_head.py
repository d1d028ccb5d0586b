"""Stand-alone program: an actor of two ranks computes its update with verl's head and with the fused one.

Usage: two_ranks_head.py INPUTS OUTPUT_FOLDER. INPUTS is a torch file with configurations by name
(``configs``), the batch of each rank (``batches``, with ``noise`` and ``reference_noise`` in place of old and
reference log-probs) and the loss (``loss``). Rank r writes ``rank<r>.pt``, for each configuration: with
``verl``, ``fused``, ``shared`` and ``by_tokens`` (shared, in micro-batches of so many tokens) the log-probs
of its answers, loss, gradients of all parameters, share of touched rows and number of forward passes; and how
many rows of the head it holds.
"""

import sys
from functools import partial
from typing import Any

import torch
from omegaconf import OmegaConf
from rank_processes import run_ranks

from keytoken import fields
from keytoken.losses.policy import LossTotals, loss_totals
from keytoken.verl_adapter.answer_engine import HeadSettings, set_head
from keytoken.verl_adapter.compat import no_padding_2_padding, tensordict_utils
from keytoken.verl_adapter.loss import token_weighted_loss
from keytoken.workers.actors import SeparateActorWorker

LIMIT_S = 180.0
SETTINGS = {
    "temperature": 0.8,
    "use_remove_padding": False,
    "use_fused_kernels": False,
    "use_dynamic_bsz": False,
    "micro_batch_size_per_gpu": 2,
    "calculate_entropy": False,
    "return_model_output": True,
}


def answers(output: Any, batch: Any) -> torch.Tensor:
    """[N] values of all answer tokens."""
    padded = no_padding_2_padding(output, batch)
    return padded[batch["response_mask"].to_padded_tensor(0).bool()]


def prepare(batches: list[Any], rank: int, log_probs: torch.Tensor) -> Any:
    """The batch of a rank, with log-probs near the current ones and the counts of both ranks."""
    own = batches[rank].copy()
    for name, noise in (("old_log_probs", "noise"), ("ref_log_prob", "reference_noise")):
        offsets = own["response_mask"].offsets()
        own[name] = torch.nested.nested_tensor_from_jagged(log_probs + own.pop(noise).values(), offsets)
    totals = LossTotals(num_responses=0, num_tokens=0, num_selected=0)
    for batch in batches:
        weights, mask = (batch[name].to_padded_tensor(0.0) for name in (fields.TOKEN_WEIGHT, "response_mask"))
        totals = totals + loss_totals(weights, mask.bool())
    counts = torch.tensor([totals.num_responses, totals.num_tokens, totals.num_selected])
    own[fields.LOSS_TOTALS] = counts.expand(len(own), 3).contiguous()
    return own


def update(
    worker: Any, batch: Any, loss: Any, settings: HeadSettings, **micro_batches: Any
) -> dict[str, Any]:
    engine, passes = worker.actor.engine, []
    set_head(engine, settings)
    batch = batch.copy()
    tensordict_utils.assign_non_tensor(batch, **micro_batches)
    handle = engine.module.register_forward_pre_hook(lambda *_: passes.append(1))
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(batch.copy(), partial(token_weighted_loss, config=loss))
        gradients = {
            name: parameter.grad.full_tensor().clone()
            for name, parameter in engine.module.named_parameters()
            if parameter.grad is not None
        }
        engine.optimizer_zero_grad()
    handle.remove()
    share = output["metrics"].get("kernels/head_backward_share")
    return {
        "loss": output["loss"],
        "log_probs": answers(output["model_output"]["log_probs"], batch),
        "gradients": gradients,
        "share": None if share is None else share.aggregate(),
        "passes": len(passes),
    }


def compare(rank: int, inputs: dict[str, Any]) -> dict[str, Any]:
    for batch in inputs["batches"]:
        tensordict_utils.assign_non_tensor(batch, **SETTINGS)
    return {name: both_heads(rank, config, inputs) for name, config in inputs["configs"].items()}


def both_heads(rank: int, config: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    worker = SeparateActorWorker(OmegaConf.create(config), role="actor")
    worker.init_model()
    own = inputs["batches"][rank]
    request = own.copy()
    tensordict_utils.assign_non_tensor(request, compute_loss=False)
    current = worker.compute_log_prob(request)["log_probs"]
    batch = prepare(inputs["batches"], rank, answers(current, own))
    head = worker.actor.engine.module.get_output_embeddings().weight
    shared = HeadSettings(fused=True, masked_loss=True, shared=True)
    by_tokens = {"use_dynamic_bsz": True, "max_token_len_per_gpu": inputs["max_tokens"]}
    return {
        "verl": update(worker, batch, inputs["loss"], HeadSettings()),
        "fused": update(worker, batch, inputs["loss"], HeadSettings(fused=True, masked_loss=True)),
        "shared": update(worker, batch, inputs["loss"], shared),
        "by_tokens": update(worker, batch, inputs["loss"], shared, **by_tokens),
        "local_rows": head.to_local().shape[0],
        "full_rows": head.shape[0],
    }


if __name__ == "__main__":
    sys.exit(run_ranks(compare, LIMIT_S))
