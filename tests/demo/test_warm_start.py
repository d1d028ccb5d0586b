import numpy as np
import pytest
import torch

from keytoken.demo.batches import Encoder
from keytoken.demo.model import build_model
from keytoken.demo.warm_start import WarmStartConfig, relabelled, run_stage, text_example, warm_start
from keytoken.demo.world import FAMILIES, make_question
from keytoken.errors import NonFiniteError
from keytoken.rewards.extract import extract_answer, has_format

TINY = WarmStartConfig(text_steps=6, clip_steps=6, relabel_steps=3, batch_size=8)


def test_loss_falls_and_a_seed_repeats(encoder: Encoder) -> None:
    runs = []
    for _ in range(2):
        model = build_model(encoder.tokenizer, seed=0)
        losses = warm_start(model, encoder, TINY, seed=0)
        assert [(name, len(stage)) for name, stage in losses.items()] == [
            ("text", 6),
            ("clips", 6),
            ("relabelled", 3),
        ]
        assert losses["clips"][-1] < losses["text"][0] - 0.5
        runs.append((losses, model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_another_seed_differs(encoder: Encoder) -> None:
    weights = [build_model(encoder.tokenizer, seed).lm_head.weight for seed in (0, 1)]
    assert not torch.equal(*weights)


def test_building_a_model_leaves_the_callers_randomness_alone(encoder: Encoder) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    build_model(encoder.tokenizer, seed=9)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_relabelled_answers_are_well_formed_and_name_a_uniform_option(family: str) -> None:
    rng = np.random.default_rng(0)
    right = 0
    for _ in range(400):
        question = make_question(family, rng)
        text = relabelled(question, rng)
        letter = extract_answer(text)
        option = question.options["ABCD".index(letter)]
        assert has_format(text) and f"answer is {option} {letter}" in text
        assert option in text.partition(" . ")[0].split()
        right += letter == question.letter
    assert 0.18 < right / 400 < 0.32


def test_text_stage_mixes_drills_and_captions() -> None:
    rng = np.random.default_rng(0)
    examples = [text_example(rng, 0.5) for _ in range(200)]
    drills = [example for example in examples if example.prompt.startswith("list ")]
    assert 70 < len(drills) < 130
    assert all(example.frames is None for example in examples)
    for example in drills:
        opening, *pairs = example.response.split()
        assert opening == "<think>" and len(pairs) == 8
        for word, letter in zip(pairs[::2], pairs[1::2], strict=True):
            assert f"{letter} {word}" in example.prompt


def test_divergence_is_named(encoder: Encoder) -> None:
    model = build_model(encoder.tokenizer, seed=0)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    batch = encoder.batch([text_example(np.random.default_rng(0), 0.0)])
    with pytest.raises(NonFiniteError, match="stage text, step 0"):
        run_stage(model, iter([batch]), steps=1, lr=1e-3, name="text")
