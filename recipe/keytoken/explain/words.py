"""From the input of a method to its token weights in words: one row for each thing that methods differ in.

Symbols: A advantage, p and q the probabilities of a token under the real input and under a view.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from keytoken.attribution import views
from keytoken.attribution.methods import METHODS, measures_of, needs_passes
from keytoken.block import Block
from keytoken.explain.notes import METHOD
from keytoken.explain.run import Run
from keytoken.losses.divergence import perception_divergence
from keytoken.losses.objectives import OBJECTIVES
from keytoken.rewards import order
from keytoken.schema import MethodConfig, ParityConfig, SelectionConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One thing and what the method does about it.

    Attributes:
        label: The thing.
        text: In words and numbers.
        keys: What it was read from.
    """

    label: str
    text: str
    keys: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class SignalRow:
    """One signal that tokens are selected by."""

    name: str
    score: str
    share: str
    weight: str
    keys: tuple[str, ...]


_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_SCOPES = {"response": "its own answer", "group": "all answers to its prompt", "batch": "the rollout batch"}
_SCORES = {
    "difference": ("log p - log q", "nats"),
    "probability": ("p - q", ""),
    "k3": ("q/p - log(q/p) - 1", "nats, at most 10"),
    "jsd": ("divergence of (p, 1 - p) and (q, 1 - q)", "nats, at most log 2"),
}
_CONTROLS = {
    "none": "none",
    "random": "the weights of every answer at random tokens of the same answer (seeded)",
    "inverse": "weight 1 at the tokens that the method leaves out, 0 at those that it selects",
}


def number(value: float) -> str:
    """A number as short as it can be."""
    return f"{value:g}"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def plain(text: str) -> str:
    """reStructuredText as this project writes it, without its marks: roles, double backquotes, ``::``."""
    return _ROLE.sub(r"\1", text).replace("``", "`").replace("::", ":").strip("\n")


def sources(method: MethodConfig) -> dict[str, str]:
    """Formula, source and departures: the docstrings of method, objective and extra terms, by title."""
    weights = METHODS[method.name].token_weights
    found = {f"method {method.name}": sys.modules[weights.__module__].__doc__ or ""}
    if method.loss.objective != "ppo":
        found[f"objective {method.loss.objective}"] = inspect.getdoc(OBJECTIVES[method.loss.objective]) or ""
    if method.loss.perception_coef > 0.0:
        text = inspect.getdoc(perception_divergence) or ""
        found["perception term"] = text.partition("\n\nArgs:")[0]
    if method.order_bonus is not None:
        found["bonus for order"] = order.__doc__ or ""
    return found


def passes(run: Run) -> list[Row]:
    """Every time the answers of a step run through a model, in the order of the step."""
    method, check = run.keytoken.method, run.keytoken.attribution.check_base
    rows = []
    if method.order_bonus is not None:
        count = method.order_bonus.shuffled_answers or run.config.actor_rollout_ref.rollout.n // 2
        text = f"{count} more answers to every video prompt, sampled on shuffled frames and scored"
        rows.append(Row("rollout, frames shuffled", text, (f"{METHOD}.order_bonus.shuffled_answers",)))
    text = "log-prob and entropy of every answer token: one forward pass over prompt and answer"
    rows.append(Row("actor, real input", text))
    measured = ", ".join(name.replace("_", " ") for name in measures_of(method))
    if needs_passes(method) and (check or measured):
        why = (
            f"measures {measured} as well"
            if measured
            else "compared with the actor's, to catch a missed sync"
        )
        text = f"log-prob: one forward pass over prompt and answer; {why}"
        rows.append(Row("attribution, real input", text, ("keytoken.attribution.check_base",)))
    rows += [
        Row(f"attribution, {name}", _view(name, method), _view_keys(name, method)) for name in method.views
    ]
    every = run.keytoken.attribution.every_steps
    if every > 1:
        text = f"in one step of {every}; in between a token has the mean difference of its id in the last one"
        rows.append(Row("attribution passes run", text, ("keytoken.attribution.every_steps",)))
    if needs_passes(method) and run.keytoken.attribution.on_failure == "actor":
        text = "the passes go on in the actor's workers; the group has a weight broadcast of its own"
        rows.append(Row("attribution group lost", text, ("keytoken.attribution.on_failure",)))
    if method.loss.kl_coef > 0.0:
        text = "log-prob of every answer token: one forward pass of the reference model"
        rows.append(Row("reference, real input", text, (f"{METHOD}.loss.kl_coef",)))
    rows.append(Row("update", "one forward and one backward pass over prompt and answer"))
    rows.append(_parity(run.keytoken.parity))
    return rows


def _parity(parity: ParityConfig) -> Row:
    keys = ("keytoken.parity.prompts", "keytoken.parity.every_steps")
    if not parity.prompts:
        return Row("parity gate", "off: nobody compares what engine and trainer see", keys)
    again = f", and again behind every {parity.every_steps} steps" if parity.every_steps else ""
    text = f"{parity.prompts} prompts on which engine and passes have to agree before the first step{again}"
    return Row("parity gate", text, keys)


def _view(name: str, method: MethodConfig) -> str:
    module = sys.modules.get(f"{views.__name__}.{name}")
    first = (module.__doc__ or "" if module else "").partition("\n\n")[0]
    what = " ".join(first.partition(": ")[2].split()).rstrip(".") or "see its file"
    cost = "one forward pass over prompt and answer, vision encoder included"
    if name == "masked":
        cost = "one forward pass over the text of prompt and answer, without vision tokens or encoder"
        what = {"kept": what, "compressed": "the vision tokens are dropped, the others renumbered from 0"}[
            method.positions
        ]
    if name == "blackened":
        options = method.view.blackened
        per = "for every answer" if options.per == "response" else "once for all answers to a prompt"
        what += f"; squares of {options.size} pixels, each with p = {number(options.p)}, drawn {per}"
    return f"log-prob: {cost}. {what[:1].upper()}{what[1:]}"


def _view_keys(name: str, method: MethodConfig) -> tuple[str, ...]:
    kind = "visual" if name == method.view.visual else "temporal"
    own = [f"{METHOD}.view.blackened.{key}" for key in ("p", "size", "per")] if name == "blackened" else []
    return (f"{METHOD}.view.{kind}", *own, *([f"{METHOD}.positions"] if name == "masked" else []))


def signals(method: MethodConfig) -> list[SignalRow]:
    """The signals that are switched on; none for a method without a selection."""
    selection = method.selection
    if selection is None:
        return []
    return [
        SignalRow(
            name,
            _score(name, method, selection),
            percent(ratio),
            number(getattr(selection, f"{name}_weight")),
            tuple(
                f"{METHOD}.selection.{key}" for key in (f"{name}_ratio", f"{name}_weight", *_score_keys(name))
            ),
        )
        for name in ("visual", "temporal", "entropy")
        if (ratio := getattr(selection, f"{name}_ratio")) > 0.0
    ]


def _score(name: str, method: MethodConfig, selection: SelectionConfig) -> str:
    if name == "entropy":
        mass = selection.entropy_top_p
        nucleus = "" if mass is None else f" of the most probable tokens with mass {number(mass)}"
        return f"entropy{nucleus} (nats)"
    formula, unit = _SCORES[selection.score]
    if selection.score_sign == "absolute" and selection.score in ("difference", "probability"):
        formula = f"|{formula}|"
    view = method.view.visual if name == "visual" else method.view.temporal
    return f"{formula}, q under {view}" + (f" ({unit})" if unit else "")


def _score_keys(name: str) -> tuple[str, ...]:
    return ("entropy_top_p",) if name == "entropy" else ("score", "score_sign")


def weighing(run: Run) -> list[Row]:
    """From signals to token weights."""
    method = run.keytoken.method
    rule = plain(inspect.getdoc(METHODS[method.name].token_weights) or "")
    rows = list(_selecting(method.selection)) if method.selection else [_no_selection(method)]
    rows.append(Row("weights", " ".join(rule.partition("\n\n")[0].split())))
    rows += _options(method)
    rows.append(Row("control", _CONTROLS[method.control], (f"{METHOD}.control",)))
    return rows


def _no_selection(method: MethodConfig) -> Row:
    text = "nothing is selected: every answer token counts"
    if METHODS[method.name].measures:
        text += f", weighed by {', '.join(METHODS[method.name].measures)}"
    return Row("selection", text, (f"{METHOD}.selection",))


def _selecting(selection: SelectionConfig) -> Iterator[Row]:
    where = f"{METHOD}.selection"
    ratios = {name: getattr(selection, f"{name}_ratio") for name in ("visual", "temporal", "entropy")}
    shares = {ratio for ratio in ratios.values() if ratio > 0.0}
    share = percent(shares.pop()) if len(shares) == 1 else "its share"
    tokens = f"all answer tokens of {_SCOPES[selection.scope]}"
    texts = {
        "count": f"each signal keeps exactly {share}, rounded up, of {tokens}; ties by a seeded draw",
        "quantile": f"each signal keeps the top {share} of {tokens}: what reaches the interpolated quantile, "
        "ties at the threshold together",
    }
    keys = tuple(f"{where}.{key}" for key in ("scope", "rule", *(f"{name}_ratio" for name in ratios)))
    yield Row("scope and rule", texts[selection.rule], keys)
    yield Row(
        "exists for", "visual: prompts with a picture; temporal: videos whose frames differ; entropy: all"
    )
    floor = "none" if selection.floor is None else f"a kept token scores at least {number(selection.floor)}"
    yield Row("floor", floor, (f"{where}.floor",))
    if selection.probability_floor > 0.0:
        text = f"probabilities below {number(selection.probability_floor)} count as that in p and q"
        yield Row("probability floor", text, (f"{where}.probability_floor",))
    if selection.advantage_conditioned:
        text = "every score is multiplied by |A| of its answer"
        yield Row("conditioning", text, (f"{where}.advantage_conditioned",))


def _options(method: MethodConfig) -> list[Row]:
    """The options of this method alone, with what their block says of them."""
    kind = METHODS[method.name].options
    if kind is None:
        return []
    block, said = kind.from_mapping(method.options, f"{METHOD}.options"), attributes_of(kind)
    return [
        Row(
            f"option {name}",
            f"{value_text(getattr(block, name))}: {said[name]}",
            (f"{METHOD}.options.{name}",),
        )
        for name in said
    ]


def attributes_of(kind: type[Block]) -> dict[str, str]:
    """What the docstring of a block says of each attribute, in one line."""
    lines = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].splitlines()
    found: dict[str, str] = {}
    for line in lines:
        name, colon, text = line.strip().partition(": ")
        if line.startswith("    ") and not line.startswith("     ") and colon:
            found[name] = text
        elif found and line.strip():
            found[next(reversed(found))] += f" {line.strip()}"
    return found


def value_text(value: Any) -> str:
    """A value as YAML would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return number(value) if isinstance(value, float) else str(value)
