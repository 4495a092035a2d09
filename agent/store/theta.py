"""theta = anchor + delta: rendered for a member, moved by a step, hashed, kept as a snapshot.

    rendered(address, s) = cast(theta_0 + (delta + s * eps(address)))      in the anchor's dtype
    apply(step)          : delta <- penalty(delta + sum_p c_p eps_p)        float32, in place

theta_0 the anchor's tensor, delta float32 in the same shape, eps the addressed noise, s = sign *
sigma. ``Parameters`` holds delta on the host, ``DeviceParameters`` where an engine is;
the bits are the same.

Memory on the host: the mapped anchor (2 bytes a parameter for bfloat16, pages the system may
drop), 4 bytes a parameter for delta, and the tensors rendered ahead (GROUP elements, or one
tensor that is larger) for as long as a reader holds them.

The compiled kernels are imported where they are called. They load numba and llvmlite, and vLLM's
search for kernels, at the start of a serving engine on the CPU, fails in a process that has
llvmlite: such a process imports this module to check its weights before it starts.

``DeviceParameters`` runs the Triton kernels over a delta in the accelerator's memory. It is asked
for by naming a device (``master_device``); without it delta stays on the host and the accelerator
holds nothing beyond the engine's own. Memory on the device: 4 bytes a parameter for delta, and
one tensor of the anchor at a time while it is rendered or moved.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from agent.errors import UserError
from agent.home import flush_folder
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
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

GROUP = 1 << 24  # elements rendered at a time

Moves = Mapping[str, tuple[float, float]]
"""Tensor name -> (sum delta^2 after a step, sum (delta after - before)^2), in float64."""


def layer_of(name: str) -> str:
    """``model.layers.0.mlp.up_proj.weight`` -> ``model.layers.0``; else all but the last part."""
    numbered = re.match(r"(.*?\.\d+)\.", name)
    return numbered.group(1) if numbered else name.rpartition(".")[0] or name


class Theta(ABC):
    """An anchor and a float32 delta, wherever delta lies; one thread at a time."""

    anchor: Anchor
    importance: Path | None = None  # folder of weights that penalties name (``importance``)
    _weights: tuple[str, Mapping[str, Floats]] = ("", {})

    @abstractmethod
    def rendered(
        self,
        address: Address | None = None,
        scale: float = 0.0,
        noise: NoiseKind = "normal",
        *,
        order: Iterable[str] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) for every distinct tensor, by name or in the order given.

        Every tensor has its own memory; a reader may keep it. Plain weights where delta is zero
        are the anchor's, bit for bit.
        """

    @abstractmethod
    def moved(self, step: Step) -> Moves:
        """Move delta by one step, in place, a no-op by nothing; the squares of every tensor."""

    @abstractmethod
    def deltas(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, delta in its shape)."""

    def apply(self, step: Step) -> Applied:
        """Move delta by one step, in place; a recorded no-op moves nothing.

        Returns the hash of delta, ||delta||, the length of the move and ||delta|| by layer.
        """
        moves = self.moved(step)
        layers: dict[str, list[float]] = {}
        for name in self.anchor.names:
            layers.setdefault(layer_of(name), []).append(moves[name][0])
        return Applied(
            delta_hash=self.delta_hash(),
            norm=math.sqrt(math.fsum(square for square, _ in moves.values())),
            step_norm=math.sqrt(math.fsum(square for _, square in moves.values())),
            layer_norms={layer: math.sqrt(math.fsum(held)) for layer, held in layers.items()},
        )

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
            self._weights = digest, read_importance(self.anchor, self.importance, digest)
        return self._weights[1]

    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of every tensor of delta."""
        return {name: (shape, torch.float32) for name, (shape, _) in self.anchor.specs.items()}

    def delta_hash(self) -> str:
        """Hex sha256 of delta (``tensorfile.combined``); equal on every engine of a generation."""
        return combined(self.specs(), hashed(self.deltas(self.anchor.names)))

    def digest(self) -> str:
        """Hex sha256 of the rendered weights, the name of a model everywhere."""
        return combined(self.anchor.specs, hashed(self.rendered()))

    def save(self, path: Path) -> None:
        """Keep delta as a safetensors file: written beside its place, flushed, renamed."""
        metadata = {"anchor": self.anchor.digest}
        with beside(path) as folder:
            tensors = self.deltas(file_order(self.specs()))
            write_tensors(folder / path.name, self.specs(), tensors, metadata)
            (folder / path.name).replace(path)
        flush_folder(path.parent)


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
    ):
        self.anchor, self.importance = anchor, importance
        self.delta = {name: delta[name].reshape(-1) for name in anchor.names}

    @classmethod
    def zeros(cls, anchor: Anchor, importance: Path | None = None) -> "Parameters":
        """theta = theta_0."""
        shapes = {name: shape for name, (shape, _) in anchor.specs.items()}
        delta = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        return cls(anchor, delta, importance)

    @classmethod
    def load(cls, anchor: Anchor, path: Path, importance: Path | None = None) -> "Parameters":
        """Read a snapshot of delta; UserError when it is damaged or of another anchor."""
        return cls(anchor, read_floats(anchor, path), importance)

    def rendered(
        self,
        address: Address | None = None,
        scale: float = 0.0,
        noise: NoiseKind = "normal",
        *,
        order: Iterable[str] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Theta``; a group of tensors is rendered at a time, on all cores."""
        from agent.learner.kernels_cpu import Render, render_many

        for names in groups(self.anchor.specs, order or self.anchor.names):
            tensors = {name: torch.empty_like(self.anchor.tensor(name)) for name in names}
            parts: list[Render] = []
            fixed: list[Render] = []  # tensors that no member perturbs
            for name, tensor in tensors.items():
                if tensor.dtype == torch.float16:  # no compiled kernel: rounding by torch
                    at = self.noise_of(name, address, scale)
                    self._render_float16(name, tensor, *at, noise)
                else:
                    base = stored(self.anchor.tensor(name))
                    kind = fixed if name in self.anchor.fixed else parts
                    kind.append(Render(name, stored(tensor), base, self.delta[name]))
            render_many(parts, address, scale, noise)
            render_many(fixed, None, 0.0, noise)
            yield from tensors.items()

    def _render_float16(
        self, name: str, out: torch.Tensor, address: Address | None, scale: float, noise: NoiseKind
    ) -> None:
        """Through float32, rounded once at the end."""
        from agent.learner.kernels_cpu import Render, render_many

        flat, base = out.view(-1), self.anchor.tensor(name).reshape(-1)
        for start in range(0, flat.numel(), GROUP):
            wide = base[start : start + GROUP].float()
            delta = self.delta[name][start : start + GROUP]
            part = Render(name, stored(wide), stored(wide), delta, start)
            render_many([part], address, scale, noise)
            flat[start : start + GROUP].copy_(wide)

    def moved(self, step: Step) -> Moves:
        """See ``Theta``; all tensors in one pass."""
        from agent.learner.kernels_cpu import Update, update_many

        weights, fixed = self.weights(step.penalty), self.anchor.fixed
        names = [name for name in self.anchor.names if name not in fixed]
        parts = [Update(name, self.delta[name], weights.get(name)) for name in names]
        moves = dict(zip(names, update_many(parts, step), strict=True))
        return moves | dict.fromkeys(fixed, (0.0, 0.0))

    def deltas(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Theta``; shares memory with delta."""
        for name in names:
            yield name, torch.from_numpy(self.delta[name]).view(self.anchor.specs[name][0])


def groups(specs: Mapping[str, Spec], names: Iterable[str]) -> Iterator[list[str]]:
    """The names in order, in lists whose tensors have GROUP elements together, or one tensor."""
    group: list[str] = []
    total = 0
    for name in names:
        count = torch.Size(specs[name][0]).numel()
        if group and total + count > GROUP:
            yield group
            group, total = [], 0
        group.append(name)
        total += count
    if group:
        yield group


def stored(tensor: torch.Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """A flat view as the kernels take it: float32, or the bits of bfloat16."""
    flat = tensor.reshape(-1)
    bits = flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat
    array: NDArray[np.float32] | NDArray[np.uint16] = bits.numpy()
    return array


class DeviceParameters(Theta):
    """An anchor and a float32 delta on a device; arguments as in ``Parameters``."""

    def __init__(
        self,
        anchor: Anchor,
        device: torch.device | str,
        delta: Mapping[str, Floats] | None = None,
        importance: Path | None = None,
    ):
        self.anchor, self.importance = anchor, importance
        self.device = _there_is(torch.device(device))
        self.delta = {
            name: torch.zeros(torch.Size(shape).numel(), device=self.device)
            if delta is None
            else self._there(torch.from_numpy(delta[name]))
            for name, (shape, _) in anchor.specs.items()
        }

    @classmethod
    def load(
        cls,
        anchor: Anchor,
        device: torch.device | str,
        path: Path,
        importance: Path | None = None,
    ) -> "DeviceParameters":
        """Read a snapshot, written on whatever device; UserError when it is damaged."""
        return cls(anchor, device, read_floats(anchor, path), importance)

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        """A flat copy on the device."""
        return tensor.reshape(-1).to(self.device, copy=True)

    def rendered(
        self,
        address: Address | None = None,
        scale: float = 0.0,
        noise: NoiseKind = "normal",
        *,
        order: Iterable[str] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Theta``; tensors are on the device."""
        from agent.learner.kernels_triton import render_into

        for name in order or self.anchor.names:
            base = self._there(self.anchor.tensor(name))
            out = torch.empty_like(base)
            at, scaled = self.noise_of(name, address, scale)
            render_into(out, base, self.delta[name], at, name, 0, scaled, noise)
            yield name, out.view(self.anchor.specs[name][0])

    def moved(self, step: Step) -> Moves:
        """See ``Theta``; the squares are summed on the device."""
        return {name: self._move(name, step) for name in self.anchor.names}

    def _move(self, name: str, step: Step) -> tuple[float, float]:
        """One tensor's step."""
        from agent.learner.kernels_triton import update_inplace

        if name in self.anchor.fixed:
            return 0.0, 0.0
        delta, before = self.delta[name], self.delta[name].clone()
        importance = self.weights(step.penalty).get(name)
        weights = None if importance is None else self._there(torch.from_numpy(importance))
        update_inplace(delta, name, 0, step, weights)
        before.sub_(delta)
        return _square(delta), _square(before)

    def deltas(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Theta``; on the device."""
        for name in names:
            yield name, self.delta[name].view(self.anchor.specs[name][0])


def _there_is(device: torch.device) -> torch.device:
    """The device, or one line that this machine has none such."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"master_device: {str(device)!r}, allowed here: cpu (no GPU is there)")
    return device


def _square(values: torch.Tensor) -> float:
    """sum values^2 in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
