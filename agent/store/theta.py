"""theta = anchor + delta: rendered for a member, moved by a step, hashed, kept as a snapshot.

    rendered(address, s) = cast(theta_0 + (delta + s * eps(address)))      in the anchor's dtype
    apply(step)          : delta <- penalty(delta + sum_p c_p eps_p)        float32, in place

theta_0 the anchor's tensor, delta float32 in the same shape, eps the addressed noise, s = sign *
sigma. ``Parameters`` holds delta on the host, ``device.DeviceParameters`` where an engine is; the
bits are the same.

Memory on the host: the mapped anchor (2 bytes a parameter for bfloat16, pages the system may
drop), 4 bytes a parameter for delta, and the tensors rendered ahead (GROUP elements, or one
tensor that is larger) for as long as a reader holds them. A tensor-parallel rank holds its
``windows`` of delta alone, and everything here is then about these.

The compiled kernels are imported where they are called. They load numba and llvmlite, and vLLM's
search for kernels, at the start of a serving engine on the CPU, fails in a process that has
llvmlite: such a process imports this module to check its weights before it starts.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agent.home import flush_folder
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind, Runs
from agent.learner.penalty import Penalty
from agent.store.anchor import Anchor, Floats, read_floats, read_importance
from agent.store.tensorfile import (
    Spec,
    beside,
    combined,
    file_order,
    hashed,
    write_tensors,
)
from agent.store.windows import TREE, Windows, tree_hash, write_windows

if TYPE_CHECKING:  # most commands need no tensor, and torch takes seconds
    import torch

GROUP = 1 << 24  # elements rendered at a time

Moves = Mapping[str, tuple[float, float]]
"""Tensor name -> (sum delta^2 after a step, sum (delta after - before)^2), in float64."""

Slot = Callable[[str], "torch.Tensor | None"]
"""Tensor name -> where its values go: flat, in the anchor's dtype; None: memory of its own."""


def layer_of(name: str) -> str:
    """``model.layers.0.mlp.up_proj.weight`` -> ``model.layers.0``; else all but the last part."""
    numbered = re.match(r"(.*?\.\d+)\.", name)
    return numbered.group(1) if numbered else name.rpartition(".")[0] or name


class Theta(ABC):
    """An anchor and a float32 delta, wherever delta lies; one thread at a time."""

    anchor: Anchor
    importance: Path | None = None  # folder of weights that penalties name (``importance``)
    tree: bool = False  # whether a tree hash is what is cheap where delta lies
    windows: Windows = MappingProxyType({})
    _weights: tuple[str, Mapping[str, Floats]] = ("", {})

    @abstractmethod
    def rendered(
        self,
        address: Address | None = None,
        scale: float = 0.0,
        noise: NoiseKind = "normal",
        *,
        order: Iterable[str] | None = None,
        into: Slot | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) for every distinct tensor, by name or in the order given.

        Every tensor has its own memory; a reader may keep it. ``into`` may name other memory where
        delta lies, such as rows of an engine's fused parameter. Plain weights where delta is zero
        are the anchor's, bit for bit.
        """

    @abstractmethod
    def moved(self, step: Step) -> Moves:
        """Move delta by one step, in place, a no-op by nothing; the squares of every tensor."""

    @abstractmethod
    def reset(self, snapshot: Path | None) -> None:
        """Delta = the snapshot's (None: zero), in the memory that it has.

        Raises:
            UserError: The snapshot is damaged or of another anchor; delta is what it was.
        """

    @abstractmethod
    def leaves(self) -> dict[str, NDArray[np.uint32]]:
        """(leaves, 2) sums over the bits of each tensor of delta (``compiled.leaves``).

        Of a window what it adds to those of the whole tensor.
        """

    @abstractmethod
    def deltas(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, delta in its shape)."""

    def apply(self, step: Step, like: str | None = None) -> Applied:
        """Move delta by one step, in place; a recorded no-op moves nothing.

        Returns the hash of delta (of the kind of ``like``), ||delta||, the length of the move and
        ||delta|| by layer.
        """
        moves = self.moved(step)
        return applied(moves, self.delta_hash(like))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what is held of a tensor."""
        whole = self.anchor.specs[name][0]
        return self.windows[name].shape(whole) if name in self.windows else whole

    def runs(self, name: str) -> Runs:
        """Where what is held of a tensor lies in it."""
        whole = self.anchor.specs[name][0]
        return self.windows[name].runs(whole) if name in self.windows else Runs()

    def base(self, name: str) -> torch.Tensor:
        """The anchor's part of what is held of a tensor; mapped, do not write."""
        tensor = self.anchor.tensor(name)
        return self.windows[name].of(tensor) if name in self.windows else tensor

    def noise_of(
        self, name: str, address: Address | None, scale: float
    ) -> tuple[Address | None, float]:
        """Address and scale of a tensor's noise: none for one that is fixed."""
        return (None, 0.0) if name in self.anchor.fixed else (address, scale)

    def weights(self, penalty: Penalty) -> Mapping[str, Floats]:
        """The importance a penalty names, flat, by tensor name; read once. Nothing: all 1."""
        digest = penalty.importance
        if digest is None:
            return {}
        if self._weights[0] != digest:
            read = read_importance(self.anchor, self.importance, digest, self.windows)
            self._weights = digest, read
        return self._weights[1]

    def require_weights(self, penalty: Penalty) -> None:
        """UserError unless the importance weights that a penalty names can be read."""
        self.weights(penalty)

    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of every tensor of delta."""
        import torch

        return {name: (shape, torch.float32) for name, (shape, _) in self.anchor.specs.items()}

    def delta_hash(self, like: str | None = None) -> str:
        """The hash of delta, equal on every engine of a generation.

        Hex sha256 of all bytes (``tensorfile.combined``), or ``TREE`` and the sha256 of the leaves
        of a tree hash, of which one number in 32,768 leaves an accelerator.

        Args:
            like: A hash that is to be compared with: its kind is taken. None: what is cheap where
                delta lies.
        """
        if self.windows:
            raise ValueError("delta_hash: a rank holds windows of delta; allowed: all of it")
        if not (self.tree if like is None else like.startswith(TREE)):
            return combined(self.specs(), hashed(self.deltas(self.anchor.names)))
        shapes = {name: shape for name, (shape, _) in self.anchor.specs.items()}
        return tree_hash(shapes, self.leaves())

    def digest(self) -> str:
        """Hex sha256 of the rendered weights, the name of a model everywhere."""
        return combined(self.anchor.specs, hashed(self.rendered()))

    def save(self, path: Path) -> None:
        """Keep delta as a safetensors file: written beside its place, flushed, renamed."""
        with beside(path) as folder:
            self.write(folder / path.name)
            (folder / path.name).replace(path)
        flush_folder(path.parent)

    def write(self, path: Path) -> None:
        """Write delta to a new safetensors file, in a folder that ``beside`` gave to the caller.

        A rank writes its windows into the file, which is whole when all ranks have.
        """
        metadata = {"anchor": self.anchor.digest}
        if self.windows:
            parts = dict(self.deltas(self.anchor.names))
            write_windows(path, self.specs(), self.windows, parts, metadata)
            return
        tensors = self.deltas(file_order(self.specs()))
        write_tensors(path, self.specs(), tensors, metadata)


def applied(moves: Moves, delta_hash: str) -> Applied:
    """What a step did: the hash of delta, ||delta||, the length of the move, ||delta|| by layer."""
    layers: dict[str, list[float]] = {}
    for name in sorted(moves):
        layers.setdefault(layer_of(name), []).append(moves[name][0])
    return Applied(
        delta_hash=delta_hash,
        norm=math.sqrt(math.fsum(square for square, _ in moves.values())),
        step_norm=math.sqrt(math.fsum(square for _, square in moves.values())),
        layer_norms={layer: math.sqrt(math.fsum(held)) for layer, held in layers.items()},
    )


class Parameters(Theta):
    """An anchor and a float32 delta in host memory.

    ``delta`` is flat, by tensor name; ``importance`` is where the weights that a penalty may name
    are kept (``agent.store.anchor``).
    """

    def __init__(
        self,
        anchor: Anchor,
        delta: Mapping[str, Floats],
        importance: Path | None = None,
        windows: Windows = MappingProxyType({}),
    ):
        self.anchor, self.importance, self.windows = anchor, importance, windows
        self.delta = {name: delta[name].reshape(-1) for name in anchor.names}

    @classmethod
    def zeros(
        cls,
        anchor: Anchor,
        importance: Path | None = None,
        windows: Windows = MappingProxyType({}),
    ) -> Parameters:
        """theta = theta_0."""
        shapes = {name: shape for name, (shape, _) in anchor.specs.items()}
        shapes |= {name: window.shape(shapes[name]) for name, window in windows.items()}
        delta = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        return cls(anchor, delta, importance, windows)

    @classmethod
    def load(cls, anchor: Anchor, path: Path, importance: Path | None = None) -> Parameters:
        """Read a snapshot of delta; UserError when it is damaged or of another anchor."""
        return cls(anchor, read_floats(anchor, path), importance)

    def rendered(
        self,
        address: Address | None = None,
        scale: float = 0.0,
        noise: NoiseKind = "normal",
        *,
        order: Iterable[str] | None = None,
        into: Slot | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Theta``; a group of tensors is rendered at a time, on all cores."""
        import torch

        from agent.learner.kernels_cpu import Render, render_many

        for names in groups(self.anchor.specs, order or self.anchor.names):
            bases = {name: self.base(name).contiguous() for name in names}
            slots = {name: into(name) if into else None for name in names}
            tensors = {
                name: torch.empty_like(bases[name])
                if slot is None or slot.device.type != "cpu"  # the kernels write host memory
                else slot.view(self.shape(name))
                for name, slot in slots.items()
            }
            parts: list[Render] = []
            fixed: list[Render] = []  # tensors that no member perturbs
            for name, tensor in tensors.items():
                if tensor.dtype == torch.float16:  # no compiled kernel: rounding by torch
                    at = self.noise_of(name, address, scale)
                    self._render_float16(name, tensor, *at, noise)
                else:
                    kind = fixed if name in self.anchor.fixed else parts
                    flat = stored(tensor), stored(bases[name]), self.delta[name]
                    kind.append(Render(name, *flat, self.runs(name)))
            render_many(parts, address, scale, noise)
            render_many(fixed, None, 0.0, noise)
            yield from tensors.items()

    def _render_float16(
        self, name: str, out: torch.Tensor, address: Address | None, scale: float, noise: NoiseKind
    ) -> None:
        """Through float32, rounded once at the end."""
        from agent.learner.kernels_cpu import Render, render_many

        flat, base = out.view(-1), self.base(name).reshape(-1)
        runs = self.runs(name)
        each = GROUP if not runs.width else runs.width * max(1, GROUP // runs.width)
        for first in range(0, flat.numel(), each):
            wide = base[first : first + each].float()
            delta = self.delta[name][first : first + each]
            begin = first // runs.width * runs.stride if runs.width else first
            place = Runs(runs.start + begin, runs.width, runs.stride)
            part = Render(name, stored(wide), stored(wide), delta, place)
            render_many([part], address, scale, noise)
            flat[first : first + each].copy_(wide)

    def moved(self, step: Step) -> Moves:
        """See ``Theta``; all tensors in one pass."""
        from agent.learner.kernels_cpu import Update, update_many

        weights, fixed = self.weights(step.penalty), self.anchor.fixed
        names = [name for name in self.anchor.names if name not in fixed]
        parts = [
            Update(name, self.delta[name], weights.get(name), self.runs(name)) for name in names
        ]
        moves = dict(zip(names, update_many(parts, step), strict=True))
        return moves | dict.fromkeys(fixed, (0.0, 0.0))

    def reset(self, snapshot: Path | None) -> None:
        """See ``Theta``; a snapshot is read beside delta, which it replaces."""
        if snapshot is not None:
            read = read_floats(self.anchor, snapshot, self.windows)
            self.delta = {name: read[name].reshape(-1) for name in self.anchor.names}
            return
        for values in self.delta.values():
            values.fill(0)

    def leaves(self) -> dict[str, NDArray[np.uint32]]:
        """See ``Theta``; on all cores."""
        from agent.learner.kernels_cpu import tree_leaves

        specs = self.anchor.specs
        return {
            name: tree_leaves(self.delta[name], None, self.runs(name), math.prod(specs[name][0]))
            for name in specs
        }

    def deltas(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Theta``; shares memory with delta."""
        import torch

        for name in names:
            yield name, torch.from_numpy(self.delta[name]).view(self.shape(name))


def groups(specs: Mapping[str, Spec], names: Iterable[str]) -> Iterator[list[str]]:
    """The names in order, in lists whose tensors have GROUP elements together, or one tensor."""

    group: list[str] = []
    total = 0
    for name in names:
        count = math.prod(specs[name][0])
        if group and total + count > GROUP:
            yield group
            group, total = [], 0
        group.append(name)
        total += count
    if group:
        yield group


def stored(tensor: torch.Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """A flat view as the kernels take it: float32, or the bits of bfloat16."""
    import torch

    flat = tensor.reshape(-1)
    bits = flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat
    array: NDArray[np.float32] | NDArray[np.uint16] = bits.numpy()
    return array
