"""Attention over packs, registered with transformers: its models run unchanged, and so do their kernels.

After :func:`share_prefix` a forward pass that carries ``prefix_plan=Plan(...)`` follows the trees of a pack
in the text layers; one that does not is what it was before. The plan travels with the arguments of the pass,
so it is there again when activation checkpointing computes a layer a second time in the backward pass.

What computes is the implementation the model had, told of the trees in its own way:

- ``flash_attention_2``, ``_3``, ``_4``: one call over segments of unequal length, the keys of a stem gathered
  for each of its branches. No mask; trains. Not yet run on a GPU.
- ``flex_attention``: the trees as a block mask. Not yet run on a GPU.
- ``sdpa``: the stem causally, then its branches with a mask of their rows: one call for all with a gradient,
  which keeps keys and values once for them, and one for each without, which computes no pair it masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface

from keytoken.errors import ConfigurationError
from keytoken.prefix.layout import SHARING_ATTENTION, Tree, apart, families, key_segments, seen_by_branches

# In transformers' form: takes a module, queries [1, heads, L, D], keys and values [1, key heads, L, D], a
# mask and options; gives [1, L, heads, D], and the weights of attention or None.
Attention = Callable[..., tuple[Tensor, Tensor | None]]

# A replacement of a model's attention says by this attribute that it hands plans on.
HANDS_ON = "hands_on_prefix_plan"


class Plan:
    """What attention has to know of a pack; made once for a pass, and the same for all its layers.

    Args:
        trees: Where stems and branches lie (:attr:`keytoken.prefix.packs.Pack.trees`).
        device: Of the pass.
    """

    def __init__(self, trees: Sequence[Tree], device: torch.device | str = "cpu") -> None:
        self.trees = tuple(trees)
        self.device = torch.device(device)
        self._branch_masks = dict[tuple[torch.dtype, bool], list[list[Tensor]]]()

    @cached_property
    def segments(self) -> tuple[Tensor, dict[str, Any]]:
        """Places of the gathered keys, and the segments as transformers' flash attention takes them."""
        made = key_segments(self.trees)
        lengths = (made.query_lengths, made.key_lengths)
        starts = [torch.tensor([0, *one], device=self.device).cumsum(0, dtype=torch.int32) for one in lengths]
        options = {
            "cu_seq_lens_q": starts[0],
            "cu_seq_lens_k": starts[1],
            "max_length_q": max(made.query_lengths),
            "max_length_k": max(made.key_lengths),
        }
        return made.index.to(self.device), options

    @cached_property
    def block_mask(self) -> BlockMask:
        """The tree mask for flex attention."""
        segment, stem = (part.to(self.device) for part in families(self.trees))

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = segment[key] == segment[query]
            return (query >= key) & (own | (segment[key] == stem[query]))

        length = len(segment)
        return create_block_mask(sees, None, None, length, length, device=str(self.device))

    def branch_masks(self, dtype: torch.dtype, together: bool) -> list[list[Tensor]]:
        """For each tree the masks of its calls, [1, 1, a call's rows, stem and those rows], 0 or -inf.

        Numbers of the queries' ``dtype``: of a mask of truths sdpa would make them anew in every layer, and
        keep each for the backward pass.

        Args:
            dtype: Of the queries.
            together: One call for all branches of a tree, or one for each.
        """
        if (dtype, together) not in self._branch_masks:
            self._branch_masks[dtype, together] = [
                [self._additive(part, dtype) for part in ([tree] if together else apart([tree]))]
                for tree in self.trees
            ]
        return self._branch_masks[dtype, together]

    def _additive(self, tree: Tree, dtype: torch.dtype) -> Tensor:
        hidden = ~seen_by_branches(tree).to(self.device)
        return torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, -torch.inf)[
            None, None
        ]


def share_prefix(model: Any) -> None:
    """Let a model's text layers follow the plan of a forward pass that carries one.

    What transformers calls for the model's attention implementation is replaced in this process, for all
    models that use it; without a plan they see no difference. Twice is as good as once.

    Args:
        model: A transformers model of the Qwen-VL family.

    Raises:
        ConfigurationError: Its attention implementation cannot follow a plan, or its attention layers were
            replaced by a function that would swallow it: every answer would see the others.
    """
    config = model.config.get_text_config()
    name = config._attn_implementation
    follow = next((follow for start, follow in _FOLLOW.items() if name.startswith(start)), None)
    if follow is None:
        raise ConfigurationError(
            f"attn_implementation={name} cannot share a prompt between answers; set "
            "actor_rollout_ref.model.override_config.attn_implementation to sdpa, flash_attention_2 or "
            "flex_attention."
        )
    _refuse_replaced_attention(model, config)
    base = AttentionInterface()[name]
    if getattr(base, "func", None) is not _attend:
        AttentionInterface.register(name, partial(_attend, base=base, follow=follow))


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    base: Attention,
    follow: Callable[..., Tensor],
    prefix_plan: Plan | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: of a pack with a plan, of anything else without.

    transformers hands a plan to the vision tower as well, whose attention is not causal.
    """
    if prefix_plan is None or options.get("is_causal") is False:
        return base(module, query, key, value, attention_mask, **options)
    planned = sum(map(len, prefix_plan.trees))
    if query.shape[0] != 1 or query.shape[2] != planned or key.shape[2] != planned:
        raise ConfigurationError(
            f"a plan for one sequence of {planned} tokens came with queries {list(query.shape)} and keys "
            f"{list(key.shape)}; pass the plan of the very pack and use_cache=False, and split no sequence."
        )
    options.pop("position_ids", None)  # flash attention would look for the starts of sequences in it
    return follow(partial(base, module), query, key, value, prefix_plan, **options), None


def _segments(
    base: Attention, query: Tensor, key: Tensor, value: Tensor, plan: Plan, **options: Any
) -> Tensor:
    index, segments = plan.segments
    gathered = (tensor.index_select(2, index) for tensor in (key, value))
    return base(query, *gathered, None, **{**options, **segments, "is_causal": True})[0]


def _block_mask(
    base: Attention, query: Tensor, key: Tensor, value: Tensor, plan: Plan, **options: Any
) -> Tensor:
    return base(query, key, value, plan.block_mask, **options)[0]


def _stem_then_branches(
    base: Attention, query: Tensor, key: Tensor, value: Tensor, plan: Plan, **options: Any
) -> Tensor:
    found, start = [], 0
    for tree, masks in zip(plan.trees, plan.branch_masks(query.dtype, torch.is_grad_enabled()), strict=True):
        stem = slice(start, start + tree.stem)
        if tree.stem:
            parts = (tensor[:, :, stem] for tensor in (query, key, value))
            found.append(base(*parts, None, **{**options, "is_causal": True})[0])
        start = stem.stop
        for mask in masks:
            rows = slice(start, start + mask.shape[2])
            seen = (_behind(tensor, stem, rows) for tensor in (key, value))
            found.append(base(query[:, :, rows], *seen, mask, **{**options, "is_causal": False})[0])
            start = rows.stop
    return torch.cat(found, dim=1)


def _behind(tensor: Tensor, stem: slice, rows: slice) -> Tensor:
    """Stem and rows, copied only where something lies between them."""
    if rows.start == stem.stop:
        return tensor[:, :, stem.start : rows.stop]
    return torch.cat([tensor[:, :, stem], tensor[:, :, rows]], dim=2)


_FOLLOW: dict[str, Callable[..., Tensor]] = dict(
    zip(SHARING_ATTENTION, (_stem_then_branches, _segments, _block_mask), strict=True)
)


def _refuse_replaced_attention(model: Any, config: Any) -> None:
    """verl 0.9.1 replaces Qwen2.5-VL's for packed batches by one that swallows what it does not know."""
    for module in model.modules():
        if getattr(module, "config", None) is not config or not hasattr(module, "layer_idx"):
            continue
        forward = type(module).forward
        if forward.__module__ != type(module).__module__ and not hasattr(forward, HANDS_ON):
            raise ConfigurationError(
                f"{type(module).__name__}.forward was replaced by {forward.__module__}.{forward.__name__}, "
                "which knows nothing of shared prompts and would let every answer see the others. Set "
                "actor_rollout_ref.model.use_remove_padding=false."
            )
