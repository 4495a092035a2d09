"""Windows: the rows or columns of each tensor that one tensor-parallel rank holds of delta.

Noise is addressed by element, so a rank renders, moves and hashes its windows alone. What the
ranks report is put together here: squares and the leaves of the tree hash are sums over elements,
of which each is counted once, however many ranks hold it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent.learner.noise import Runs
from agent.store.tensorfile import Spec, combined, file_order, flush, header

if TYPE_CHECKING:  # most commands need no tensor, and torch takes seconds
    import torch

TREE = "tree-"  # how a tree hash of delta begins

Windows = Mapping[str, "Window"]
"""Tensor name -> what a rank holds of it; a tensor that is not there is held whole."""


@dataclass(frozen=True, slots=True)
class Window:
    """Indices [start, stop) along one axis of a tensor."""

    axis: int
    start: int
    stop: int

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Its shape, of a tensor of this shape."""
        return (*whole[: self.axis], self.stop - self.start, *whole[self.axis + 1 :])

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The window's part of a tensor, which shares its memory."""
        return tensor.narrow(self.axis, self.start, self.stop - self.start)

    def runs(self, whole: Sequence[int]) -> Runs:
        """Where its elements lie in a tensor of this shape."""
        inner = prod(whole[self.axis + 1 :])
        width = (self.stop - self.start) * inner
        return Runs(self.start * inner, width, whole[self.axis] * inner)


def counted(shapes: Mapping[str, tuple[int, ...]], ranks: Sequence[Windows]) -> list[list[str]]:
    """For each rank the tensors whose elements it is the first to hold: sums take these.

    Raises:
        ValueError: The windows of a tensor leave a gap or overlap.
    """
    mine: list[list[str]] = [[] for _ in ranks]
    for name, shape in shapes.items():
        first = {windows.get(name): rank for rank, windows in reversed(list(enumerate(ranks)))}
        cuts = sorted((w.start, w.stop) for w in first if w is not None and w.start < w.stop)
        axes = {w.axis for w in first if w is not None}
        if axes:
            ends = [(0, 0), *cuts, (shape[min(axes)], 0)]
            if None in first or len(axes) > 1 or any(a[1] != b[0] for a, b in pairwise(ends)):
                raise ValueError(f"{name}: {list(shape)}, ranks hold {list(first)}")
        for rank in first.values():
            mine[rank].append(name)
    return mine


def summed_leaves(
    mine: Sequence[Sequence[str]], leaves: Sequence[Mapping[str, bytes]]
) -> dict[str, NDArray[np.uint32]]:
    """(leaves, 2) sums of each tensor, modulo 2^32, from those of the ranks that count.

    Args:
        mine: Of `counted`.
        leaves: By rank and tensor name, little-endian 32-bit numbers.
    """
    total: dict[str, NDArray[np.uint32]] = {}
    for names, reported in zip(mine, leaves, strict=True):
        for name in names:
            part = np.frombuffer(reported[name], "<u4").astype(np.uint32).reshape(-1, 2)
            total[name] = total[name] + part if name in total else part
    return total


def summed_moves(
    mine: Sequence[Sequence[str]], moves: Sequence[Mapping[str, Sequence[float]]]
) -> dict[str, tuple[float, float]]:
    """The squares of each tensor (``theta.Moves``) from those of the ranks that count."""
    total: dict[str, tuple[float, float]] = {}
    for names, reported in zip(mine, moves, strict=True):
        for name in names:
            before, (square, moved) = total.get(name, (0.0, 0.0)), reported[name]
            total[name] = before[0] + square, before[1] + moved
    return total


def write_windows(
    path: Path,
    specs: Mapping[str, Spec],
    windows: Windows,
    parts: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write one rank's float32 windows to their places in a file that all ranks write at once.

    Every rank writes the same header; the file is whole when each has written, down to the disk.
    """
    import torch

    head = header(specs, metadata)
    place = len(head)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(file, place + sum(4 * prod(shape) for shape, _ in specs.values()))
        os.pwrite(file, head, 0)
        for name in file_order(specs):
            shape = specs[name][0]
            if name in parts:
                whole = np.memmap(path, np.float32, "r+", place, shape)
                into = torch.from_numpy(whole)
                (windows[name].of(into) if name in windows else into).copy_(parts[name])
                whole.flush()
            place += 4 * prod(shape)
        flush(file)
    finally:
        os.close(file)


def to_json(windows: Windows) -> dict[str, list[int]]:
    """Plain values, which ``from_json`` reads."""
    return {name: list(astuple(window)) for name, window in windows.items()}


def from_json(data: Mapping[str, Sequence[Any]]) -> dict[str, Window]:
    """The inverse of ``to_json``."""
    return {name: Window(*map(int, window)) for name, window in data.items()}


def tree_hash(
    shapes: Mapping[str, tuple[int, ...]], leaves: Mapping[str, NDArray[np.uint32]]
) -> str:
    """``TREE`` and the sha256 of the (leaves, 2) sums of every tensor of delta."""
    import torch

    hashes = {
        name: hashlib.sha256(sums.astype("<u4").tobytes()).digest() for name, sums in leaves.items()
    }
    return TREE + combined({name: (each, torch.float32) for name, each in shapes.items()}, hashes)


class Ranks:
    """What the tensor-parallel ranks of one engine report of theta, put together."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        windows: Sequence[Mapping[str, Sequence[int]]],
    ):
        """The anchor's shapes and what each rank holds; ValueError when a part is missing."""
        self._shapes, self._windows = shapes, [from_json(each) for each in windows]
        self._mine = counted(shapes, self._windows)

    def held(self) -> list[int]:
        """Elements of delta on each rank."""
        shapes = self._shapes.items()
        return [
            sum(prod(held[name].shape(each) if name in held else each) for name, each in shapes)
            for held in self._windows
        ]

    def moves(
        self, reported: Sequence[Mapping[str, Sequence[float]]]
    ) -> dict[str, tuple[float, float]]:
        """The squares of every tensor."""
        return summed_moves(self._mine, reported)

    def delta_hash(self, reported: Sequence[Mapping[str, Any]]) -> str:
        """The hash that a rank with all of delta reports, or that of the leaves of all."""
        if "hash" in reported[0]:
            return str(reported[0]["hash"])
        leaves = summed_leaves(self._mine, [each["leaves"] for each in reported])
        return tree_hash(self._shapes, leaves)
