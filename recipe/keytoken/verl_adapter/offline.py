"""One vLLM engine without a trainer: evaluation asks it what training's rollout would have been asked.

Shared with training, so that an evaluated model sees what the trained one saw:

- clips and images are read by the dataset's own method (:mod:`keytoken.verl_adapter.dataset`);
- prompts are built by verl's builder and packed by :mod:`keytoken.verl_adapter.prompts`;
- the engine's settings are those of ``actor_rollout_ref.rollout``, read from the same files, its workers run
  verl's extension and with it KeyToken's shims, and the logits of vision tokens are masked by the same call;
- answers are cut at vision tokens and decoded as the reward sees them.

Not shared: no Ray, no HTTP server and no weight sync; nothing of the engine sleeps.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from omegaconf import DictConfig, OmegaConf

from keytoken.data.contract import SamplingContract
from keytoken.errors import ClusterError, ConfigurationError, DataError
from keytoken.verl_adapter.agent_loop import GREEDY, cut_at_vision_token
from keytoken.verl_adapter.compat import (
    create_continuous_token_builder,
    get_vision_placeholder_token_ids,
    hf_processor,
    hf_tokenizer,
    one_placeholder_for_each_picture,
)
from keytoken.verl_adapter.dataset import VideoDataset, sampling_contract
from keytoken.verl_adapter.owner import become_owner
from keytoken.verl_adapter.pictures import Media, controlled
from keytoken.verl_adapter.prompts import PreparedPrompt, pack_prompt
from keytoken.verl_adapter.shims.hooks import on_cpu
from keytoken.verl_adapter.shims.vision_tokens import vision_token_ids

_EXTENSION = "verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension"
_EXTERNAL_MODULE = "keytoken.verl_adapter.register"
# Settings of ``actor_rollout_ref.rollout`` that vLLM knows by the same name, as verl passes them on.
_SAME_NAME = (
    "load_format",
    "dtype",
    "max_num_seqs",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "disable_log_stats",
    "seed",
    "scheduling_policy",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its text, its tokens, and whether it came to an end of its own."""

    text: str
    num_tokens: int
    finished: bool


class PromptMaker:
    """Makes the prompts of one model under one sampling contract. Its methods may run in several threads."""

    def __init__(self, model: Path, data: Mapping[str, Any]) -> None:
        """Load the model's tokenizer and processor.

        Args:
            model: Hugging Face folder.
            data: Keys of a run's ``data`` block: ``sampling_contract``, and others if wanted.

        Raises:
            ConfigurationError: the folder has no processor, or the contract does not fit it.
        """
        self.tokenizer = hf_tokenizer(str(model))
        self.processor = hf_processor(str(model))
        if self.processor is None:
            raise ConfigurationError(
                f"{model}: has no processor, so no video can be shown to it; give the folder of a "
                "vision-language model with preprocessor_config.json or processor_config.json"
            )
        self._data = OmegaConf.create(dict(data))
        self._patch_size = int(self.processor.image_processor.patch_size)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        text_config = config.get("text_config") or {}
        # The longest sequence that the model was made for.
        self.context_length = int(
            text_config.get("max_position_embeddings") or config["max_position_embeddings"]
        )
        self._processor_kwargs = dict(self._data.get("mm_processor_kwargs") or {})
        self._builder = create_continuous_token_builder(
            self.tokenizer,
            hf_model_type=config.get("model_type"),
            chat_template_kwargs=dict(self._data.get("apply_chat_template_kwargs") or {}),
            mm_processor_kwargs=self._processor_kwargs,
            processor=self.processor,
        )
        self.contract: SamplingContract = sampling_contract(self._data, self._patch_size)

    def read(self, messages: list[dict[str, Any]]) -> Media:
        """Read the media of a conversation.

        Raises:
            ClipError: a clip cannot be read.
            OSError: an image cannot be read.
        """
        images, videos, _ = VideoDataset._process_multi_modal_info(messages, self._patch_size, self._data)
        return Media(images, videos)

    def prepare(self, messages: list[dict[str, Any]], media: Media) -> PreparedPrompt:
        """The prompt of a conversation with media that :meth:`read` has read.

        Raises:
            ConfigurationError: the processor resizes the contract's frames.
        """
        features: dict[str, Any] = {}
        token_ids = self._builder.build_initial_tokens(
            messages, images=media.images, videos=media.videos, mm_inputs_out=features
        )
        return pack_prompt(
            token_ids, media.images, media.videos, features, self.processor, self._processor_kwargs
        )

    def controlled(self, media: Media, control: str, seed: int, name: str) -> Media:
        """The pictures under a control; see :func:`keytoken.verl_adapter.pictures.controlled`."""
        return controlled(media, control, self.processor.video_processor.image_mean, seed, name)


class OfflineEngine:
    """A running vLLM engine. Use within one event loop, and call :meth:`shutdown` at the end."""

    def __init__(self, model: Path, rollout: DictConfig, maker: PromptMaker, max_model_len: int) -> None:
        """Start the engine; takes from half a minute to several.

        Args:
            model: Hugging Face folder.
            rollout: ``actor_rollout_ref.rollout`` of a composed configuration.
            maker: Makes this model's prompts.
            max_model_len: Longest prompt and answer together.

        Raises:
            ClusterError: the engine did not start.
        """
        _set_environment()
        become_owner()
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._maker = maker
        self._max_model_len = max_model_len
        arguments = AsyncEngineArgs(model=str(model), **engine_settings(rollout, max_model_len))
        try:
            self._engine = AsyncLLM.from_engine_args(arguments)
        except (RuntimeError, ValueError, OSError) as problem:
            raise ClusterError(
                f"vLLM did not start with {model}: {problem}. Its own messages are above; too little memory "
                "is mended by max_model_len=, tensor_parallel= or a smaller sampling preset."
            ) from problem

    async def mask_vision_tokens(self) -> None:
        """Make tokens that no answer may hold impossible, by the call that verl's server makes."""
        await self._engine.collective_rpc(
            "monkey_patch_model",
            kwargs={
                "vocab_size": len(self._maker.tokenizer),
                "banned_token_ids": get_vision_placeholder_token_ids(self._maker.processor),
            },
        )

    async def answer(self, prompt: PreparedPrompt, sampling: Mapping[str, Any], max_tokens: int) -> Answer:
        """Ask for one answer.

        Args:
            prompt: The prompt.
            sampling: Sampling parameters of vLLM; with a seed, as the CPU engine needs one of every request.
            max_tokens: Longest answer; less where the prompt leaves less room.

        Raises:
            DataError: the engine refuses this request; others may go on.
            ClusterError: the engine has died.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        room = self._max_model_len - len(prompt.token_ids)
        if room < 1:
            raise DataError(
                f"the prompt has {len(prompt.token_ids)} tokens and max_model_len is {self._max_model_len}; "
                "raise it, or choose a sampling preset with fewer frames or pixels"
            )
        parameters = SamplingParams(max_tokens=min(max_tokens, room), repetition_penalty=1.0, **sampling)
        try:
            async for output in self._engine.generate(self._request(prompt), parameters, uuid4().hex):
                last = output
        except EngineDeadError as problem:
            raise ClusterError(
                f"the vLLM engine has died ({problem}); its last messages say why. What is answered is kept: "
                "the same command goes on"
            ) from problem
        except (VLLMClientError, EngineGenerateError, ValueError) as problem:
            reason = problem.__cause__ or problem
            raise DataError(f"vLLM: {type(reason).__name__}: {reason}") from problem
        return self._decoded(last.outputs[0])

    def shutdown(self) -> None:
        """Stop the engine and its processes."""
        self._engine.shutdown()

    def _request(self, prompt: PreparedPrompt) -> Any:
        """As verl's server makes it: one placeholder for each picture, which vLLM expands again."""
        pictures = {"image": prompt.images, "video": prompt.videos}
        return {
            "prompt_token_ids": one_placeholder_for_each_picture(prompt.engine_ids, self._maker.processor),
            "multi_modal_data": {name: given for name, given in pictures.items() if given},
            "mm_processor_kwargs": prompt.processor_kwargs,
        }

    def _decoded(self, output: Any) -> Answer:
        tokenizer = self._maker.tokenizer
        forbidden = vision_token_ids(self._maker.processor)
        ids, mask = cut_at_vision_token(list(output.token_ids), forbidden, tokenizer.eos_token_id)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text, sum(mask), output.finish_reason == "stop")


def sampling_of(decoding: str, seed: int, temperature: float, top_p: float) -> dict[str, Any]:
    """Sampling parameters of one answer."""
    if decoding == "greedy":
        return {**GREEDY, "seed": seed}
    return {"temperature": temperature, "top_p": top_p, "top_k": -1, "seed": seed}


def engine_settings(rollout: DictConfig, max_model_len: int) -> dict[str, Any]:
    """vLLM's arguments from the settings of training's rollout, as verl's server derives them."""
    own = rollout.engine_kwargs.get("vllm") or {}
    extra = {str(name): value for name, value in dict(own).items() if value is not None}
    return {
        **{name: rollout[name] for name in _SAME_NAME},
        "tensor_parallel_size": rollout.tensor_model_parallel_size,
        "max_model_len": max_model_len,
        # A prefill that is not cut into chunks has to fit into one batch.
        "max_num_batched_tokens": max(rollout.max_num_batched_tokens, max_model_len),
        "distributed_executor_backend": "mp",
        "worker_extension_cls": _EXTENSION,
        "skip_tokenizer_init": False,
        **extra,
    }


def _set_environment() -> None:
    """What vLLM's processes inherit: KeyToken's shims, and on a CPU one thread that no core is bound to."""
    modules = [name for name in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if name]
    if _EXTERNAL_MODULE not in modules:
        os.environ["VERL_USE_EXTERNAL_MODULES"] = ",".join([*modules, _EXTERNAL_MODULE])
    if on_cpu():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
