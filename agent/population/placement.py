"""Which CPU cores and which GPUs each engine gets: counts in, numbers out.

Cores are shared where an engine runs, so a plan made on one machine holds on any other. An engine
that serves beside the population has the first half of the cores and the first GPUs.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from agent.errors import UserError

ALONE = 0.9  # of a GPU's memory, for an engine that has the GPU to itself
BESIDE = 0.45  # of a GPU's memory, for an engine beside another one
ROUNDING = 1e-9  # 1 - 0.45 - 0.55 is not 0
TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def available_cores() -> list[int]:
    """The cores this process may use, one CPU of each: its second hyperthread adds nothing here."""
    return first_threads(sorted(os.sched_getaffinity(0)), _siblings)


def gpu_count() -> int:
    """How many GPUs this process sees; counted without taking hold of one."""
    import torch

    return torch.cuda.device_count()


def first_threads(cpus: Iterable[int], siblings: Callable[[int], str]) -> list[int]:
    """The first of the given CPUs on each core; ``siblings(cpu)`` names the core of a CPU."""
    first: dict[str, int] = {}
    for cpu in cpus:
        first.setdefault(siblings(cpu), cpu)
    return list(first.values())


def serving_cores(count: int) -> int:
    """How many of the machine's cores the serving engine computes on: half, at least one."""
    return max(1, count // 2)


def share(cores: Sequence[int], place: int, engines: int, kept: int = 0) -> tuple[int, ...]:
    """The cores of engine ``place`` of ``engines`` when the first ``kept`` ones are not theirs.

    All others are shared evenly. With more engines than cores several have the same one; where
    nothing would be left, the last core is theirs.
    """
    spare = cores[kept:] or cores[-1:]
    if engines > len(spare):
        return (spare[place % len(spare)],)
    first, last = (end * len(spare) // engines for end in (place, place + 1))
    return tuple(spare[first:last])


def by_rank(cores: Sequence[int], ranks: int) -> list[tuple[int, ...]]:
    """The cores of each tensor-parallel rank of one engine."""
    return [share(cores, rank, ranks) for rank in range(ranks)]


def cpus_each(nodes: Sequence[float], engines: int) -> int:
    """CPUs for each engine of a cluster: the most with which all find a node, at least one."""
    most = int(max(nodes, default=1))
    fits = (
        cpus for cpus in range(most, 1, -1) if sum(int(node // cpus) for node in nodes) >= engines
    )
    return next(fits, 1)


def gpu_places(
    gpus: int,
    engines: int,
    tensor_parallel: int,
    memory: float | None = None,
    serving_gpus: int = 0,
    serving_memory: float = 0.0,
) -> list[tuple[tuple[int, ...], float]]:
    """For each engine its GPUs and the share of their memory it takes.

    Each goes where the fewest others are, then where most memory is free, on neighbouring GPUs
    counted from the last: the serving engine has the first ``serving_gpus``.

    Args:
        memory: Share of each of its GPUs an engine takes; None: ``ALONE`` where every engine has
            GPUs of its own, else ``BESIDE``.

    Raises:
        UserError: Not all fit; it says how many do.
    """
    if memory is None:  # decided for all at once: equal engines give equal answers
        memory = ALONE if engines * tensor_parallel <= gpus - serving_gpus else BESIDE
    free = [1 - serving_memory if gpu < serving_gpus else 1.0 for gpu in range(gpus)]
    # Windows of neighbours that do not overlap, the last GPUs first; serving's come last.
    starts = range(gpus - tensor_parallel, -1, -tensor_parallel)
    windows = [tuple(range(start, start + tensor_parallel)) for start in starts]
    places: list[tuple[int, ...]] = []
    for _ in range(engines):
        room = {window: min(free[gpu] for gpu in window) for window in windows}
        fits = [window for window in windows if room[window] >= memory - ROUNDING]
        if not fits:
            raise UserError(
                f"engines.population: {engines}, allowed here: {len(places)} ({gpus} GPUs, "
                f"{tensor_parallel} an engine, {memory:g} of each one's memory; "
                f"the serving engine holds {serving_memory:g} of {serving_gpus})"
            )
        place = min(fits, key=lambda window: (places.count(window), -room[window]))
        for gpu in place:
            free[gpu] -= memory
        places.append(place)
    return [(place, memory) for place in places]


def visible_devices(devices: Sequence[int], current: str | None) -> str:
    """CUDA_VISIBLE_DEVICES that leaves an engine these of the GPUs its process sees now."""
    names = current.split(",") if current else None
    return ",".join(names[device] if names else str(device) for device in devices)


def _siblings(cpu: int) -> str:
    """The CPUs on one core with this one, as the kernel writes them; itself where it does not."""
    with suppress(OSError):
        return Path(TOPOLOGY.format(cpu)).read_text().strip()
    return str(cpu)
