"""theta = anchor + delta: rendered for a member, moved by a step, hashed, kept as a snapshot.

    rendered(address, s) = cast(theta_0 + (delta + s * eps(address)))      in the anchor's dtype
    apply(step)          : delta <- penalty(delta + sum_p c_p eps_p)        float32, in place

theta_0 the anchor's tensor, delta float32 in the same shape, eps the addressed noise, s = sign *
sigma. ``Parameters`` holds delta on the host, ``DeviceParameters`` where an engine is; the bits
are the same.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from agent.home import flush_folder
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
from agent.learner.penalty import Penalty
from agent.store.anchor import Anchor
from agent.store.importance import Floats, read_importance
from agent.store.tensorfile import (
    Spec,
    beside,
    combined,
    file_order,
    hashed,
    write_tensors,
)

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
        """Keep delta as a safetensors file: temporary, flushed, then renamed."""
        metadata = {"anchor": self.anchor.digest}
        with beside(path) as folder:
            tensors = self.deltas(file_order(self.specs()))
            write_tensors(folder / path.name, self.specs(), tensors, metadata)
            (folder / path.name).replace(path)
        flush_folder(path.parent)
