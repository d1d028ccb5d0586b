"""On the warm-started demo model, scores find the words they should, through the real stack."""

import numpy as np
import pandas as pd
import pytest

from keytoken.demo.run import prepare_for_training
from keytoken.demo.world import COLORS, DIRECTIONS, EVENTS, NUMBERS, SHAPES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

# Question, the words that bear its answer, and whether they need the order of the frames.
FAMILIES = {
    "order": ("comes first", set(COLORS), True),
    "motion": ("which way", set(DIRECTIONS), True),
    "event": ("what happens", set(EVENTS), True),
    "color": ("what color is", set(COLORS), False),
    "shape": ("what shape", set(SHAPES), False),
    "count": ("how many", set(NUMBERS[1:5]), False),
    "text": ("plus", set(NUMBERS), False),
}


@pytest.fixture(scope="module")
def warm_tokens(make_launcher) -> pd.DataFrame:
    """One step of Video-KTR over 84 prompts, 12 of each family, by the warm-started model."""
    run = make_launcher(prepare_for_training().root).run(
        "scores",
        "data.train_batch_size=84",
        "actor_rollout_ref.actor.ppo_mini_batch_size=84",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=28",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=28",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=28",
        "actor_rollout_ref.rollout.max_num_seqs=128",
        "keytoken.attribution.micro_batch_size=28",
        "keytoken.export.max_responses=336",
        "data.shuffle=false",
        "trainer.total_training_steps=1",
        "trainer.save_freq=-1",
    )
    return run.tokens(1)


def scores_on_answer_words(tokens: pd.DataFrame, family: str, signal: str) -> np.ndarray:
    """Scores of the answer-bearing words in the chain of thought, before the answer is drawn from them."""
    question, words, _ = FAMILIES[family]
    scores = []
    for row in tokens[tokens["prompt"].str.contains(question)].itertuples():
        chain = [token.strip() for token in row.tokens]
        end = chain.index("so") if "so" in chain else len(chain)
        scores += [
            value for token, value in zip(chain[:end], getattr(row, signal), strict=False) if token in words
        ]
    assert len(scores) >= 24, f"too few answer words of family {family} to judge by"
    return np.asarray(scores)


def test_order_questions_depend_on_the_order_of_frames(warm_tokens):
    temporal = {name: scores_on_answer_words(warm_tokens, name, "temporal").mean() for name in FAMILIES}
    needs_order = np.mean([temporal[name] for name, (_, _, order) in FAMILIES.items() if order])
    appearance = np.mean([temporal[name] for name in ("color", "shape", "count")])
    assert temporal["order"] > 0.3, temporal
    assert temporal["order"] > 3 * max(temporal[name] for name in ("color", "shape", "count")), temporal
    assert needs_order > 3 * appearance, temporal


def test_video_questions_depend_on_the_video_and_text_ones_do_not(warm_tokens):
    visual = {name: scores_on_answer_words(warm_tokens, name, "visual").mean() for name in FAMILIES}
    assert visual["order"] > 0.3 and visual["count"] > 0.3, visual
    assert visual["text"] == 0.0, visual


def test_words_without_content_depend_on_nothing(warm_tokens):
    values = [
        value
        for row in warm_tokens.itertuples()
        for token, value in zip(row.tokens, row.temporal, strict=True)
        if token.strip() in {"so", "the", "answer", "is", "."}
    ]
    content = scores_on_answer_words(warm_tokens, "order", "temporal")
    assert np.mean(values) < 0.1 * content.mean()
