"""Against the model's own forward pass, one unpadded row at a time."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from keytoken.attribution.views import ModelInput
from keytoken.demo import model as demo_model
from keytoken.demo.batches import Encoder, clip_example
from keytoken.study.policy import FORBIDDEN, Model, answer_ids, answer_logits, sample
from keytoken.study.prompts import Prompt, processor, split_question

LIMIT = 6


def plain_logits(model: Model, row: ModelInput) -> Tensor:
    hidden = model.model(
        input_ids=row.input_ids[None], position_ids=row.position_ids[:, None], use_cache=False, **row.media
    ).last_hidden_state[0]
    return model.lm_head(hidden[row.prompt_length - 1 : -1])


def ids_of(*tokens: str) -> list[int]:
    return processor().tokenizer.convert_tokens_to_ids(list(tokens))


def answers_of(model: Model, prompts: tuple[Prompt, ...], noise: np.ndarray) -> list[list[Tensor]]:
    end = int(processor().tokenizer.eos_token_id)
    return sample(model, prompts, noise, temperature=0.7, end=end, forbidden=ids_of(*FORBIDDEN), greedy=True)


@pytest.fixture
def noise(prompts: tuple[Prompt, ...]) -> np.ndarray:
    return np.random.default_rng(0).random((len(prompts), 2, LIMIT))


def test_encoded_prompts_are_those_of_the_encoder(prompts: tuple[Prompt, ...]) -> None:
    encoder = Encoder(processor(), demo_model.TOKENS_PER_SECOND)
    assert {prompt.family for prompt in prompts} >= {"motion", "text"}
    for index, prompt in enumerate(prompts):
        question, rng = split_question("standard", "train", index)
        batch = encoder.batch([clip_example(question, rng)])
        answer = batch.input_ids[0, prompt.input_ids.numel() :]
        row = prompt.with_answer(answer)
        assert torch.equal(row.input_ids, batch.input_ids[0])
        assert torch.equal(row.position_ids, batch.position_ids[:, 0])
        assert row.media.keys() == batch.vision.keys()
        assert all(torch.equal(row.media[name], batch.vision[name]) for name in row.media)
        assert prompt.letter == question.letter and prompt.family == question.family


def test_logits_equal_a_plain_forward(model: Model, prompts: tuple[Prompt, ...]) -> None:
    """Ragged rows, equal prompts side by side, equal ids with other pixels, text between clips."""
    lengths = (4, 1, 6, 2, 5, 3, 6, 2)
    rows = [
        prompt.with_answer(torch.arange(10, 10 + length))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    darker = {**rows[0].media, "pixel_values_videos": 0.5 * rows[0].media["pixel_values_videos"]}
    rows = [rows[0], rows[0], dataclasses.replace(rows[0], media=darker), *rows[1:], rows[6]]
    with torch.no_grad():
        found = answer_logits(model, rows)
        expected = torch.cat([plain_logits(model, row) for row in rows])
    assert torch.allclose(found, expected, atol=2e-5)
    assert not torch.allclose(found[4:8], found[8:12], atol=1e-3), "the pixels count"
    assert torch.equal(answer_ids(rows)[:8], torch.tensor([10, 11, 12, 13] * 2))


def test_sampling_follows_the_models_distribution(
    model: Model, prompts: tuple[Prompt, ...], noise: np.ndarray
) -> None:
    """Each token again, from the logits of a plain forward over the whole answer."""
    forbidden, end = ids_of(*FORBIDDEN), int(processor().tokenizer.eos_token_id)
    found = answers_of(model, prompts, noise)
    for prompt, draws, group in zip(prompts, noise, found, strict=True):
        assert len(group) == 3
        for place, answer in enumerate(group):
            with torch.no_grad():
                logits = plain_logits(model, prompt.with_answer(answer)).double()
            logits[:, forbidden] = -torch.inf
            assert answer.numel() == LIMIT or answer[-1] == end
            assert not (answer[:-1] == end).any()
            for step, token in enumerate(answer.tolist()):
                if place == 2:
                    assert token == int(logits[step].argmax())
                else:
                    shares = (logits[step] / 0.7).softmax(-1)
                    before = float(shares[:token].sum())
                    assert before - 1e-5 <= draws[place, step] <= before + float(shares[token]) + 1e-5


def test_an_answer_does_not_depend_on_its_neighbours(
    model: Model, prompts: tuple[Prompt, ...], noise: np.ndarray
) -> None:
    together = answers_of(model, prompts, noise)
    for index in (0, 5, 6):
        alone = answers_of(model, prompts[index : index + 1], noise[index : index + 1])[0]
        assert all(torch.equal(a, b) for a, b in zip(alone, together[index], strict=True))


def test_forbidden_and_end(model: Model, prompts: tuple[Prompt, ...]) -> None:
    """With equal logits every allowed token has the same share: the noise counts tokens by their ids."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
    forbidden, end = ids_of(*FORBIDDEN), int(processor().tokenizer.eos_token_id)
    allowed = [token for token in range(len(processor().tokenizer)) if token not in forbidden]
    assert model.lm_head.out_features == len(allowed) + len(forbidden)
    for place, token in ((0, allowed[0]), (len(allowed) - 1, allowed[-1]), (allowed.index(end), end)):
        noise = np.full((1, 1, LIMIT), (place + 0.5) / len(allowed))
        drawn = answers_of(model, prompts[:1], noise)[0][0].tolist()
        assert drawn == ([end] if token == end else [token] * LIMIT)
