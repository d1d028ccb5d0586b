"""The demo's tokenizers and processors: byte-level BPE in which every word of the world is one token.

They have the special tokens and the chat template of Qwen2.5-VL and are saved in Hugging Face's format, so
``AutoTokenizer`` and ``AutoProcessor`` load them like any other model's. ``<think>`` and ``<answer>`` are
ordinary tokens, not special ones: a decoder that skips special tokens must keep them for the reward.
"""

import dataclasses

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from keytoken.data.contract import SamplingContract
from keytoken.demo import world

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The pixel bounds leave a frame of the demo's size as it is.
DEMO_CONTRACT = SamplingContract(
    fps=2.0,
    min_frames=4,
    max_frames=world.NUM_FRAMES,
    min_pixels=world.FRAME_SIZE**2,
    max_pixels=world.FRAME_SIZE**2,
)
# Two patches of 16 pixels become one token, so a frame of 56 is enlarged to 64.
QWEN3_SIZE = 64
QWEN3_CONTRACT = dataclasses.replace(
    DEMO_CONTRACT, min_pixels=QWEN3_SIZE**2, max_pixels=QWEN3_SIZE**2, patch_size=16
)
CONTRACTS = {"qwen2_5_vl": DEMO_CONTRACT, "qwen3_vl": QWEN3_CONTRACT}
_HALF = [0.5, 0.5, 0.5]  # mean and deviation of the released Qwen3-VL, for images and videos


def vocabulary() -> list[str]:
    """All words of the world, sorted."""
    rng = np.random.default_rng(0)
    words = {"user", "assistant", "system", *world.LETTERS, *world.COLORS, *world.SHAPES, *world.DIRECTIONS}
    words |= {*world.EVENTS, *world.NUMBERS}
    for family in world.FAMILIES:
        question = world.make_question(family, rng)
        words.update(question.prompt.split(), question.response.split())
    return sorted(words - set(TAG_TOKENS))


def build_tokenizer(family: str = "qwen2_5_vl") -> PreTrainedTokenizerFast:
    """Build the tokenizer of a family; it depends on the word list only, so it is the same everywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # never reached: merging stops when every word is one token
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Words follow a space everywhere but after a line break or a tag.
    words = [*vocabulary(), *(["seconds"] if family == "qwen3_vl" else [])]  # Qwen3-VL writes times
    tokenizer.train_from_iterator([f"{word} {word}" for word in words], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, lstrip=True, normalized=False) for token in TAG_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor(
    tokenizer: PreTrainedTokenizerFast, family: str = "qwen2_5_vl"
) -> Qwen2_5_VLProcessor | Qwen3VLProcessor:
    """The family's processor around the tokenizer.

    Frames reach it at the size that the sampling contract gives them, and it may not change that. Its bounds,
    one tile and four times the contract's pixels, hold clips as well that are not square as the demo's are.
    """
    contract = CONTRACTS[family]
    tile = contract.patch_size * contract.merge_size
    size = {"shortest_edge": tile * tile, "longest_edge": 4 * contract.max_pixels}
    if family == "qwen3_vl":
        look = {"patch_size": contract.patch_size, "image_mean": _HALF, "image_std": _HALF}
        of_clip = {**size, "longest_edge": size["longest_edge"] * contract.max_frames}  # of a whole clip
        return Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(size=dict(size), **look),
            video_processor=Qwen3VLVideoProcessor(size=of_clip, **look),
            tokenizer=tokenizer,
            chat_template=CHAT_TEMPLATE,
        )
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size)),
        video_processor=Qwen2VLVideoProcessor(size=dict(size)),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
