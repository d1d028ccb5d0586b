"""Asks a model the questions that are wanted, many at a time, and keeps every answer at once.

Media are read and prompts made in threads beside the generation, once for all answers of a question. What
goes wrong with one question (a clip that cannot be read, a prompt that is too long, a request that the
engine refuses) becomes an answer that failed, with the reason; too many of them, or an engine that dies, end
the run.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

from keytoken.errors import ConfigurationError, DataError
from keytoken.evaluation.rows import Job, SampleKey, conversation, media_of, sample_seed
from keytoken.evaluation.store import PredictionStore
from keytoken.scoring.items import Item, Prediction
from keytoken.verl_adapter.offline import Answer, PromptMaker, sampling_of
from keytoken.verl_adapter.pictures import Media
from keytoken.verl_adapter.prompts import PreparedPrompt

ResultT = TypeVar("ResultT")
SHOWN_REASONS = 5


class Engine(Protocol):
    """What answers: :class:`keytoken.verl_adapter.offline.OfflineEngine`."""

    async def answer(self, prompt: PreparedPrompt, sampling: Mapping[str, Any], max_tokens: int) -> Answer:
        """One answer; DataError for a request that is refused, ClusterError for an engine that has died."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions are asked.

    Attributes:
        text: The text of a question as the model sees it.
        media_root: Folder of the media; None for questions without any, or that name it themselves.
        seed: Seeds sampled answers and shuffled frames.
        temperature: Of sampled answers.
        top_p: Of sampled answers.
        max_tokens: Longest answer.
        threads: Questions whose media are read at the same time.
        concurrency: Questions in the engine or on their way to it.
        max_failures: More failed answers than this end the run.
    """

    text: Callable[[Item], str]
    media_root: Path | None
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    threads: int
    concurrency: int
    max_failures: int


class Asker:
    """Asks the questions of one evaluation."""

    def __init__(
        self,
        asking: Asking,
        maker: PromptMaker,
        engine: Engine,
        store: PredictionStore,
        seen: Callable[[Prediction], None],
    ) -> None:
        """Get ready.

        Args:
            asking: How questions are asked.
            maker: Makes the model's prompts.
            engine: Answers them.
            store: Keeps the answers.
            seen: Told of every answer after it is kept.
        """
        self._asking, self._maker, self._engine, self._store, self._seen = asking, maker, engine, store, seen

    async def ask(self, jobs: Sequence[Job]) -> None:
        """Ask everything.

        Raises:
            DataError: more answers failed than may.
            ClusterError: the engine has died.
        """
        waiting = iter(jobs)

        async def work() -> None:
            for job in waiting:  # shared: each worker takes the next job that nobody has
                await self._ask_job(job)

        count = min(self._asking.concurrency, len(jobs))
        self._pool = ThreadPoolExecutor(self._asking.threads, thread_name_prefix="media")
        workers = [asyncio.ensure_future(work()) for _ in range(count)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def _ask_job(self, job: Job) -> None:
        reading: asyncio.Future[Media] | None = None
        for control, keys in groupby(job.keys, key=lambda key: key.control):
            if control != "text" and reading is None:
                reading = asyncio.ensure_future(self._in_thread(lambda: self._read(job.item)))
            try:
                media = Media() if control == "text" or reading is None else await reading
                prompt = await self._in_thread(lambda: self._prompt(job.item, control, media))  # noqa: B023
            except ConfigurationError:
                raise  # no question's own fault
            except (DataError, ValueError, OSError) as problem:
                self._keep_failures(keys, problem)
                continue
            await asyncio.gather(*(self._ask_one(prompt, key) for key in keys))

    async def _ask_one(self, prompt: PreparedPrompt, key: SampleKey) -> None:
        how = self._asking
        sampling = sampling_of(key.decoding, sample_seed(how.seed, key), how.temperature, how.top_p)
        try:
            answer = await self._engine.answer(prompt, sampling, how.max_tokens)
        except DataError as problem:
            self._keep_failures([key], problem)
            return
        self._keep(Prediction(response=answer.text, **key._asdict()))

    def _read(self, item: Item) -> Media:
        videos, images = media_of(item, self._asking.media_root)
        return self._maker.read(conversation("", videos, images))

    def _prompt(self, item: Item, control: str, media: Media) -> PreparedPrompt:
        """The prompt of a question under a control."""
        if control != "text":  # which has no pictures to change
            media = self._maker.controlled(media, control, self._asking.seed, item.item_id)
        # Only how many there are, and of which kind, matters to the chat template.
        shown = [Path(item.video or "")] * len(media.videos or ()), [Path()] * len(media.images or ())
        return self._maker.prepare(conversation(self._asking.text(item), *shown), media)

    async def _in_thread(self, work: Callable[[], ResultT]) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _keep(self, prediction: Prediction) -> None:
        self._store.append(prediction)
        self._seen(prediction)

    def _keep_failures(self, keys: Iterable[SampleKey], problem: Exception) -> None:
        for key in keys:
            reason = f"{type(problem).__name__}: {problem}"
            self._keep(Prediction(response=None, error=reason, **key._asdict()))
        failed = [each for each in self._store.predictions.values() if each.response is None]
        if len(failed) > self._asking.max_failures:
            reasons = [f"{each.item_id}: {each.error}" for each in failed[-SHOWN_REASONS:]]
            raise DataError(
                f"{len(failed)} answers failed, and max_failures is {self._asking.max_failures}. The last "
                f"ones: {'; '.join(reasons)}. What is answered is kept. Mend the reason and give the same "
                "command with retry_failed=true, or raise max_failures"
            )
