"""One home opened for work: its parts and, once needed, the engines that evaluate members.

Flows that run inside one another in one process share the session of their home, so that engines
start once and stay warm from one round to the next.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil

from agent.errors import UserError
from agent.population.nursery import Nursery
from agent.population.pool import Population
from agent.population.schedule import Engine
from agent.population.vllm import EngineOptions, on_cpu
from flows.service import Service
from flows.show.progress import Reporter, Silent

_OPEN: dict[Path, "Session"] = {}


class Session:
    """The parts of a home, its engines (given, or started as the settings say), and a reporter."""

    def __init__(
        self, service: Service, progress: Reporter, population: Population | None = None
    ) -> None:
        self.service = service
        self.progress = progress
        self._nursery: Nursery | None = None
        self._population = population

    @property
    def population(self) -> Population:
        """The engines; the first call starts them and does not wait until they are ready."""
        if self._population is None:
            options = engine_options(self.service)
            self._population = Population([partial(self.engine, each) for each in options])
        return self._population

    def engine(self, options: EngineOptions) -> Engine:
        """One more engine, placed as the settings say; the caller closes it."""
        chosen = self.service.settings.engines
        if chosen.placement == "ray":
            from agent.population.ray import Placement, RayEngine, attach

            attach(chosen.ray_address)
            gpus = 0.0 if on_cpu() else float(options.tensor_parallel)
            return RayEngine(options, Placement(cpus=float(len(options.cores) or 1), gpus=gpus))
        if self._nursery is None:
            self._nursery = Nursery(self.service.home.log("nursery"))
        return self._nursery.engine(options)

    def close(self) -> None:
        """End the engines."""
        if self._population is not None:
            self._population.close()
        if self._nursery is not None:
            self._nursery.close()
        self._population = self._nursery = None


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


def engine_options(service: Service) -> list[EngineOptions]:
    """One set of options an engine: all alike but for the CPU cores each has to itself.

    The engines take the last cores: the serving engine and the gateway keep the first.
    """
    chosen, model = service.settings.engines, service.settings.model
    if chosen.master_device == "cuda" and chosen.placement == "local" and on_cpu():
        raise UserError("engines.master_device: 'cuda', allowed here: cpu (vLLM's CPU build)")
    cores = sorted(psutil.Process().cpu_affinity() or [0])
    count = chosen.population
    return [
        EngineOptions(
            model=service.anchor.directory,
            dtype=model.dtype,
            max_model_len=model.max_model_len,
            max_num_seqs=chosen.max_num_seqs,
            cores=(cores[-1 - index % len(cores)],),
            gpu_memory_utilization=chosen.gpu_memory_utilization / count,
            tensor_parallel=chosen.tensor_parallel_size,
            master_device=chosen.master_device,
            importance=service.home.importance,
            log=service.home.log(f"population-{index}"),
        )
        for index in range(count)
    ]
