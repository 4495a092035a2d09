"""Where each Hugging Face tensor lies in a vLLM model on the CPU: the short way for members.

``reload_weights`` finds it out again for every tensor of every member, which takes longer than
rendering a small model. Here it is found out once, from the model's own ``packed_modules_mapping``
(q, k, v and gate, up are rows of one matrix), and used only where it accounts for every parameter
of the model to the row: a dense model, unquantised, whole in one worker. Everything else, and every
directory that is to be served, takes the long way; both ways end in the same bits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from agent.store.tensorfile import Spec

LINEAR = "UnquantizedLinearMethod"
PLAIN = {LINEAR, "UnquantizedEmbeddingMethod", "NoneType"}


@dataclass(frozen=True, slots=True)
class ModuleSlice:
    """Rows [start, stop) of a parameter of a module."""

    module: str
    parameter: str
    start: int
    stop: int

    @property
    def whole(self) -> str:
        """The parameter's full name in the model."""
        return f"{self.module}.{self.parameter}"


def places(specs: Mapping[str, Spec], packed: Mapping[str, list[str]]) -> dict[str, ModuleSlice]:
    """Tensor name -> its rows; parts of one parameter follow each other in the packed order."""
    fused = {part: whole for whole, parts in packed.items() for part in parts}
    turn = {part: index for parts in packed.values() for index, part in enumerate(parts)}
    ends: dict[str, int] = {}
    found = {}
    for name in sorted(specs, key=lambda name: turn.get(_split(name)[1], 0)):
        parent, part, parameter = _split(name)
        module = parent + fused.get(part, part)
        start = ends.get(f"{module}.{parameter}", 0)
        found[name] = ModuleSlice(module, parameter, start, start + specs[name][0][0])
        ends[found[name].whole] = found[name].stop
    return found


def _split(name: str) -> tuple[str, str, str]:
    """``model.layers.0.mlp.up_proj.weight`` -> ``model.layers.0.mlp.``, ``up_proj``, ``weight``."""
    path, _, parameter = name.rpartition(".")
    parent, dot, part = path.rpartition(".")
    return parent + dot, part, parameter


class Layout:
    """The places of one model. ``put`` fills all of them."""

    def __init__(
        self, model: torch.nn.Module, found: Mapping[str, ModuleSlice], dtype: torch.dtype
    ):
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._places, self._dtype = found, dtype

    @classmethod
    def of(cls, model: Any, specs: Mapping[str, Spec], dtype: torch.dtype) -> "Layout | None":
        """The layout of a model that computes in dtype; None where it is not sure of one."""
        packed = getattr(model, "packed_modules_mapping", None)
        if not isinstance(model, torch.nn.Module) or not isinstance(packed, dict):
            return None
        layout = cls(model, places(specs, packed), dtype)
        held = {place.whole: place for place in layout._places.values()}
        shapes = {
            place.whole: (place.stop, *specs[name][0][1:])
            for name, place in sorted(layout._places.items(), key=lambda item: item[1].stop)
        }
        parameters = dict(model.named_parameters())
        if parameters.keys() != held.keys():
            return None
        sure = all(layout._fits(held[n], parameters[n], shapes[n]) for n in held)
        return layout if sure else None

    def _fits(self, place: ModuleSlice, parameter: torch.Tensor, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape is all of a parameter, on the CPU and not split."""
        module = self._modules[place.module]
        if self._method(place) not in PLAIN or getattr(module, "tp_size", 1) != 1:
            return False
        if parameter.device.type != "cpu":
            return False
        if self._is_linear(place):
            wanted = (module.output_size_per_partition, module.input_size_per_partition)
            return shape == wanted[: len(shape)]
        if hasattr(module, "org_vocab_size"):  # rows beyond the vocabulary are padding
            return shape == (module.org_vocab_size, *parameter.shape[1:])
        return shape == tuple(parameter.shape)

    def _method(self, place: ModuleSlice) -> str:
        """How vLLM computes with the module of a place."""
        return type(getattr(self._modules[place.module], "quant_method", None)).__name__

    def _is_linear(self, place: ModuleSlice) -> bool:
        """Whether a place belongs to a Linear layer, whose weight is kept packed."""
        return self._method(place) == LINEAR

    @torch.no_grad()
    def put(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy all tensors to their places and pack each Linear layer once it is whole.

        Needs the memory of a layer or two beyond the model's. A tied head is the caller's to pack.
        """
        waiting: dict[str, torch.Tensor] = {}
        rows: dict[str, int] = {}
        for name, tensor in tensors:
            place = self._places[name]
            module = self._modules[place.module]
            if not self._is_linear(place) or place.parameter != "weight":
                self._copy(getattr(module, place.parameter), place, tensor)
                continue
            if place.module not in waiting:
                shape = (module.output_size_per_partition, module.input_size_per_partition)
                waiting[place.module] = torch.empty(shape, dtype=self._dtype)
            self._copy(waiting[place.module], place, tensor)
            rows[place.module] = rows.get(place.module, 0) + len(tensor)
            if rows[place.module] == module.output_size_per_partition:
                module.weight = torch.nn.Parameter(waiting.pop(place.module), requires_grad=False)
                module.quant_method.process_weights_after_loading(module)

    def _copy(self, into: torch.Tensor, place: ModuleSlice, tensor: torch.Tensor) -> None:
        """Fill the rows, rounded once, to the dtype the model computes in."""
        into[place.start : place.stop].copy_(tensor.to(self._dtype))
