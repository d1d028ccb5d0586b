"""Rollout of one answer: media in, seeded sampling, an answer without vision tokens out.

Three classes on verl's seams (verl 0.9.1, experimental/agent_loop and trainer/ppo/v1/agent_loop_tq.py):

- :class:`VideoAgentLoop` runs one trajectory. It prepares a prompt once for all answers of its group
  (verl decodes the clip and runs the processor for every answer, three times each), sends the frames
  *with* their metadata (:mod:`keytoken.verl_adapter.prompts`), and gives every answer its own sampling
  seed. Where the method asks for it, it samples an answer on shuffled frames beside
  (:mod:`keytoken.verl_adapter.order`).
- :class:`VideoAgentLoopWorker` takes the trainer's pixels from that same processor run, stores them once for
  the group (:mod:`keytoken.verl_adapter.media`) and computes positions by vLLM's rule
  (:mod:`keytoken.data.families`).
- :class:`VideoAgentLoopManager` starts these workers; name it in
  ``actor_rollout_ref.rollout.agent.agent_loop_manager_class``.

A per-request seed needs ``rollout.enable_chunked_prefill=false`` on the CPU engine.
"""

import asyncio
import dataclasses
import hashlib
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

import ray
import torch
from pydantic import PrivateAttr

from keytoken.data.families import positions_of
from keytoken.loss_rules import AGENT_LOOP
from keytoken.parity import require_positions_of_any_answer
from keytoken.verl_adapter import order
from keytoken.verl_adapter.compat import (
    AgentLoopManagerTQ,
    AgentLoopMetrics,
    AgentLoopOutput,
    AgentLoopWorkerTQ,
    SingleTurnAgentLoop,
    register_agent_loop,
    simple_timer,
)
from keytoken.verl_adapter.dataset import counting_reads
from keytoken.verl_adapter.failures import FailureWatch
from keytoken.verl_adapter.media import PromptMedia
from keytoken.verl_adapter.pictures import Media, controlled
from keytoken.verl_adapter.prompts import PreparedPrompt, pack_prompt
from keytoken.verl_adapter.shims.vision_tokens import vision_token_ids

# Key in ``extra_fields``: vision tokens that the policy put into its answer, and that were cut off.
ANSWER_VISION_TOKENS = "answer_vision_tokens"
# Key in ``extra_fields``: clips that were decoded or found in the frame cache for this answer, as a dict with
# the fields of CacheStatistics. The answer that prepared its group's prompt has them, the others have zeros.
CLIP_READS = "clip_reads"
# Key in ``extra_fields``: bytes of pixels that were put into the data plane with this answer, which is the
# first of its group to be stored.
MEDIA_PUT_BYTES = "media_put_bytes"
# Key of a row: sampling parameters of the parity gate, which take the place of the run's and of the seed. A
# row that has it comes as one of a validation, because verl knows two kinds of prompts.
PARITY_SAMPLING = "parity_sampling"
# Takes the likeliest token. Said by ``top_k`` and not by a temperature of 0: vLLM's CPU sampler ignores every
# seed of a batch in which one request has none, and a greedy request has none (vllm 0.27.1,
# topk_topp_sampler.py, forward_cpu).
GREEDY = {"temperature": 1.0, "top_p": 1.0, "top_k": 1}


class VideoAgentLoopOutput(AgentLoopOutput):
    """verl's output, and beside it what is not stored with it.

    The prompt's media, which all answers of the group share, and the answer on shuffled frames if any.
    """

    _media: PromptMedia | None = PrivateAttr(default=None)
    _shuffled: "VideoAgentLoopOutput | None" = PrivateAttr(default=None)


# Answers of one group run at the same time and hold the task; the last one to end lets it go.
_PREPARING: "weakref.WeakValueDictionary[str, asyncio.Task[_Group]]" = weakref.WeakValueDictionary()


@dataclasses.dataclass(frozen=True, slots=True)
class _Group:
    """What the answers to a prompt share."""

    prompt: PreparedPrompt
    media: PromptMedia


@register_agent_loop(AGENT_LOOP)
class VideoAgentLoop(SingleTurnAgentLoop):
    """One answer to one prompt."""

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """Generate and package one answer; ``kwargs`` are the dataset's fields and verl's ids."""
        number = int(kwargs["session_id"])
        info = kwargs.get("extra_info") or {}
        # Counting is inherited by the task that prepares the prompt, if this call starts it.
        with counting_reads() as reads:
            preparing = self._prepare(list(kwargs["raw_prompt"]), str(info.get("control") or "none"), kwargs)
            group = await _once(str(kwargs["uid"]), preparing)
        prompt = group.prompt
        answer = partial(self._answer, params=sampling_params, priority=int(priority), row=kwargs)
        shuffled = self._shuffle(prompt, kwargs)
        if shuffled is None:
            result = await answer(prompt, number)
        else:
            # Numbers below 0 are those of shuffled answers: the seeds of the others are as they are without.
            result, result._shuffled = await asyncio.gather(
                answer(prompt, number), answer(shuffled, -1 - number)
            )
        result._media = group.media
        result.extra_fields[CLIP_READS] = dataclasses.asdict(reads)
        return result

    def _shuffle(self, prompt: PreparedPrompt, row: dict[str, Any]) -> PreparedPrompt | None:
        """The prompt of the shuffled answer beside this one; None if there is to be none."""
        if int(row["session_id"]) >= int(row.get(order.SHUFFLED_ANSWERS, 0)):
            return None
        seed = self.config.keytoken.attribution.shuffle_seed
        videos = order.shuffled_videos(prompt.videos, seed, str(row["uid"]))
        return None if videos is None else dataclasses.replace(prompt, videos=videos)

    async def _answer(
        self, prompt: PreparedPrompt, number: int, params: dict[str, Any], priority: int, row: dict[str, Any]
    ) -> VideoAgentLoopOutput:
        run_seed, step, index = self.config.keytoken.seed, int(row["global_steps"]), int(row["index"])
        seed = answer_seed(run_seed, step, index, number, prompt.token_ids)
        timing: dict[str, Any] = {}
        with simple_timer("generate_sequences", timing):
            output = await self.server_manager.generate(
                request_id=uuid4().hex,
                prompt_ids=prompt.engine_ids,
                sampling_params={**params, **_decoding_of(row), "seed": seed, **row.get(PARITY_SAMPLING, {})},
                image_data=prompt.images,
                video_data=prompt.videos,
                mm_processor_kwargs=prompt.processor_kwargs,
                priority=priority,
            )
        answer = list(output.token_ids)[: self.response_length]
        forbidden = vision_token_ids(self.processor)
        ids, mask = cut_at_vision_token(answer, forbidden, self.tokenizer.eos_token_id)
        num_cut = sum(token in set(forbidden) for token in answer)
        preempted = -1 if output.num_preempted is None else output.num_preempted
        return VideoAgentLoopOutput(
            prompt_ids=prompt.token_ids,
            response_ids=ids,
            response_mask=mask,
            response_logprobs=_log_probs_of(mask, output.log_probs),
            num_turns=2,
            metrics=AgentLoopMetrics(num_preempted=preempted, **timing),
            extra_fields={
                **output.extra_fields,
                "turn_scores": [],
                "tool_rewards": [],
                ANSWER_VISION_TOKENS: num_cut,
            },
        )

    async def _prepare(self, messages: list[dict[str, Any]], control: str, row: dict[str, Any]) -> _Group:
        found = await self.process_multi_modal_info(messages)
        self._assert_mm_supported(bool(found))
        media = Media(found.get("images"), found.get("videos"))
        if control != "none":
            name = str(row["extra_info"].get("prompt_id") or row["index"])
            seed = self.config.keytoken.attribution.shuffle_seed
            media = controlled(media, control, self.processor.video_processor.image_mean, seed, name)
        images, videos = media.images, media.videos
        features: dict[str, Any] = {}
        token_ids = await self.ct_build_initial_tokens(
            messages, images=images, videos=videos, mm_inputs_out=features
        )
        prompt = pack_prompt(token_ids, images, videos, features, self.processor, self.mm_processor_kwargs)
        return _Group(prompt, PromptMedia(str(row["uid"]), prompt.features))


class VideoAgentLoopWorker(AgentLoopWorkerTQ):
    """verl's worker with the prompt's own features and vLLM's positions.

    It also ends a run that cannot go on: verl's asynchronous modes replace a failed prompt by the next
    one, for ever if every prompt fails (verl 0.9.1, trainer/ppo/v1/replay_buffer.py:94-107).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._failures = FailureWatch()

    async def generate_sequences(self, batch: Any) -> None:
        """Start the answers of a batch, unless earlier ones have shown that none can succeed."""
        self._failures.raise_if_hopeless()
        await super().generate_sequences(batch)

    async def _run_agent_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = await super()._run_agent_loop(*args, **kwargs)
        except Exception as error:
            self._failures.failed(str(kwargs["uid"]), error)
            raise
        self._failures.succeeded()
        return result

    async def _agent_loop_postprocess(self, output: AgentLoopOutput, validate: bool, **kwargs: Any) -> Any:
        """Score the shuffled answer, if there is one, and keep its accuracy only; store the prompt's media.

        Nobody reads the pixels of a validation, so they are not stored.
        """
        of_parity = PARITY_SAMPLING in kwargs
        shuffled = output._shuffled if isinstance(output, VideoAgentLoopOutput) else None
        if shuffled is not None:
            await self._compute_score([shuffled], kwargs=kwargs)
            output.extra_fields[order.SHUFFLED_ACCURACY] = order.accuracy_of(shuffled.extra_fields)
        media = output._media if isinstance(output, VideoAgentLoopOutput) else None
        if media is not None:
            stored = not validate or of_parity
            output.extra_fields[MEDIA_PUT_BYTES] = await media.store() if stored else 0
        if of_parity and (start := vision_token_ids(self.processor)[:1]):
            positions = partial(self._positions_of, output)
            require_positions_of_any_answer(positions, output.prompt_ids, output.response_ids, start[0])
        return await super()._agent_loop_postprocess(output, validate, **kwargs)

    def _compute_multi_modal_inputs(
        self, output: AgentLoopOutput, input_ids: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        media = output._media if isinstance(output, VideoAgentLoopOutput) else None
        if media is not None:
            return media.reference()
        return super()._compute_multi_modal_inputs(output, input_ids)

    def _positions_of(self, output: AgentLoopOutput, ids: list[int]) -> torch.Tensor:
        row = torch.tensor([ids])
        features = self._compute_multi_modal_inputs(output, row[0])
        return self._compute_position_ids(row, torch.ones_like(row), features)

    def last_failure(self) -> str | None:
        """What the answer that failed last said; None if none has."""
        return self._failures.last

    def _compute_position_ids(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        multi_modal_inputs: Mapping[str, Any],
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        if self.processor is None:
            return super()._compute_position_ids(input_ids, attention_mask, multi_modal_inputs)
        return position_ids(self.processor, input_ids, attention_mask, multi_modal_inputs)


class VideoAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager, starting :class:`VideoAgentLoopWorker`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(VideoAgentLoopWorker)


def position_ids(
    processor: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, features: Mapping[str, Any]
) -> torch.Tensor:
    """Position ids of one sequence, by vLLM's rule for the model's family.

    Args:
        processor: A processor with the model's configuration as ``config``, as verl binds it.
        input_ids: [1, L], prompt and answer.
        attention_mask: [1, L]; padding gets position 1, verl's convention.
        features: The prompt's ``image_grid_thw``, ``video_grid_thw`` and ``second_per_grid_ts``.

    Returns:
        int64 [1, 4, L]: text row, then time, height and width.

    Raises:
        ConfigurationError: another model family, whose positions differ.
    """
    valid = attention_mask[0].bool()
    vision = getattr(getattr(processor, "config", None), "vision_config", None)
    per_second = getattr(vision, "tokens_per_second", None)
    positions = positions_of(processor, input_ids[0, valid].tolist(), features, per_second)
    result = torch.ones((1, 4, input_ids.shape[1]), dtype=torch.int64)
    result[0, 0, valid] = torch.arange(int(valid.sum()))
    result[0, 1:, valid] = positions
    return result


def answer_seed(run_seed: int, step: int, index: int, answer: int, prompt_ids: Sequence[int]) -> int:
    """The sampling seed of one answer: the same in every run with the same seed, whatever the timing.

    Args:
        run_seed: Seed of the run.
        step: Training step for which the prompt was drawn.
        index: The prompt's number in the dataset.
        answer: Number of the answer within its group; -1, -2, ... for answers on shuffled frames.
        prompt_ids: Prompt ids; keeps rows apart that share a number.

    Returns:
        A non-negative 63-bit integer.
    """
    text = f"{run_seed}|{step}|{index}|{answer}|{','.join(map(str, prompt_ids))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def cut_at_vision_token(
    answer: Sequence[int], forbidden: Sequence[int], end_token_id: int
) -> tuple[list[int], list[int]]:
    """Cut an answer before its first vision token, which no later pass could place.

    The cut is marked by an end token that the loss does not see, so an answer is never empty.

    Example: with forbidden token 9 and end token 2, ``[5, 6, 9, 7]`` becomes ids ``[5, 6, 2]`` with
    loss mask ``[1, 1, 0]``.

    Returns:
        Token ids and loss mask of equal length.
    """
    banned = set(forbidden)
    for position, token in enumerate(answer):
        if token in banned:
            return [*answer[:position], end_token_id], [1] * position + [0]
    return list(answer), [1] * len(answer)


async def _once(key: str, work: Coroutine[Any, Any, _Group]) -> _Group:
    """Await one shared task for all callers of the same key that overlap in time."""
    task = _PREPARING.get(key)
    if task is None:
        task = asyncio.ensure_future(work)
        _PREPARING[key] = task
        task.add_done_callback(partial(_forget_failure, key))
    else:
        work.close()
    return await asyncio.shield(task)


def _forget_failure(key: str, task: "asyncio.Task[_Group]") -> None:
    """Let a failed task go: its traceback refers to it, so nobody's end would."""
    if (task.cancelled() or task.exception() is not None) and _PREPARING.get(key) is task:
        del _PREPARING[key]


def _decoding_of(row: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters that a row asks for by ``extra_info.decoding: greedy``."""
    return dict(GREEDY) if (row.get("extra_info") or {}).get("decoding") == "greedy" else {}


def _log_probs_of(mask: Sequence[int], log_probs: Sequence[float] | None) -> list[float] | None:
    """The engine's log-probs of the kept tokens, 0 for a mark that was not sampled."""
    if not log_probs:
        return None
    return [log_prob if kept else 0.0 for log_prob, kept in zip(log_probs, mask, strict=False)]
