"""N11: verl's attention for Qwen2.5-VL with padding removed, on packs.

It needs flash-attn, which is replaced by what its documentation says; verl's function is the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention

from keytoken.errors import ConfigurationError
from keytoken.prefix.attention import Plan, share_prefix
from keytoken.prefix.packs import Pack, pack_inputs


@pytest.fixture
def qwen2_vl(tools: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's module with our shim, and with a flash-attn."""
    from keytoken.verl_adapter import compat  # noqa: F401  (applies the shims)

    # isort: split
    from verl.models.transformers import qwen2_vl

    monkeypatch.setattr(qwen2_vl, "flash_attn_varlen_func", tools.varlen, raising=False)
    # It would cast to bfloat16, in which flash-attn computes.
    monkeypatch.setattr(qwen2_vl, "fa_peft_integration_check", lambda *states, **_: states)
    for name in ("window_size", "deterministic"):
        monkeypatch.setattr(qwen2_vl, f"_flash_supports_{name}", False, raising=False)
    monkeypatch.setattr(qwen2_vl, "_flash_use_top_left_mask", False, raising=False)
    return qwen2_vl


@pytest.fixture
def pack(qwen2_5: Any) -> Pack:
    (pack,) = pack_inputs([one for one in qwen2_5.inputs if one.prompt == "walk"], 1000).packs
    return pack


@pytest.fixture
def truth(qwen2_5: Any, tools: Any) -> dict[int, torch.Tensor]:
    """By stock attention, taken before a test replaces it."""
    model = qwen2_5.model().eval()
    walks = [one for one in qwen2_5.inputs if one.prompt == "walk"]
    with torch.no_grad():
        return {place: tools.separate(model, one) for place, one in enumerate(walks)}


@pytest.fixture
def model(truth: Any, qwen2_5: Any) -> Iterator[Any]:
    with torch.no_grad():
        yield qwen2_5.model().eval()


def restarting_text_row(pack: Pack) -> torch.Tensor:
    """[4, 1, L] positions whose text row goes on from the prompt in every answer, as in a batch of rows."""
    positions, (tree,) = pack.position_ids.clone(), pack.trees
    starts = [torch.arange(tree.stem), *(tree.stem + torch.arange(length) for length in tree.branches)]
    positions[0] = torch.cat(starts)
    return positions[:, None]


def gap(pack: Pack, values: torch.Tensor, truth: dict[int, torch.Tensor]) -> float:
    return max(float((found - truth[place]).abs().max()) for place, found in pack.by_place(values).items())


def test_verls_attention_is_silently_wrong_on_packs(
    qwen2_vl: Any,
    qwen2_5: Any,
    model: Any,
    pack: Pack,
    truth: Any,
    tools: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verls = qwen2_vl.qwen2_vl_attn_forward.__wrapped__
    monkeypatch.setattr(Qwen2_5_VLAttention, "forward", verls)
    positions = restarting_text_row(pack)
    assert gap(pack, tools.packed(model, pack, position_ids=positions), truth) > 0.1

    # On what it was written for it is right: the same answers as rows of one batch without padding.
    rows = [one for one in qwen2_5.inputs if one.prompt == "walk"]
    logits = model(
        input_ids=torch.cat([one.input_ids for one in rows])[None],
        position_ids=torch.cat([one.position_ids for one in rows], dim=1)[:, None],
        **{name: torch.cat([one.media[name] for one in rows]) for name in rows[0].media},
        use_cache=False,
    ).logits[0]
    for place, (one, found) in enumerate(
        zip(rows, logits.split([len(one.input_ids) for one in rows]), strict=True)
    ):
        log_probs = found[one.prompt_length - 1 : -1].log_softmax(-1)
        labels = one.input_ids[one.prompt_length :, None]
        assert float((log_probs.gather(1, labels)[:, 0] - truth[place]).abs().max()) <= 1e-5


def test_packs_are_refused_where_verls_attention_would_get_them(
    qwen2_vl: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Qwen2_5_VLAttention, "forward", qwen2_vl.qwen2_vl_attn_forward.__wrapped__)
    with pytest.raises(ConfigurationError, match=r"replaced by verl.*qwen2_vl_attn_forward"):
        share_prefix(model)


def test_the_shim_sends_packs_to_the_stock_attention_and_the_rest_to_verl(
    qwen2_vl: Any,
    qwen2_5: Any,
    model: Any,
    pack: Pack,
    truth: Any,
    tools: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Qwen2_5_VLAttention, "forward", qwen2_vl.qwen2_vl_attn_forward)
    share_prefix(model)
    assert gap(pack, tools.packed(model, pack), truth) <= 1e-5
    calls = []
    monkeypatch.setattr(qwen2_vl, "flash_attn_varlen_func", partial(_counted, calls, tools.varlen))
    positions = restarting_text_row(pack)
    model(input_ids=pack.input_ids[None], position_ids=positions, **pack.media, use_cache=False)
    assert len(calls) == model.config.get_text_config().num_hidden_layers
    calls.clear()
    tools.packed(model, pack, Plan(pack.trees), position_ids=positions)
    assert not calls


def _counted(calls: list[int], function: Any, *args: Any, **options: Any) -> Any:
    calls.append(1)
    return function(*args, **options)
