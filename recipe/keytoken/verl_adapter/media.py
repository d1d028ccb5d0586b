"""The pixels of a prompt cross the data plane once, and not once for each of its answers.

verl stores what the processor made of a prompt's media with every answer to it, and hands every reader as
many copies as there are answers. Here pixels lie in a partition of TransferQueue of their own:

1. The agent loop that prepared a prompt puts its pixels there, before any answer to it is stored
   (:class:`PromptMedia`). All answers to a prompt run in one process (verl 0.9.1, agent_loop_tq.py:122-137).
2. An answer's ``multi_modal_inputs`` is a :class:`MediaReference`: a mapping, as verl and the attribution
   passes expect one, that fetches the pixels when somebody asks for them. That is once for a process and a
   step, as long as :class:`PixelCache` has room.
3. At the end of a step the trainer empties the caches and clears what belongs to no prompt that is being
   answered or waits for its turn (:func:`clear_finished`), whatever became of its answers: trained on,
   filtered out, failed.

TransferQueue's own processes unpickle references, so this module imports little.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import transfer_queue as tq
from torch import Tensor

from keytoken.errors import ClusterError

PARTITION = "keytoken_media"
# Where verl registers a prompt before it is answered, until its answers are trained on or dropped.
_PROMPTS = "train"
# How the names of the tensors begin that are worth a partition of their own; grids and times are tiny.
_PIXELS = "pixel_values"

Pixels = dict[str, Tensor]


class PixelCache:
    """Pixels that this process has fetched in this step; those not asked for the longest make room."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.got_bytes = 0
        self._held: OrderedDict[str, Pixels] = OrderedDict()

    def get(self, prompt: str, fetch: Callable[[], Pixels]) -> Pixels:
        """The pixels of a prompt, from here or by ``fetch``, which is then counted."""
        pixels = self._held.pop(prompt, None)
        if pixels is None:
            pixels = fetch()
            self.got_bytes += _size(pixels)
        self._held[prompt] = pixels
        room = self.capacity - sum(map(_size, self._held.values()))
        while room < 0:
            room += _size(self._held.popitem(last=False)[1])
        return pixels

    def release(self) -> int:
        """Forget all; returns the bytes fetched since the last time."""
        got, self.got_bytes = self.got_bytes, 0
        self._held.clear()
        return got


_CACHE = PixelCache()


class MediaReference(Mapping[str, Tensor]):
    """What the processor made of a prompt's media, the pixels by reference.

    Example: ``reference["video_grid_thw"]`` is at hand wherever the reference is, and
    ``reference["pixel_values_videos"]`` is fetched. Two references are equal if they are one.
    """

    __slots__ = ("_at_hand", "_pixels", "prompt")
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, prompt: str, at_hand: Mapping[str, Tensor], pixels: tuple[str, ...]) -> None:
        self.prompt = prompt
        self._at_hand = at_hand
        self._pixels = pixels

    def __getitem__(self, name: str) -> Tensor:
        if name in self._pixels:
            return _CACHE.get(self.prompt, lambda: _fetch(self.prompt, self._pixels))[name]
        return self._at_hand[name]

    def __contains__(self, name: object) -> bool:
        return name in self._pixels or name in self._at_hand

    def __iter__(self) -> Iterator[str]:
        yield from self._at_hand
        yield from self._pixels

    def __len__(self) -> int:
        return len(self._at_hand) + len(self._pixels)

    def __reduce__(self) -> Any:
        return MediaReference, (self.prompt, self._at_hand, self._pixels)


class PromptMedia:
    """The media of a prompt in the process that prepared it, one object for all answers to it.

    Args:
        prompt: verl's uid of the prompt.
        features: What the processor made of its media; empty for text.
    """

    def __init__(self, prompt: str, features: Mapping[str, Tensor]) -> None:
        self.prompt = prompt
        self.features = features
        self._pixels = {name: value for name, value in features.items() if name.startswith(_PIXELS)}
        self._storing: asyncio.Task[None] | None = None

    def reference(self) -> Mapping[str, Tensor]:
        """What an answer carries: a reference, or nothing for text."""
        if not self.features:
            return {}
        at_hand = {name: value for name, value in self.features.items() if name not in self._pixels}
        return MediaReference(self.prompt, at_hand, tuple(self._pixels))

    async def store(self) -> int:
        """Put the pixels into the data plane, unless another answer's call has done so or is at it.

        Returns:
            The bytes that this call put.
        """
        if not self._pixels:
            return 0
        if self._storing is not None:
            await asyncio.shield(self._storing)
            return 0
        self._storing = asyncio.ensure_future(self._put())
        await asyncio.shield(self._storing)
        return _size(self._pixels)

    async def _put(self) -> None:
        tag = {"bytes": _size(self._pixels)}
        await tq.async_kv_put(key=self.prompt, partition_id=PARTITION, fields=self._pixels, tag=tag)


def set_media_cache(capacity_gb: float) -> None:
    """Bound what this process keeps of the pixels it has fetched, in GiB."""
    _CACHE.capacity = int(capacity_gb * 2**30)


def release_media() -> int:
    """Forget the pixels that this process has fetched; returns their bytes."""
    return _CACHE.release()


def clear_finished() -> int:
    """Clear the pixels of all prompts that verl no longer lists; returns the bytes that stay.

    verl lists a prompt before any of its pixels are stored, and until it has settled: so what is stored is
    asked for first.
    """
    stored = tq.kv_list(PARTITION).get(PARTITION, {})
    listed = tq.kv_list(_PROMPTS).get(_PROMPTS, {})
    finished = [prompt for prompt in stored if prompt not in listed]
    if finished:
        tq.kv_clear(keys=finished, partition_id=PARTITION)
    # A key is there before its pixels, and gets its tag after them.
    return sum(tag.get("bytes", 0) for prompt, tag in stored.items() if prompt in listed)


def clear_prompts(prompts: list[str]) -> None:
    """Clear the pixels of these prompts, whatever verl says of them."""
    stored = tq.kv_list(PARTITION).get(PARTITION, {})
    present = [prompt for prompt in prompts if prompt in stored]
    if present:
        tq.kv_clear(keys=present, partition_id=PARTITION)


def _fetch(prompt: str, names: tuple[str, ...]) -> Pixels:
    try:
        stored = tq.kv_batch_get(keys=[prompt], partition_id=PARTITION, select_fields=list(names))
    except ValueError as gone:
        raise ClusterError(
            f"The pixels of prompt {prompt} are not in the data plane (TransferQueue, {PARTITION}): {gone} "
            "Its answers have outlived it, for instance because they were read from files of an earlier run "
            "(skip.rollout_tq.enable). Switch that off and resubmit: trainer.resume_mode=auto continues from "
            "the last checkpoint."
        ) from gone
    return {name: stored[name][0] for name in names}


def _size(pixels: Pixels) -> int:
    return sum(value.nbytes for value in pixels.values())
