"""The anchor: what is on disk is what is mapped, under one digest; anything doubtful is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agent.errors import UserError
from agent.store.anchor import Anchor, require_finite, tie_of
from agent.store.tensorfile import raw

MakeModel = Callable[..., Path]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        held |= load_file(file)
    return held


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [0, 3])
def test_every_stored_bit_is_mapped(make_model: MakeModel, dtype: torch.dtype, shards: int) -> None:
    folder = make_model(dtype=dtype, shards=shards)
    anchor, held = Anchor.open(folder), stored(folder)
    assert anchor.names == tuple(sorted(held))
    assert anchor.parameters == sum(tensor.numel() for tensor in held.values())
    for name, tensor in held.items():
        assert anchor.specs[name] == (tuple(tensor.shape), dtype)
        assert bytes(raw(anchor.tensor(name))) == bytes(raw(tensor))


def test_it_is_mapped_not_read(make_model: MakeModel) -> None:
    folder = make_model()
    anchor = Anchor.open(folder)
    maps = Path("/proc/self/maps").read_text()
    assert str(folder / "model.safetensors") in maps
    assert anchor.tensor(EMBEDDING).shape == (32, 8)


def test_writing_into_a_tensor_never_reaches_the_file(make_model: MakeModel) -> None:
    folder = make_model()
    before = (folder / "model.safetensors").read_bytes()
    Anchor.open(folder).tensor(EMBEDDING).zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_digest_ignores_shards_and_a_stored_tied_head(make_model: MakeModel) -> None:
    single, sharded = make_model("one"), make_model("many", shards=3)
    held = stored(single)
    both = make_model("both", tensors={**held, HEAD: held[EMBEDDING].clone()})
    digests = {Anchor.open(folder).digest for folder in (single, sharded, both)}
    assert len(digests) == 1
    anchor = Anchor.open(both)
    assert HEAD not in anchor.names
    assert dict(anchor.tied) == {HEAD: EMBEDDING}
    assert anchor.tensor(HEAD) is anchor.tensor(EMBEDDING)


def test_digest_follows_names_shapes_dtypes_and_every_bit(make_model: MakeModel) -> None:
    folder = make_model()
    held = stored(folder)
    name = "model.norm.weight"
    flipped = held[name].clone().view(torch.int16)
    flipped[3] ^= 1
    renamed = {("model.norn.weight" if n == name else n): t for n, t in held.items()}
    variants = [
        {**held, name: flipped.view(torch.bfloat16)},
        {**held, name: held[name].view(1, 8)},
        {**held, name: held[name].view(torch.float16)},
        renamed,
        {**held, "model.norm.bias": held[name].clone()},
    ]
    digests = {Anchor.open(folder).digest}
    for number, tensors in enumerate(variants):
        digests.add(Anchor.open(make_model(f"v{number}", tensors=tensors)).digest)
    assert len(digests) == 1 + len(variants)


def test_tied_is_what_the_config_says_else_what_is_stored(make_model: MakeModel) -> None:
    silent = {"tie_word_embeddings": None}
    assert Anchor.open(make_model("a", config=silent)).tied == {HEAD: EMBEDDING}
    assert Anchor.open(make_model("b", tied=False, config=silent)).tied == {}
    untied = Anchor.open(make_model("c", tied=False))
    assert HEAD in untied.names
    assert untied.tied == {}


@pytest.mark.parametrize(
    ("config", "names", "tied"),
    [
        ({"tie_word_embeddings": True}, ["transformer.wte.weight"], "transformer.wte.weight"),
        ({}, ["transformer.word_embeddings.weight"], "transformer.word_embeddings.weight"),
        ({}, ["gpt_neox.embed_in.weight", "embed_out.weight"], None),
        ({"tie_word_embeddings": True}, ["model.decoder.embed_tokens.weight"],
         "model.decoder.embed_tokens.weight"),
        ({"text_config": {"tie_word_embeddings": True}},
         ["language_model.model.embed_tokens.weight", "vision_tower.embeddings.weight"],
         "language_model.model.embed_tokens.weight"),
        ({"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False},
         ["model.language_model.embed_tokens.weight", "lm_head.weight"], None),
        ({"tie_word_embeddings": True}, ["an.unknown.name"], None),
    ],
)  # fmt: skip
def test_embeddings_go_by_many_names(
    config: dict[str, Any], names: list[str], tied: str | None
) -> None:
    assert list(tie_of(config, names, Path("model")).values()) == ([tied] if tied else [])


def test_values_that_are_not_finite_are_named(make_model: MakeModel) -> None:
    require_finite(Anchor.open(make_model("sound")))
    bad = make_model("bad")
    edit(bad, lambda t: t["model.norm.weight"].__setitem__(slice(2), torch.tensor([1e39, -1e39])))
    edit(bad, lambda t: t[EMBEDDING].view(-1).__setitem__(0, float("nan")))
    with pytest.raises(UserError, match=r"not finite: .*embed_tokens.weight \(1\), .*norm.*\(2\)$"):
        require_finite(Anchor.open(bad))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = {name: tensor.clone() for name, tensor in stored(folder).items()}
    change(held)
    save_file(held, folder / "model.safetensors")


def edit_index(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def edit_map(folder: Path, name: str, file: str | None) -> None:
    def change(index: dict[str, object]) -> None:
        mapping = index["weight_map"]
        assert isinstance(mapping, dict)
        del mapping[name]
        if file:
            mapping[name] = file

    edit_index(folder, change)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


SINGLE_FILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: cannot be read"),
    "config not JSON": (
        lambda f: (f / "config.json").write_text("{"), r"config\.json: is not JSON"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"), "a JSON list, allowed: an object"),
    "config binary": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\xfd"), "is not JSON"),
    "auto_map": (
        lambda f: (f / "config.json").write_text('{"auto_map": {}}'), "auto_map .* names code"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"neither model\.safetensors nor model\.safetensors\.index\.json"),
    "pickle renamed": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04\x95" + b"x" * 400),
        r"model\.safetensors: is not a whole safetensors file"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), "is not a whole safetensors file"),
    "empty file": (
        lambda f: (f / "model.safetensors").write_bytes(b""), "is not a whole safetensors file"),
    "no tensors": (lambda f: edit(f, dict.clear), "holds no tensors"),
    "empty tensor": (
        lambda f: edit(f, lambda t: t.update({"model.x": torch.empty(0, 8)})),
        r"model\.x is empty, shape \[0, 8\]"),
    "integer tensor": (
        lambda f: edit(f, lambda t: t.update({"model.x": torch.ones(3, dtype=torch.int32)})),
        r"model\.x is I32, allowed: BF16, F16, F32"),
    "double tensor": (
        lambda f: edit(f, lambda t: t.update({"model.x": torch.ones(3, dtype=torch.float64)})),
        r"model\.x is F64, allowed: BF16, F16, F32"),
    "tied tensors differ": (
        lambda f: edit(f, lambda t: t.update({HEAD: t[EMBEDDING] + 1})),
        r"lm_head\.weight and model\.embed_tokens\.weight are tied but differ"),
    "tied of another dtype": (
        lambda f: edit(f, lambda t: t.update({HEAD: t[EMBEDDING].float()})),
        "are tied but differ"),
    "tied without an embedding": (
        lambda f: edit(f, lambda t: t.update({HEAD: t.pop(EMBEDDING)})),
        r"no embedding is stored, but lm_head\.weight: tie_word_embeddings is true"),
    "untied without a head": (
        lambda f: (f / "config.json").write_text('{"tie_word_embeddings": false}'),
        "no head is stored, tie_word_embeddings is false"),
}  # fmt: skip

SHARDED: dict[str, tuple[Callable[[Path], object], str]] = {
    "both forms": (
        lambda f: save_file({"a": torch.ones(2)}, f / "model.safetensors"), "allowed: one of them"),
    "no weight_map": (
        lambda f: edit_index(f, lambda i: i.pop("weight_map")), "weight_map is missing or empty"),
    "shard missing": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        "model-00002-of-00003.safetensors: is not a whole"),
    "shard truncated": (
        lambda f: truncate(f / "model-00002-of-00003.safetensors"), "is not a whole"),
    "name missing from the index": (
        lambda f: edit_map(f, EMBEDDING, None),
        r"model\.embed_tokens\.weight of model-0000\d-of-00003\.safetensors not in the index"),
    "name in another shard": (
        lambda f: edit_map(f, "model.norm.weight", "model-00001-of-00003.safetensors"),
        r"model\.norm\.weight not in model-00001-of-00003"),
    "shard outside": (
        lambda f: edit_map(f, EMBEDDING, "../anchor/model-00001-of-00003.safetensors"),
        "must lie in the same folder"),
}  # fmt: skip


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Anchor.open(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", SINGLE_FILE)
def test_a_doubtful_directory_is_refused(make_model: MakeModel, kind: str) -> None:
    spoil, message = SINGLE_FILE[kind]
    folder = make_model()
    Anchor.open(folder)
    spoil(folder)
    refused(folder, message)


@pytest.mark.parametrize("kind", SHARDED)
def test_doubtful_shards_are_refused(make_model: MakeModel, kind: str) -> None:
    spoil, message = SHARDED[kind]
    folder = make_model(shards=3)
    Anchor.open(folder)
    spoil(folder)
    refused(folder, message)


def test_a_directory_of_links_is_a_model(make_model: MakeModel, tmp_path: Path) -> None:
    """A download cache keeps blobs and links to them."""
    folder = make_model()
    (tmp_path / "links").mkdir()
    for file in folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert Anchor.open(tmp_path / "links").digest == Anchor.open(folder).digest


def test_what_is_not_a_directory_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere: is not a model directory")
