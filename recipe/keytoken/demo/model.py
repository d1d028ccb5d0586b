"""The demo's models: a Qwen2.5-VL of 1.2 and a Qwen3-VL of 1.4 million parameters, like the real ones."""

from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

Model = Qwen2_5_VLForConditionalGeneration | Qwen3VLForConditionalGeneration

HEAD_SIZE = 32  # hidden size over heads; the smallest that the CPU attention of vLLM supports
# Looking up an option's letter takes two attention layers that find each other only if a layer's input
# still shows which token it stands on. With the usual 0.02 everywhere, or with embeddings as small as
# the weights, the first layer's output drowns the token and the lookup takes three times as many steps.
_WEIGHT_STD = 0.11  # about 1 / sqrt(hidden size)
_EMBEDDING_STD = 0.5  # of the order of a layer's output
TOKENS_PER_SECOND = 2  # temporal positions of Qwen2.5-VL advance by two a second, as in the released models


def model_config(
    tokenizer: PreTrainedTokenizerFast, family: str = "qwen2_5_vl"
) -> Qwen2_5_VLConfig | Qwen3VLConfig:
    """Configuration of the demo's model for a tokenizer.

    The vocabulary is not padded beyond the tokenizer: vLLM masks such rows and transformers does not,
    so their log-probs would differ.

    Args:
        tokenizer: The family's tokenizer.
        family: ``model_type`` of a line of :data:`keytoken.data.families.FAMILIES`.
    """
    return _FAMILIES[family][0](tokenizer)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, family: str = "qwen2_5_vl") -> Model:
    """A freshly initialised model; the same seed gives the same weights."""
    config = model_config(tokenizer, family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _FAMILIES[family][1]._from_config(config, attn_implementation="sdpa")
        torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=_EMBEDDING_STD)
    return model


def load_model(folder: str, family: str = "qwen2_5_vl") -> Model:
    """A saved model in float32."""
    return _FAMILIES[family][1].from_pretrained(folder, dtype=torch.float32)


def _qwen2_5_vl(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    text = {
        **_text(tokenizer),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "mrope_section": [4, 6, 6]},
    }
    vision = {
        **_VISION,
        "patch_size": 14,
        "tokens_per_second": TOKENS_PER_SECOND,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    names = ["Qwen2_5_VLForConditionalGeneration"]
    shared = {**_shared(tokenizer), **_ends(tokenizer), "architectures": names}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **shared)


def _qwen3_vl(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    rope = {
        "rope_type": "default",
        "rope_theta": 1e3,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    }
    text = {**_text(tokenizer), "head_dim": HEAD_SIZE, "rope_parameters": rope}
    vision = {
        **_VISION,
        "patch_size": 16,
        "num_position_embeddings": 64,  # a grid of 8 x 8, stretched over the 4 x 4 patches of a frame
        "deepstack_visual_indexes": [0, 1],
    }
    shared = {**_shared(tokenizer), "architectures": ["Qwen3VLForConditionalGeneration"]}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **shared)


_FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen2_5_vl": (_qwen2_5_vl, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (_qwen3_vl, Qwen3VLForConditionalGeneration),
}

_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 128,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": _WEIGHT_STD,
}


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 128 // HEAD_SIZE,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": _WEIGHT_STD,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **_ends(tokenizer),
    }


def _ends(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    token_id: Any = tokenizer.convert_tokens_to_ids
    return {
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }


def _shared(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    token_id: Any = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
