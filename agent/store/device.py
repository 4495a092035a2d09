"""theta where an engine is: the Triton kernels over a delta in the accelerator's memory.

Asked for by naming a device (``master_device``); without it delta stays on the host and the
accelerator holds nothing beyond the engine's own. Memory on the device: 4 bytes a parameter for
delta, and one tensor of the anchor at a time while it is rendered or moved.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from agent.errors import UserError
from agent.learner.es import Step
from agent.learner.kernels_triton import render_into, update_inplace
from agent.learner.noise import Address, NoiseKind
from agent.store.anchor import Anchor
from agent.store.importance import Floats, read_floats
from agent.store.theta import Moves, Theta


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
