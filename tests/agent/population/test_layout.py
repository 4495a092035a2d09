"""Places of tensors in a fused model, against a model that was built the other way round."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from agent.learner.es import members, step
from agent.learner.noise import Address
from agent.learner.penalty import Penalty
from agent.population.layout import Layout, ModuleSlice, places
from agent.store.replay import is_sound
from agent.store.tensorfile import Spec
from agent.store.theta import applied
from agent.store.weights import Anchor, Parameters
from agent.store.windows import TREE, Ranks, Window, counted, to_json

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
            if "mlp" not in name and slot is not None:
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
            assert slot is not None
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


def test_a_bias_that_is_kept_in_float32_is_copied() -> None:
    model = Fused(torch.bfloat16)
    layout, attn = Layout.of(model, SPECS, torch.bfloat16), model.model.layers[0].attn
    assert layout is not None
    attn.qkv_proj.bias = nn.Parameter(attn.qkv_proj.bias.float(), requires_grad=False)
    named = {name: tensor.bfloat16() for name, tensor in tensors(0).items()}
    without = {name for name in named if layout.slot(name) is None}
    biases = [f"model.layers.0.attn.{letter}_proj.bias" for letter in "qkv"]
    assert without == set(biases)
    layout.put(backwards(named))
    assert torch.equal(attn.qkv_proj.bias, torch.cat([named[name] for name in biases]).float())


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


def test_quantised_and_unknown_models_go_the_long_way() -> None:
    assert Layout.of(object(), SPECS, torch.float32) is None
    quantised = Fused()
    quantised.model.layers[0].mlp.down_proj.quant_method = object()
    assert Layout.of(quantised, SPECS, torch.float32) is None
    elsewhere = Fused().to("meta")
    assert Layout.of(elsewhere, SPECS, torch.float32) is None


class Rank(nn.Module):
    """One of two tensor-parallel workers' model, cut as vLLM cuts it; one key and value head."""

    packed_modules_mapping = PACKED

    def __init__(self, rank: int):
        super().__init__()
        layer: Any = nn.Module()
        layer.attn, layer.mlp = nn.Module(), nn.Module()
        layer.attn.qkv_proj = split(Linear(12, 8, bias=True), rank, [8, 8, 8], 8)
        layer.attn.qkv_proj.num_kv_head_replicas = 2
        layer.mlp.gate_up_proj = split(Linear(6, 8), rank, [6, 6], 8)
        layer.mlp.down_proj = split(Linear(8, 3), rank, [8], 6)
        embedding: Any = Embedding()
        embedding.weight = nn.Parameter(torch.zeros(8, 8), requires_grad=False)
        embedding.shard_indices = SimpleNamespace(
            org_vocab_start_index=8 * rank, org_vocab_end_index=(8, 10)[rank]
        )
        embedding.tp_size, embedding.tp_rank = 2, rank
        self.model: Any = nn.Module()
        self.model.embed_tokens, self.model.layers = embedding, nn.ModuleList([layer])
        self.model.norm = nn.LayerNorm(8, bias=False)


def split(layer: Any, rank: int, output_sizes: list[int], input_size: int) -> Any:
    """A layer as one of two workers has it."""
    layer.tp_size, layer.tp_rank = 2, rank
    layer.output_sizes, layer.input_size = output_sizes, input_size
    return layer


HELD = {  # the rows, or the columns, of each rank; what is not named is whole on both
    "embed_tokens.weight": (np.s_[:8], np.s_[8:10]),
    "q_proj.weight": (np.s_[:4], np.s_[4:]),
    "q_proj.bias": (np.s_[:4], np.s_[4:]),
    "gate_proj.weight": (np.s_[:3], np.s_[3:]),
    "up_proj.weight": (np.s_[:3], np.s_[3:]),
    "down_proj.weight": (np.s_[:, :3], np.s_[:, 3:]),
}


def of_rank(named: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """What a rank holds of tensors."""
    cut = {".".join(name.split(".")[-2:]): name for name in named}
    return {
        name: named[name][HELD[end][rank]] if end in HELD else named[name]
        for end, name in cut.items()
    }


def test_ranks_hold_their_windows_of_theta_and_together_the_whole(tmp_path: Path) -> None:
    """Members, steps, the hash of delta, norms and a snapshot, by two ranks and by one worker."""
    save_file(tensors(0), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    anchor, address = Anchor.open(tmp_path), Address(3, 1, 2)
    one = Parameters.zeros(anchor)
    layouts = [Layout.of(Rank(rank), SPECS, torch.float32) for rank in range(2)]
    assert None not in layouts
    two = [Parameters.zeros(anchor, None, layout.windows) for layout in layouts if layout]
    ranks = Ranks(SHAPES, [to_json(theta.windows) for theta in two])
    assert ranks.held() == [sum(d.size for d in theta.delta.values()) for theta in two]
    for generation in range(2):
        now = step(
            np.array([0.1, 0.7, 0.2, 0.9]), members(4, True), run_seed=3, generation=generation,
            sigma=0.1, alpha=0.2, penalty=Penalty("l1", 0.01),
        )  # fmt: skip
        wanted = one.apply(now, TREE)
        moves = ranks.moves([theta.moved(now) for theta in two])
        leaves = [{n: each.tobytes() for n, each in t.leaves().items()} for t in two]
        found = applied(moves, ranks.delta_hash([{"leaves": each} for each in leaves]))
        assert found.delta_hash == wanted.delta_hash
        assert found.norm == pytest.approx(wanted.norm, rel=1e-12)
        assert found.layer_norms == pytest.approx(wanted.layer_norms, rel=1e-12)
    whole = dict(one.rendered(address, 0.1))
    for rank, (theta, layout) in enumerate(zip(two, layouts, strict=True)):
        rendered, held = dict(theta.rendered(address, 0.1)), of_rank(whole, rank)
        assert all(torch.equal(rendered[name], held[name]) for name in SHAPES)
        theta.write(tmp_path / "snapshot.safetensors")
        assert layout is not None
        layout.put(backwards(rendered))
        layout.put(theta.rendered(address, 0.1, into=layout.slot))  # straight into the rows
        down = layout._modules["model.layers.0.mlp.down_proj"].packed
        assert torch.equal(down, held["model.layers.0.mlp.down_proj.weight"])
        parts = [held[f"model.layers.0.attn.{each}_proj.weight"] for each in "qkv"]
        assert torch.equal(layout._modules["model.layers.0.attn.qkv_proj"].packed, torch.cat(parts))
    assert is_sound(anchor, tmp_path / "snapshot.safetensors", one.delta_hash())
    for theta in two:
        before = {name: delta.copy() for name, delta in theta.delta.items()}
        theta.reset(None)
        theta.reset(tmp_path / "snapshot.safetensors")
        assert all(np.array_equal(theta.delta[name], before[name]) for name in SHAPES)
        with pytest.raises(ValueError, match="a rank holds windows"):
            theta.delta_hash()


def test_a_fused_tensor_or_other_sizes_of_a_rank_go_the_long_way() -> None:
    """Rows of a tensor that is q, k and v at once are not cut at one place."""
    fused = dict(SPECS)
    for kind in ("weight", "bias"):
        shape = (16, 8)[: 2 if kind == "weight" else 1]
        fused[f"model.layers.0.attn.qkv_proj.{kind}"] = shape, torch.float32
        for each in "qkv":
            del fused[f"model.layers.0.attn.{each}_proj.{kind}"]
    assert Layout.of(Rank(0), fused, torch.float32) is None
    other: Any = Rank(0)
    other.model.layers[0].mlp.down_proj.input_size = 3  # says that it is not split
    assert Layout.of(other, SPECS, torch.float32) is None


@pytest.mark.parametrize(
    "windows",
    [
        [{"w": Window(0, 0, 5)}, {"w": Window(0, 6, 10)}],
        [{"w": Window(0, 0, 5)}, {"w": Window(0, 4, 10)}],
        [{"w": Window(0, 0, 5)}, {"w": Window(1, 5, 10)}],
        [{"w": Window(0, 0, 10)}, {}],
    ],
)
def test_windows_that_are_not_the_whole_once_are_refused(windows: list[dict[str, Window]]) -> None:
    with pytest.raises(ValueError, match="w: "):
        counted({"w": (10, 10)}, windows)


def test_elements_on_several_ranks_are_counted_once() -> None:
    same = [
        {"w": Window(0, 0, 5)},
        {"w": Window(0, 0, 5)},
        {"w": Window(0, 5, 10)},
        {"w": Window(0, 10, 10)},
    ]
    assert counted({"w": (10, 10), "norm": (3,)}, same) == [["w", "norm"], [], ["w"], ["w"]]
