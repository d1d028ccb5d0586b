"""One batch of videos, images and texts on which the methods are compared with their sources.

The sources are transcribed at the top of each test file, over a flat list of all answer tokens: Python for
what is selected, float64 tensors for losses, whose gradient autograd takes.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.losses.advantage import group_advantages
from keytoken.losses.policy import policy_loss
from keytoken.schema import MethodConfig

# Answers in the order of a batch, which is not that of their prompts.
GROUP = [5, 2, 5, 9, 2, 7, 5, 9, 2, 7]
LENGTHS = [7, 4, 11, 5, 9, 6, 3, 8, 1, 10]
REWARDS = [1.0, 0.1, 0.0, 1.0, 1.0, 0.0, 1.2, 1.0, 0.4, 1.0]  # all equal for prompt 9
KINDS = {5: "video", 2: "image", 9: "text", 7: "video"}
VOCABULARY = 11


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A loss over the N answer tokens of a batch: their weights, its value and its gradient."""

    weights: Tensor
    value: Tensor
    gradient: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What one update knows, in float64; padding, and views that a prompt does not have, hold NaN.

    Attributes:
        signals: Of the policy that sampled.
        distributions: [B, T, V] its log-probs.
        current: [B, T] log-probs of the policy in the update, far enough from it to reach every clip.
        reference: [B, T] of the reference policy.
        rewards: [B].
    """

    signals: Signals
    distributions: Tensor
    current: Tensor
    reference: Tensor
    rewards: Tensor

    def flat(self, values: Tensor | None) -> Tensor:
        """[N] of [B, T], or [N] of [B]: the value at every answer token, answer after answer."""
        assert values is not None
        mask = self.signals.mask
        return (values if values.ndim > 1 else values[:, None].expand(mask.shape))[mask]

    @property
    def answers(self) -> list[list[int]]:
        """The tokens of every answer, as numbers in the flat list."""
        row = self.flat(torch.arange(len(self.rewards))).tolist()
        return [[n for n, i in enumerate(row) if i == answer] for answer in range(len(self.rewards))]

    def advantages(self, epsilon: float) -> Tensor:
        """[N] (r - mean) / (std + epsilon), with the unbiased standard deviation of a prompt's rewards."""
        rewards, group = self.rewards.tolist(), self.signals.group.tolist()
        found = []
        for reward, prompt in zip(rewards, group, strict=True):
            own = [r for r, g in zip(rewards, group, strict=True) if g == prompt]
            found.append((reward - statistics.fmean(own)) / (statistics.stdev(own) + epsilon))
        return self.flat(torch.tensor(found, dtype=torch.float64))

    def on_policy(self) -> Batch:
        """The same before the first update, where the ratio is 1."""
        return dataclasses.replace(self, current=self.signals.logp)

    def weigh(self, method: MethodConfig) -> TokenWeights:
        return compute_token_weights(self.signals, method)

    def evaluate(self, method: MethodConfig) -> Evaluated:
        """From signals and rewards to the loss, by the code under test."""
        signals, mask = self.signals, self.signals.mask
        weights = self.weigh(method).weights
        advantages = group_advantages(self.rewards, signals.group, method.advantage_epsilon)
        leaf = self.current.clone().requires_grad_()
        masked = signals.logp_masked
        if masked is not None:  # what the adapter puts in for prompts without a picture
            masked = torch.where(signals.has_visual[:, None], masked, leaf.detach())
        value = policy_loss(
            log_prob=leaf,
            old_log_prob=signals.logp,
            advantages=advantages[:, None].expand(mask.shape),
            weights=weights.double(),  # float32 of selections holds 0, 0.5 and 1 exactly
            mask=mask,
            config=method.loss,
            ref_log_prob=self.reference,
            masked_log_prob=masked,
        ).loss
        (gradient,) = torch.autograd.grad(value, leaf)
        assert not bool(gradient[~mask].any())
        return Evaluated(weights=weights[mask], value=value.detach(), gradient=gradient[mask])

    def transcribed(self, weights: list[float], loss: Callable[..., Tensor], **known: Any) -> Evaluated:
        """A source's loss, called with the current log-probs [N], the weights [N] and what else it reads."""
        leaf = self.flat(self.current).clone().requires_grad_()
        given = torch.tensor(weights, dtype=torch.float64)
        value = loss(leaf, given, **known)
        (gradient,) = torch.autograd.grad(value, leaf)
        return Evaluated(weights=given, value=value.detach(), gradient=gradient)


def build(
    kinds: dict[int, str] = KINDS, group: list[int] = GROUP, lengths: list[int] = LENGTHS, seed: int = 0
) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths) + 2) < torch.tensor(lengths)[:, None]

    def noise(*more: int) -> Tensor:
        return torch.randn(*mask.shape, *more, generator=draw, dtype=torch.float64)

    def padded(values: Tensor, applies: Tensor | None = None) -> Tensor:
        valid = mask if applies is None else mask & applies[:, None]
        return values.masked_fill(~valid, torch.nan)

    sharpness = 0.5 + 3.0 * torch.rand(*mask.shape, 1, generator=draw, dtype=torch.float64)
    distributions = (noise(VOCABULARY) * sharpness).log_softmax(-1)
    sampled = distributions.exp().flatten(0, 1).multinomial(1, generator=draw).view(*mask.shape, 1)
    logp = distributions.gather(-1, sampled).squeeze(-1)
    pictured = torch.tensor([kinds[prompt] != "text" for prompt in group])
    moving = torch.tensor([kinds[prompt] == "video" for prompt in group])
    signals = Signals(
        logp=padded(logp),
        logp_masked=padded(logp - 0.4 + noise(), pictured),
        logp_shuffled=padded(logp + 0.3 * noise(), moving),
        entropy=padded(-(distributions.exp() * distributions).sum(-1)),
        mask=mask,
        group=torch.tensor(group),
        has_visual=pictured,
        has_temporal=moving,
        row_keys=torch.randperm(len(group), generator=draw),
        seed=3,
    )
    current = logp + 0.6 * noise()
    return Batch(
        signals=signals,
        distributions=distributions,
        current=padded(current),
        reference=padded(current + 0.5 * noise()),
        rewards=torch.tensor(REWARDS[: len(group)], dtype=torch.float64),
    )


@pytest.fixture
def batch_of() -> Callable[..., Batch]:
    """Builds such a batch; ``kinds``, ``group`` and ``lengths`` may be given."""
    return build


@pytest.fixture
def batch() -> Batch:
    return build()


@pytest.fixture
def agree() -> Callable[[Evaluated, Evaluated], None]:
    """Asserts that two evaluations have the same weights, value and gradient, to 1e-9."""

    def compare(found: Evaluated, source: Evaluated) -> None:
        for field in dataclasses.fields(Evaluated):
            ours, theirs = getattr(found, field.name).double(), getattr(source, field.name)
            where = partial("{}: {}".format, field.name)
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=where)

    return compare
