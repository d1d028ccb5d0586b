import numpy as np
import pytest
import torch

from keytoken.data.contract import SamplingContract
from keytoken.demo.batches import IGNORED, Encoder, Example, clip_example, draw_batches
from keytoken.demo.model import build_model
from keytoken.demo.tokenizer import DEMO_CONTRACT
from keytoken.demo.warm_start import sequence_loss
from keytoken.demo.world import FAMILIES, make_question


def _examples(count: int, seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    return [clip_example(make_question(FAMILIES[i % len(FAMILIES)], rng), rng) for i in range(count)]


def test_prompts_equal_the_processors_own_expansion(encoder: Encoder) -> None:
    """What reinforcement learning feeds the model: processor and chat template with real clips."""
    for example in _examples(7):
        content = [{"type": "text", "text": example.prompt}]
        clips, grid = {}, None
        if example.frames is not None:
            content.insert(0, {"type": "video"})
            clip = torch.from_numpy(example.frames).permute(0, 3, 1, 2)
            clips, grid = {"videos": [clip], "do_sample_frames": False}, (4, 4, 4)
        text = encoder.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        expected = encoder.processor(text=[text], return_tensors="pt", **clips)
        assert encoder.prompt_ids(example, grid) == expected["input_ids"][0].tolist()
        if clips:
            pixels = encoder.vision([example])["pixel_values_videos"]
            assert torch.equal(pixels, expected["pixel_values_videos"])


def test_labels_are_the_answers_shifted_by_one(encoder: Encoder) -> None:
    examples = _examples(14)
    batch = encoder.batch(examples)
    for row, example in enumerate(examples):
        kept = batch.labels[row] != IGNORED
        answer = batch.labels[row][kept].tolist()
        assert answer == [*encoder.tokenizer(example.response)["input_ids"], encoder.tokenizer.eos_token_id]
        assert batch.input_ids[row][1:][kept[:-1]].tolist() == answer


def test_padding_changes_nothing(encoder: Encoder) -> None:
    """The loss of a ragged batch equals the mean over its examples taken alone, weighted by tokens."""
    model = build_model(encoder.tokenizer, seed=1).eval()
    examples = _examples(7)
    with torch.no_grad():
        together = sequence_loss(model, encoder.batch(examples))
        alone = [encoder.batch([example]) for example in examples]
        tokens = torch.tensor([float((batch.labels != IGNORED).sum()) for batch in alone])
        losses = torch.stack([sequence_loss(model, batch) for batch in alone])
    assert together == pytest.approx(float((losses * tokens).sum() / tokens.sum()), abs=1e-5)


def test_the_contract_leaves_demo_clips_alone() -> None:
    assert isinstance(DEMO_CONTRACT, SamplingContract)
    assert DEMO_CONTRACT.min_pixels == DEMO_CONTRACT.max_pixels == 56 * 56


def test_a_batch_is_a_function_of_seed_stream_and_step(encoder: Encoder) -> None:
    """Two steps are the first two of three; another seed or stream draws others."""

    def drawn(seed: int, stream: int, steps: int) -> list[list[float]]:
        numbers: list[float] = []

        def draw(rng: np.random.Generator) -> Example:
            numbers.append(rng.random())
            return Example("which way ?", "up")

        batches = list(draw_batches(encoder, draw, seed=seed, stream=stream, steps=steps, size=2))
        assert [len(batch.input_ids) for batch in batches] == [2] * steps
        return [numbers[2 * step : 2 * step + 2] for step in range(steps)]

    three = drawn(5, 1, 3)
    assert drawn(5, 1, 2) == three[:2]
    assert three[1] == np.random.default_rng([5, 1, 1]).random(2).tolist()
    assert len({tuple(batch) for batch in [*three, *drawn(6, 1, 3), *drawn(5, 2, 3)]}) == 9
