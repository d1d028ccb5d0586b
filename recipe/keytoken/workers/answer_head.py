"""The language-model head for answer positions only, inside an ordinary forward pass of the model.

The transformer runs over whole sequences; of its hidden states the head needs those that predict an answer
token. While an :class:`AnswerHead` is active, the model's output embedding takes these rows out, hands them
with its weight to a scoring function, and returns what that made of them where the logits would be: ``K``
numbers of each row, such as log-prob and entropy, ``[B, L, K]`` instead of ``[B, L, V]``.

The numbers enter and leave through the module's own call. So FSDP2 has gathered the weight when they are
computed, and its hook on the output gathers it again before their backward pass runs, as it does for ordinary
logits. It works for packed and padded batches, and for every model that ends in a linear layer without bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keytoken.errors import ConfigurationError

# Hidden states [N, H] and the head's weight [V, H] to one or more tensors [N] of one dtype.
Score = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
_REMEDY = "Use a model of the Qwen-VL family, or, for the actor, keytoken.kernels.head=verl."


class AnswerHead:
    """Context in which ``model`` computes scores at ``index`` instead of logits everywhere.

    Example::

        with AnswerHead(model, index, score) as head:
            log_probs, entropy = head.read(model(**inputs))

    Args:
        model: a transformers model, sharded or not.
        index: ``[N]`` places in the flattened batch whose hidden states are scored, each at most once.
        score: what is computed for these rows, with or without a gradient.

    Raises:
        ConfigurationError: the model does not end in a plain linear layer.
    """

    def __init__(self, model: Any, index: Tensor, score: Score) -> None:
        self._head = _plain_head(model)
        self._index = index
        self._score = score
        self._results: list[Tensor] = []

    def __enter__(self) -> AnswerHead:
        self._replaced = vars(self._head).get("forward")
        self._head.forward = self._forward
        return self

    def __exit__(self, *_: object) -> None:
        del self._head.forward
        if self._replaced is not None:
            self._head.forward = self._replaced

    def read(self, output: Any) -> tuple[Tensor, ...]:
        """What the score gave, read off a model's output: ``[B, L]`` each, 0 outside ``index``.

        Raises:
            ConfigurationError: the head did not run exactly once, or the model changed what it returned.
        """
        if len(self._results) != 1:
            raise ConfigurationError(
                f"The language-model head ran {len(self._results)} times in one forward pass instead of "
                "once: set actor_rollout_ref.model.use_fused_kernels=false."
            )
        (result,) = self._results
        if output.logits is not result:
            raise ConfigurationError(
                f"The model changes its logits after the head ({type(output).__name__}.logits is another "
                f"tensor), as models with a logit scale or a soft cap do. {_REMEDY}"
            )
        return tuple(result[..., number] for number in range(result.shape[-1]))

    def _forward(self, hidden: Tensor) -> Tensor:
        """What the head computes instead of logits: ``[B, L, H]`` to ``[B, L, K]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            rows = hidden.flatten(0, -2).index_select(0, self._index)
            values = torch.stack(self._score(rows, self._head.weight), dim=-1)
        width = hidden.shape[-2]
        # Not a view of a flat tensor: FSDP2 warns of views, whose hooks are lost by an in-place operation.
        places = (self._index // width, self._index % width)
        result = values.new_zeros(*hidden.shape[:-1], values.shape[-1]).index_put(places, values)
        self._results.append(result)
        return result


def _plain_head(model: Any) -> Any:
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise ConfigurationError(
            f"The output embedding of {type(model).__name__} is {head!r}; log-probs of answer positions are "
            f"computed from the weight of a linear layer without bias. {_REMEDY}"
        )
    return head
