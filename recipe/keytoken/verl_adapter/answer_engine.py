"""The actor's and the reference's engine with the head for answer positions: ``keytoken.kernels.head=fused``.

verl's own engine computes logits at every position of a batch, prompts and videos included, and the update
differentiates all of them. This one computes log-probs at answer positions
(:class:`keytoken.workers.answer_head.AnswerHead`) and hands them to verl in the form of its fused kernels, an
output with ``log_probs`` and ``entropy``; verl does the rest, packed or padded. Positions outside the answers
hold 0, which verl's losses and trainers never read (verl 0.9.1, workers/utils/padding.py).

With ``keytoken.prefix=shared`` the model is not given verl's batch of rows but a pack of them
(:class:`keytoken.workers.packed.PackedRows`), and verl's micro-batches hold whole groups where their size
allows it (:mod:`keytoken.verl_adapter.shims.shared_micro_batches`).

It imports verl directly because it is loaded while verl's engine module is (shims/resident_engine.py), before
:mod:`keytoken.verl_adapter.compat` can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData
from torch import Tensor
from verl.utils import tensordict_utils
from verl.utils.device import get_device_id
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from keytoken import fields
from keytoken.errors import ConfigurationError
from keytoken.prefix.attention import share_prefix
from keytoken.schema import KeyTokenConfig
from keytoken.verl_adapter.shims.shared_micro_batches import SHARED
from keytoken.workers.answer_head import AnswerHead, Score
from keytoken.workers.packed import PackedRows
from keytoken.workers.rows import answer_places, rows_of
from keytoken_kernels.dispatch import Impl
from keytoken_kernels.head import BackwardRecord, differentiable_head, head_log_probs

# Metrics of an update. verl puts "actor/" before them.
HEAD_FUSED = "kernels/head_fused"
HEAD_BACKWARD_SHARE = "kernels/head_backward_share"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSettings:
    """How an engine computes log-probs.

    Attributes:
        fused: At answer positions only; otherwise as verl does.
        impl: Implementation of the kernels (:func:`keytoken_kernels.dispatch.resolve`).
        masked_loss: Whether every term of the loss counts selected tokens only. Then a gradient at any other
            token is an error of the update.
        shared: Whether the answers of a micro-batch share their prompts; only with ``fused``.
    """

    fused: bool = False
    impl: Impl = "auto"
    masked_loss: bool = False
    shared: bool = False

    @classmethod
    def of(cls, keytoken: KeyTokenConfig) -> HeadSettings:
        """What ``keytoken.kernels`` and ``keytoken.method.loss`` say."""
        return cls(
            fused=keytoken.kernels.head == "fused",
            impl=keytoken.kernels.impl,
            masked_loss=keytoken.method.loss.counts_selected_only,
            shared=keytoken.kernels.head == "fused" and keytoken.prefix == "shared",
        )


class AnswerHeadEngine(FSDPEngineWithLMHead):
    """verl's FSDP language-model engine; with ``head_settings.fused`` its head serves answers only."""

    head_settings = HeadSettings()
    _answer_head: AnswerHead | None = None
    _packed: PackedRows | None = None
    _record: BackwardRecord | None = None

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        """verl's, and the metrics of the head if it is an update."""
        record = self._record = BackwardRecord()
        if self.head_settings.shared:
            data = data.copy()
            data[SHARED] = NonTensorData(True)
        output = super().forward_backward_batch(data, loss_function, forward_only=forward_only)
        if not forward_only:
            values = {HEAD_FUSED: float(self.head_settings.fused)}
            if self.head_settings.fused:
                values[HEAD_BACKWARD_SHARE] = record.share
            output["metrics"].update(Metric.from_dict(values, aggregation=AggregationType.MEAN))
        return output

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """verl's, with the head replaced while the model runs."""
        if not self.head_settings.fused:
            return super().forward_step(micro_batch, loss_function, forward_only)
        _require_answers(micro_batch)
        self._packed = PackedRows(rows_of(micro_batch)) if self.head_settings.shared else None
        answers = (part.to(get_device_id()) for part in _answers(micro_batch, self._packed))
        index, labels, selected = answers
        temperature, impl = _temperature(micro_batch), self.head_settings.impl
        score: Score = partial(head_log_probs, labels=labels, temperature=temperature, impl=impl)
        if not forward_only:
            score = partial(
                differentiable_head,
                labels=labels,
                temperature=temperature,
                impl=impl,
                expected_rows=selected if self.head_settings.masked_loss else None,
                record=self._record,
            )
        with AnswerHead(self.module, index, score) as self._answer_head:
            try:
                return super().forward_step(micro_batch, loss_function, forward_only)
            finally:
                self._answer_head = self._packed = None

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's, or those of a pack."""
        if self._packed is None:
            return super().prepare_model_inputs(micro_batch)
        return self._packed.model_inputs(get_device_id()), {}

    def prepare_model_outputs(
        self, output: Any, output_args: Any, micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        """verl's, which is told that the model returned log-probs and entropies itself."""
        if self._answer_head is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        log_probs, entropy = self._answer_head.read(output)
        micro_batch = micro_batch.copy()
        micro_batch["use_fused_kernels"] = NonTensorData(True)
        if self._packed is not None:
            # From here on as if verl had packed the rows one after the other.
            micro_batch["use_remove_padding"] = NonTensorData(True)
            rows = self._packed.pack.rows.to(log_probs.device)
            log_probs, entropy = (
                self._packed.over_sequences(values[0, rows])[None] for values in (log_probs, entropy)
            )
            nothing = torch.empty(0, device=log_probs.device)
            output_args = {"input_ids_rmpad_rolled": nothing, "temperature_rmpad": nothing, "pad_size": 0}
        output = SimpleNamespace(log_probs=log_probs, entropy=entropy)
        return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)


def set_head(engine: Any, settings: HeadSettings) -> None:
    """Tell an engine how to compute log-probs from now on.

    Raises:
        ConfigurationError: the fused head is asked of an engine that has none.
    """
    if isinstance(engine, AnswerHeadEngine):
        if settings.shared:
            share_prefix(engine.module)
        engine.head_settings = settings
    elif settings.fused:
        raise ConfigurationError(
            "keytoken.kernels.head=fused needs KeyToken's FSDP2 engine; this worker runs "
            f"{type(engine).__name__}. Set actor_rollout_ref.actor.strategy=fsdp2, or "
            "keytoken.kernels.head=verl."
        )


def _require_answers(micro_batch: TensorDict) -> None:
    for name in ("input_ids", "responses"):
        if name not in micro_batch.keys():  # noqa: SIM118 - a TensorDict is no dict
            raise ConfigurationError(
                "keytoken.kernels.head=fused computes log-probs of answers, but the batch holds no "
                f"{name!r}; use keytoken.kernels.head=verl."
            )


def _answers(micro_batch: TensorDict, packed: PackedRows | None) -> tuple[Tensor, Tensor, Tensor]:
    """Places and ids of all answer tokens, and which of them are selected, ``[N]`` each."""
    answers = list(micro_batch["responses"].unbind())
    weights = micro_batch.get(fields.TOKEN_WEIGHT, None)
    weights = [torch.ones_like(row) for row in answers] if weights is None else list(weights.unbind())
    if packed is None:
        in_place = tensordict_utils.get_non_tensor_data(micro_batch, "use_remove_padding", default=True)
        index = answer_places(_lengths(micro_batch["input_ids"].unbind()), _lengths(answers), in_place)
        return index, torch.cat(answers), torch.cat(weights) > 0
    pack = packed.pack
    selected = [weights[place] for place in pack.places]
    if len(pack.labels) != sum(map(len, selected)):  # the token that stands in where there is no answer
        return pack.rows, pack.labels, torch.zeros_like(pack.labels, dtype=torch.bool)
    return pack.rows, pack.labels, torch.cat(selected) > 0


def _lengths(rows: Any) -> Tensor:
    return torch.tensor([len(row) for row in rows])


def _temperature(micro_batch: TensorDict) -> float:
    temperature = micro_batch["temperature"]
    if isinstance(temperature, Tensor):
        raise ConfigurationError(
            "keytoken.kernels.head=fused takes one temperature for all answers; this batch has one for each. "
            "Use keytoken.kernels.head=verl."
        )
    return float(temperature)
