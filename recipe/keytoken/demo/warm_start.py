"""Supervised warm start of the demo's model, in plain torch.

This prepares a starting point; it is not a trainer of the project. Reinforcement learning needs a
policy that already answers in the right format and is right about as often as not, with entropy left to
lose. Three stages give one:

1. *Text*: half the examples list options with their letters in random order, half answer a question
   whose caption stands in the prompt. Without this stage the letter lookup never emerges.
2. *Clips*: reference answers to questions about clips.
3. *Relabelled*: clips again, but a share of the answers names a random option, consistently in caption
   and letter. Greedy answers stay right, sampled ones become doubtful.

Every schedule counts steps, never seconds, and each batch is a function of the seed and its step.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from keytoken.demo.batches import IGNORED, Batch, Encoder, Example, clip_example, draw_batches
from keytoken.demo.model import Model
from keytoken.demo.world import FAMILIES, LETTERS, Question, make_question, response
from keytoken.errors import NonFiniteError

_STREAMS = {"text": 1, "clips": 2, "relabelled": 3}  # keeps the stages' random streams apart


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Sizes and rates of the warm start.

    Attributes:
        text_steps: Steps of the text stage.
        clip_steps: Steps of the clip stage.
        relabel_steps: Steps of the relabelled stage.
        relabel_share: Share of its answers that get a uniformly drawn option (one in four is right).
        batch_size: Examples a step.
        text_lr: Peak learning rate of the text stage.
        clip_lr: Peak learning rate of the clip stage.
        relabel_lr: Peak learning rate of the relabelled stage.
        drill_share: Share of option listings in the text stage.
    """

    text_steps: int = 350
    clip_steps: int = 700
    relabel_steps: int = 120
    relabel_share: float = 0.45
    batch_size: int = 32
    text_lr: float = 3e-3
    clip_lr: float = 2e-3
    relabel_lr: float = 1e-3
    drill_share: float = 0.5


def text_example(rng: np.random.Generator, drill_share: float) -> Example:
    """An example without a clip: an option listing, or a question with its caption in the prompt."""
    question = make_question(str(rng.choice(FAMILIES)), rng)
    if rng.random() >= drill_share:
        return Example(f"{question.caption} . {question.prompt}", question.response)
    pairs = [f"{question.options[i]} {LETTERS[i]}" for i in rng.permutation(len(LETTERS))]
    return Example(f"list {question.prompt}", f"<think> {' '.join(pairs)}")


def relabelled(question: Question, rng: np.random.Generator) -> str:
    """A well-formed answer that names a uniformly drawn option in its caption and its letter."""
    index = int(rng.integers(len(LETTERS)))
    option = question.options[index]
    words = [option if word == question.answer else word for word in question.caption.split()]
    return response(" ".join(words), option, LETTERS[index])


def _clip_example(rng: np.random.Generator, relabel_share: float) -> Example:
    question = make_question(str(rng.choice(FAMILIES)), rng)
    if rng.random() < relabel_share:
        return clip_example(question, rng, relabelled(question, rng))
    return clip_example(question, rng)


def sequence_loss(model: Model, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over answer tokens in nats; logits are made for those positions only."""
    hidden = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **batch.vision
    ).last_hidden_state
    kept = batch.labels != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]), batch.labels[kept])


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each prepared by a second thread while the one before it is used."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as worker:
        pending = worker.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = worker.submit(next, batches, None)
            yield batch


def run_stage(
    model: Model,
    batches: Iterator[Batch],
    *,
    steps: int,
    lr: float,
    name: str,
    decay: float = 1.0,
) -> list[float]:
    """Train on ``steps`` batches with AdamW and a rate that falls linearly by ``decay`` of itself.

    Returns:
        The loss of each step in nats a token.

    Raises:
        NonFiniteError: If a loss is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = min(20, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1 - decay * step / steps)
    )
    losses: list[float] = []
    model.train()
    progress = tqdm(_ahead(batches), total=steps, desc=f"warm start: {name}", unit="step", mininterval=1.0)
    for step, batch in enumerate(progress):
        loss = sequence_loss(model, batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise NonFiniteError(f"warm start, stage {name}, step {step}: loss is {losses[-1]}; lower its lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def warm_start(model: Model, encoder: Encoder, config: WarmStartConfig, seed: int) -> dict[str, list[float]]:
    """Run the three stages in place.

    Args:
        model: The freshly initialised model.
        encoder: Encoder of the model's processor.
        config: Sizes and rates.
        seed: Seed of all examples.

    Returns:
        Losses of each stage in nats a token.
    """
    share = config.relabel_share
    # The text stage ends at half its rate: the lookup is still growing there.
    stages: tuple[tuple[str, int, float, float, Callable[[np.random.Generator], Example]], ...] = (
        ("text", config.text_steps, config.text_lr, 0.5, lambda rng: text_example(rng, config.drill_share)),
        ("clips", config.clip_steps, config.clip_lr, 1.0, lambda rng: _clip_example(rng, 0.0)),
        ("relabelled", config.relabel_steps, config.relabel_lr, 1.0, lambda rng: _clip_example(rng, share)),
    )
    losses = {}
    for name, steps, lr, decay, draw in stages:
        batches = draw_batches(
            encoder, draw, stream=_STREAMS[name], steps=steps, size=config.batch_size, seed=seed
        )
        losses[name] = run_stage(model, batches, steps=steps, lr=lr, name=name, decay=decay)
    model.eval()
    return losses
