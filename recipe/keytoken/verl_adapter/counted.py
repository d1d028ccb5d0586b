"""Vision tokens that a prepared row says it has, so that its media need not be decoded to count them.

``keytoken data prepare`` writes ``num_vision_tokens`` into ``extra_info``, with the digest of the contract it
was counted by and whether the media were decoded then. A count of another contract is not used. The first
media that turn out to have another number of tokens when they are read are named once, since then the
dataset and its media no longer belong together.
"""

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from keytoken.data.clip_check import ALL, NONE
from keytoken.data.contract import SamplingContract

logger = logging.getLogger(__name__)

# Keys that ride on the media of a prompt from the row to where they are read.
COUNT, ROW = "num_vision_tokens", "row"
_WARNED = threading.Event()


def usable_counts(
    rows: Iterable[Mapping[str, Any] | None], contract: SamplingContract, policy: str
) -> dict[int, int]:
    """Vision tokens of the rows that need no decoding, by their numbers.

    Args:
        rows: ``extra_info`` of each row.
        contract: The run's.
        policy: Whose media are decoded all the same. "new": those that were not decoded when they were
            counted; "all": those of all rows; "none": those of rows without a count.
    """
    if policy == ALL:
        return {}
    digest = contract.digest()
    counts = {}
    for number, info in enumerate(rows):
        count = counted(info, digest)
        if count is not None and (policy == NONE or (info or {}).get("decoded")):
            counts[number] = count
    return counts


def counted(info: Mapping[str, Any] | None, digest: str) -> int | None:
    """Vision tokens by a row's ``extra_info`` under a contract, or None."""
    if not info or info.get("sampling_digest") != digest:
        return None
    count = info.get("num_vision_tokens")
    return count if isinstance(count, int) else None


def compare_count(item: Mapping[str, Any], num_tokens: int) -> None:
    """Compare media that were read with what their row says of them; warn of the first difference."""
    expected = item.get(COUNT)
    if expected is None or expected == num_tokens or _WARNED.is_set():
        return
    _WARNED.set()
    logger.warning(
        "row %s: %s has %d vision tokens, and the row says %d. The file was changed after the dataset was "
        "prepared, or holds something else than its header says; prompts may be longer than "
        "data.max_prompt_length. Prepare the dataset again with check=decode, or set data.clip_check=all. "
        "Said once in each process.",
        item.get(ROW),
        item.get("video") or item.get("image"),
        num_tokens,
        expected,
    )
