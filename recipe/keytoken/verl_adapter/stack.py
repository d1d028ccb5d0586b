"""Combinations of verl's settings that cannot work on this stack, refused before any process starts.

Each rule replaces a crash, a hang or silently wrong numbers deep inside a worker by one message:

- S6: offload needs an accelerator (pinned memory). verl 0.9.1, workers/engine/fsdp/transformer_impl.py:462.
- B6: without padding, Qwen2.5-VL attention needs flash-attn; without it a NameError in the first pass.
  verl 0.9.1, models/transformers/qwen2_vl.py:45-61 and :331.
- B10: vocabulary rows beyond the tokenizer: vLLM masks them, the trainer does not, and the log-probs of
  the two differ. Trained models give such rows next to no probability, untrained ones a fair share.
- FSDP1 does not run on CPU, and a request with a seed of its own stops the CPU engine when its prefill
  is chunked.
"""

from pathlib import Path

from omegaconf import DictConfig
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import is_flash_attn_2_available

from keytoken.errors import ConfigurationError
from keytoken.verl_adapter.shims.hooks import on_cpu

# A model that spreads its probability evenly is off by -log(1 - share): 0.01 nats at one percent.
# Qwen2.5-VL-7B pads 0.3 percent of its rows.
_MAX_PADDED_SHARE = 0.01


def check_stack(config: DictConfig) -> None:
    """Check a composed run configuration against the stack that is installed.

    Args:
        config: The whole configuration (verl's blocks and KeyToken's).

    Raises:
        ConfigurationError: names the key, its value and what to set.
    """
    model = config.actor_rollout_ref.model
    if model.use_remove_padding and not is_flash_attn_2_available():
        raise ConfigurationError(
            "actor_rollout_ref.model.use_remove_padding=true needs flash-attn, which is not installed; "
            "set it to false, or install requirements/gpu.txt"
        )
    if on_cpu():
        for role in ("actor", "ref"):
            _check_cpu_engine(config, role)
        if config.actor_rollout_ref.rollout.enable_chunked_prefill:
            raise ConfigurationError(
                "actor_rollout_ref.rollout.enable_chunked_prefill=true: vLLM's CPU engine dies on a seeded "
                "request whose prefill is chunked; set it to false"
            )
    check_vocabulary(model.path)


def check_vocabulary(model_path: str) -> None:
    """Check that a local model's vocabulary fits its tokenizer; a model that is not local is not checked.

    Raises:
        ConfigurationError: names both sizes.
    """
    folder = Path(model_path).expanduser()
    if not folder.is_dir():
        return
    model_config = AutoConfig.from_pretrained(folder)
    num_rows = model_config.get_text_config().vocab_size
    num_tokens = len(AutoTokenizer.from_pretrained(folder))
    if num_tokens > num_rows:
        raise ConfigurationError(
            f"model {folder}: the tokenizer has {num_tokens} tokens, the model {num_rows} embeddings; "
            "use the tokenizer the model was trained with"
        )
    if (num_rows - num_tokens) / num_rows > _MAX_PADDED_SHARE:
        raise ConfigurationError(
            f"model {folder}: {num_rows - num_tokens} of {num_rows} vocabulary rows have no token; the "
            "rollout masks them and the trainer does not, so their log-probs would differ. Set vocab_size to "
            f"{num_tokens} (model.resize_token_embeddings({num_tokens}))"
        )


def _check_cpu_engine(config: DictConfig, role: str) -> None:
    engine = config.actor_rollout_ref[role].fsdp_config
    where = f"actor_rollout_ref.{role}"
    strategy = config.actor_rollout_ref[role].strategy
    if strategy != "fsdp2":
        raise ConfigurationError(f"{where}.strategy={strategy} does not run on CPU; set it to fsdp2")
    for name in ("param_offload", "optimizer_offload", "offload_policy"):
        if engine.get(name, False):
            raise ConfigurationError(
                f"{where}.fsdp_config.{name}=true: there is no accelerator to offload from; set it to false"
            )
