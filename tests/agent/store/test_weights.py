"""weights/<digest>/: whole, named by what it holds, and the model that was rendered."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agent.errors import UserError
from agent.learner import es
from agent.learner.penalty import Penalty
from agent.store.tensorfile import beside
from agent.store.weights import (
    Anchor,
    Parameters,
    companions,
    digest_of,
    export,
    preflight,
    short,
    verify,
)

MakeModel = Callable[..., Path]


def moved(anchor: Anchor, generation: int = 0) -> Parameters:
    parameters = Parameters.zeros(anchor)
    parameters.apply(
        es.step(
            np.arange(4.0), es.members(4, True), run_seed=1, generation=generation, sigma=0.1,
            alpha=0.1, penalty=Penalty("l2", 1.0),
        )
    )  # fmt: skip
    return parameters


@pytest.fixture
def parameters(make_model: MakeModel) -> Parameters:
    return moved(Anchor.open(make_model()))


def test_a_directory_holds_the_rendered_weights_and_the_anchors_files(
    parameters: Parameters, tmp_path: Path
) -> None:
    folder = export(parameters, tmp_path / "weights")
    source = parameters.anchor.directory
    assert folder.name == parameters.digest() == digest_of(folder) == verify(folder)
    assert short(folder.name) == folder.name[:12]
    held = load_file(folder / "model.safetensors")
    for name, tensor in parameters.rendered():
        assert torch.equal(held[name], tensor)
    same = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in same:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    files = {file.name for file in folder.iterdir()}
    assert files == same | {"model.safetensors", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["anchor"] == parameters.anchor.digest
    preflight(folder, parameters.anchor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shards", [0, 2])
def test_any_anchor_gives_one_whole_file(
    make_model: MakeModel, tmp_path: Path, dtype: torch.dtype, shards: int
) -> None:
    anchor = Anchor.open(make_model(dtype=dtype, shards=shards, tied=False))
    parameters = moved(anchor)
    folder = export(parameters, tmp_path / "weights")
    preflight(folder, anchor)
    assert folder.name == parameters.digest()
    assert set(load_file(folder / "model.safetensors")) == set(anchor.names)


def test_mixed_dtypes_stay_aligned(make_model: MakeModel, tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.arange(3).to(torch.bfloat16),
        "b.weight": torch.arange(5).to(torch.float32),
    }
    folder = make_model("mixed", tensors=tensors, config={"tie_word_embeddings": None})
    made = export(Parameters.zeros(Anchor.open(folder)), tmp_path / "weights")
    held = load_file(made / "model.safetensors")
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in held.values())


def test_a_second_export_keeps_the_first(parameters: Parameters, tmp_path: Path) -> None:
    folder = export(parameters, tmp_path / "weights")
    before = (folder / "model.safetensors").stat().st_ino
    assert export(parameters, tmp_path / "weights") == folder
    assert (folder / "model.safetensors").stat().st_ino == before
    assert [entry.name for entry in (tmp_path / "weights").iterdir()] == [folder.name]


def test_a_damaged_directory_is_written_again(parameters: Parameters, tmp_path: Path) -> None:
    folder = export(parameters, tmp_path / "weights")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"the weights are .* says"):
        verify(folder)
    assert export(parameters, tmp_path / "weights") == folder
    assert verify(folder) == folder.name


def test_an_export_that_fails_leaves_nothing(
    parameters: Parameters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([None, None, None])

    def full_after_three(_: int) -> None:
        if next(calls, "full") == "full":
            raise OSError("disk full")

    monkeypatch.setattr("agent.store.tensorfile.flush", full_after_three)
    with pytest.raises(OSError, match="disk full"):
        export(parameters, tmp_path / "weights")
    assert list((tmp_path / "weights").iterdir()) == []


def test_what_a_killed_export_left_is_swept_and_a_running_one_is_not(
    parameters: Parameters, tmp_path: Path
) -> None:
    root = tmp_path / "weights"
    with beside(root / "x") as running:
        (root / ".dead.partial" / "weights").mkdir(parents=True)
        folder = export(parameters, root)
        assert sorted(root.iterdir()) == sorted([folder, running])
    assert list(root.iterdir()) == [folder]


def test_exports_at_once_agree_on_one_directory(parameters: Parameters, tmp_path: Path) -> None:
    others = [moved(parameters.anchor) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda each: export(each, tmp_path / "weights"), others))
    assert list((tmp_path / "weights").iterdir()) == list(made)
    assert verify(*made) == parameters.digest()


def test_a_champion_can_be_the_anchor_of_what_follows(
    parameters: Parameters, tmp_path: Path
) -> None:
    folder = export(parameters, tmp_path / "weights")
    anchor = Anchor.open(folder)
    assert anchor.digest == folder.name
    assert companions(folder).keys() == companions(parameters.anchor.directory).keys()
    preflight(export(moved(anchor, 1), tmp_path / "weights"), anchor)


def test_only_what_a_model_needs_is_copied(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model()
    for name in ("pytorch_model.bin", "modeling.py", ".secret.json", "README.md", "LICENSE.md"):
        (folder / name).write_bytes(b"x")
    (folder / "onnx").mkdir()
    made = export(Parameters.zeros(Anchor.open(folder)), tmp_path / "weights")
    added = {file.name for file in made.iterdir()} - {file.name for file in folder.iterdir()}
    assert added == {"manifest.json"}
    assert (made / "LICENSE.md").exists()
    assert not any((made / name).exists() for name in ("modeling.py", ".secret.json", "onnx"))


@pytest.mark.integration
def test_transformers_loads_it_and_computes_with_the_rendered_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "anchor")
    anchor = Anchor.open(tmp_path / "anchor")
    parameters = moved(anchor)
    loaded = AutoModelForCausalLM.from_pretrained(export(parameters, tmp_path / "weights"))
    state = loaded.state_dict()
    for name, tensor in parameters.rendered():
        assert torch.equal(state[name], tensor)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    tokens = torch.tensor([[1, 2, 3]])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "anchor")
    base.load_state_dict(dict(parameters.rendered()), strict=False)
    assert torch.equal(loaded(tokens).logits, base(tokens).logits)
