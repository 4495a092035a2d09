"""One home opened for work: its parts and, once needed, the engines that evaluate members.

Flows that run inside one another in one process share the session of their home, so that engines
start once and stay warm from one round to the next.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from agent.config import Settings
from agent.errors import UserError
from agent.home import read_sealed, remove_tree, write_sealed
from agent.population.capacity import (
    Device,
    Machine,
    gib,
    gpu_bytes,
    host_bytes,
    refuse_small,
    size_of,
)
from agent.population.certify import Certificate, certify, key_of
from agent.population.decoding import decoding
from agent.population.fresh import FreshEngine
from agent.population.placement import (
    ALONE,
    EngineOptions,
    cpus_each,
    gpu_places,
    on_cpu,
    serving_cores,
)
from agent.population.pool import Population
from agent.population.process import EngineLauncher
from agent.population.schedule import Engine, Way
from agent.population.vllm_arguments import vllm_version
from agent.sections import AUTO
from agent.store.anchor import Anchor
from deploy.model import EMBEDDED_CERTIFICATES
from deploy.serving.engines import is_up
from flows.service import Service
from flows.show.terminal import Reporter, Silent

_OPEN: dict[Path, "Session"] = {}
Start = Callable[[EngineOptions], Engine]


class Session:
    """The parts of a home, its engines, and a reporter.

    Engines are those given, or started as the settings say; ``start`` starts other ones instead.
    """

    def __init__(
        self,
        service: Service,
        progress: Reporter,
        population: Population | None = None,
        start: Start | None = None,
    ) -> None:
        self.service = service
        self.progress = progress
        self._launcher: EngineLauncher | None = None
        self._population = population
        self._start = start
        self._own = population is None  # whether the engines were started here

    @property
    def population(self) -> Population:
        """The engines; the first call starts them and does not wait until they are ready.

        How members get into them is certified before, once for a model configuration.
        """
        if self._population is None:
            way = self.certificate().way
            options = engine_options(self.service)
            starts = [partial(self._placed, way, at, each) for at, each in enumerate(options)]
            self._population = Population(starts)
        return self._population

    def certificate(self) -> Certificate:
        """The certificate of this model, vLLM and options: kept, shipped, or measured now."""
        known = kept_certificate(self.service) or self._certified()
        if known.way == "fresh":
            self.progress.say(
                f"{known.family}: a running engine does not take other weights exactly "
                f"({known.refused[-1]}); every member gets an engine of its own, which is slow"
            )
        return known

    def _certified(self) -> Certificate:
        """Measure a certificate and keep it in the home."""
        home = self.service.home
        self.progress.say("engines of this model are compared with cold starts, once")
        certificate = self.measured_certificate()
        path = home.certificate_json(certificate_key(self.service))
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_sealed(path, certificate.to_json())
        return certificate

    def measured_certificate(self) -> Certificate:
        """Measure the ways of this model, vLLM and options against cold engines."""
        options = engine_options(self.service)[0]

        def start(directory: Path, way: Way) -> Engine:
            return self.engine(replace(options, model=directory, way=way))

        folder = self.service.home.members / "certify"
        try:
            return certify(start, self.service.anchor.directory, folder)
        finally:
            remove_tree(folder, ignore_errors=True)

    def _placed(self, way: Way, number: int, options: EngineOptions) -> Engine:
        """An engine of the population, by the certified way."""
        if way != "fresh":
            return self.engine(replace(options, way=way))
        scratch = self.service.home.members / str(number)

        def start(directory: Path) -> Engine:
            return self.engine(replace(options, model=directory))

        return FreshEngine(start, scratch, options.model, options.importance)

    def make_room(self) -> None:
        """End the population where one more engine would not fit beside it; it starts anew."""
        crowded = not on_cpu() and self.service.settings.engines.placement == "local"
        if crowded and self._own and self._population is not None:
            self._population.close()
            self._population = None

    def engine(self, options: EngineOptions) -> Engine:
        """One more engine, placed as the settings say; the caller closes it."""
        if self._start is not None:
            return self._start(options)
        if self.service.settings.engines.placement == "ray":
            from agent.population.ray import Placement, RayEngine

            gpus = 0.0 if on_cpu() else float(options.tensor_parallel)
            return RayEngine(options, Placement(cpus=float(options.threads or 1), gpus=gpus))
        if self._launcher is None:
            self._launcher = EngineLauncher(self.service.home.log("launcher"))
        return self._launcher.engine(options)

    def close(self) -> None:
        """End the engines."""
        if self._population is not None:
            self._population.close()
        if self._launcher is not None:
            self._launcher.close()
        self._population = self._launcher = None


@contextmanager
def session(home: Path, progress: Reporter | None = None) -> Iterator[Session]:
    """The open session of a home, or a new one that ends with the block."""
    key = home.resolve()
    if key in _OPEN:
        yield _OPEN[key]
        return
    opened = Session(Service.at(key), progress or Silent())
    _OPEN[key] = opened
    try:
        yield opened
    finally:
        del _OPEN[key]
        opened.close()


def certificate_key(service: Service) -> str:
    """What decides how weights are laid out in this service's engines, as a hash."""
    chosen = service.settings.engines
    options = {
        "dtype": service.settings.model.dtype,
        "tensor_parallel": chosen.population_ranks,
        "master_device": chosen.device(on_cpu()),
    }
    return key_of(service.anchor, vllm_version(), options)


def kept_certificate(service: Service) -> Certificate | None:
    """The certificate in the home, or the shipped one of the embedded model, if there is one."""
    key = certificate_key(service)
    kept = service.home.certificate_json(key)
    if kept.is_file():
        return Certificate.from_json(read_sealed(kept))
    shipped = json.loads(EMBEDDED_CERTIFICATES.read_text(encoding="utf-8")).get(key)
    return Certificate.from_json(shipped) if shipped else None


def engine_options(service: Service, machine: Machine | None = None) -> list[EngineOptions]:
    """One set of options an engine: all alike but for the cores and GPUs of each.

    Args:
        machine: Where local engines run; None: this machine.

    Raises:
        UserError: More engines than this machine holds, or a device that is not there.
    """
    chosen, model = service.settings.engines, service.settings.model
    here = machine or Machine.here()
    if chosen.master_device == "cuda" and chosen.placement == "local" and here.on_cpu:
        raise UserError("engines.master_device: 'cuda', allowed here: cpu (vLLM's CPU build)")
    decoding(service.settings, service.origin.directory)  # refused before an engine starts
    common = EngineOptions(
        model=service.directory(service.anchor.digest),
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        max_num_seqs=chosen.max_num_seqs,
        prefix_caching=chosen.prefix_caching,
        tensor_parallel=chosen.population_ranks,
        weighted=service.settings.learner.importance is not None,
        importance=service.home.importance,
        generation_config=service.settings.tasks.generation_config == "model",
        chat_template=model.template,
        chat_template_kwargs=model.chat_template_kwargs,
        reasoning_parser=model.reasoning_parser,
        tool_parser=model.tool_parser,
    )
    placed = local_places if chosen.placement == "local" else _ray_places
    places = placed(service.settings, service.anchor, here, is_up(service.home))
    return [
        replace(common, log=service.home.log(f"population-{index}"), **place)
        for index, place in enumerate(places)
    ]


def local_places(
    settings: Settings, anchor: Anchor, machine: Machine, serving: bool
) -> list[dict[str, Any]]:
    """Options of each engine on one machine: all its cores and GPUs, or those serving leaves.

    Raises:
        UserError: They do not fit, with the numbers.
    """
    engines = settings.engines
    count = engines.population
    if machine.on_cpu:
        kept = serving_cores(machine.cores) if serving else 0
        _refuse_host(settings, anchor, machine, "cpu")
        return [{"place": place, "places": count, "kept_cores": kept} for place in range(count)]
    gpus = gpu_places(
        machine.gpus,
        count,
        engines.population_ranks,
        engines.population_gpu_memory_utilization,
        engines.tensor_parallel_size if serving else 0,
        engines.gpu_memory_utilization if serving else 0.0,
    )
    device = _device(settings, anchor, machine, gpus[0][1])
    _refuse_host(settings, anchor, machine, device)
    return [
        {"devices": devices, "gpu_memory_utilization": memory, "master_device": device}
        for devices, memory in gpus
    ]


def _device(settings: Settings, anchor: Anchor, machine: Machine, share: float) -> Device:
    """Where delta lies beside engines that take this share of their GPUs.

    Raises:
        UserError: The engine does not fit; where delta may lie on the host, not even so.
    """
    ranks, wanted = settings.engines.population_ranks, settings.engines.master_device
    size, weighted = size_of(anchor), settings.learner.importance is not None
    device: Device = settings.engines.device(machine.on_cpu)
    if machine.gpu_memory is None:
        return device
    room = share * machine.gpu_memory
    tokens = settings.model.max_model_len
    need = gpu_bytes(size, ranks, device, tokens, weighted)
    if wanted == AUTO and sum(need.values()) > room:
        device, need = "cpu", gpu_bytes(size, ranks, "cpu", tokens)
    has = f"{share:g} of a GPU of {gib(machine.gpu_memory)}, {ranks} to an engine"
    refuse_small(f"engines.master_device: {wanted!r}: a GPU", need, room, has)
    return device


def _refuse_host(settings: Settings, anchor: Anchor, machine: Machine, device: Device) -> None:
    """One line where the engines would not fit into the machine's memory."""
    engines, size = settings.engines, size_of(anchor)
    count, ranks = engines.population, engines.population_ranks
    need = host_bytes(size, count, ranks, device, not machine.on_cpu)
    refuse_small(f"engines.population: {count}", need, machine.memory, "memory of this machine")


def _ray_places(
    settings: Settings, _anchor: Anchor, machine: Machine, serving: bool
) -> list[dict[str, Any]]:
    """Options of each engine on the cluster, which is told what the serving engine holds here."""
    from agent.population.ray import Placement, attach

    engines, cpu = settings.engines, machine.on_cpu
    held = Placement(
        cpus=float(serving_cores(machine.cores)),
        gpus=0.0 if cpu else float(engines.tensor_parallel_size),
    )
    nodes = attach(engines.ray_address, held if serving else None)
    place: dict[str, Any] = {"threads": cpus_each(nodes, engines.population)}
    if not cpu:
        share = engines.population_gpu_memory_utilization or ALONE
        place = {"gpu_memory_utilization": share, "master_device": engines.device(cpu)}
    return [place] * engines.population
