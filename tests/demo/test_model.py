import pytest
import torch
from transformers import PreTrainedTokenizerFast

from keytoken.demo.model import HEAD_SIZE, build_model


def test_size_and_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model(tokenizer, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1.17e6, rel=0.01)
    config = model.config
    assert tokenizer.convert_ids_to_tokens(config.video_token_id) == "<|video_pad|>"
    assert tokenizer.convert_ids_to_tokens(config.vision_start_token_id) == "<|vision_start|>"
    assert tokenizer.convert_ids_to_tokens(config.text_config.eos_token_id) == "<|im_end|>"
    assert config.text_config.hidden_size // config.text_config.num_attention_heads == HEAD_SIZE


def test_vllm_supports_the_head_size_on_cpu() -> None:
    backend = pytest.importorskip("vllm.v1.attention.backends.cpu_attn").CPUAttentionBackend
    assert HEAD_SIZE in backend.get_supported_head_sizes()


def test_embeddings_are_of_the_order_of_a_layers_output(tokenizer: PreTrainedTokenizerFast) -> None:
    """The lookup depends on it: a layer must not drown the tokens that it reads."""
    model = build_model(tokenizer, seed=0).eval()
    embed = model.model.language_model.embed_tokens
    states = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: states.append(output))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        model.model(input_ids=ids, position_ids=torch.arange(40).expand(3, 1, 40))
    output = states[0][0] if isinstance(states[0], tuple) else states[0]
    added = output - embed(ids)
    assert 0.2 < float(embed(ids).std() / added.std()) < 5
