"""The demo's model: a Qwen2.5-VL of 1.2 million parameters with the real one's architecture."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

HEAD_SIZE = 32  # hidden size over heads; the smallest that the CPU attention of vLLM supports
# Looking up an option's letter takes two attention layers that find each other only if a layer's input
# still shows which token it stands on. With the usual 0.02 everywhere, or with embeddings as small as
# the weights, the first layer's output drowns the token and the lookup takes three times as many steps.
_WEIGHT_STD = 0.11  # about 1 / sqrt(hidden size)
_EMBEDDING_STD = 0.5  # of the order of a layer's output
TOKENS_PER_SECOND = 2  # temporal positions advance by two a second, as in the released models


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Configuration of the demo's model for a tokenizer.

    The vocabulary is not padded beyond the tokenizer: vLLM masks such rows and transformers does not,
    so their log-probs would differ.
    """
    token_id: Any = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 128 // HEAD_SIZE,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": _WEIGHT_STD,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "mrope_section": [4, 6, 6]},
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": TOKENS_PER_SECOND,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "initializer_range": _WEIGHT_STD,
    }
    shared: dict[str, Any] = {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "tie_word_embeddings": False,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "dtype": "float32",
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **shared)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised model; the same seed gives the same weights."""
    config = model_config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=_EMBEDDING_STD)
    return model
