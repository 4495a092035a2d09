"""A safetensors file and the folder that holds it: written once, hashed on the way, then renamed.

Layout of a file, https://github.com/huggingface/safetensors: eight bytes little-endian length of
the header, the header (JSON: name -> dtype, shape, offsets into the data), the data without gaps.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # most commands need no tensor, and torch takes seconds
    import torch


Spec = tuple[tuple[int, ...], "torch.dtype"]

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # by torch's name
DTYPES = {code: name for name, code in CODES.items()}
BATCH = 1 << 26  # bytes hashed together
WORTH_THREADS = 1 << 20  # bytes below which starting threads costs more than hashing


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``, ``bfloat16`` or ``float16``."""
    return str(dtype).removeprefix("torch.")


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in C order, without a copy where it is contiguous on the host."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_hash(tensor: torch.Tensor) -> bytes:
    """SHA-256 of the bytes of one tensor; other threads run meanwhile."""
    return hashlib.sha256(raw(tensor)).digest()


def combined(specs: Mapping[str, Spec], hashes: Mapping[str, bytes]) -> str:
    """One digest of many tensors, the same in whatever order and thread they were hashed.

    sha256 over the sorted names of ``name \\0 dtype \\0 shape \\0`` + sha256(bytes of the tensor).
    """
    total = hashlib.sha256()
    for name in sorted(specs):
        shape, dtype = specs[name]
        sides = ",".join(str(side) for side in shape)
        total.update(f"{name}\0{dtype_name(dtype)}\0{sides}\0".encode() + hashes[name])
    return total.hexdigest()


def hashed(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, bytes]:
    """name -> sha256 of the bytes, on all cores; up to BATCH bytes of tensors are held."""
    done: dict[str, bytes] = {}
    waiting: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        waiting.append((name, tensor))
        size += tensor.nbytes
        if size >= BATCH:
            done |= _hash_batch(waiting, size)
            waiting, size = [], 0
    return done | _hash_batch(waiting, size)


def _hash_batch(batch: Sequence[tuple[str, torch.Tensor]], size: int) -> dict[str, bytes]:
    """One task a core; tensors are dealt out by size, so that all end together."""
    cores = len(os.sched_getaffinity(0)) if size >= WORTH_THREADS else 1
    ordered = sorted(batch, key=lambda pair: -pair[1].nbytes)
    shares = [ordered[core::cores] for core in range(cores)]

    def work(share: Sequence[tuple[str, torch.Tensor]]) -> dict[str, bytes]:
        return {name: tensor_hash(tensor) for name, tensor in share}

    if cores == 1:
        return work(ordered)
    with ThreadPoolExecutor(cores) as pool:
        return {name: found for part in pool.map(work, shares) for name, found in part.items()}


def file_order(specs: Mapping[str, Spec]) -> list[str]:
    """Names with the widest elements first, so that every tensor is aligned in the mapping."""
    return sorted(specs, key=lambda name: (-specs[name][1].itemsize, name))


def header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON before the data, padded with spaces to eight bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in file_order(specs):
        shape, dtype = specs[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        code = CODES[dtype_name(dtype)]
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    path: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> dict[str, bytes]:
    """Write one safetensors file, a tensor at a time in ``file_order``, down to the disk.

    Returns sha256 per tensor. Peak memory is one tensor beyond what the iterator holds.
    """
    hashes: dict[str, bytes] = {}
    with path.open("xb") as file:
        file.write(header(specs, metadata))
        for (name, tensor), expected in zip(tensors, file_order(specs), strict=True):
            assert name == expected
            assert specs[name] == (tuple(tensor.shape), tensor.dtype)
            content = raw(tensor)
            hashes[name] = hashlib.sha256(content).digest()
            file.write(content)
        flush(file.fileno())
    return hashes


def flush(descriptor: int) -> None:
    """Wait until the bytes of an open file are on the disk."""
    os.fsync(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """A new file with this content, down to the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        flush(file.fileno())


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A new folder in the folder of ``target``, removed at the end with what is left in it.

    Write files there and rename them to ``target``: both lie on one file system, so the rename is
    atomic. What a killed process left is removed by the next caller; a lock on the folder itself
    (flock, because ``home.locked`` locks files) tells it from what is still being written.
    """
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    # The parent stays locked until the new folder is: no sweep can see it unlocked in between.
    parent_lock = _lock(parent, fcntl.LOCK_EX)
    try:
        _sweep(parent)
        folder = parent / f".{secrets.token_hex(8)}.partial"
        folder.mkdir()
        folder_lock = _lock(folder, fcntl.LOCK_EX)
    finally:
        os.close(parent_lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(folder_lock)


def _sweep(parent: Path) -> None:
    """Remove the unfinished folders whose lock is free."""
    for left in parent.glob(".*.partial"):
        try:
            lock = _lock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):
            continue
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path, mode: int) -> int:
    """Lock a folder until the returned descriptor is closed, or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
