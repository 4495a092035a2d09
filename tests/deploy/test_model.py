"""Where the anchor comes from, and what is said when it is not there."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.config import load
from agent.errors import UserError
from agent.gateway.keys import KeyStore
from agent.home import Home
from agent.sections import ModelSettings
from agent.store.experience import ExperienceStore
from agent.store.weights import Anchor
from deploy.model import first_key, resolve

Array = NDArray[np.float32]


def test_a_directory_with_weights_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.safetensors").touch()
    assert resolve(ModelSettings(path=str(tmp_path)), tmp_path) == tmp_path.resolve()


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_directory_without_a_part_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    for name in {"config.json", "model.safetensors"} - {missing}:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=missing.split(".")[-1]):
        resolve(ModelSettings(path=str(tmp_path)), tmp_path)


def test_an_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as told:
        resolve(ModelSettings(path="anchorage-tests/no-such-model"), tmp_path)
    assert "anchorage-tests/no-such-model" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_name_that_is_no_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a/b/c"):
        resolve(ModelSettings(path="a/b/c"), tmp_path)


def test_a_gguf_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.gguf"):
        resolve(ModelSettings(path=str(tmp_path / "nothing.gguf")), tmp_path)


@pytest.mark.proof
def test_a_gguf_file_becomes_a_directory_with_its_values_once(tmp_path: Path) -> None:
    file, weights = _gguf(tmp_path / "tiny.gguf")
    models = tmp_path / "models"
    directory = resolve(ModelSettings(path=str(file)), models)
    anchor = Anchor.open(directory)
    read = {name: tensor.float().numpy() for name, tensor in anchor.tensors()}
    for name, values in weights.items():
        assert np.array_equal(read[name], values), name  # bfloat16 holds the values chosen here
    made = (directory / "model.safetensors").stat().st_mtime_ns
    assert resolve(ModelSettings(path=str(file)), models) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in models.iterdir()] == [directory.name]


@pytest.mark.proof
def test_a_file_that_is_not_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF but not really" * 100)
    with pytest.raises(UserError, match=r"broken\.gguf"):
        resolve(ModelSettings(path=str(file)), tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def _gguf(
    path: Path,
) -> tuple[Path, dict[str, Array]]:
    """A one-layer Llama with a vocabulary of 8 in float32, and some of its values by HF name."""
    import gguf

    rng = np.random.default_rng(0)
    hidden, inner, vocabulary = 32, 64, 8

    def values(*shape: int) -> Array:
        return rng.integers(-8, 9, shape).astype(np.float32) / 16

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcde", "ab", "<s>", "</s>"])
    writer.add_token_types([1] * 6 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(6)
    writer.add_eos_token_id(7)
    kept = {
        "model.embed_tokens.weight": ("token_embd.weight", values(vocabulary, hidden)),
        "model.layers.0.mlp.gate_proj.weight": ("blk.0.ffn_gate.weight", values(inner, hidden)),
        "model.layers.0.mlp.down_proj.weight": ("blk.0.ffn_down.weight", values(hidden, inner)),
        "model.norm.weight": ("output_norm.weight", values(hidden)),
    }
    for name, tensor in [
        *kept.values(),
        ("blk.0.ffn_up.weight", values(inner, hidden)),
        ("blk.0.attn_norm.weight", values(hidden)),
        ("blk.0.ffn_norm.weight", values(hidden)),
        *((f"blk.0.attn_{part}.weight", values(hidden, hidden)) for part in ("q", "k", "v")),
        ("blk.0.attn_output.weight", values(hidden, hidden)),
    ]:
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, {name: tensor for name, (_, tensor) in kept.items()}


def test_a_gateway_beyond_this_machine_finds_a_key_before_it_starts(tmp_path: Path) -> None:
    home, wide = Home.at(tmp_path / "home"), load(gateway={"host": "0.0.0.0"})
    first_key(home, load())
    assert not home.first_key.exists()
    first_key(home, wide)
    token = home.first_key.read_text()
    assert home.first_key.stat().st_mode & 0o777 == 0o600
    first_key(home, wide)  # a pod that starts again
    assert home.first_key.read_text() == token
    store = ExperienceStore.open(home.experience_db)
    (key,) = KeyStore(store).list_keys()
    store.close()
    assert str(key["key_id"]) in token
