"""Bytes of engines from a model's numbers, and what is refused because of them."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reference import random_checkpoint

from agent.errors import UserError
from agent.population.capacity import (
    GIB,
    ModelSize,
    gpu_bytes,
    host_bytes,
    master_bytes,
    refuse_small,
    size_of,
    size_of_config,
    vllm_share,
)
from agent.population.layout import window_of
from agent.store.anchor import Anchor

QWEN_3B = {
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def test_published_numbers_of_parameters_follow_from_their_configs() -> None:
    size = ModelSize(3_085_938_688, 434, 6_171_877_376, 36_864, 2)
    assert replace(size_of_config(QWEN_3B), vectors=0, keys=0) == size
    assert size_of_config(LLAMA_70B).parameters == 70_553_706_496
    assert size_of_config(LLAMA_70B).tensors == 723


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("llama", False)])
def test_a_config_says_what_the_files_hold(tmp_path: Path, family: str, tied: bool) -> None:
    model = random_checkpoint(tmp_path / "model", family=family, tied=tied)  # type: ignore[arg-type]
    stored = size_of(Anchor.open(model))
    stated = size_of_config(json.loads((model / "config.json").read_text()))
    assert (stated.parameters, stated.tensors) == (stored.parameters, stored.tensors)
    assert (stated.kv_bytes, stated.kv_heads) == (stored.kv_bytes, stored.kv_heads)
    assert (stated.vectors, stated.keys) == (stored.vectors, stored.keys)
    assert stored.split
    assert stored.weight_bytes == 4 * stored.parameters  # these are float32


def test_a_config_without_the_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="hidden_size, vocab_size missing"):
        size_of_config({k: v for k, v in QWEN_3B.items() if k not in ("hidden_size", "vocab_size")})
    with pytest.raises(UserError, match="experts"):
        size_of_config(QWEN_3B | {"num_local_experts": 8})


def test_ranks_divide_weights_cache_and_theta() -> None:
    size = ModelSize(1000, 10, 2000, 64, 4, vectors=40, keys=160)
    one, eight = (gpu_bytes(size, ranks, "cuda", 100, weighted=True) for ranks in (1, 8))
    assert (one["weights"], eight["weights"]) == (2000, 250)
    assert (one["cache of one sequence"], eight["cache of one sequence"]) == (6400, 1600)
    assert {k: one[k] for k in master_bytes(size, 1, True)} == {
        "anchor": 2000,
        "delta": 4000,
        "importance": 4000,
    }
    held = 40 + 160 // 4 + 800 // 8  # two ranks share each of the four heads
    assert master_bytes(size, 8, True) == {
        "anchor": 2 * held,
        "delta": 4 * held,
        "importance": 4 * held,
    }
    whole = replace(size, split=False)
    assert master_bytes(whole, 8, True) == master_bytes(whole, 1, True)
    assert not master_bytes(size, 1).keys() & gpu_bytes(size, 1, "cpu", 100).keys()


@pytest.mark.parametrize(("config", "ranks"), [(QWEN_3B, 2), (QWEN_3B, 8), (LLAMA_70B, 8)])
def test_the_planned_delta_of_a_rank_is_that_of_its_windows(
    config: dict[str, Any], ranks: int
) -> None:
    """Counted tensor by tensor, as the engines cut them; biases are counted whole in the plan."""
    hidden, inner, kv = (
        config[n] for n in ("hidden_size", "intermediate_size", "num_key_value_heads")
    )
    head = hidden // config["num_attention_heads"]
    kinds = {  # rows, columns and whether the columns are cut
        "q_proj": (hidden, hidden, False), "k_proj": (kv * head, hidden, False),
        "v_proj": (kv * head, hidden, False), "o_proj": (hidden, hidden, True),
        "gate_proj": (inner, hidden, False), "up_proj": (inner, hidden, False),
        "down_proj": (hidden, inner, True),
    }  # fmt: skip
    layer = 0
    for part, (rows, columns, by_columns) in kinds.items():
        module = SimpleNamespace(
            tp_size=ranks, tp_rank=1, num_kv_head_replicas=max(1, ranks // kv), input_size=columns,
            input_size_per_partition=columns // ranks if by_columns else columns,
        )  # fmt: skip
        window = window_of(module, part in ("k_proj", "v_proj"), "weight", (rows, columns))
        assert window is not None
        layer += prod(window.shape((rows, columns)))
    tables = 1 if config["tie_word_embeddings"] else 2
    size, layers = size_of_config(config), config["num_hidden_layers"]
    counted = layers * layer + tables * config["vocab_size"] * hidden // ranks + size.vectors
    assert size.on_rank(ranks) == counted
    assert gpu_bytes(size, ranks, "cuda", 1)["delta"] == 4 * counted


def test_every_rank_holds_its_part_of_delta_on_the_host() -> None:
    size = ModelSize(1000, 10, 2000, 64, 4)
    assert host_bytes(size, 3, 2, "cpu", on_gpu=True)["delta"] == 3 * 4000
    assert host_bytes(replace(size, split=False), 3, 2, "cpu", on_gpu=True)["delta"] == 3 * 2 * 4000
    assert "delta" not in host_bytes(size, 3, 2, "cuda", on_gpu=True)
    assert host_bytes(size, 3, 1, "cpu", on_gpu=False)["weights"] == 6000


def test_a_refusal_is_one_line_with_the_parts() -> None:
    refuse_small("x", {"a": GIB, "b": GIB}, 2 * GIB, "all")
    line = r"x: needs 3.0 GiB \(a 1.0 GiB, b 2.0 GiB\), allowed here: 2.0 GiB \(all\)"
    with pytest.raises(UserError, match=line):
        refuse_small("x", {"a": GIB, "b": 2 * GIB}, 2 * GIB, "all")


def test_vllm_is_not_given_what_theta_takes() -> None:
    size = ModelSize(10 * GIB, 10, 20 * GIB, 64, 4)  # anchor 20 GiB, delta 40 GiB
    assert vllm_share(0.9, size, 1, 80 * GIB) == pytest.approx(0.9 - 60 / 80)
    assert vllm_share(0.9, size, 2, 80 * GIB) == pytest.approx(0.9 - 30 / 80)
