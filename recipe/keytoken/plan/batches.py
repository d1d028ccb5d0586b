"""Micro-batches of one rank: how many, and how many answers lie behind each copy of a prompt in them.

All answers are taken to have the mean length. Ranks have whole groups as far as their share allows
(:mod:`keytoken.verl_adapter.balance`). With ``keytoken.prefix=shared`` a micro-batch is one pack: the passes
and fixed sizes take answers in the order of the groups, dynamic sizes are filled by tokens with whole groups
(:mod:`keytoken.verl_adapter.shims.shared_micro_batches`). A group that is cut has a copy of its prompt in
each part.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from omegaconf import DictConfig

from keytoken.plan.workload import Pools, Workload
from keytoken.prefix.layout import Tree, bundled


@dataclasses.dataclass(frozen=True, slots=True)
class Largest:
    """A micro-batch as large as they come.

    Attributes:
        tokens: In the transformer.
        answers: To whatever prompts.
        prompts: Copies of them, each with its clip.
        keys: Places whose keys and values a kernel for segments has beside those of the tokens: of each
            answer and its prompt. 0 where there are no packs. On a CPU masks do without them.
    """

    tokens: float
    answers: float
    prompts: float
    keys: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Batches:
    """Micro-batches of one rank.

    Attributes:
        rounds: How many.
        copies: Of prompts, by the answers behind each: {8: 4, 4: 2} are four whole groups and one cut in two.
        largest: One of them.
        size: The key that sets their size.
    """

    rounds: int
    copies: dict[int, int]
    largest: Largest
    size: str

    @property
    def by_tokens(self) -> bool:
        """Whether that key counts tokens, not answers."""
        return self.size.endswith("max_token_len_per_gpu")

    @property
    def answers(self) -> int:
        """Of the rank."""
        return sum(answers * times for answers, times in self.copies.items())

    @property
    def prompts(self) -> int:
        """How many prompts the rank computes, copies counted."""
        return sum(self.copies.values())


@dataclasses.dataclass(frozen=True, slots=True)
class StepBatches:
    """Of a step: the update, log-probs of actor and reference, and views.

    Attributes:
        per_answer: Of views that draw anew for each answer, so that no two share a prompt.
    """

    update: Batches
    score: Batches
    view: Batches
    per_answer: Batches


def batches_of(config: DictConfig, work: Workload, pools: Pools) -> StepBatches:
    """Micro-batches of a validated configuration."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    passes, key = config.keytoken.attribution.micro_batch_size, "keytoken.attribution.micro_batch_size"
    scorers = pools.attribution or pools.actor
    if actor.use_dynamic_bsz:
        tokens, dynamic = actor.ppo_max_token_len_per_gpu, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
        update = _by_tokens(work, pools.actor, tokens, dynamic)
    else:
        fixed = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
        update = _by_answers(work, pools.actor, actor.ppo_micro_batch_size_per_gpu, fixed)
    score = update
    if not rollout.log_prob_use_dynamic_bsz:
        fixed = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"
        score = _by_answers(work, pools.actor, rollout.log_prob_micro_batch_size_per_gpu, fixed)
    elif not actor.use_dynamic_bsz or rollout.log_prob_max_token_len_per_gpu != tokens:  # verl: the actor's
        dynamic = "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu"
        score = _by_tokens(work, pools.actor, rollout.log_prob_max_token_len_per_gpu, dynamic)
    return StepBatches(
        update=update,
        score=score,
        view=_by_answers(work, scorers, passes, key),
        per_answer=_by_answers(work, scorers, passes, key, together=False),
    )


def groups_of_rank(work: Workload, ranks: int) -> list[int]:
    """Answers of each group on one rank; the last one may be a part of a group."""
    rows = math.ceil(work.answers / ranks)
    rest = rows % work.group
    return [work.group] * (rows // work.group) + ([rest] if rest else [])


def _by_tokens(work: Workload, ranks: int, limit: int, size: str) -> Batches:
    """Dynamic sizes. Answers longer than the mean fill the largest one up to its limit."""
    groups = groups_of_rank(work, ranks)
    if not work.shared:
        rows = math.ceil(work.answers / ranks)
        answers = max(1.0, limit / work.row_tokens)
        rounds = math.ceil(rows * work.row_tokens / limit)
        return Batches(rounds, {1: rows}, Largest(float(limit), answers, answers), size)
    stem = work.prompt_tokens - 1
    bundles = bundled([Tree(stem, (work.answer_tokens,) * answers) for answers in groups], limit)
    packs = [tuple(len(part) for _, part in bundle) for bundle in bundles]
    copies = _count(packs)
    fullest = _largest(work, packs)
    longest = copies.total() * stem + sum(groups) * work.longest_answer
    tokens = max(fullest.tokens, float(min(limit, longest)))
    more = tokens / fullest.tokens
    answers, prompts = min(fullest.answers * more, sum(groups)), min(fullest.prompts * more, copies.total())
    largest = Largest(tokens, answers, prompts, keys=tokens + answers * stem)
    return Batches(len(packs), dict(copies), largest, size)


def _by_answers(work: Workload, ranks: int, count: int, size: str, together: bool = True) -> Batches:
    """A fixed number of answers, in the order of the groups; of ``together`` they share prompts."""
    groups = groups_of_rank(work, ranks)
    rows = sum(groups)
    if not work.shared:
        largest = Largest(count * work.row_tokens, float(count), float(count))
        return Batches(math.ceil(rows / count), {1: rows}, largest, size)
    owners = [number for number, answers in enumerate(groups) for _ in range(answers)]
    if not together:
        owners = list(range(rows))
    packs = [tuple(Counter(owners[at : at + count]).values()) for at in range(0, rows, count)]
    return Batches(len(packs), dict(_count(packs)), _largest(work, packs), size)


def _count(packs: list[tuple[int, ...]]) -> Counter[int]:
    return Counter(answers for pack in packs for answers in pack)


def _largest(work: Workload, packs: list[tuple[int, ...]]) -> Largest:
    stem = work.prompt_tokens - 1

    def tokens(pack: tuple[int, ...]) -> int:
        return len(pack) * stem + sum(pack) * work.answer_tokens

    pack = max(packs, key=tokens)
    return Largest(tokens(pack), sum(pack), len(pack), tokens(pack) + sum(pack) * stem)
