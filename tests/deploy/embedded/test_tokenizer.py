"""The shipped tokenizer: any text survives, digits stand apart, chats follow the template."""

import unicodedata
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deploy.embedded import MODEL
from deploy.embedded.tokenizer import END, encode_chat

pytestmark = pytest.mark.proof

CHAT = [
    {"role": "user", "content": "Ben has 12 eggs.\nHow many?"},
    {"role": "assistant", "content": "#### 12"},
    {"role": "user", "content": " 0: cuts\n\n1: digs"},
    {"role": "assistant", "content": "1"},
]


@cache
def load() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return load()


@given(text=st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = load().encode(text, add_special_tokens=False)
    assert load().decode(ids) == unicodedata.normalize("NFC", text)  # Qwen2's own normaliser


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    words = tokenizer.convert_ids_to_tokens(tokenizer.encode("407+15=422"))
    assert words == list("407+15=422")


def test_a_chat_is_encoded_as_the_template_renders_it(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, learnt = encode_chat(tokenizer, CHAT)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    said = tokenizer.decode([token for token, mine in zip(ids, learnt, strict=True) if mine])
    assert said == f"#### 12{END}1{END}"


def test_the_prompt_of_a_question_begins_the_chat_with_its_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """What generation starts from is what training saw before the answer."""
    text = tokenizer.apply_chat_template(CHAT[:3], tokenize=False, add_generation_prompt=True)
    asked = tokenizer.encode(text, add_special_tokens=False)
    ids, learnt = encode_chat(tokenizer, CHAT)
    assert ids[: len(asked)] == asked
    assert learnt[len(asked)]


def test_special_tokens_end_and_pad(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token == END
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
