"""theta on an accelerator: anchor and delta stay there, and nothing of their size leaves or enters.

Memory of the device: 4 bytes a parameter for delta, the anchor in its published dtype, and 4 bytes
a parameter for the importance weights of a penalty that names some. Where the anchor does not fit
beside delta it stays on the host, mapped, and one tensor at a time crosses for every member.
Only what ``Bus`` copies crosses in sizes that grow with the model; the kernels' arguments are a few
hundred bytes a launch.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from agent.errors import UserError
from agent.learner.es import Step
from agent.learner.noise import Address, NoiseKind
from agent.learner.penalty import Penalty
from agent.store.anchor import Anchor, Floats, read_floats
from agent.store.theta import Moves, Slot, Theta
from agent.store.windows import Windows


class Bus:
    """Copies between the host and a device, and how many bytes went each way."""

    def __init__(self, device: torch.device | str):
        self.device = _there_is(torch.device(device))
        self.to_device = self.to_host = 0  # bytes so far

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A flat copy on the device."""
        self.to_device += tensor.nbytes
        return tensor.reshape(-1).to(self.device, copy=True)

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host."""
        self.to_host += tensor.nbytes
        return tensor.cpu()

    def room(self) -> float:
        """Free bytes of the device; what is on the host counts as endless."""
        if self.device.type != "cuda":
            return float("inf")
        return float(torch.cuda.mem_get_info(self.device)[0])


class DeviceParameters(Theta):
    """An anchor and a float32 delta on a device; arguments as in ``Parameters``."""

    tree = True

    def __init__(
        self,
        anchor: Anchor,
        device: torch.device | str | Bus,
        delta: Mapping[str, Floats] | None = None,
        importance: Path | None = None,
        windows: Windows = MappingProxyType({}),
    ):
        self.anchor, self.importance, self.windows = anchor, importance, windows
        self.bus = device if isinstance(device, Bus) else Bus(device)
        self.delta = {
            name: torch.zeros(math.prod(self.shape(name)), device=self.bus.device)
            if delta is None
            else self.bus.put(torch.from_numpy(delta[name]))
            for name in anchor.specs
        }
        self._on_device: tuple[str, dict[str, torch.Tensor]] = ("", {})  # importance, by its sha256
        held = {name: self.base(name) for name in anchor.names}
        self._base = {}
        if sum(tensor.nbytes for tensor in held.values()) < self.bus.room():
            self._base = {name: self.bus.put(tensor) for name, tensor in held.items()}

    @classmethod
    def load(
        cls,
        anchor: Anchor,
        device: torch.device | str | Bus,
        path: Path,
        importance: Path | None = None,
    ) -> "DeviceParameters":
        """Read a snapshot, written on whatever device; UserError when it is damaged."""
        return cls(anchor, device, read_floats(anchor, path), importance)

    def rendered(
        self,
        address: Address | None = None,
        scale: float = 0.0,
        noise: NoiseKind = "normal",
        *,
        order: Iterable[str] | None = None,
        into: Slot | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Theta``; tensors are on the device."""
        from agent.learner.kernels_triton import render_into, words_of

        names = list(order or self.anchor.names)
        noisy = [address] if address is not None and scale else []
        # Two copies a member: one for each tensor would wait for the kernel before it.
        words = words_of(noisy, names, self.bus.device)
        factor = torch.tensor([scale], dtype=torch.float32, device=self.bus.device)
        for place, name in enumerate(names):
            base = self._base.get(name)
            if base is None:
                base = self.bus.put(self.base(name))
            slot = into(name) if into else None
            out = torch.empty_like(base) if slot is None else slot
            at, scaled = self.noise_of(name, address, scale)
            flat = out, base, self.delta[name]
            runs = self.runs(name)
            render_into(*flat, at, name, runs, scaled, noise, words[place], factor)
            yield name, out.view(self.shape(name))

    def moved(self, step: Step) -> Moves:
        """See ``Theta``; squares are summed in the kernel, two numbers a tensor come back."""
        from agent.learner.kernels_triton import numbers_of, update_inplace, words_of

        names = [name for name in self.anchor.names if name not in self.anchor.fixed]
        words = words_of(step.addresses(), names, self.bus.device)
        numbers = numbers_of(step, self.bus.device)
        weights = self._weights_there(step.penalty)
        sums = []
        for place, name in enumerate(names):
            part = self.delta[name], name, self.runs(name), step, weights.get(name)
            sums.append(update_inplace(*part, words[place], numbers))
        pairs = self.bus.get(torch.stack(sums)).tolist() if sums else []
        moves = {name: (pair[0], pair[1]) for name, pair in zip(names, pairs, strict=True)}
        return moves | dict.fromkeys(self.anchor.fixed, (0.0, 0.0))

    def _weights_there(self, penalty: Penalty) -> Mapping[str, torch.Tensor]:
        """The importance weights a penalty names, on the device; they cross once."""
        digest = penalty.importance
        if digest is not None and self._on_device[0] != digest:
            self._on_device = "", {}  # the old ones first: two sets may not fit
            weights = self.weights(penalty)
            there = {name: self.bus.put(torch.from_numpy(w)) for name, w in weights.items()}
            self._on_device = digest, there
            self._weights = "", {}  # the host's copy is not needed again
        return {} if digest is None else self._on_device[1]

    def require_weights(self, penalty: Penalty) -> None:
        """See ``Theta``."""
        self._weights_there(penalty)

    def reset(self, snapshot: Path | None) -> None:
        """See ``Theta``; no second delta is on the device at any time."""
        if snapshot is None:
            for values in self.delta.values():
                values.zero_()
            return
        for name, read in read_floats(self.anchor, snapshot, self.windows).items():
            self.delta[name].copy_(self.bus.put(torch.from_numpy(read)))

    def leaves(self) -> dict[str, NDArray[np.uint32]]:
        """See ``Theta``; a 32,768th of delta comes back, in one copy that waits for all kernels."""
        from agent.learner.kernels_triton import tree_leaves

        names = self.anchor.names
        sums = [
            tree_leaves(self.delta[name], self.runs(name), math.prod(self.anchor.specs[name][0]))
            for name in names
        ]
        all_of_them: NDArray[np.uint32] = self.bus.get(torch.cat(sums)).numpy().view(np.uint32)
        ends = np.cumsum([len(each) for each in sums])[:-1]
        return dict(zip(names, np.split(all_of_them, ends), strict=True))

    def deltas(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Theta``; on the host, for a snapshot or a sha256."""
        for name in names:
            yield name, self.bus.get(self.delta[name]).view(self.shape(name))


def _there_is(device: torch.device) -> torch.device:
    """The device, or one line that this machine has none such."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"master_device: {str(device)!r}, allowed here: cpu (no GPU is there)")
    return device
