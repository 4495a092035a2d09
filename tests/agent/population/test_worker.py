"""The worker extension against a runner that keeps what it is given, and shards of one tensor."""

import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from agent.errors import UserError
from agent.learner.es import Step, members, step
from agent.learner.noise import Address, normal
from agent.learner.penalty import Penalty
from agent.population.worker import (
    WeightsExtension,
    forget_packed_experts,
    refuse_head_of_its_own,
)
from agent.store.tensorfile import beside
from agent.store.weights import Anchor, Parameters

SHAPES = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 24),
    "model.norm.weight": (8,),
}


def model(directory: Path, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A directory with a few tensors, the head tied."""
    directory.mkdir()
    chance = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(s, generator=chance).to(dtype) for name, s in SHAPES.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text('{"tie_word_embeddings": true}')
    return directory


class VocabParallelEmbedding(torch.nn.Module):
    """Keeps a packed copy of the embedding, as vLLM's does on the CPU."""

    def __init__(self, engine: dict[str, torch.Tensor]):
        super().__init__()
        self.engine, self.packed = engine, torch.empty(0)
        self.quant_method = UnquantizedEmbeddingMethod()


class ParallelLMHead(VocabParallelEmbedding):
    """A head of its own, tied."""


class UnquantizedEmbeddingMethod:
    """vLLM's name for how an embedding computes."""

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        """Pack again."""
        layer.packed = layer.engine["model.embed_tokens.weight"].clone()


class UnquantizedFusedMoEMethod:
    """vLLM's name for how experts compute: packs only while it has no kernel."""

    def __init__(self) -> None:
        self.moe_kernel: str | None = "kernel"


class Runner:
    """The part of vLLM's model runner the extension uses."""

    def __init__(self, directory: Path, kind: type[VocabParallelEmbedding] = ParallelLMHead):
        self.model_config = SimpleNamespace(model=str(directory), dtype=torch.bfloat16)
        self.engine = {name: t.clone() for name, t in Anchor.open(directory).tensors()}
        self.head = kind(self.engine)
        self.head.quant_method.process_weights_after_loading(self.head)
        self.experts = torch.nn.Linear(2, 2)
        self.experts.quant_method = UnquantizedFusedMoEMethod()

    def get_model(self) -> torch.nn.Module:
        """The model with its head."""
        embedding = VocabParallelEmbedding(self.engine)  # with a head beside it: packed for nobody
        own = isinstance(self.head, ParallelLMHead)
        return torch.nn.ModuleList([*([embedding] if own else []), self.head, self.experts])

    def reload_weights(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take tensors by full name; the head's packed copy stays old."""
        assert self.experts.quant_method.moe_kernel is None  # else they would not be packed
        for name, tensor in weights_iterator:
            self.engine[name] = tensor.clone()
        self.experts.quant_method.moe_kernel = "kernel"


def worker(
    directory: Path, kind: type[VocabParallelEmbedding] = ParallelLMHead
) -> WeightsExtension:
    """A worker whose engine was started on a directory."""
    extension = WeightsExtension()
    extension.model_runner = Runner(directory, kind)
    return extension


def holds(extension: WeightsExtension, tensors: Iterable[tuple[str, torch.Tensor]]) -> bool:
    """Whether the engine has exactly these weights, its head included."""
    runner: Runner = extension.model_runner
    wanted = dict(tensors)
    same = all(torch.equal(runner.engine[name], tensor) for name, tensor in wanted.items())
    head = torch.equal(runner.head.packed, wanted["model.embed_tokens.weight"])
    return same and head and runner.engine.keys() == wanted.keys()


def one_step(generation: int) -> Step:
    """A step of four members."""
    return step(
        np.array([0.1, 0.9, 0.4, 0.2]),
        members(4, mirrored=False),
        run_seed=5,
        generation=generation,
        sigma=0.1,
        alpha=0.2,
        penalty=Penalty("l2", 0.5),
    )


def test_members_and_theta_reach_the_engine(tmp_path: Path) -> None:
    directory = model(tmp_path / "a", 0)
    extension, theta = worker(directory), Parameters.zeros(Anchor.open(directory))
    opened = extension.anchorage_open(str(directory))
    assert opened == {"digest": theta.anchor.digest, "sure": False, "windows": {}}
    for generation in range(3):
        for pair, sign in ((0, 1), (0, -1), (3, 1)):
            extension.anchorage_render(5, generation, pair, sign * 0.1)
            address = Address(5, generation, pair)
            assert holds(extension, theta.rendered(address, sign * 0.1))
            assert not holds(extension, theta.rendered())
        moves = extension.anchorage_apply(one_step(generation).to_json())
        assert moves == {n: list(each) for n, each in theta.moved(one_step(generation)).items()}
        assert extension.anchorage_hash() == {"hash": theta.delta_hash()}
        extension.anchorage_render(0, 0, 0, 0.0)
        assert holds(extension, theta.rendered())
    assert extension.anchorage_state() == {
        "served": "theta",
        "way": "long",  # nothing is known about this runner's model
        "anchor": theta.anchor.digest,
    }


@pytest.mark.timeout(20)
def test_a_snapshot_is_written_into_the_folder_that_the_engine_keeps_locked(tmp_path: Path) -> None:
    directory = model(tmp_path / "a", 0)
    extension, theta = worker(directory), Parameters.zeros(Anchor.open(directory))
    extension.anchorage_open(str(directory))
    extension.anchorage_apply(one_step(0).to_json())
    theta.apply(one_step(0))
    theta.save(tmp_path / "whole.safetensors")
    with beside(tmp_path / "part.safetensors") as folder:
        extension.anchorage_save(str(folder / "part.safetensors"))
        written = (folder / "part.safetensors").read_bytes()
    assert written == (tmp_path / "whole.safetensors").read_bytes()


def test_restore_is_the_snapshot_and_the_steps(tmp_path: Path) -> None:
    directory = model(tmp_path / "a", 0)
    extension, theta = worker(directory), Parameters.zeros(Anchor.open(directory))
    extension.anchorage_open(str(directory))
    theta.apply(one_step(0))
    theta.save(tmp_path / "one.safetensors")
    theta.apply(one_step(1))
    rows = [one_step(0).to_json(), one_step(1).to_json()]
    snapshot = str(tmp_path / "one.safetensors")
    for start, after, same in (
        (None, rows, True),
        (snapshot, rows[1:], True),
        (None, rows[1:], False),
    ):
        extension.anchorage_restore(start, after)
        assert (extension.anchorage_hash() == {"hash": theta.delta_hash()}) is same


@pytest.mark.parametrize("kind", [ParallelLMHead, VocabParallelEmbedding])
def test_a_directory_is_loaded_with_its_head(
    tmp_path: Path, kind: type[VocabParallelEmbedding]
) -> None:
    """Also where the embedding itself is the head, as in Gemma 2."""
    one, other = model(tmp_path / "a", 0), model(tmp_path / "b", 1)
    extension, wanted = worker(one, kind), Anchor.open(other)
    assert extension.anchorage_load(str(other)) == {"digest": wanted.digest}
    assert holds(extension, wanted.tensors())
    assert extension.anchorage_state()["served"] == wanted.digest
    extension.anchorage_load(str(one))
    extension.anchorage_load(str(other), repack_head=False)
    assert not holds(extension, wanted.tensors())


class Meddling(Runner):
    """The weights file is written, with the same bytes, while the engine reads it."""

    file: Path

    def reload_weights(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().reload_weights(weights_iterator)
        content = self.file.read_bytes()
        with self.file.open("r+b") as file:  # in place: it is mapped, and may not be cut
            file.write(content)


def test_files_that_are_written_while_they_are_loaded_are_not_taken_for_the_digest(
    tmp_path: Path,
) -> None:
    one, other = model(tmp_path / "a", 0), model(tmp_path / "b", 1)
    extension = WeightsExtension()
    extension.model_runner = Meddling(one)
    extension.model_runner.file = other / "model.safetensors"
    time.sleep(0.05)  # the kernel's clock of changes ticks every few milliseconds
    with pytest.raises(UserError, match="was changed while it was loaded"):
        extension.anchorage_load(str(other))
    assert extension.anchorage_state()["served"] == "half loaded"


def test_other_tensors_are_refused_and_the_engine_keeps_its_own(tmp_path: Path) -> None:
    one, wide = model(tmp_path / "a", 0), model(tmp_path / "b", 1, torch.float32)
    extension = worker(one)
    with pytest.raises(UserError, match=r"embed_tokens.*torch.float32, allowed: .*bfloat16.*norm"):
        extension.anchorage_load(str(wide))
    with pytest.raises(UserError, match="float32"):
        extension.anchorage_open(str(wide))
    assert holds(extension, Anchor.open(one).tensors())


def test_experts_on_an_accelerator_keep_the_kernel_that_reads_their_storage() -> None:
    """There vLLM copies into it, and captured graphs hold its address."""
    layers = [torch.nn.Linear(2, 2, device=device) for device in ("cpu", "meta")]
    for layer in layers:
        layer.quant_method = UnquantizedFusedMoEMethod()
    forget_packed_experts(torch.nn.ModuleList(layers))
    assert [layer.quant_method.moe_kernel for layer in layers] == [None, "kernel"]


def test_without_an_anchor_there_is_nothing_to_move(tmp_path: Path) -> None:
    extension = worker(model(tmp_path / "a", 0))
    with pytest.raises(UserError, match="anchorage_open first"):
        extension.anchorage_apply(one_step(0).to_json())
    with pytest.raises(UserError, match="anchorage_open first"):
        extension.anchorage_hash()


@pytest.mark.parametrize("dimension", [0, 1])
def test_two_tensor_parallel_ranks_hold_the_bits_of_the_whole(
    tmp_path: Path, dimension: int
) -> None:
    """A rank's part, drawn at its own element indices, is that part of the full tensor."""
    name, scale, address = "model.layers.0.mlp.down_proj.weight", 0.1, Address(5, 2, 1)
    theta = Parameters.zeros(Anchor.open(model(tmp_path / "a", 0)))
    theta.apply(one_step(0))
    whole = dict(theta.rendered(address, scale))[name]
    rows, columns = SHAPES[name]
    for rank in range(2):
        part = np.array_split(np.arange(SHAPES[name][dimension]), 2)[rank]
        at = np.ix_(part, np.arange(columns)) if dimension == 0 else np.ix_(np.arange(rows), part)
        starts = at[0].ravel() * columns + at[1].ravel()[0]
        eps = np.stack([normal(address, name, int(s), at[1].size) for s in starts])
        anchor = theta.anchor.tensor(name).float().numpy()[at]
        delta = theta.delta[name].reshape(rows, columns)[at]
        rendered = anchor + (delta + np.float32(scale) * eps)
        assert torch.equal(torch.from_numpy(rendered).bfloat16(), whole[at])


@pytest.mark.parametrize("kind", [ParallelLMHead, VocabParallelEmbedding])
def test_a_tied_head_that_vllm_does_not_tie_is_refused(
    kind: type[VocabParallelEmbedding],
) -> None:
    """Nothing is loaded into it; where there is no head beside the embedding, nothing is wrong."""
    embedding, head = VocabParallelEmbedding({}), kind({})
    embedding.weight = torch.nn.Parameter(torch.zeros(12, 8))
    head.weight = embedding.weight
    refuse_head_of_its_own(torch.nn.ModuleList([embedding, head]))
    head.weight = torch.nn.Parameter(torch.zeros(12, 8))
    both = torch.nn.ModuleList([embedding, head])
    if kind is ParallelLMHead:
        with pytest.raises(UserError, match="a head that is not the embedding; allowed: "):
            refuse_head_of_its_own(both)
    else:
        refuse_head_of_its_own(both)
