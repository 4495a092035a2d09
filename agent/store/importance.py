"""Files with one float32 number per parameter: snapshots of delta, and importance weights.

Importance weights scale a penalty parameter by parameter. A file of them is kept under the sha256
of its bytes and a step names that sha256, so that a journal replays with the weights its rounds
had.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from agent.errors import UserError
from agent.home import flush_folder
from agent.learner.penalty import check_weights
from agent.store.anchor import Anchor, listed, open_tensors
from agent.store.tensorfile import beside, sha256_of

Floats = NDArray[np.float32]


def read_floats(anchor: Anchor, path: Path) -> dict[str, Floats]:
    """One float32 array per tensor of the anchor, from a snapshot that belongs to it."""
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
    return {name: np.array(tensor.numpy()) for name, tensor in tensors.items()}


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


def read_importance(anchor: Anchor, folder: Path | None, digest: str) -> Mapping[str, Floats]:
    """The weights of this sha256, by tensor name, flat; UserError when they are not there."""
    path = importance_path(folder, digest) if folder else None
    if path is None or not path.is_file():
        raise UserError(f"importance {digest[:12]}: is not kept in {folder}")
    if (found := sha256_of(path)) != digest:
        raise UserError(f"{path}: has sha256 {found[:12]}, the round was made with {digest[:12]}")
    return {name: weights.reshape(-1) for name, weights in read_floats(anchor, path).items()}


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
