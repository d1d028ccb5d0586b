"""Small demo parts that several tests share."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from keytoken.demo.batches import Encoder
from keytoken.demo.tokenizer import build_processor, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    return build_processor(tokenizer)


@pytest.fixture(scope="session")
def encoder(processor: Any) -> Encoder:
    return Encoder(processor, tokens_per_second=2)
