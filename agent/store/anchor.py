"""The anchor: a Hugging Face directory of float tensors, memory-mapped, never written.

Beside it are files with one float32 number a parameter: snapshots of delta, and importance weights.

Importance weights scale a penalty parameter by parameter. A file of them is kept under the sha256
of its bytes and a step names that sha256, so that a journal replays with the weights its rounds
had.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from agent.errors import UserError
from agent.home import flush_folder
from agent.learner.penalty import check_weights
from agent.store.tensorfile import DTYPES, Spec, beside, combined, hashed, sha256_of
from agent.store.windows import Windows

if TYPE_CHECKING:  # most commands need no tensor, and torch takes seconds
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
HEADS = ("lm_head", "embed_out")
SENSES = ("visual", "vision", "audio", "image", "multi_modal")  # parts of modules' names
SHOWN = 8


def listed(values: list[str]) -> str:
    """The first few of a list of names and how many follow."""
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(values[:SHOWN]) + more


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file, or a UserError that names the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, allowed: an object")
    return value


def open_tensors(path: Path) -> Any:
    """A memory-mapped safetensors file (private mapping); its header is checked on opening."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a whole safetensors file ({error})") from error


def shards(directory: Path) -> dict[str, str | None]:
    """file -> None for a single file, tensor -> file for an index."""
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() and index.exists():
        raise UserError(f"{directory}: holds {SINGLE} and {INDEX}, allowed: one of them")
    if single.exists():
        return {SINGLE: None}
    if not index.exists():
        raise UserError(f"{directory}: holds neither {SINGLE} nor {INDEX}")
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{index}: weight_map is missing or empty")
    bad = sorted(str(file) for file in mapping.values() if Path(str(file)).name != file)
    if bad:
        raise UserError(f"{index}: shards must lie in the same folder, not {listed(bad)}")
    return dict(mapping)


def locate(directory: Path) -> dict[str, Any]:
    """Tensor name -> open file, from one file or from all shards of the index."""
    mapping = shards(directory)
    if mapping == {SINGLE: None}:
        handle = open_tensors(directory / SINGLE)
        return dict.fromkeys(handle.keys(), handle)
    handles = {str(file): open_tensors(directory / str(file)) for file in set(mapping.values())}
    # A handle of safetensors has keys() and cannot be iterated.
    stored = {(name, file) for file, handle in handles.items() for name in handle.keys()}  # noqa: SIM118
    wanted = {(name, str(file)) for name, file in mapping.items()}
    if stored != wanted:
        missing = [f"{name} not in {file}" for name, file in sorted(wanted - stored)]
        extra = [f"{name} of {file} not in the index" for name, file in sorted(stored - wanted)]
        raise UserError(f"{directory / INDEX}: {listed(missing + extra)}")
    return {name: handles[file] for name, file in wanted}


def spec_of(handle: Any, name: str) -> Spec | str:
    """Shape and dtype of a stored tensor, or what is wrong with them."""
    import torch

    stored = handle.get_slice(name)
    shape, code = tuple(stored.get_shape()), stored.get_dtype()
    if code not in DTYPES:
        return f"{name} is {code}, allowed: {', '.join(sorted(DTYPES))}"
    if 0 in shape:
        return f"{name} is empty, shape {list(shape)}"
    dtype: torch.dtype = getattr(torch, DTYPES[code])
    return shape, dtype


def _weight_of(names: Iterable[str], modules: Sequence[str]) -> str | None:
    """The tensor that is the weight of one of these modules, under whatever prefix."""
    ends = {f"{module}.weight" for module in modules}
    return min((n for n in names if ".".join(n.split(".")[-2:]) in ends), default=None)


def tie_of(config: Mapping[str, Any], names: Iterable[str], where: Path) -> dict[str, str]:
    """{head: embedding} where the head is the embedding, else nothing.

    That is what the config says (its text part, where a model reads pictures, too), else whether a
    head is stored. Families whose embedding has yet another name store a head or have none.
    """
    embedding, head = _weight_of(names, EMBEDDINGS), _weight_of(names, HEADS)
    text = config.get("text_config") or {}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if tied is None:
        tied = head is None
    if embedding is None and head is None:
        return {}
    if embedding is None and tied:
        raise UserError(f"{where}: no embedding is stored, but {head}: tie_word_embeddings is true")
    if head is None and not tied:
        raise UserError(f"{where}: no head is stored, tie_word_embeddings is false")
    return {head or f"{HEADS[0]}.weight": str(embedding)} if tied else {}


def not_text(config: Mapping[str, Any], names: Iterable[str]) -> frozenset[str]:
    """The tensors of a model's other senses: no answer to a text depends on them."""
    if not {"vision_config", "audio_config"} & config.keys():
        return frozenset()
    return frozenset(n for n in names if any(s in n.rpartition(".")[0] for s in SENSES))


class Anchor:
    """The immutable model a round starts from: tensors by canonical name, tied ones once.

    ``names`` sorted, ``specs`` name -> (shape, dtype), ``tied`` alias -> name, ``parameters`` the
    number of distinct weights, ``fixed`` the names that are never perturbed or moved, ``digest``
    the sha256 of names, dtypes, shapes and bytes, ``companions`` the folder of the config,
    tokenizer and template files that every version made from it carries.
    Memory: the mapping only, in the published dtype (2 bytes a parameter for bfloat16).
    """

    def __init__(self, directory: Path, files: Mapping[str, Any], specs: Mapping[str, Spec]):
        self.directory = self.companions = directory
        self.names = tuple(sorted(specs))
        self.specs = MappingProxyType(dict(specs))
        self.tied: Mapping[str, str] = MappingProxyType({})
        self.fixed: frozenset[str] = frozenset()
        self.parameters = sum(prod(shape) for shape, _ in specs.values())
        self._tensors: dict[str, torch.Tensor] = {
            name: files[name].get_tensor(name) for name in specs
        }

    @classmethod
    def open(cls, directory: Path) -> Anchor:
        """Map a directory with config.json and safetensors weights; UserError names what is wrong.

        Refused: no config or weights, code named by ``auto_map``, other dtypes, empty tensors,
        tensors missing from the index or the shards, stored tied tensors that differ.
        """
        if not directory.is_dir():
            raise UserError(f"{directory}: is not a model directory")
        config = read_json(directory / "config.json")
        if "auto_map" in config:
            raise UserError(f"{directory}: auto_map in config.json names code, allowed: none")
        files = locate(directory)
        found = {name: spec_of(handle, name) for name, handle in files.items()}
        bad = sorted(spec for spec in found.values() if isinstance(spec, str))
        if bad or not found:
            raise UserError(f"{directory}: {listed(bad) or 'holds no tensors'}")
        specs = {name: spec for name, spec in found.items() if not isinstance(spec, str)}
        tied = tie_of(config, specs, directory)
        for head, embedding in tied.items():
            if head in specs and not _equal(files, head, embedding):
                raise UserError(f"{directory}: {head} and {embedding} are tied but differ")
        anchor = cls(directory, files, {n: spec for n, spec in specs.items() if n not in tied})
        anchor.tied = MappingProxyType(tied)
        anchor.fixed = not_text(config, anchor.names)
        return anchor

    @property
    def learnable(self) -> int:
        """How many weights a step can move."""
        return self.parameters - sum(prod(self.specs[n][0]) for n in self.fixed)

    def tensor(self, name: str) -> torch.Tensor:
        """The mapped tensor in its own dtype; an alias gives what it is tied to. Do not write."""
        return self._tensors[self.tied.get(name, name)]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All distinct tensors, by name."""
        return ((name, self._tensors[name]) for name in self.names)

    @cached_property
    def digest(self) -> str:
        """Hex sha256 over sorted names of name, dtype, shape, bytes (``tensorfile.combined``)."""
        return combined(self.specs, hashed(self.tensors()))


def require_finite(anchor: Anchor) -> None:
    """Raise one UserError with every tensor that holds NaN or infinity: no engine answers sense."""
    import torch

    counts = {
        name: int(tensor.numel() - torch.isfinite(tensor).sum())
        for name, tensor in anchor.tensors()
    }
    bad = [f"{name} ({count})" for name, count in counts.items() if count]
    if bad:
        raise UserError(f"{anchor.directory}: values that are not finite: {listed(bad)}")


def _equal(files: Mapping[str, Any], one: str, other: str) -> bool:
    """Whether two stored tensors have the same dtype, shape and bytes."""
    import torch

    first, second = files[one].get_tensor(one), files[other].get_tensor(other)
    return first.dtype == second.dtype and torch.equal(first, second)


Floats = NDArray[np.float32]


def read_floats(anchor: Anchor, path: Path, windows: Windows | None = None) -> dict[str, Floats]:
    """One float32 array per tensor of the anchor, or its window, from a snapshot of the anchor."""
    import torch

    handle = open_tensors(path)
    if (handle.metadata() or {}).get("anchor", anchor.digest) != anchor.digest:
        raise UserError(f"{path}: belongs to another anchor than {anchor.digest[:12]}")
    names = set(handle.keys())
    if names != set(anchor.names):
        raise UserError(f"{path}: tensors differ: {listed(sorted(names ^ set(anchor.names)))}")
    tensors = {name: handle.get_tensor(name) for name in anchor.names}
    wrong = [
        f"{name} is {tensor.dtype} {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if (tuple(tensor.shape), tensor.dtype) != (anchor.specs[name][0], torch.float32)
    ]
    if wrong:
        raise UserError(f"{path}: {listed(wrong)}, allowed: float32 in the anchor's shapes")
    for name, window in (windows or {}).items():
        tensors[name] = window.of(tensors[name])
    return {name: np.array(tensor.numpy(), order="C") for name, tensor in tensors.items()}


def importance_path(folder: Path, digest: str) -> Path:
    """Where the weights of this sha256 are kept."""
    return folder / f"{digest}.safetensors"


def keep_importance(anchor: Anchor, source: Path, folder: Path) -> tuple[str, float]:
    """Check a file of weights and keep a copy; returns its sha256 and its largest weight.

    Raises:
        UserError: Not safetensors, other names or shapes than the anchor's, not float32, negative
            or not finite; nothing is kept then.
    """
    if not source.is_file():
        raise UserError(f"importance {str(source)!r}: no such file, allowed: safetensors")
    digest, largest = sha256_of(source), _largest(read_floats(anchor, source), source)
    with beside(folder / "weights") as place:
        copy = place / "weights.safetensors"
        shutil.copyfile(source, copy)
        if sha256_of(copy) != digest:
            raise UserError(f"importance {str(source)!r}: changed while it was read")
        copy.replace(importance_path(folder, digest))
    flush_folder(folder)
    return digest, largest


def read_importance(
    anchor: Anchor, folder: Path | None, digest: str, windows: Windows | None = None
) -> Mapping[str, Floats]:
    """The weights of this sha256, by tensor name, flat; UserError when they are not there."""
    path = importance_path(folder, digest) if folder else None
    if path is None or not path.is_file():
        raise UserError(f"importance {digest[:12]}: is not kept in {folder}")
    if (found := sha256_of(path)) != digest:
        raise UserError(f"{path}: has sha256 {found[:12]}, the round was made with {digest[:12]}")
    read = read_floats(anchor, path, windows)
    return {name: weights.reshape(-1) for name, weights in read.items()}


def _largest(weights: Mapping[str, Floats], source: Path) -> float:
    """The largest weight; one line with every tensor that holds a bad one."""
    bad, largest = [], [0.0]
    for name, values in weights.items():
        try:
            largest.append(check_weights(values.reshape(-1), values.size))
        except ValueError as error:
            bad.append(f"{name}: {error}")
    if bad:
        raise UserError(f"{source}: {listed(bad)}")
    return max(largest)
