"""theta on the host: the compiled CPU kernels over the mapped anchor.

Memory: the mapped anchor (2 bytes a parameter for bfloat16, pages the system may drop) + 4 bytes a
parameter for delta + the tensors rendered ahead (GROUP elements, or one tensor that is larger) for
as long as a reader holds them; float16 passes through float32, GROUP elements at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from agent.learner.es import Step
from agent.learner.kernels_cpu import Render, Update, render_many, update_many
from agent.learner.noise import Address, NoiseKind
from agent.store.anchor import Anchor
from agent.store.importance import Floats, read_floats
from agent.store.tensorfile import Spec
from agent.store.theta import Moves, Theta

GROUP = 1 << 24


class Parameters(Theta):
    """An anchor and a float32 delta in host memory.

    ``delta`` is flat, by tensor name; ``importance`` is where the weights that a penalty may name
    are kept (``agent.store.importance``).
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
        for names in groups(self.anchor.specs, order or self.anchor.names):
            tensors = {name: torch.empty_like(self.anchor.tensor(name)) for name in names}
            parts = []
            for name, tensor in tensors.items():
                if tensor.dtype == torch.float16:
                    self._render_float16(name, tensor, address, scale, noise)
                else:
                    base = stored(self.anchor.tensor(name))
                    parts.append(Render(name, stored(tensor), base, self.delta[name]))
            render_many(parts, address, scale, noise)
            yield from tensors.items()

    def _render_float16(
        self, name: str, out: torch.Tensor, address: Address | None, scale: float, noise: NoiseKind
    ) -> None:
        """Through float32, rounded once at the end."""
        flat, base = out.view(-1), self.anchor.tensor(name).reshape(-1)
        for start in range(0, flat.numel(), GROUP):
            wide = base[start : start + GROUP].float()
            delta = self.delta[name][start : start + GROUP]
            part = Render(name, stored(wide), stored(wide), delta, start)
            render_many([part], address, scale, noise)
            flat[start : start + GROUP].copy_(wide)

    def moved(self, step: Step) -> Moves:
        """See ``Theta``; all tensors in one pass."""
        names, weights = self.anchor.names, self.weights(step.penalty)
        parts = [Update(name, self.delta[name], weights.get(name)) for name in names]
        return dict(zip(names, update_many(parts, step), strict=True))

    def deltas(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Theta``; shares memory with delta."""
        for name in names:
            yield name, torch.from_numpy(self.delta[name]).view(self.anchor.specs[name][0])


def groups(specs: Mapping[str, Spec], names: Iterable[str]) -> Iterator[list[str]]:
    """The names in order, in lists whose tensors have GROUP elements together, or one tensor."""
    held: list[str] = []
    total = 0
    for name in names:
        count = torch.Size(specs[name][0]).numel()
        if held and total + count > GROUP:
            yield held
            held, total = [], 0
        held.append(name)
        total += count
    if held:
        yield held


def stored(tensor: torch.Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """A flat view as the kernels take it: float32, or the bits of bfloat16."""
    flat = tensor.reshape(-1)
    bits = flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat
    array: NDArray[np.float32] | NDArray[np.uint16] = bits.numpy()
    return array
