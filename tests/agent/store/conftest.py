"""Small models on disk, as the store finds them."""

import inspect
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from postgres_server import PostgresProcess, needs_server
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
MakeModel = Callable[..., Path]


def weights(dtype: torch.dtype, seed: int = 0, hidden: int = 8) -> Tensors:
    """Two layers of a decoder with names, a bias and norms as Hugging Face spells them."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"model.layers.{layer}.self_attn.q_proj.bias"] = (hidden,)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (2 * hidden, hidden)
    return {name: torch.randn(s, generator=generator).to(dtype) for name, s in shapes.items()}


def write_shards(folder: Path, tensors: Tensors, count: int) -> None:
    """The tensors over several files with their index."""
    names = sorted(tensors)
    mapping = {}
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        held = names[shard::count]
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
        mapping |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": mapping}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """``make_model(name, dtype=, tied=, shards=, tensors=, config=)`` -> its directory."""

    def make(
        name: str = "anchor",
        *,
        dtype: torch.dtype = torch.bfloat16,
        tied: bool = True,
        shards: int = 0,
        tensors: Tensors | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        held = dict(tensors or weights(dtype))
        if not tied and "lm_head.weight" not in held:
            held["lm_head.weight"] = torch.ones(32, 8, dtype=dtype)
        written = {"model_type": "qwen2", "tie_word_embeddings": tied, **(config or {})}
        (folder / "config.json").write_text(json.dumps(written))
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        if shards:
            write_shards(folder, held, shards)
        else:
            save_file(held, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


NAMES = itertools.count()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``state`` is a file and a server's database; a file only where its bytes are damaged."""
    if "state" in metafunc.fixturenames:
        server = pytest.param("postgresql", marks=[pytest.mark.integration, needs_server])
        file_only = "tmp_path" in inspect.signature(metafunc.function).parameters
        metafunc.parametrize("state", ["sqlite", *([] if file_only else [server])], indirect=True)


@pytest.fixture
def state(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    """Where journal and ledger of a test are: a new file, or a new database of a server."""
    if request.param == "sqlite":
        return tmp_path / "state.db"
    return str(request.getfixturevalue("url"))


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresProcess]:
    """One PostgreSQL server for all; it may be killed and has to be started again."""
    process = PostgresProcess()
    yield process
    process.remove()


@pytest.fixture
def url(server: PostgresProcess) -> str:
    """A new, empty database."""
    return server.database(f"test{next(NAMES)}")
