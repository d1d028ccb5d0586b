"""Batched passes of verl's real engine against one plain transformers forward for each sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from keytoken.errors import NonFiniteError
from keytoken.workers import passes
from keytoken.workers.passes import PassSettings, score_rows
from keytoken.workers.rows import Row, rows_of

SETTINGS = PassSettings(micro_batch_size=16, temperature=1.0, use_remove_padding=False)
BOTH_WAYS = pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])


def expected(logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """[R] log-probs in nats, by float64."""
    rows = (logits.double() / temperature).log_softmax(-1)
    return rows.gather(1, labels[:, None]).squeeze(1).float()


def assert_equal_to_truth(
    scored: list[torch.Tensor],
    mixed: dict[str, Any],
    logits: dict[str, torch.Tensor],
    temperature: float = 1.0,
) -> None:
    for (name, example), values in zip(mixed.items(), scored, strict=True):
        assert values.dtype == torch.float32
        assert values.shape == (example.response_length,), name
        wanted = expected(logits[name], example.labels, temperature)
        torch.testing.assert_close(
            values, wanted, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@BOTH_WAYS
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_mixed_batch_equals_one_forward_for_each_row(
    engine: Any,
    mixed: dict[str, Any],
    truth: dict[str, dict[str, torch.Tensor]],
    as_batch: Callable[..., TensorDict],
    temperature: float,
    shared: bool,
) -> None:
    rows = rows_of(as_batch(list(mixed.values())))
    settings = dataclasses.replace(SETTINGS, temperature=temperature, shared=shared)
    assert_equal_to_truth(score_rows(engine, rows, settings, "real"), mixed, truth["real"], temperature)


@BOTH_WAYS
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_the_micro_batch_size_does_not_matter(
    engine: Any,
    mixed: dict[str, Any],
    truth: dict[str, dict[str, torch.Tensor]],
    as_batch: Callable[..., TensorDict],
    micro_batch_size: int,
    shared: bool,
) -> None:
    """With micro-batches of one there is an empty answer alone in one of them."""
    settings = dataclasses.replace(SETTINGS, micro_batch_size=micro_batch_size, shared=shared)
    rows = rows_of(as_batch(list(mixed.values())))
    assert_equal_to_truth(score_rows(engine, rows, settings, "real"), mixed, truth["real"])


@BOTH_WAYS
def test_no_rows_give_no_log_probs(engine: Any, shared: bool) -> None:
    assert score_rows(engine, [], dataclasses.replace(SETTINGS, shared=shared), "shuffled") == []


def test_a_prompt_is_computed_once_for_its_answers(
    engine: Any, mixed: dict[str, Any], as_batch: Callable[..., TensorDict]
) -> None:
    """Tokens that the model reads and clips that its vision tower sees, for two answers to one video."""
    rows = rows_of(as_batch([mixed["video"], mixed["same video"]]))
    read, seen = [], []
    handles = [
        engine.module.get_input_embeddings().register_forward_hook(
            lambda _, ids, __: read.append(ids[0].numel())
        ),
        engine.module.model.visual.register_forward_pre_hook(
            lambda _, __, named: seen.append(len(named["grid_thw"])), with_kwargs=True
        ),
    ]
    for shared in (False, True):
        score_rows(engine, rows, dataclasses.replace(SETTINGS, shared=shared), "real")
    for handle in handles:
        handle.remove()
    prompt, answers = rows[0].prompt_length, [row.response_length for row in rows]
    # The last token of the prompt stands before each answer, the last token of an answer predicts nothing.
    assert read == [2 * max(map(len, rows)), prompt - 1 + sum(answers)]
    assert seen == [2, 1]


def test_the_head_reads_answer_positions_only(
    engine: Any,
    mixed: dict[str, Any],
    as_batch: Callable[..., TensorDict],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The transformer gives hidden states of whole sequences; logits are made of the answers' alone."""
    rows = rows_of(as_batch(list(mixed.values())))
    seen: dict[str, Any] = {}
    original = passes.head_measures

    def recorded(hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen["scored"] = hidden.shape
        return original(hidden, *args, **options)

    def around_head(_: Any, args: Any, output: torch.Tensor) -> None:
        seen["hidden"], seen["output"] = args[0].shape, output.shape

    monkeypatch.setattr(passes, "head_measures", recorded)
    head = engine.module.get_output_embeddings()
    handle = head.register_forward_hook(around_head)
    score_rows(engine, rows, SETTINGS, "real")
    handle.remove()
    width = max(map(len, rows))
    assert seen["hidden"] == (len(rows), width, head.in_features)
    assert seen["scored"] == (sum(row.response_length for row in rows), head.in_features)
    assert seen["output"] == (len(rows), width, 1)  # the log-prob in place of the vocabulary


def test_a_bad_weight_is_named_with_its_row(
    engine: Any, encoder: Any, as_batch: Callable[..., TensorDict], mixed: dict[str, Any]
) -> None:
    """NaN in the embedding of a word that one answer alone holds, in the second micro-batch."""
    rare = encoder.processor.tokenizer.convert_tokens_to_ids("<think>")
    examples = [mixed["video"], mixed["text"], encoder.example("p9", [3, rare, 4]), mixed["image"]]
    assert not any((example.input_ids == rare).any() for example in mixed.values())
    with torch.no_grad():
        engine.module.get_input_embeddings().weight.to_local()[rare] = torch.nan
    settings = PassSettings(micro_batch_size=2, temperature=1.0, use_remove_padding=False)
    message = r"The shuffled pass gave a log-prob of nan at token 0 of the answer in row 2 \(prompt p9\)"
    with pytest.raises(NonFiniteError, match=message):
        score_rows(engine, rows_of(as_batch(examples)), settings, "shuffled")


def test_the_first_bad_token_is_named() -> None:
    rows = [Row(torch.arange(5), torch.zeros(4, 5), 3, {}, prompt=f"p{n}", number=n) for n in (4, 6)]
    fine, bad = torch.tensor([[-1.0, 0.0, -80.0]]), torch.tensor([[-1.0, -torch.inf, torch.nan]])
    passes._refuse_non_finite(rows, [fine, fine], "real", ("log_prob",))
    with pytest.raises(NonFiniteError, match=r"log-prob of -inf at token 1 .* row 6 \(prompt p6\)"):
        passes._refuse_non_finite(rows, [fine, bad], "real", ("log_prob",))
    measured = [torch.cat([fine, bad])] * 2
    with pytest.raises(NonFiniteError, match=r"a disagreement of -inf at token 1 .* row 4 \(prompt p4\)"):
        passes._refuse_non_finite(rows, measured, "real", ("log_prob", "disagreement"))


def test_a_placeholder_in_the_answer_of_a_text_prompt_is_a_word(
    engine: Any,
    placeholder_answer: Any,
    as_batch: Callable[..., TensorDict],
    truth: dict[str, dict[str, torch.Tensor]],
) -> None:
    (scored,) = score_rows(engine, rows_of(as_batch([placeholder_answer])), SETTINGS, "real")
    wanted = expected(truth["placeholder"]["text"], placeholder_answer.labels)
    torch.testing.assert_close(scored, wanted, atol=1e-5, rtol=0)


def test_padded_rows_read_the_right_places() -> None:
    """Indices against a table of who predicts whom, with an empty answer among them."""
    rows = [
        Row(torch.arange(length), torch.zeros(4, length, dtype=torch.long), answer, {})
        for length, answer in ((5, 2), (3, 0), (4, 3))
    ]
    assert passes.answer_row_index(rows, use_remove_padding=False).tolist() == [2, 3, 10, 11, 12]
    assert passes.answer_row_index(rows, use_remove_padding=True).tolist() == [2, 3, 8, 9, 10]
