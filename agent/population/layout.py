"""Where each Hugging Face tensor lies in a vLLM model, whole or split over tensor-parallel workers.

``reload_weights`` finds it out again for every tensor of every member, which takes longer than
rendering a small model. ``Layout`` finds it out once, from the model's own
``packed_modules_mapping`` (q, k, v and gate, up are rows of one matrix), and is used only where it
accounts for every parameter of the model to the row: a dense model, unquantised. Of a model that
is split over tensor-parallel workers it knows which rows or columns of each tensor are here: the
worker then holds these windows of delta and no more. A member is rendered to the rows themselves,
or to the matrix that is packed next, and no tensor is copied; on a GPU, where nothing is packed,
the storage that CUDA graphs read stays. Everything else, and every directory that is to be served,
takes the long way; both ways end in the same bits.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from agent.store.tensorfile import Spec
from agent.store.windows import Window, Windows

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


def window_of(module: Any, part: int, parameter: str, shape: tuple[int, ...]) -> Window | None:
    """What a module of one tensor-parallel rank holds of a tensor of this shape; None: all of it.

    As vLLM 0.32 cuts them: the vocabulary with its padding at the end, columns where the input of
    a layer is split, else rows. Where ranks outnumber the key and value heads neighbouring ranks
    hold the same one.

    Args:
        part: The tensor's place in a fused module: of q, k, v only q has all heads.
    """
    ranks, rank = int(getattr(module, "tp_size", 1)), int(getattr(module, "tp_rank", 0))
    if ranks == 1:
        return None
    if hasattr(module, "shard_indices"):
        rows = module.shard_indices
        return Window(0, int(rows.org_vocab_start_index), int(rows.org_vocab_end_index))
    if getattr(module, "input_size", 0) != getattr(module, "input_size_per_partition", 0):
        each = int(module.input_size_per_partition)  # a bias is added to the sum of all ranks
        return Window(1, rank * each, (rank + 1) * each) if parameter == "weight" else None
    if part:
        same = int(getattr(module, "num_kv_head_replicas", 1))
        ranks, rank = ranks // same, rank // same
    each = shape[0] // ranks
    return Window(0, rank * each, (rank + 1) * each)


class Layout:
    """The places of one model. ``put`` fills all of them.

    ``windows``: what this worker holds of tensors that are split over several.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        specs: Mapping[str, Spec],
        packed: Mapping[str, list[str]],
        dtype: torch.dtype,
        packs: bool,
    ):
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._dtype, self._packs = dtype, packs
        self._waiting: dict[str, torch.Tensor] = {}  # matrices to be packed once they are whole
        turn = {part: index for parts in packed.values() for index, part in enumerate(parts)}
        self.windows: Windows = {
            name: window
            for name, place in places(specs, packed).items()
            if (module := self._modules.get(place.module)) is not None
            and (at := turn.get(_split(name)[1], 0)) >= 0
            and (window := window_of(module, at, place.parameter, specs[name][0]))
        }
        self.specs = dict(specs)  # of what this worker holds
        for name, window in self.windows.items():
            self.specs[name] = window.shape(specs[name][0]), specs[name][1]
        self._places = places(self.specs, packed)

    @classmethod
    def of(
        cls, model: Any, specs: Mapping[str, Spec], dtype: torch.dtype, packs: bool | None = None
    ) -> "Layout | None":
        """The layout of a model that computes in dtype; None where it is not sure of one.

        ``packs``: whether Linear weights are kept packed; None: on the CPU, as vLLM does.
        """
        packed = getattr(model, "packed_modules_mapping", None)
        if not isinstance(model, torch.nn.Module) or not isinstance(packed, dict):
            return None
        devices = {parameter.device.type for parameter in model.parameters()}
        if devices not in ({"cpu"}, {"cuda"}):
            return None
        packs = devices == {"cpu"} if packs is None else packs
        layout = cls(model, specs, packed, dtype, packs)
        held = {place.whole: place for place in layout._places.values()}
        shapes = {
            place.whole: (place.stop, *layout.specs[name][0][1:])
            for name, place in sorted(layout._places.items(), key=lambda item: item[1].stop)
        }
        parts = Counter(place.whole for place in layout._places.values())
        parameters = dict(model.named_parameters())
        if parameters.keys() != held.keys():
            return None
        sure = all(layout._fits(held[n], parameters[n], shapes[n], parts[n]) for n in held)
        return layout if sure else None

    def _fits(
        self, place: ModuleSlice, parameter: torch.Tensor, shape: tuple[int, ...], parts: int
    ) -> bool:
        """Whether tensors that have this shape together are all of a worker's parameter."""
        module = self._modules[place.module]
        if self._method(place) not in PLAIN:
            return False
        if getattr(module, "tp_size", 1) > 1 and parts != len(getattr(module, "output_sizes", [0])):
            return False  # one tensor with several parts in it: its rows are not cut at one place
        if self._packs and self._is_linear(place):
            wanted = (module.output_size_per_partition, module.input_size_per_partition)
            return shape == wanted[: len(shape)]
        if hasattr(module, "org_vocab_size"):  # rows beyond the vocabulary are padding
            rows = module.org_vocab_size
            if getattr(module, "tp_size", 1) > 1:
                rows = module.shard_indices.org_vocab_end_index
                rows -= module.shard_indices.org_vocab_start_index
            return shape == (rows, *parameter.shape[1:])
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

        Packing needs the memory of a layer or two beyond the model's. A tied head is the caller's
        to pack. A tensor that already is the rows of ``slot`` is not copied.
        """
        self._waiting.clear()  # of a call that failed
        filled: Counter[str] = Counter()
        for name, tensor in tensors:
            place = self._places[name]
            module, rows = self._modules[place.module], self._rows(place)
            if rows.data_ptr() != tensor.data_ptr():
                rows.copy_(tensor.to(self._dtype))  # rounded once, to what the model computes in
            if not self._is_packed(place):
                continue
            filled[place.module] += len(tensor)
            if filled[place.module] == module.output_size_per_partition:
                whole = self._waiting.pop(place.module)
                module.weight = torch.nn.Parameter(whole, requires_grad=False)
                module.quant_method.process_weights_after_loading(module)

    def slot(self, name: str) -> torch.Tensor | None:
        """The memory of a tensor, flat, to be written in the model's dtype: its rows of the model,
        or of the matrix that is packed once it is whole.

        None where the model keeps another dtype, as vLLM's CPU build does of a bfloat16 model's
        biases: those are copied.
        """
        rows = self._rows(self._places[name])
        return rows.view(-1) if rows.dtype == self._dtype else None

    def _is_packed(self, place: ModuleSlice) -> bool:
        return self._packs and self._is_linear(place) and place.parameter == "weight"

    def _rows(self, place: ModuleSlice) -> torch.Tensor:
        """The rows of a place; those that are to be packed in memory that ``put`` hands on."""
        module = self._modules[place.module]
        if not self._is_packed(place):
            whole: torch.Tensor = getattr(module, place.parameter).data
        elif place.module in self._waiting:
            whole = self._waiting[place.module]
        else:
            shape = (module.output_size_per_partition, module.input_size_per_partition)
            whole = self._waiting[place.module] = torch.empty(shape, dtype=self._dtype)
        return whole[place.start : place.stop]
