"""What runs inside every vLLM worker: render a member into the engine, move delta, load weights.

vLLM mixes this class into its worker (``worker_extension_cls``); methods are called by name with
JSON-able arguments, in process or over HTTP. Nothing of vLLM is patched or imported.

Why ``reload_weights`` with full Hugging Face names, and not in-place arithmetic: on the CPU vLLM
packs Linear weights at load and keeps empty tensors in their place; the reload fuses, shards (of
tensor-parallel workers each takes its part of the same full tensor) and packs again. ``Layout``
(``layout``) does the same in less time for the members of a dense model.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from agent.errors import UserError
from agent.learner.es import Step
from agent.learner.noise import Address, NoiseKind
from agent.population.layout import Layout
from agent.store.tensorfile import Spec
from agent.store.weights import Anchor, Parameters, Theta, identity
from agent.store.windows import Windows, to_json


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
        runner = self.model_runner
        dtype = runner.model_config.dtype
        sure = Layout.of(runner.get_model(), anchor.specs, dtype) if way == "short" else None
        windows = {} if sure is None else sure.windows
        kept = Path(importance) if importance else None
        self._anchorage, self._anchorage_layout = held(anchor, master_device, kept, windows), sure
        return {"digest": anchor.digest, "sure": sure is not None, "windows": to_json(windows)}

    def anchorage_restore(self, snapshot: str | None, steps: list[dict[str, Any]]) -> None:
        """Delta = the snapshot (None: zero) and then every step."""
        theta, moves = self._anchorage_theta(), [Step.from_json(row) for row in steps]
        for step in moves:  # all that may be refused comes before delta is touched
            theta.require_weights(step.penalty)
        theta.reset(Path(snapshot) if snapshot else None)
        for step in moves:
            theta.moved(step)

    def anchorage_apply(self, step: dict[str, Any]) -> dict[str, list[float]]:
        """Move delta by one step; the squares of what is here of each tensor (``theta.Moves``)."""
        moves = self._anchorage_theta().moved(Step.from_json(step))
        return {name: list(squares) for name, squares in moves.items()}

    def anchorage_hash(self) -> dict[str, Any]:
        """The hash of delta; of windows the leaves, which add up to those of the whole."""
        theta = self._anchorage_theta()
        if not theta.windows:
            return {"hash": theta.delta_hash()}
        return {"leaves": {n: each.astype("<u4").tobytes() for n, each in theta.leaves().items()}}

    def anchorage_save(self, path: str) -> None:
        """Write what is here of delta to a snapshot, in a folder that the engine keeps locked."""
        self._anchorage_theta().write(Path(path))

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

    def _anchorage_own(self) -> Mapping[str, Spec]:
        """Names, shapes and dtypes the engine was started with: all it may ever be given."""
        if self._anchorage is not None:
            return self._anchorage.anchor.specs
        return Anchor.open(Path(self.model_runner.model_config.model)).specs

    def _anchorage_put(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
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


def heads(model: torch.nn.Module) -> list[Any]:
    """The modules that compute logits: they keep a packed copy, which no reload renews.

    A head that is tied to the embedding shares its tensor but not its packed copy. Where there is
    no head of its own (Gemma 2, Cohere, OPT) the embedding itself is it.
    """
    kept = [m for m in model.modules() if _method(m) == "UnquantizedEmbeddingMethod"]
    return [m for m in kept if "ParallelLMHead" in (c.__name__ for c in type(m).__mro__)] or kept


def refuse_head_of_its_own(model: torch.nn.Module) -> None:
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


def forget_packed_experts(model: torch.nn.Module) -> None:
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


def _method(module: torch.nn.Module) -> str:
    """The name of the class that computes with a module of vLLM."""
    return type(getattr(module, "quant_method", None)).__name__


def held(anchor: Anchor, device: str, importance: Path | None, windows: Windows) -> Theta:
    """The anchor and delta = 0 on a device; the bits are the same on all."""
    if device == "cpu":
        return Parameters.zeros(anchor, importance, windows)
    from agent.store.device import DeviceParameters

    return DeviceParameters(anchor, device, importance=importance, windows=windows)


def refuse_other_tensors(weights: Anchor, own: Mapping[str, Spec]) -> None:
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
