"""Building: packing changes nothing, gradients are the loss's, training learns and repeats."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from deploy.embedded import build as building
from deploy.embedded import tokenizer as tokens
from deploy.embedded.build import (
    Packed,
    Recipe,
    build,
    complete,
    config,
    loss_of,
    pack,
    rate_factor,
)
from deploy.embedded.drills import drill

pytestmark = pytest.mark.proof

SMALL = Recipe(steps=30, rate=8e-3, parts=2, part_tokens=128, tokenizer_conversations=200)


def greeting(rng: Random, _done: float) -> list[dict[str, str]]:
    """The least there is to learn: one answer, whoever asks."""
    word = rng.choice(("owl", "fox"))
    return [{"role": "user", "content": word}, {"role": "assistant", "content": "hoot 12"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tokens.train(m["content"] for _ in range(50) for m in drill(Random(1)))


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config(len(tokenizer))).eval()


def one(example: tuple[list[int], list[bool]]) -> Packed:
    (alone,) = pack([example], [len(example[0])], len(example[0]))
    return alone


def test_a_packed_conversation_is_predicted_as_if_it_were_alone(
    tokenizer: PreTrainedTokenizerFast, model: Qwen2ForCausalLM
) -> None:
    rng = Random(3)
    examples = [tokens.encode_chat(tokenizer, drill(rng)) for _ in range(4)]
    (together,) = pack(examples, (512,), 512)
    apart = [loss_of(model, one(example), 0.0).item() for example in examples]
    sizes = [sum(learnt) for _, learnt in examples]
    mean = sum(loss * size for loss, size in zip(apart, sizes, strict=True)) / sum(sizes)
    assert loss_of(model, together, 0.0).item() == pytest.approx(mean, rel=1e-5)


def test_the_loss_is_the_cross_entropy_of_the_answers_tokens(
    tokenizer: PreTrainedTokenizerFast, model: Qwen2ForCausalLM
) -> None:
    ids, learnt = tokens.encode_chat(tokenizer, drill(Random(5)))
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [-chances[t - 1, ids[t]].item() for t in range(1, len(ids)) if learnt[t]]
    alone = one((ids, learnt))
    assert loss_of(model, alone, 0.0).item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    whole = [-chances[t - 1, ids[t]].item() for t in range(1, len(ids))]
    assert loss_of(model, alone, 1.0).item() == pytest.approx(sum(whole) / len(whole), rel=1e-5)


def test_packing_keeps_every_conversation_once_in_the_narrowest_rows_that_hold_it() -> None:
    sizes = [3, 5, 2, 6, 4, 8, 1, 7]
    examples = [([10 + n] * n, [True] * n) for n in sizes]
    seen = []
    for batch in pack(examples, (4, 8), 16):
        assert batch.ids.numel() == 16
        for row in range(len(batch.ids)):
            for number in range(1, int(batch.segments[row].max()) + 1):
                ids = batch.ids[row][batch.segments[row] == number].tolist()
                assert batch.ids.shape[1] == (4 if len(ids) <= 4 else 8)
                seen.append(ids)
    assert sorted(seen) == sorted(ids for ids, _ in examples)


def test_a_conversation_too_long_to_pack_is_an_error() -> None:
    with pytest.raises(ValueError, match="conversation of 9 tokens: allowed: 8"):
        list(pack([([1] * 9, [True] * 9)], (4, 8), 16))


def test_the_rate_rises_then_falls_to_zero() -> None:
    factors = [rate_factor(step, 100) for step in range(101)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[100] == pytest.approx(0.0, abs=1e-12)


def test_the_gradient_of_the_parts_is_that_of_their_mean_loss(
    tokenizer: PreTrainedTokenizerFast, model: Qwen2ForCausalLM
) -> None:
    stream = building.batches(greeting, tokenizer, SMALL)
    parts = [next(stream), next(stream)]
    with building.ThreadPoolExecutor(2) as pool:
        building._gradients(pool, model, parts, 0.1)
    found = [p.grad.clone() for p in model.parameters()]
    mean = sum(loss_of(model, part, 0.1) for part in parts) / 2
    wanted = torch.autograd.grad(mean, list(model.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_build_learns_and_answers(tmp_path: Path) -> None:
    built = build(greeting, tmp_path, SMALL)
    asked = [[{"role": "user", "content": word}] for word in ("owl", "fox")]
    assert complete(built.directory, asked, 8) == ["hoot 12", "hoot 12"]
    assert built.parameters > 0
    assert built.loss < 4.0  # a running mean, from 7 on


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    short = replace(SMALL, steps=3, tokenizer_conversations=20)
    recipes = (short, short, replace(short, seed=1))
    first, again, other = (
        (build(greeting, tmp_path / str(n), recipe).directory / "model.safetensors").read_bytes()
        for n, recipe in enumerate(recipes)
    )
    assert first == again
    assert first != other
