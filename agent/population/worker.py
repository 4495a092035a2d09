"""What runs inside every vLLM worker: render a member into the engine, move delta, load weights.

vLLM mixes this class into its worker (``worker_extension_cls``); methods are called by name with
JSON-able arguments, in process or over HTTP. Nothing of vLLM is patched or imported.

Why ``reload_weights`` with full Hugging Face names, and not in-place arithmetic: on the CPU vLLM
packs Linear weights at load and keeps empty tensors in their place; the reload fuses, shards (for
tensor parallel workers each takes its part of the same full tensor) and packs again. ``Layout``
does the same in less time for the members of a small dense model.

``Layout`` knows where each Hugging Face tensor lies in a vLLM model.
``reload_weights`` finds it out again for every tensor of every member, which takes longer than
rendering a small model. ``Layout`` finds it out once, from the model's own
``packed_modules_mapping`` (q, k, v and gate, up are rows of one matrix), and used only where it
accounts for every parameter of the model to the row: a dense model, unquantised, whole in one
worker. A member is rendered to the rows themselves, or to the matrix that is packed next, and no
tensor is copied; on a GPU, where nothing is packed, the storage that CUDA graphs read stays.
Everything else, and every directory that is to be served, takes the long way; both ways end in the
same bits.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.errors import UserError
from agent.learner.es import Step
from agent.learner.noise import Address, NoiseKind
from agent.store.weights import Anchor, Parameters, Theta, identity

if TYPE_CHECKING:
    import torch

    from agent.store.tensorfile import Spec

from dataclasses import dataclass

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
        self,
        model: torch.nn.Module,
        found: Mapping[str, ModuleSlice],
        dtype: torch.dtype,
        packs: bool,
    ):
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._places, self._dtype, self._packs = found, dtype, packs
        self._waiting: dict[str, torch.Tensor] = {}  # matrices to be packed once they are whole

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
        layout = cls(model, places(specs, packed), dtype, packs)
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
        """Whether a tensor of this shape is all of a parameter, which is not split."""
        module = self._modules[place.module]
        if self._method(place) not in PLAIN or getattr(module, "tp_size", 1) != 1:
            return False
        if self._packs and self._is_linear(place):
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

    def slot(self, name: str) -> torch.Tensor:
        """The memory of a tensor, flat, to be written in the model's dtype: its rows of the model,
        or of the matrix that is packed once it is whole."""
        return self._rows(self._places[name]).view(-1)

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


class WeightsExtension:
    """theta = anchor + delta beside the engine's own weights; see the module."""

    model_runner: Any
    _anchorage: Theta | None = None
    _anchorage_layout: Layout | None = None
    _anchorage_served: str = "start"

    def anchorage_check(self) -> None:
        """Refuse an engine that answers with weights that no file holds; asked after its start."""
        anchor = Anchor.open(Path(self.model_runner.model_config.model))
        if anchor.tied:
            refuse_head_of_its_own(self.model_runner.get_model())

    def anchorage_open(
        self,
        anchor_dir: str,
        master_device: str = "cpu",
        importance: str | None = None,
        way: str = "short",
    ) -> dict[str, Any]:
        """Hold this anchor with delta = 0, on the host or on the accelerator (``cuda``).

        ``importance`` is the folder of the weights that penalties may name. The engine keeps its
        weights until the next render, here as after every change of theta.
        """
        anchor = Anchor.open(Path(anchor_dir))
        refuse_other_tensors(anchor, self._anchorage_own())
        self._anchorage = None  # freed before the next one: an accelerator may not hold two
        self._anchorage = held(anchor, master_device, Path(importance) if importance else None)
        runner = self.model_runner
        dtype = runner.model_config.dtype
        sure = Layout.of(runner.get_model(), anchor.specs, dtype) if way == "short" else None
        self._anchorage_layout = sure
        return {"digest": anchor.digest, "parameters": anchor.parameters}

    def anchorage_restore(self, snapshot: str | None, steps: list[dict[str, Any]]) -> str:
        """Delta = the snapshot (None: zero) and then every step; returns the hash of delta."""
        theta, moves = self._anchorage_theta(), [Step.from_json(row) for row in steps]
        for step in moves:  # all that may be refused comes before delta is touched
            theta.require_weights(step.penalty)
        theta.reset(Path(snapshot) if snapshot else None)
        for step in moves:
            theta.moved(step)
        return theta.delta_hash()

    def anchorage_apply(self, step: dict[str, Any]) -> dict[str, Any]:
        """Move delta by one step; what the drift meter needs comes back."""
        return asdict(self._anchorage_theta().apply(Step.from_json(step)))

    def anchorage_save(self, path: str) -> str:
        """Keep delta as a snapshot; returns its hash."""
        theta = self._anchorage_theta()
        theta.save(Path(path))
        return theta.delta_hash()

    def anchorage_render(
        self,
        run_seed: int,
        generation: int,
        pair: int,
        scale: float,
        noise: NoiseKind = "normal",
        repack_head: bool = True,
    ) -> None:
        """Put cast(anchor + delta + scale * eps) into the engine; scale 0 is theta itself."""
        theta = self._anchorage_theta()
        address = Address(run_seed, generation, pair) if scale else None
        layout = self._anchorage_layout
        into = layout.slot if layout is not None and self._anchorage_same_dtype() else None
        self._anchorage_put(theta.rendered(address, scale, noise, into=into), repack_head)
        self._anchorage_served = f"member {generation}/{pair}/{scale:+g}" if scale else "theta"

    def anchorage_load(self, directory: str, repack_head: bool = True) -> dict[str, str]:
        """Put a weights directory into the engine: names, shapes and dtypes are checked first.

        A reload cannot be undone in place (a missing tensor would only be a line in vLLM's log),
        so whatever is wrong with the directory is raised before the first tensor is touched.
        """
        before, weights = identity(Path(directory)), Anchor.open(Path(directory))
        refuse_other_tensors(weights, self._anchorage_own())
        with ThreadPoolExecutor(1) as beside:  # hashing is as long as loading, and needs no GIL
            hashed = beside.submit(lambda: weights.digest)
            self._anchorage_put(weights.tensors(), repack_head, short_way=False)
            digest = hashed.result()
        if identity(Path(directory)) != before:  # hashed and loaded may be two contents
            raise UserError(f"{directory}: was changed while it was loaded")
        self._anchorage_served = digest
        return {"digest": digest}

    def anchorage_state(self) -> dict[str, str | None]:
        """What the engine answers with (``start``, ``theta``, a member or a digest) and theta."""
        theta = self._anchorage
        return {
            "served": self._anchorage_served,
            "way": "short" if self._anchorage_layout else "long",
            "anchor": theta.anchor.digest if theta else None,
            "delta_hash": theta.delta_hash() if theta else None,
        }

    def _anchorage_theta(self) -> Theta:
        """The open parameters, or one line that none are."""
        if self._anchorage is None:
            raise UserError("anchor: none is open in this engine, call anchorage_open first")
        return self._anchorage

    def _anchorage_same_dtype(self) -> bool:
        """Whether the engine computes in the dtype in which all of the anchor is published."""
        dtypes = {dtype for _, dtype in self._anchorage_theta().anchor.specs.values()}
        return dtypes == {self.model_runner.model_config.dtype}

    def _anchorage_own(self) -> "Mapping[str, Spec]":
        """Names, shapes and dtypes the engine was started with: all it may ever be given."""
        if self._anchorage is not None:
            return self._anchorage.anchor.specs
        return Anchor.open(Path(self.model_runner.model_config.model)).specs

    def _anchorage_put(
        self,
        weights: "Iterable[tuple[str, torch.Tensor]]",
        repack_head: bool,
        short_way: bool = True,
    ) -> None:
        """Put all tensors into the engine, and pack again what a reload leaves packed as it was."""
        self._anchorage_served = "half loaded"
        model = self.model_runner.get_model()
        if short_way and self._anchorage_layout is not None:
            self._anchorage_layout.put(weights)
        else:
            forget_packed_experts(model)
            self.model_runner.reload_weights(weights_iterator=weights)
        for head in heads(model) if repack_head else ():
            head.quant_method.process_weights_after_loading(head)


def heads(model: "torch.nn.Module") -> "list[Any]":
    """The modules that compute logits: they keep a packed copy, which no reload renews.

    A head that is tied to the embedding shares its tensor but not its packed copy. Where there is
    no head of its own (Gemma 2, Cohere, OPT) the embedding itself is it.
    """
    kept = [m for m in model.modules() if _method(m) == "UnquantizedEmbeddingMethod"]
    return [m for m in kept if "ParallelLMHead" in (c.__name__ for c in type(m).__mro__)] or kept


def refuse_head_of_its_own(model: "torch.nn.Module") -> None:
    """UserError for a head beside the embedding where the anchor's head is the embedding.

    vLLM 0.32 does not tie the two in OLMoE and GPT-OSS: nothing is loaded into such a head, and it
    answers from whatever its memory held; with NaN in it an engine may never end an answer.
    """
    kept: list[Any] = [m for m in model.modules() if _method(m) == "UnquantizedEmbeddingMethod"]
    own = {id(m) for m in heads(model)}
    embeddings = {m.weight.data_ptr() for m in kept if id(m) not in own}
    if embeddings and any(m.weight.data_ptr() not in embeddings for m in kept if id(m) in own):
        raise UserError(
            f"{type(model).__name__}: tie_word_embeddings is true, and this version of vLLM gives "
            "the model a head that is not the embedding; allowed: a model saved with its own head"
        )


def forget_packed_experts(model: "torch.nn.Module") -> None:
    """Have vLLM's next reload pack the experts of a model on the CPU again.

    vLLM 0.32 packs them only while a layer has no kernel yet
    (unquantized_fused_moe_method.py), so that a reload would leave plain weights where the kernel
    reads packed ones. Accelerators copy into the storage that the kernel reads, and keep it.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is None:
            continue
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            method.moe_kernel = None


def _method(module: "torch.nn.Module") -> str:
    """The name of the class that computes with a module of vLLM."""
    return type(getattr(module, "quant_method", None)).__name__


def held(anchor: Anchor, device: str, importance: Path | None = None) -> Theta:
    """The anchor and delta = 0 on a device; the bits are the same on all."""
    if device == "cpu":
        return Parameters.zeros(anchor, importance)
    from agent.store.device import DeviceParameters

    return DeviceParameters(anchor, device, importance=importance)


def refuse_other_tensors(weights: Anchor, own: "Mapping[str, Spec]") -> None:
    """Raise one UserError that lists every name, shape and dtype that is not the engine's."""
    missing = [f"{name} is missing" for name in sorted(own.keys() - weights.specs.keys())]
    extra = [f"{name} is unknown" for name in sorted(weights.specs.keys() - own.keys())]
    wrong = [
        f"{name} is {list(spec[0])} {spec[1]}, allowed: {list(own[name][0])} {own[name][1]}"
        for name, spec in sorted(weights.specs.items())
        if name in own and own[name] != spec
    ]
    if problems := missing + extra + wrong:
        raise UserError(f"{weights.directory}: {'; '.join(problems)}")
