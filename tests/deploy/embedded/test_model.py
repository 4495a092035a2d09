"""The shipped model: small, loadable without code of its own, and what its card says it is."""

import re
from hashlib import sha256

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deploy.embedded import MODEL

pytestmark = pytest.mark.proof

CARD = MODEL / "README.md"


def test_the_card_states_the_digest_of_the_weights() -> None:
    stated = re.search(r"`([0-9a-f]{64})`", CARD.read_text(encoding="utf-8"))[1]
    assert stated == sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()


def test_the_card_states_seed_time_licence_and_an_accuracy_of_every_task() -> None:
    card = CARD.read_text(encoding="utf-8")
    assert re.search(r"seed \d+.*\d+ minutes", card, re.DOTALL)
    assert "license: apache-2.0" in card
    found = re.findall(r"^\| (\w+) \| ([0-9.]+) \| (\d+) \|$", card, re.MULTILINE)
    assert {name for name, _, _ in found} >= {
        "countdown",
        "gsm8k",
        "proofwriter",
        "hellaswag",
        "piqa",
        "arc_challenge",
        "mmlu_pro",
    }


def test_all_of_it_stays_within_six_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 6_000_000


def test_weights_are_float32_and_tied_tensors_are_stored_once() -> None:
    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert kinds == {"F32"}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_config_tokenizer_and_weights_agree() -> None:
    settings = AutoConfig.from_pretrained(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert len(tokenizer) == settings.vocab_size == model.get_input_embeddings().num_embeddings
    assert tokenizer.eos_token_id == settings.eos_token_id == model.generation_config.eos_token_id
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == pytest.approx(900_000, rel=0.15)
