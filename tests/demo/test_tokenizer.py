from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from keytoken.demo.model import model_config
from keytoken.demo.tokenizer import build_tokenizer
from keytoken.demo.world import FAMILIES, make_question


def test_every_word_is_one_token_and_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(0)
    for family in FAMILIES * 20:
        response = make_question(family, rng).response
        ids = tokenizer(response)["input_ids"]
        assert len(ids) == len(response.split())
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer(text)["input_ids"] == ids
        assert text.startswith("<think>") and text.endswith("</answer>")


def test_any_text_can_be_encoded(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("zebra crossing, 12 %", "\u00fcber \u89c6\u9891", "\n\t "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_building_twice_gives_the_same_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_vocabulary_is_not_padded(tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows beyond the tokenizer are masked by vLLM only and would set its log-probs apart."""
    assert model_config(tokenizer).text_config.vocab_size == len(tokenizer)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_saved_processor_loads_and_expands_a_clip(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, local_files_only=True)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what happens ?"}]}]
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    clip = torch.randint(0, 256, (8, 3, 56, 56), dtype=torch.uint8)
    metadata = {"fps": 2.0, "frames_indices": list(range(8)), "total_num_frames": 8}
    inputs = loaded(
        text=[text],
        videos=[clip],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert inputs["video_grid_thw"].tolist() == [[4, 4, 4]]
    assert inputs["pixel_values_videos"].shape == (64, 3 * 2 * 14 * 14)
    assert (inputs["input_ids"] == loaded.video_token_id).sum() == 16
    assert torch.as_tensor(inputs["second_per_grid_ts"]).tolist() == [1.0]
    assert AutoTokenizer.from_pretrained(tmp_path, local_files_only=True).get_vocab() == (
        processor.tokenizer.get_vocab()
    )
