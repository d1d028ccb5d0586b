"""Answers that no rule can decide, put to a language model behind an OpenAI-compatible endpoint.

    >>> judge = Judge(Endpoint(url="http://localhost:8000/v1", model="judge"), Path("judge.jsonl"))
    >>> verdicts = judge.decide([(item, response), ...])

Every reply that can be read is appended to a JSON Lines file as it comes; a run that is started again asks
only what is not in it. A reply counts by the benchmark's own reading
(:mod:`keytoken.scoring.judge_prompts`). What cannot be read, and what stays without a reply, is
*undecided*: its verdict has no score, and the next run asks again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from keytoken.errors import ConfigurationError, DataError
from keytoken.scoring.chat import Endpoint, Messages, NoReplyError, complete
from keytoken.scoring.items import JUDGE, Item, Verdict
from keytoken.scoring.judge_prompts import judge_prompt

UNDECIDED = "judge undecided"
GIVE_UP_AFTER = 3  # questions without a reply before there was any


class Judge:
    """A judge with its memory.

    Attributes:
        endpoint: Where it is; its model has to be named wherever its verdicts are.
        undecided: Why verdicts have no score, by the id of the item.
    """

    def __init__(self, endpoint: Endpoint, cache: Path, parallel: int = 4) -> None:
        """Read what was replied before.

        Args:
            endpoint: Where the model is and how it is asked.
            cache: File of the replies, made if it is not there.
            parallel: Requests under way at once.

        Raises:
            DataError: If the file is damaged, other than by a last line that was cut.
        """
        self.endpoint = endpoint
        self.undecided: dict[str, str] = {}
        self._cache = cache
        self._parallel = parallel
        self._replies = _read_cache(cache)

    def decide(
        self, questions: Sequence[tuple[Item, str]], done: Callable[[int, int], None] | None = None
    ) -> list[Verdict]:
        """One verdict for each question and response, in their order.

        Args:
            questions: What no rule could decide.
            done: Called after every question that was asked, with their number so far and in all.

        Raises:
            ConfigurationError: If the endpoint refuses requests, or none of the first gets a reply.
            DataError: If a benchmark has no judge.
        """
        prompts = [judge_prompt(item).messages(item, response) for item, response in questions]
        keys = [self._key(messages) for messages in prompts]
        asked = {
            key: (item, messages)
            for key, (item, _), messages in zip(keys, questions, prompts, strict=True)
            if key not in self._replies
        }
        self._ask_all(asked, done)
        verdicts: list[Verdict] = []
        for (item, _), key in zip(questions, keys, strict=True):
            reading = judge_prompt(item).read(item, self._replies[key]) if key in self._replies else None
            verdicts.append(Verdict(None, "", UNDECIDED) if reading is None else Verdict(*reading, JUDGE))
        return verdicts

    def _ask_all(
        self, asked: dict[str, tuple[Item, Messages]], done: Callable[[int, int], None] | None
    ) -> None:
        silent = replies = 0
        pool = ThreadPoolExecutor(self._parallel)
        try:
            outcomes = pool.map(self._ask, (messages for _, messages in asked.values()))
            for number, ((key, (item, _)), outcome) in enumerate(
                zip(asked.items(), outcomes, strict=True), start=1
            ):
                if isinstance(outcome, NoReplyError):
                    self.undecided[item.item_id] = f"no reply ({outcome})"
                    silent += 1
                    if silent == GIVE_UP_AFTER and not replies:
                        raise ConfigurationError(
                            f"The judge at {self.endpoint.address} replies to nothing ({outcome}); see "
                            "whether it runs. What it replied before is kept."
                        )
                else:
                    replies += 1
                    self._take(key, item, outcome)
                if done is not None:
                    done(number, len(asked))
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, messages: Messages) -> str | NoReplyError:
        try:
            return complete(self.endpoint, messages)
        except NoReplyError as problem:
            return problem

    def _take(self, key: str, item: Item, reply: str) -> None:
        """Keep a reply if it can be read; any other is asked for again by the next run."""
        if judge_prompt(item).read(item, reply) is None:
            self.undecided[item.item_id] = f"unreadable reply {reply[:200]!r}"
            return
        self._replies[key] = reply
        line = {"key": key, "item_id": item.item_id, "model": self.endpoint.model, "reply": reply}
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        with self._cache.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")

    def _key(self, messages: Messages) -> str:
        asked = json.dumps([self.endpoint.address, self.endpoint.body(messages)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()


def _read_cache(path: Path) -> dict[str, str]:
    """Replies by key; a last line without its end was being written when the run stopped, and is cut off."""
    if not path.exists():
        return {}
    replies: dict[str, str] = {}
    with path.open("rb+") as file:
        while line := file.readline():
            if not line.endswith(b"\n"):
                file.truncate(file.tell() - len(line))
                break
            try:
                row = json.loads(line)
                replies[row["key"]] = row["reply"]
            except (ValueError, KeyError, TypeError) as problem:
                raise DataError(
                    f"{path}: the line before byte {file.tell()} is no reply of a judge; remove it, or the "
                    "file to ask everything again."
                ) from problem
    return replies
