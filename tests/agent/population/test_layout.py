"""Places of tensors in a fused model, against a model that was built the other way round."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from agent.learner.es import members, step
from agent.learner.kernels_cpu import render_into
from agent.learner.noise import Address
from agent.learner.penalty import Penalty
from agent.population.worker import Layout, ModuleSlice, places
from agent.store.tensorfile import Spec
from agent.store.weights import Anchor, Parameters

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHAPES = {
    "model.embed_tokens.weight": (10, 8),
    "model.layers.0.attn.q_proj.weight": (8, 8),
    "model.layers.0.attn.q_proj.bias": (8,),
    "model.layers.0.attn.k_proj.weight": (4, 8),
    "model.layers.0.attn.k_proj.bias": (4,),
    "model.layers.0.attn.v_proj.weight": (4, 8),
    "model.layers.0.attn.v_proj.bias": (4,),
    "model.layers.0.mlp.gate_proj.weight": (6, 8),
    "model.layers.0.mlp.up_proj.weight": (6, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 6),
    "model.norm.weight": (8,),
}
SPECS: dict[str, Spec] = {name: (shape, torch.float32) for name, shape in SHAPES.items()}


class UnquantizedLinearMethod:
    """Packs a layer as vLLM does: the weight moves out of the parameter."""

    def process_weights_after_loading(self, layer: "Linear") -> None:
        layer.packed = layer.weight.detach().clone()
        layer.weight = nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)


class Linear(nn.Module):
    """A Linear layer that keeps its weight packed."""

    def __init__(self, rows: int, columns: int, bias: bool = False, tp_size: int = 1):
        super().__init__()
        self.output_size_per_partition, self.input_size_per_partition = rows, columns
        self.tp_size, self.quant_method = tp_size, UnquantizedLinearMethod()
        self.packed = torch.empty(0)
        self.weight = nn.Parameter(torch.zeros(rows, columns), requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.zeros(rows), requires_grad=False)
        self.quant_method.process_weights_after_loading(self)


class UnquantizedEmbeddingMethod:
    """Looks rows up; nothing is packed."""


class Embedding(nn.Module):
    """Ten rows, padded to sixteen."""

    def __init__(self) -> None:
        super().__init__()
        self.org_vocab_size, self.tp_size = 10, 1
        self.output_size_per_partition, self.input_size_per_partition = 16, 8
        self.quant_method = UnquantizedEmbeddingMethod()
        self.weight = nn.Parameter(torch.zeros(16, 8), requires_grad=False)


class Fused(nn.Module):
    """The model with its fused layers."""

    packed_modules_mapping = PACKED

    def __init__(self, dtype: torch.dtype = torch.float32, tp_size: int = 1):
        super().__init__()
        layer: Any = nn.Module()
        layer.attn, layer.mlp = nn.Module(), nn.Module()
        layer.attn.qkv_proj = Linear(16, 8, bias=True, tp_size=tp_size)
        layer.mlp.gate_up_proj, layer.mlp.down_proj = Linear(12, 8), Linear(8, 6)
        self.model: Any = nn.Module()
        self.model.embed_tokens, self.model.layers = Embedding(), nn.ModuleList([layer])
        self.model.norm = nn.LayerNorm(8, bias=False)
        self.to(dtype)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Random tensors under their full names."""
    chance = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}


def backwards(named: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in an order in which no layer is whole before its last part."""
    return iter(sorted(named.items(), reverse=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_lands_in_its_rows(dtype: torch.dtype) -> None:
    model = Fused(dtype)
    layout = Layout.of(model, SPECS, dtype)
    assert layout is not None
    for seed in range(2):  # the second time over what the first left
        named = tensors(seed)
        layout.put(backwards(named))
        part = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in named.items()}
        attn, mlp = model.model.layers[0].attn, model.model.layers[0].mlp
        for kind, found in (("weight", attn.qkv_proj.packed), ("bias", attn.qkv_proj.bias)):
            parts = [part[f"layers.0.attn.{letter}_proj.{kind}"] for letter in "qkv"]
            assert torch.equal(found, torch.cat(parts))
        both = [part["layers.0.mlp.gate_proj.weight"], part["layers.0.mlp.up_proj.weight"]]
        assert torch.equal(mlp.gate_up_proj.packed, torch.cat(both))
        assert torch.equal(mlp.down_proj.packed, part["layers.0.mlp.down_proj.weight"])
        assert torch.equal(model.model.norm.weight, part["norm.weight"])
        assert torch.equal(model.model.embed_tokens.weight[:10], part["embed_tokens.weight"])
        assert not model.model.embed_tokens.weight[10:].any()


class Plain(Linear):
    """A Linear layer as on a GPU: its weight stays where it is."""

    def __init__(self, rows: int, columns: int, bias: bool = False):
        super().__init__(rows, columns, bias)
        self.weight = nn.Parameter(torch.zeros(rows, columns), requires_grad=False)


def on_gpu() -> Fused:
    """The model as a GPU holds it, on CPU tensors."""
    model = Fused()
    layer = model.model.layers[0]
    layer.attn.qkv_proj = Plain(16, 8, bias=True)
    layer.mlp.gate_up_proj, layer.mlp.down_proj = Plain(12, 8), Plain(8, 6)
    return model


def test_on_a_gpu_a_member_is_written_to_the_rows_of_the_model_and_storage_stays() -> None:
    model = on_gpu()
    layout = Layout.of(model, SPECS, torch.float32, packs=False)
    assert layout is not None
    storage = {name: each.data_ptr() for name, each in model.named_parameters()}
    for seed in range(2):
        named = tensors(seed)
        slots = {name: layout.slot(name) for name in named}
        direct = {}
        for name, slot in slots.items():  # what a kernel does: its output is the slot
            if "mlp" not in name:
                direct[name] = slot.copy_(named[name].view(-1)).view(named[name].shape)
        layout.put(backwards(named | direct))  # the others are copied
        layer = model.model.layers[0]
        parts = [named[f"model.layers.0.attn.{letter}_proj.weight"] for letter in "qkv"]
        assert torch.equal(layer.attn.qkv_proj.weight, torch.cat(parts))
        parts = [named[f"model.layers.0.mlp.{each}_proj.weight"] for each in ("gate", "up")]
        assert torch.equal(layer.mlp.gate_up_proj.weight, torch.cat(parts))
        assert torch.equal(layer.mlp.down_proj.weight, named["model.layers.0.mlp.down_proj.weight"])
        assert torch.equal(model.model.embed_tokens.weight[:10], named["model.embed_tokens.weight"])
        assert not model.model.embed_tokens.weight[10:].any()
    assert {name: each.data_ptr() for name, each in model.named_parameters()} == storage


def test_a_member_is_written_to_the_matrix_that_is_packed() -> None:
    """Also after a call that failed between two parts of a matrix."""
    model = Fused()
    layout = Layout.of(model, SPECS, torch.float32)
    assert layout is not None
    assert Layout.of(Fused(), SPECS, torch.float32, packs=False) is None

    def written(seed: int, most: int) -> Iterator[tuple[str, torch.Tensor]]:
        for place, (name, tensor) in enumerate(backwards(tensors(seed))):
            if place == most:
                raise RuntimeError
            slot = layout.slot(name)
            yield name, slot.copy_(tensor.view(-1)).view(tensor.shape)

    for seed, most in enumerate([len(SHAPES), 3, 6, len(SHAPES)]):
        if most < len(SHAPES):
            with pytest.raises(RuntimeError):
                layout.put(written(seed, most))
            continue
        layout.put(written(seed, most))
        named, layer = tensors(seed), model.model.layers[0]
        qkv = [named[f"model.layers.0.attn.{letter}_proj.weight"] for letter in "qkv"]
        assert torch.equal(layer.attn.qkv_proj.packed, torch.cat(qkv))
        both = [named[f"model.layers.0.mlp.{each}_proj.weight"] for each in ("gate", "up")]
        assert torch.equal(layer.mlp.gate_up_proj.packed, torch.cat(both))
        assert torch.equal(model.model.norm.weight, named["model.norm.weight"])


def test_places_follow_the_packed_order_not_the_alphabet() -> None:
    found = places(SPECS, PACKED)
    rows = {name: place for name, place in found.items() if name.endswith("_proj.weight")}
    qkv = "model.layers.0.attn.qkv_proj"
    assert rows["model.layers.0.attn.q_proj.weight"] == ModuleSlice(qkv, "weight", 0, 8)
    assert rows["model.layers.0.attn.k_proj.weight"] == ModuleSlice(qkv, "weight", 8, 12)
    assert rows["model.layers.0.attn.v_proj.weight"] == ModuleSlice(qkv, "weight", 12, 16)
    down = rows["model.layers.0.mlp.down_proj.weight"]
    assert down == ModuleSlice("model.layers.0.mlp.down_proj", "weight", 0, 8)


def without(*names: str) -> dict[str, Spec]:
    """The specs less some."""
    return {name: spec for name, spec in SPECS.items() if name not in names}


@pytest.mark.parametrize(
    "specs",
    [
        without("model.layers.0.attn.v_proj.weight"),
        without("model.norm.weight"),
        SPECS | {"model.layers.0.mlp.experts.0.weight": ((4, 4), torch.float32)},
        SPECS | {"model.norm.weight": ((1,), torch.float32)},
        SPECS | {"model.layers.0.mlp.down_proj.weight": ((8, 7), torch.float32)},
        SPECS | {"model.embed_tokens.weight": ((16, 8), torch.float32)},
    ],
)
def test_a_model_that_is_not_fully_accounted_for_goes_the_long_way(specs: dict[str, Spec]) -> None:
    assert Layout.of(Fused(), specs, torch.float32) is None


def test_split_quantised_and_unknown_models_go_the_long_way() -> None:
    assert Layout.of(Fused(tp_size=2), SPECS, torch.float32) is None
    assert Layout.of(object(), SPECS, torch.float32) is None
    quantised = Fused()
    quantised.model.layers[0].mlp.down_proj.quant_method = object()
    assert Layout.of(quantised, SPECS, torch.float32) is None
    elsewhere = Fused().to("meta")
    assert Layout.of(elsewhere, SPECS, torch.float32) is None


CUT = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0, "down_proj": 1}
"""Dimension that tensor parallelism cuts; the embedding by rows, norms not at all."""


def drawn(theta: Parameters, name: str, rank: int | None, address: Address) -> torch.Tensor:
    """A rank's part of a tensor (None: all of it), rendered run by run at its own indices."""
    shape = SHAPES[name]
    kind = "embed" if "embed" in name else name.split(".")[-2]
    cut = 0 if kind == "embed" else CUT.get(kind)
    places = np.arange(np.prod(shape)).reshape(shape)
    if rank is not None and cut is not None:
        places = np.array_split(places, 2, axis=cut)[rank]
    out = torch.empty(places.shape)
    rows = places.reshape(-1, places.shape[-1])
    anchor = theta.anchor.tensor(name).reshape(-1).numpy()
    for row, part in zip(rows, out.view(rows.shape), strict=True):
        run = slice(row[0], row[-1] + 1)
        base, delta = anchor[run], theta.delta[name][run]
        render_into(part.numpy(), base, delta, address, name, int(row[0]), 0.1, "normal")
    return out


def test_tensor_parallel_ranks_fuse_the_bits_of_the_whole(tmp_path: Path) -> None:
    """Both ranks' parts of every parameter, put side by side, are the parameter one worker has."""
    save_file(tensors(0), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    theta, address = Parameters.zeros(Anchor.open(tmp_path)), Address(3, 1, 2)
    rewards = np.array([0.1, 0.7, 0.2, 0.9])
    theta.apply(
        step(
            rewards, members(4, True), run_seed=3, generation=0, sigma=0.1, alpha=0.2,
            penalty=Penalty("l2", 1.0),
        )
    )  # fmt: skip
    whole = dict(theta.rendered(address, 0.1))
    for name in SHAPES:
        assert torch.equal(drawn(theta, name, None, address), whole[name])
    parameters: dict[str, list[str]] = {}
    found = places(SPECS, PACKED)
    for name in sorted(SHAPES, key=lambda name: found[name].start):
        parameters.setdefault(found[name].whole, []).append(name)
    for parts in parameters.values():
        ranks = [torch.cat([drawn(theta, name, r, address) for name in parts]) for r in range(2)]
        for rank, held in enumerate(ranks):
            cut = [
                whole[name].chunk(2, dim=1 if "down_proj" in name else 0)[rank]
                if "norm" not in name
                else whole[name]
                for name in parts
            ]
            assert torch.equal(held, torch.cat(cut))
