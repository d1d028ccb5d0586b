"""Which rank gets which answers: whole groups, and about equally many tokens.

verl balances answers by length, wherever their prompts are. Answers that share a prompt's computation, and
those that a method compares, have to be on one rank.
"""

from collections.abc import Sequence

from transfer_queue import KVBatchMeta

from keytoken.errors import ConfigurationError
from keytoken.verl_adapter.compat import log_seqlen_unbalance
from keytoken.verl_adapter.keys import place_of


def canonical(keys: Sequence[str]) -> list[int]:
    """The rows by prompt and answer number."""
    return sorted(range(len(keys)), key=lambda row: place_of(keys[row]))


def canonical_order(batch: KVBatchMeta) -> None:
    """Sort a batch by prompt and answer number: answers arrive in the order they happened to finish."""
    batch.reorder(canonical(batch.keys))


def gather_groups(batch: KVBatchMeta, num_ranks: int, prefix: str = "global_seqlen") -> dict[str, float]:
    """Reorder a batch so that the ranks' equal shares hold whole groups, as far as that is possible.

    Args:
        batch: With what verl made up to fill it.
        num_ranks: Ranks that take a share each; the rows divide over them.
        prefix: Of the metrics.

    Returns:
        verl's metrics of a balance, in tokens of prompts and answers that a rank computes: its prompts once.
    """
    order = order_of_whole_groups(batch, num_ranks, strict=False)
    batch.reorder(order)
    costs, seen = [], set[tuple[int, str]]()
    share = len(batch) // num_ranks
    for row, tag in enumerate(batch.tags):
        place = (row // share, _prompt(batch, row))
        costs.append(tag.get("response_len", 1) + (0 if place in seen else tag.get("prompt_len", 0)))
        seen.add(place)
    shares = [list(range(start, start + share)) for start in range(0, len(batch), share)]
    return dict(log_seqlen_unbalance(costs, shares, prefix=prefix))


def order_of_whole_groups(batch: KVBatchMeta, num_ranks: int, *, strict: bool) -> list[int]:
    """An order of rows in which no prompt has answers in two of the ranks' equal shares.

    Large groups first, each to the rank that has the fewest groups, and of those to the one with the fewest
    tokens; rows that verl made up fill the rest. Where a share is a multiple of the answers to a prompt this
    finds an order, also if some prompts have fewer. Within a share full groups come first, so that they are
    whole in mini-batches of a multiple of them.

    Args:
        batch: Keys and tags of the rows.
        num_ranks: Ranks that take a share each; the rows divide over them.
        strict: Whether to refuse a batch that has no such order; otherwise groups without a place are split.

    Raises:
        ConfigurationError: some prompt has no place, and ``strict``.
    """
    share = len(batch) // num_ranks
    groups, filling = _groups(batch)
    tokens = [_tokens(batch, group) for group in groups]
    shares: list[list[int]] = [[] for _ in range(num_ranks)]  # numbers of groups

    def load(rank: list[int]) -> tuple[int, int]:
        return len(rank), sum(tokens[number] for number in rank)

    for number in sorted(range(len(groups)), key=lambda number: -tokens[number]):
        room = share - len(groups[number])
        fitting = [rank for rank in shares if sum(len(groups[other]) for other in rank) <= room]
        if fitting:
            min(fitting, key=load).append(number)
        elif strict:
            raise _no_place(batch, groups[number], num_ranks)
        else:
            filling = [*groups[number], *filling]
    order: list[int] = []
    for rank in shares:
        rank.sort(key=lambda number: (-len(groups[number]), number))
        own = [row for number in rank for row in groups[number]]
        missing = share - len(own)
        order += own + filling[:missing]
        filling = filling[missing:]
    return order


def _no_place(batch: KVBatchMeta, group: list[int], num_ranks: int) -> ConfigurationError:
    return ConfigurationError(
        f"The {len(batch)} answers of a step do not divide over the {num_ranks} ranks of the attribution "
        f"passes so that the {len(group)} answers to prompt {_prompt(batch, group[0])}, which the method "
        "compares, stay together. Make actor_rollout_ref.actor.ppo_mini_batch_size a multiple of "
        "keytoken.attribution.num_workers, or of the actor's ranks if they run the passes."
    )


def _groups(batch: KVBatchMeta) -> tuple[list[list[int]], list[int]]:
    """Rows of every prompt, in the canonical order, and the rows that verl made up."""
    groups: dict[str, list[int]] = {}
    made_up: list[int] = []
    for row in canonical(batch.keys):
        padding = batch.tags[row].get("is_padding", False)
        (made_up if padding else groups.setdefault(_prompt(batch, row), [])).append(row)
    return list(groups.values()), made_up


def _prompt(batch: KVBatchMeta, row: int) -> str:
    return place_of(batch.keys[row])[0]


def _tokens(batch: KVBatchMeta, rows: list[int]) -> int:
    """Of a prompt and the answers to it."""
    tags = [batch.tags[row] for row in rows]
    return tags[0].get("prompt_len", 0) + sum(tag.get("response_len", 1) for tag in tags)
