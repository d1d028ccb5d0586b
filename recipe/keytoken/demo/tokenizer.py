"""The demo's tokenizer and processor: byte-level BPE in which every word of the world is one token.

It has the special tokens and the chat template of Qwen2.5-VL and is saved in Hugging Face's format, so
``AutoTokenizer`` and ``AutoProcessor`` load it like any other model's. ``<think>`` and ``<answer>`` are
ordinary tokens, not special ones: a decoder that skips special tokens must keep them for the reward.
"""

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

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


def vocabulary() -> list[str]:
    """All words of the world, sorted."""
    rng = np.random.default_rng(0)
    words = {"user", "assistant", "system", *world.LETTERS, *world.COLORS, *world.SHAPES, *world.DIRECTIONS}
    words |= {*world.EVENTS, *world.NUMBERS}
    for family in world.FAMILIES:
        question = world.make_question(family, rng)
        words.update(question.prompt.split(), question.response.split())
    return sorted(words - set(TAG_TOKENS))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; it depends on the word list only, so it is the same everywhere."""
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
    words = vocabulary()
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


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    """A ``Qwen2_5_VLProcessor`` around the tokenizer, with the demo's pixel bounds."""
    size = {"shortest_edge": DEMO_CONTRACT.min_pixels, "longest_edge": DEMO_CONTRACT.max_pixels}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size)),
        video_processor=Qwen2VLVideoProcessor(size=dict(size)),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
