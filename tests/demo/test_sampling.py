import numpy as np
import torch

from keytoken.demo.batches import Encoder, clip_example
from keytoken.demo.model import build_model
from keytoken.demo.sampling import sample_answers
from keytoken.demo.world import FAMILIES, make_question


def test_cached_greedy_answers_equal_full_forwards(encoder: Encoder) -> None:
    """Every generated token is the argmax of one forward over the whole sequence, without a cache."""
    model = build_model(encoder.tokenizer, seed=2).eval()
    rng = np.random.default_rng(0)
    examples = [clip_example(make_question(family, rng), rng) for family in FAMILIES]
    answers = sample_answers(model, encoder, examples, temperature=0.0)
    compared = 0
    for example, text in zip(examples, answers, strict=True):
        grid = None if example.frames is None else (4, 4, 4)
        ids = encoder.prompt_ids(example, grid)
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < 32 and encoder.tokenizer.eos_token_id not in answer:
                hidden = model.model(
                    input_ids=torch.tensor([ids + answer]),
                    position_ids=encoder.positions(ids + answer, grid)[:, None],
                    **encoder.vision([example]),
                ).last_hidden_state[0, -1]
                answer.append(int(model.lm_head(hidden).argmax()))
                if answer[-1] == encoder.processor.video_token_id:
                    break  # this forward cannot place a sampled placeholder; compare up to it
        expected = encoder.tokenizer.decode(answer, skip_special_tokens=True)
        assert text.startswith(expected.replace("<|video_pad|>", ""))
        compared += len(answer)
    assert compared > 30


def test_sampling_repeats_with_its_seed(encoder: Encoder) -> None:
    model = build_model(encoder.tokenizer, seed=2).eval()
    rng = np.random.default_rng(0)
    examples = [clip_example(make_question(family, rng), rng) for family in FAMILIES]
    first, second, other = (
        sample_answers(model, encoder, examples, temperature=1.0, seed=seed) for seed in (0, 0, 1)
    )
    assert first == second != other
