"""The literal engine against transformers itself, and against its own definition of a member."""

from pathlib import Path

import pytest
import torch
from reference import ReferenceEngine, random_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from agent.learner.noise import Address
from agent.population.decoding import largest_difference
from agent.store.weights import Anchor, Parameters, export

pytestmark = pytest.mark.proof

PROMPTS = [
    [{"role": "user", "content": "2 + 2 = ?"}],
    [{"role": "user", "content": "é"}, {"role": "assistant", "content": "It is"}],
]
MEMBER = (Address(3, 1, 4), 0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("models") / "a", seed=5)


def test_greedy_answers_are_those_of_transformers(model: Path) -> None:
    engine, ours = ReferenceEngine(model), []
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model)
    for messages in PROMPTS:
        going_on = messages[-1]["role"] == "assistant"
        inputs = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not going_on,
            continue_final_message=going_on,
            return_tensors="pt",
            return_dict=True,
        )
        whole = plain.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = whole[0, inputs["input_ids"].shape[1] :]
        ours.append((tokenizer.decode(new, skip_special_tokens=True), len(new)))
    assert [(c.text, c.tokens) for c in engine.generate(PROMPTS, 12)] == ours


def test_theta_a_member_and_its_directory(model: Path, tmp_path: Path) -> None:
    engine, theta = ReferenceEngine(model), Parameters.zeros(Anchor.open(model))
    assert engine.open(model) == theta.anchor.digest
    plain = engine.generate(PROMPTS, 8)
    moved = engine.generate(PROMPTS, 8, MEMBER)
    assert moved != plain
    assert engine.generate(PROMPTS, 8) == plain
    for name, tensor in theta.rendered(*MEMBER):
        theta.delta[name] += (tensor - theta.anchor.tensor(name)).numpy().reshape(-1)
    engine.load(export(theta, tmp_path / "weights"))
    assert engine.generate(PROMPTS, 8) == moved
    assert engine.generate(PROMPTS, 8, MEMBER) == moved  # of the anchor that is open
    assert engine.generate(PROMPTS, 8) == moved


def test_logprobs_are_of_the_tokens_asked_for(model: Path) -> None:
    engine = ReferenceEngine(model)
    best = engine.top_logprobs(PROMPTS, 5, positions=3)
    greedy = [[max(place, key=lambda token: place[token]) for place in row] for row in best]
    given = engine.prompt_logprobs(PROMPTS, greedy)
    wanted = [[max(place.values()) for place in row] for row in best]
    assert torch.allclose(torch.tensor(given), torch.tensor(wanted), atol=1e-5)
    assert largest_difference(best, best) == 0.0
    drawn = engine.sample(PROMPTS, 6, seed=1)
    assert drawn == engine.sample(PROMPTS, 6, seed=1)
    assert drawn != engine.sample(PROMPTS, 6, seed=2)
