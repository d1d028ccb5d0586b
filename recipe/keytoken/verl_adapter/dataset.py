"""verl's RL dataset, reading clips through KeyToken's sampling contract.

The seam is ``_process_multi_modal_info``: verl calls it in the agent loop, and everything downstream
(the request to vLLM, the processor that makes the trainer's pixels) takes the frames and metadata it
returns. verl's own goes through qwen_vl_utils, which re-reads its settings from every row.

Rows that cannot be used are set aside when the dataset is opened, not in the middle of a run: a clip or
image that cannot be read, a prompt longer than the limit. Each is listed with its reason in
``data.quarantine_file``; none is replaced.

A row may show a part of a clip, as ``video_start`` and ``video_end`` beside ``video``
(:mod:`keytoken.data.part`).

Rows of ``keytoken data prepare check=decode`` say how many vision tokens they have; their clips are not
decoded again to find out (:mod:`keytoken.verl_adapter.counted`).

Own keys of the ``data`` block: ``sampling_contract`` (fields of :class:`SamplingContract`; the patch size
comes from the processor), ``quarantine_file``, ``clip_check`` and ``clip_check_jobs`` (what is decoded when
the dataset is opened, and how many clips at once) and ``frame_cache``, a folder
(:mod:`keytoken.data.cache.store`). Without a cache a clip is decoded when the dataset is opened and whenever
its prompt is drawn; with one, once. Evaluation, which scans no clips beforehand, also sets ``clip_limit_s``,
the seconds that decoding a clip may take.
"""

import asyncio
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import torch
from omegaconf import DictConfig
from PIL import Image

from keytoken.data.cache.store import CacheStatistics, FrameCache, Read, Shape, clip_shape, frame_cache
from keytoken.data.clip_check import NEW, check_settings
from keytoken.data.clips import Clip, read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.families import words_of_video
from keytoken.data.headers import tokens_of_frames, tokens_of_picture
from keytoken.data.part import Part, named_clip
from keytoken.data.quarantine import Quarantined, scan_rows
from keytoken.data.row_contract import require_contract
from keytoken.data.timed import read_clip_within
from keytoken.errors import ConfigurationError, DataError
from keytoken.verl_adapter.compat import RLHFDataset
from keytoken.verl_adapter.counted import COUNT, ROW, compare_count, counted, usable_counts

logger = logging.getLogger(__name__)

_INFO = "extra_info"

# Where clips read by the running task are counted; None: nobody asked.
_COUNTER: ContextVar[CacheStatistics | None] = ContextVar("counter", default=None)

Video = tuple[torch.Tensor, dict[str, Any]]  # uint8 frames [T, C, H, W] and their metadata


class VideoDataset(RLHFDataset):
    """Rows of verl's schema (``prompt``, ``videos``, ``images``, ``extra_info``, ...) with usable media.

    Attributes:
        quarantined: The rows set aside, in the order of the data files.
    """

    quarantined: list[Quarantined]

    @cached_property
    def _contract(self) -> SamplingContract:
        return sampling_contract(self.config, self.image_patch_size)

    @cached_property
    def _contract_digest(self) -> str:
        return self._contract.digest()  # asked for with every row

    def maybe_filter_out_long_prompts(self, dataframe: datasets.Dataset) -> datasets.Dataset:
        """Set aside unreadable and overlong rows; verl calls this once after reading the files.

        Raises:
            DataError: no row is left.
        """
        contract = self._contract
        if self.video_key in dataframe.column_names:
            require_contract(dataframe[self.video_key], contract)
        infos = dataframe[_INFO] if _INFO in dataframe.column_names else []
        policy, jobs = self.config.get("clip_check", NEW), self.config.get("clip_check_jobs")
        check_settings(policy, jobs)
        counts = usable_counts(infos, contract, policy)
        if counts:
            what = (
                "%d of %d rows say how many vision tokens they have; of them only changed clips are decoded"
            )
            logger.warning(what, len(counts), len(dataframe))
        scan = scan_rows(
            dataframe,
            contract,
            video_key=self.video_key,
            cache=self.config.get("frame_cache"),
            jobs=jobs,
            known=counts,
        )
        self.quarantined = scan.quarantined
        kept = []
        for number in scan.kept:
            count = counts[number] if number in scan.unchanged else None
            reason = self._reason_against(dataframe[number], contract, scan.shapes, count)
            if reason is None:
                kept.append(number)
            else:
                self.quarantined.append(Quarantined(number, str(self.data_files), reason))
        self._report(len(dataframe))
        if not kept:
            raise DataError(
                f"{list(self.data_files)}: none of {len(dataframe)} rows can be used; "
                f"reasons are in {self.config.get('quarantine_file')}"
            )
        return dataframe.select(kept)

    @classmethod
    def _process_multi_modal_info(
        cls, messages: list[dict[str, Any]], image_patch_size: int, config: DictConfig
    ) -> tuple[list[Image.Image] | None, list[Video] | None, None]:
        """Read the media of a conversation.

        Returns:
            Images, videos as (frames, metadata), and no audio; None where there are none.

        Raises:
            ClipError: a clip that was readable when the dataset was opened no longer is.
        """
        contract = sampling_contract(config, image_patch_size)
        images, clips = [], []
        for item in _media_items(messages, "image"):
            images.append(_load_image(item, contract))
            width, height = images[-1].size
            compare_count(item, tokens_of_picture(height, width, contract))
        for item in _media_items(messages, "video"):
            clips.append(_read(named_clip(item), contract, config))
            compare_count(item, tokens_of_frames(clips[-1].frames.shape, contract))
        return images or None, [(clip.frames, clip.metadata()) for clip in clips] or None, None

    @classmethod
    async def process_multi_modal_info(
        cls, messages: list[dict[str, Any]], image_patch_size: int, config: DictConfig
    ) -> tuple[list[Image.Image] | None, list[Video] | None, None]:
        """The same in a thread of its own, which :func:`counting_reads` reaches and verl's does not."""
        return await asyncio.to_thread(cls._process_multi_modal_info, messages, image_patch_size, config)

    @classmethod
    async def process_vision_info(
        cls, messages: list[dict[str, Any]], image_patch_size: int, config: DictConfig
    ) -> tuple[list[Image.Image] | None, list[Video] | None]:
        """The same for callers of verl's older entry point."""
        images, videos, _ = await cls.process_multi_modal_info(messages, image_patch_size, config)
        return images, videos

    def _build_messages(self, example: dict[str, Any], key: str) -> list[dict[str, Any]]:
        """verl's, with the number of vision tokens beside the medium that the row counts them of."""
        messages: list[dict[str, Any]] = super()._build_messages(example, key)
        info = example.get(_INFO) or {}
        count = counted(info, self._contract_digest)
        items = [item for kind in ("image", "video") for item in _media_items(messages, kind)]
        if count is not None and len(items) == 1:
            items[0] |= {COUNT: count, ROW: info.get("prompt_id", info.get("index"))}
        return messages

    def _reason_against(
        self,
        row: dict[str, Any],
        contract: SamplingContract,
        shapes: Mapping[str | Part, Shape],
        count: int | None,
    ) -> str | None:
        """Why a row with readable clips cannot be used all the same, or None."""
        messages = self._build_messages(row, key=self.prompt_key)
        try:
            length = self._prompt_length(messages, contract, shapes, count)
        except (OSError, DataError) as error:
            return f"{type(error).__name__}: {error}"
        if length > self.max_prompt_length:
            return (
                f"the prompt has {length} tokens, data.max_prompt_length is {self.max_prompt_length}; "
                "raise it, or lower max_frames or max_pixels of the sampling contract"
            )
        return None

    def _prompt_length(
        self,
        messages: list[dict[str, Any]],
        contract: SamplingContract,
        shapes: Mapping[str | Part, Shape],
        count: int | None = None,
    ) -> int:
        """Tokens of a prompt with its placeholders expanded, without running the processor on pixels.

        Clips that the scan did not see, because they stand in the messages only, are decoded. Where a prompt
        has times of a video in words, the longest ones are counted.

        Args:
            messages: The conversation.
            contract: The sampling contract.
            shapes: Of the frames of clips that were decoded.
            count: Vision tokens of the one medium of the conversation, if they are known.
        """
        renderer = self.tokenizer if self.processor is None else self.processor
        kwargs = {**self.apply_chat_template_kwargs, "tokenize": False, "add_generation_prompt": True}
        text = renderer.apply_chat_template(messages, **kwargs)
        length = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if count is not None:
            shown = [
                contract.max_frames // contract.temporal_patch_size for _ in _media_items(messages, "video")
            ]
            return length + count - 1 + sum(map(self._words_of_video, shown))
        for item in _media_items(messages, "image"):
            width, height = _load_image(item, contract).size
            length += tokens_of_picture(height, width, contract) - 1
        for item in _media_items(messages, "video"):
            clip = named_clip(item)
            shape = shapes.get(clip) or clip_shape(clip, contract, self.config.get("frame_cache"))
            length += tokens_of_frames(shape, contract) - 1
            length += self._words_of_video(shape[0] // contract.temporal_patch_size)
        return length

    def _words_of_video(self, num_patches: int) -> int:
        return 0 if self.processor is None else words_of_video(self.processor, num_patches)

    def _report(self, num_rows: int) -> None:
        """Log how many rows were set aside and write the list, replacing an earlier one of these files."""
        dataset = ",".join(str(name) for name in self.original_data_files)
        if self.quarantined:
            logger.warning("%d of %d rows of %s set aside", len(self.quarantined), num_rows, dataset)
        target = self.config.get("quarantine_file")
        if target is None:
            return
        lines = [json.dumps({"dataset": dataset, **asdict(row)}) for row in self.quarantined]
        path = Path(os.path.expanduser(target))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            earlier = path.read_text().splitlines()
            lines = [line for line in earlier if json.loads(line)["dataset"] != dataset] + lines
        path.write_text("".join(line + "\n" for line in lines))


def sampling_contract(config: Mapping[str, Any], image_patch_size: int) -> SamplingContract:
    """The run's sampling contract, from the ``data`` block.

    Args:
        config: The block.
        image_patch_size: The processor's, which the contract takes where it names none.

    Raises:
        ConfigurationError: the block has no ``sampling_contract``, one with unknown fields, or one for models
            with other patches.
    """
    fields = config.get("sampling_contract")
    if fields is None:
        raise ConfigurationError(
            "data.sampling_contract is not set; point it at the run's sampling settings, "
            "such as data.sampling_contract=${keytoken.sampling}"
        )
    contract = SamplingContract.from_mapping(
        {"patch_size": image_patch_size, **fields}, where="data.sampling_contract"
    )
    if contract.patch_size != image_patch_size:
        raise ConfigurationError(
            f"the sampling contract is for patches of {contract.patch_size} pixels (patch_size), and the "
            f"model's processor makes patches of {image_patch_size}; leave keytoken.sampling.patch_size out, "
            f"and make what was made by this contract again with sampling.patch_size={image_patch_size}"
        )
    return contract


def _media_items(messages: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    for message in messages:
        if isinstance(message["content"], list):
            yield from (item for item in message["content"] if item.get("type") == kind)


def _read(path: str | Part, contract: SamplingContract, config: Mapping[str, Any]) -> Clip:
    root, limit_s = config.get("frame_cache"), config.get("clip_limit_s")
    if root is None:
        clip = _reader(limit_s)(path, contract)
        counts = CacheStatistics(decodes=1, decoded_bytes=clip.frames.nbytes)
    else:
        clips = frame_cache(root) if limit_s is None else _limited_cache(root, limit_s)
        clip, counts = clips.fetch(path, contract)
    counter = _COUNTER.get()
    if counter is not None:
        counter.add(counts)
    return clip


def _reader(limit_s: float | None) -> Read:
    return read_clip if limit_s is None else partial(read_clip_within, limit_s=limit_s)


@cache
def _limited_cache(root: str, limit_s: float) -> FrameCache:
    return FrameCache(root, read=_reader(limit_s))


@contextmanager
def counting_reads() -> Iterator[CacheStatistics]:
    """Count the clips that this task reads within the block."""
    counts = CacheStatistics()
    token = _COUNTER.set(counts)
    try:
        yield counts
    finally:
        _COUNTER.reset(token)


def _load_image(item: Mapping[str, Any], contract: SamplingContract) -> Image.Image:
    from qwen_vl_utils import fetch_image

    return fetch_image(dict(item), image_patch_size=contract.patch_size)
