"""One float32 number a parameter, in a safetensors file: a snapshot of delta, or importance."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from agent.errors import UserError
from agent.store.anchor import Anchor, listed, open_tensors

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
