"""Diagnostics of a selection: what its tokens add to the gradient, where they lie, what they have in common.

Source: questions that reviewers of Video-KTR (arXiv 2601.19686) and ToR (arXiv 2603.25077) asked. All metrics
are plain floats; one that has no value in a batch (a class without tokens, a cosine with a gradient of 0) is
left out. Shares lie in [0, 1].

**Gradient.** With z_t the logits that token y_t was drawn from, after the division by the temperature, p_t
their softmax and c_t the factor of the token (:mod:`keytoken.losses.denominators`: its weight over the
denominator), the policy term of the loss has at ratio 1, in the first update of a batch, the gradient ::

    dL/dz_t = -c_t A_i (e_{y_t} - p_t),    |dL/dz_t| = c_t |A_i| sqrt(1 - 2 p_t(y_t) + sum_v p_t(v)^2)

for every objective, so that no backward pass is needed. Logits of different tokens are different coordinates:
with g_t the norm above, the gradient of a set of tokens has the norm sqrt(sum_t g_t^2), and between that of
weights w and that of weights 1 everywhere, the full one, ::

    cos = sum_t g_t(w) g_t(1) / sqrt(sum_t g_t(w)^2  sum_t g_t(1)^2)

which is the root of the set's share of the full squared norm where both have the same denominators.
Parameters mix tokens, which logits do not show. The batch counts as one mini-batch.

    ``diagnostics/gradient/full/norm``: with weight 1 at every answer token.
    ``diagnostics/gradient/<set>/norm``, ``.../cosine`` to the full one, ``.../token_share`` of the answer
    tokens, for three sets: ``selected`` (the weights of the method), ``unselected`` (weight 1 at the other
    tokens) and ``random`` (the weights of every answer at random tokens of it, an average of several draws,
    with ``.../cosine_spread``, their standard deviation).

**Overlap** of the signals' selections, names in alphabetical order.

    ``diagnostics/overlap/<a>_<b>``: tokens that both select over those that one of them selects (Jaccard).
    ``diagnostics/venn/<a>[_<b>[_<c>]]``: share of the selected tokens that these signals select and no other.

**Concentration** on few answers.

    ``diagnostics/answers/gini``: Gini coefficient of the answers' shares of selected tokens, 0 for all alike.
    ``diagnostics/answers/lowest_share``, ``median_share`` and ``highest_share`` of them.

**Words**, by the class of the decoded token (:func:`word_class`).

    ``diagnostics/words/<class>/token_share``: of the answer tokens.
    ``diagnostics/words/<class>/selected_share``, ``.../<signal>_share``: of the class's tokens.

**Outcomes**: the mean of a score over the tokens of an answer, averaged over right and over wrong answers;
for each signal, and for ``selected``, the share of selected tokens.

    ``diagnostics/outcomes/<score>/right``, ``/wrong``, ``/difference`` (right minus wrong) and ``/low`` and
    ``/high``, the ends of its 95 % interval: answers are taken as independent, normal approximation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from keytoken.attribution.methods.controls import at_random
from keytoken.attribution.types import Signals, TokenWeights

NUM_DRAWS = 8  # of the random set: their average is then three times as steady as one
Z_95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval
FRAGMENT = "\ufffd"  # what a decoder makes of a part of a character
# Token weights [B, T] to the factors of the policy term [B, T].
Coefficients = Callable[[Tensor], Tensor]


def diagnose(
    signals: Signals,
    result: TokenWeights,
    advantages: Tensor,
    coefficients: Coefficients,
    *,
    right: Tensor | None = None,
    classes: Sequence[Sequence[str]] | None = None,
) -> dict[str, float]:
    """All metrics of one batch, see the module.

    Args:
        signals: What the method looked at; gradients need ``collision``.
        result: What it decided.
        advantages: [B, T] as the loss sees them.
        coefficients: Factors of the policy term under other weights, for the gradients.
        right: [B] bool, answers that are right; None leaves the outcomes out.
        classes: For each answer the class of each of its tokens; None leaves the words out.
    """
    metrics = gradient_metrics(signals, result, advantages, coefficients)
    metrics |= overlap_metrics(result.masks)
    metrics |= concentration_metrics(result.selected, signals.mask)
    if classes is not None:
        metrics |= word_metrics(classes, result, signals.mask)
    if right is not None:
        metrics |= outcome_metrics(signals, result, right)
    return metrics


def unit_gradient_norm(logp: Tensor, collision: Tensor) -> Tensor:
    """Norm of d log p(y) / dz, sqrt(1 - 2 p + sum_v p_v^2), from 0 to sqrt 2.

    Computed as sqrt((1 - p)^2 + sum_{v != y} p_v^2). The sum is a difference; where all but 1e-3 of the mass
    lies on one token, it is rounding in float32.

    Args:
        logp: Log-prob of the sampled token, nats, any shape.
        collision: sum_v p_v^2, same shape.
    """
    logp, collision = logp.double(), collision.double()
    others = (collision - (2.0 * logp).exp()).clamp(min=0.0)
    return (torch.expm1(logp).square() + others).sqrt()


def token_gradient_norms(
    signals: Signals, weights: Tensor, advantages: Tensor, coefficients: Coefficients
) -> Tensor:
    """[B, T] float64 norms of the gradient of the policy term with respect to every token's logits, ratio 1.

    Args:
        signals: ``logp``, ``collision`` and ``mask``.
        weights: [B, T] token weights.
        advantages: [B, T].
        coefficients: See :func:`diagnose`.
    """
    assert signals.collision is not None
    logp, collision = (values.masked_fill(~signals.mask, 0.0) for values in (signals.logp, signals.collision))
    factors = coefficients(weights.double()) * advantages.double().abs()
    return (factors * unit_gradient_norm(logp, collision)).masked_fill(~signals.mask, 0.0)


def gradient_metrics(
    signals: Signals, result: TokenWeights, advantages: Tensor, coefficients: Coefficients
) -> dict[str, float]:
    """The gradients of selected, unselected and random tokens; nothing without ``signals.collision``."""
    if signals.collision is None:
        return {}
    every = signals.mask.double()
    full = token_gradient_norms(signals, every, advantages, coefficients)
    metrics = {"diagnostics/gradient/full/norm": float(full.norm())}

    def compare(weights: Tensor) -> dict[str, float]:
        own = token_gradient_norms(signals, weights, advantages, coefficients)
        norms = float(own.norm() * full.norm())
        found = {"norm": float(own.norm()), "token_share": float((weights > 0).sum() / every.sum())}
        return found | ({"cosine": float((own * full).sum()) / norms} if norms > 0.0 else {})

    left_out = signals.mask & ~result.selected
    sets = {
        "selected": [compare(result.weights)] if bool(result.selected.any()) else [],
        "unselected": [compare(left_out)] if bool(left_out.any()) else [],
    }
    if sets["selected"]:
        sets["random"] = [compare(_drawn(signals, result, draw)) for draw in range(NUM_DRAWS)]
    for name, draws in sets.items():
        for key in draws[0] if draws else ():
            values = torch.tensor([found[key] for found in draws if key in found], dtype=torch.float64)
            metrics[f"diagnostics/gradient/{name}/{key}"] = float(values.mean())
            if name == "random" and key == "cosine":
                metrics["diagnostics/gradient/random/cosine_spread"] = float(values.std(correction=0))
    return metrics


def _drawn(signals: Signals, result: TokenWeights, draw: int) -> Tensor:
    """[B, T] weights of every answer at random tokens of it."""
    seed = signals.seed + 7919 * (draw + 1)  # not that of the control itself
    return at_random(result, dataclasses.replace(signals, seed=seed)).weights


def overlap_metrics(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Pairwise Jaccard indices, and the cells of the Venn diagram.

    Args:
        masks: [B, T] bool, what each signal selects.
    """
    names = sorted(masks)
    metrics = {}
    for a, b in itertools.combinations(names, 2):
        union = int((masks[a] | masks[b]).sum())
        if union:
            metrics[f"diagnostics/overlap/{a}_{b}"] = int((masks[a] & masks[b]).sum()) / union
    if not names:
        return metrics
    stacked = torch.stack([masks[name] for name in names])
    total = int(stacked.any(dim=0).sum())
    for size in range(1, len(names) + 1) if total else ():
        for chosen in itertools.combinations(names, size):
            members = torch.tensor([name in chosen for name in names])
            cell = (stacked == members.to(stacked.device)[:, None, None]).all(dim=0)
            metrics[f"diagnostics/venn/{'_'.join(chosen)}"] = int(cell.sum()) / total
    return metrics


def selected_shares(selected: Tensor, mask: Tensor) -> Tensor:
    """[B] float64 share of selected tokens of each answer; NaN for an answer without tokens."""
    return (selected & mask).sum(dim=1).double() / mask.sum(dim=1).double()


def gini(values: Tensor) -> float:
    """Gini coefficient of non-negative values, sum_ij |x_i - x_j| / (2 n sum_i x_i).

    0 if all are equal, also if all are 0; (n - 1) / n if one has everything.

    Args:
        values: [n], n at least 1.
    """
    ordered = values.double().sort().values
    n, total = len(ordered), float(ordered.sum())
    if total == 0.0:
        return 0.0
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=ordered.device)
    return float(((2.0 * ranks - n - 1.0) * ordered).sum()) / (n * total)


def concentration_metrics(selected: Tensor, mask: Tensor) -> dict[str, float]:
    """How evenly the selected tokens are spread over the answers.

    Args:
        selected: [B, T] bool.
        mask: [B, T] bool, answer tokens.
    """
    shares = selected_shares(selected, mask)
    shares = shares[~shares.isnan()]
    if not len(shares):
        return {}
    prefix = "diagnostics/answers"
    return {
        f"{prefix}/gini": gini(shares),
        f"{prefix}/lowest_share": float(shares.min()),
        f"{prefix}/median_share": float(shares.quantile(0.5)),
        f"{prefix}/highest_share": float(shares.max()),
    }


def word_class(token: str, known: Mapping[str, str] | None = None) -> str:
    """The class of a decoded token, by its characters alone.

    Blanks at the ends do not count. In this order: a class of ``known``; ``space`` (nothing else);
    ``special`` (``<...>``: tags, and special tokens of most tokenizers); ``fragment`` (a part of a
    character); ``letter`` (a single one of the English alphabet, such as the name of an option); ``word``
    (any other letters); ``digits`` (a digit and no letter); ``punctuation`` (the rest).

    Args:
        token: One token, decoded by itself.
        known: Classes of whole words that come before the rule.
    """
    text = token.strip()
    if known is not None and text in known:
        return known[text]
    if not text:
        return "space"
    if len(text) > 2 and text[0] == "<" and text[-1] == ">":
        return "special"
    if FRAGMENT in text:
        return "fragment"
    if any(character.isalpha() for character in text):
        return "letter" if len(text) == 1 and text.isascii() else "word"
    return "digits" if any(character.isdigit() for character in text) else "punctuation"


def word_metrics(classes: Sequence[Sequence[str]], result: TokenWeights, mask: Tensor) -> dict[str, float]:
    """Tokens and selected tokens by class.

    Args:
        classes: For each answer the class of each of its tokens.
        result: The selection.
        mask: [B, T] bool, answer tokens.

    Raises:
        ValueError: Some answer has another number of classes than tokens.
    """
    if [len(row) for row in classes] != mask.sum(dim=1).tolist():
        raise ValueError("give every answer token one class: the rows of classes and mask differ in length")
    flat = [name for row in classes for name in row]
    selections = {"selected": result.selected, **result.masks}
    kept = {name: chosen[mask].tolist() for name, chosen in selections.items()}
    metrics = {}
    for name in sorted(set(flat)):
        places = [place for place, found in enumerate(flat) if found == name]
        metrics[f"diagnostics/words/{name}/token_share"] = len(places) / len(flat)
        for selection, flags in kept.items():
            share = sum(flags[place] for place in places) / len(places)
            metrics[f"diagnostics/words/{name}/{selection}_share"] = share
    return metrics


def outcome_metrics(signals: Signals, result: TokenWeights, right: Tensor) -> dict[str, float]:
    """Scores of right and of wrong answers.

    Args:
        signals: Which tokens there are, and which rows a signal exists for.
        result: Scores and selection.
        right: [B] bool.
    """
    exists = {"visual": signals.has_visual, "temporal": signals.has_temporal}
    everywhere = torch.ones_like(signals.has_visual)
    metrics: dict[str, float] = {}
    for name, scores in {"selected": result.selected, **result.scores}.items():
        valid = signals.mask & exists.get(name, everywhere)[:, None]
        counts = valid.sum(dim=1)
        means = scores.double().masked_fill(~valid, 0.0).sum(dim=1) / counts
        prefix = f"diagnostics/outcomes/{name}"
        found = _difference(means[(counts > 0) & right], means[(counts > 0) & ~right])
        metrics |= {f"{prefix}/{key}": value for key, value in found.items()}
    return metrics


def _difference(right: Tensor, wrong: Tensor) -> dict[str, float]:
    """Means of two samples and, where both have members, their difference; with two each, its interval."""
    found = {
        name: float(sample.mean()) for name, sample in (("right", right), ("wrong", wrong)) if len(sample)
    }
    if len(found) < 2:
        return found
    found["difference"] = found["right"] - found["wrong"]
    if min(len(right), len(wrong)) >= 2:
        half = Z_95 * math.sqrt(float(right.var()) / len(right) + float(wrong.var()) / len(wrong))
        found |= {"low": found["difference"] - half, "high": found["difference"] + half}
    return found
