"""`anchorage bench endpoint`: the gateway against the bare engine, swaps, rollbacks.

Starts engine, gateway and watchdog in a temporary home. The same requests go to the engine's
socket and through the gateway in turns; then two versions are swapped with and without streaming
clients; then rollbacks are timed (bench/swapping.py).

    added latency   p(gateway) - p(direct) of the pooled latencies, p50 and p99, in ms
    throughput      median over the turns of answers/s through the gateway over answers/s direct
    gateway's time  processor time of the gateway's process over its answers, in ms
    first token     median to a stream's first event, gateway - direct, in ms
    swap pause      time in which the gateway admits no request, waiting for answers included, in ms

With N clients that ask again at once, N requests are always under way, and the mean latency is N
over the throughput (Little's law): beyond one at a time, added latency is the throughput once more,
N (1/X_gateway - 1/X_direct). What the gateway itself costs is its processor time.
"""

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import psutil
from rich.table import Table

from agent.config import Settings, load
from agent.errors import UserError
from agent.home import Home, remove_tree
from agent.learner.noise import Address
from agent.store.weights import Parameters, export
from deploy import stack
from deploy.serving.served import BLUE, Served
from deploy.stack import Ports, services
from deploy.supervise import Program
from flows.lab.bench.load import Burst, Client, Target, clients, percentile
from flows.lab.bench.swapping import Shuttle, rollbacks, rollbacks_within, swapped
from flows.serve.swaps import probe_served
from flows.service import Service
from flows.show.terminal import Reporter, Silent

ADDED_MS, THROUGHPUT, PAUSE_MS = 2.0, 0.95, 250.0  # what the endpoint promises
OTHER_SIGMA: Final = 0.001  # the second version is the anchor and this much noise
SILENT: Final = Silent()


@dataclass(frozen=True, slots=True)
class EndpointBench:
    """How much is measured."""

    turns: int = 8
    """Bursts of each kind, to the gateway and to the engine."""
    requests: int = 64
    """Least answers of a burst (a fourth of it one at a time); each client asks for four."""
    at_once: tuple[int, ...] = (1, 8, 32)
    """Requests under way at a time."""
    tokens: int = 16
    """Tokens of every answer."""
    swaps: int = 40
    """Swaps with nobody asking, and as many under streams."""
    streams: int = 8
    """Clients that stream while weights are swapped."""
    rollbacks: int = 5
    """Rollbacks by a process that runs, and as many by the command."""

    def __post_init__(self) -> None:
        if min(self.turns, self.requests, self.tokens, self.streams, *self.at_once) < 1:
            raise UserError(f"bench endpoint: {asdict(self)}; allowed: counts from 1")


def bench_endpoint(
    bench: EndpointBench | None = None, progress: Reporter = SILENT
) -> dict[str, Any]:
    """Start, measure, stop; the document of `--json`. `within`: every promise is kept."""
    bench = bench or EndpointBench()
    folder = Path(tempfile.mkdtemp(prefix="anchorage-"))
    home = Home.at(folder / "home")
    try:
        settings = load(gateway={"host": "127.0.0.1", "port": 0, "rate": "", "token_quota": ""})
        service = Service(home, settings)
        other = _other(service)
        if bench.swaps or bench.rollbacks:
            _started(service, other, (BLUE,), progress)  # only to record how it behaves
            stack.down(home)
        anchor = Served(service.anchor.digest, str(service.anchor.directory))
        status = _started(service, anchor, (BLUE, "gateway", "watchdog"), progress)
        doors = _doors(home, settings, status["endpoint"])
        process = psutil.Process(_pid(status, "gateway"))
        document = asyncio.run(_measure(bench, service, doors, process, (anchor, other), progress))
        if bench.rollbacks:
            document["rollback"] = rollbacks(service, other, bench.rollbacks, progress)
    finally:
        stack.down(home)
        remove_tree(folder, ignore_errors=True)
    return {"setup": asdict(bench), **document, "within": _within(document)}


def table(document: Mapping[str, Any]) -> Table:
    """The document for people."""
    drawn = Table(title="gateway beside the bare engine", title_justify="left")
    columns = {
        "direct p50 ms": "direct_p50_ms",
        "added p50 ms": "added_p50_ms",
        "added p99 ms": "added_p99_ms",
        "throughput": "throughput_ratio",
        "gateway's CPU ms": "gateway_cpu_ms",
    }
    for column in ("at once", *columns):
        drawn.add_column(column, justify="right")
    for row in document["latency"]:
        drawn.add_row(str(row["at_once"]), *(f"{row[name]:.2f}" for name in columns.values()))
    first = document["first_token"]
    drawn.add_row("1, streamed", f"{first['direct_ms']:.2f}", f"{first['added_ms']:.2f}")
    for name, swaps in document["swap"].items():
        text = f"pause p50 {swaps['pause_p50_ms']:.0f} ms, p95 {swaps['pause_p95_ms']:.0f} ms"
        lost = f"{swaps['failed_swaps']} swaps and {swaps['failed_answers']} answers failed"
        drawn.add_row(f"{swaps['swaps']} swaps, {name}", text, lost)
    for name in ("act", "command") if "rollback" in document else ():
        row = document["rollback"][name]
        text = f"served p50 {row['served_p50_s']:.2f} s, longest {row['served_max_s']:.2f} s"
        drawn.add_row(f"rollback, {name}", text, f"whole p50 {row['whole_p50_s']:.2f} s")
    return drawn


def compared(
    at_once: int, direct: Sequence[Burst], gateway: Sequence[Burst], cpu_s: float
) -> dict[str, float]:
    """One row of the document: bursts at the two doors, compared turn by turn (medians of turns).

    cpu_s: processor time of the gateway during its bursts, of whose answers each client's first is
    not in the bursts.
    """
    turns = list(zip(direct, gateway, strict=True))
    answers = sum(len(burst.latencies) for burst in gateway)

    def added(share: float) -> float:
        return median(
            percentile(g.latencies, share) - percentile(d.latencies, share) for d, g in turns
        )

    ratios = [(len(g.latencies) / g.seconds) / (len(d.latencies) / d.seconds) for d, g in turns]
    return {
        "at_once": at_once,
        "direct_p50_ms": 1000 * median(percentile(d.latencies, 0.5) for d in direct),
        "added_p50_ms": 1000 * added(0.5),
        "added_p99_ms": 1000 * added(0.99),
        "throughput_ratio": median(ratios),
        "gateway_cpu_ms": 1000 * cpu_s / (answers + at_once * len(gateway)),
    }


def _other(service: Service) -> Served:
    """A second version of the anchor, exported as a round's candidate would be."""
    theta = Parameters.zeros(service.anchor)
    for name, tensor in theta.rendered(Address(1, 0, 0), OTHER_SIGMA):
        moved = tensor.float() - service.anchor.tensor(name).float()
        theta.delta[name][:] = moved.reshape(-1).numpy()
    directory = export(theta, service.home.weights)
    return Served(directory.name, str(directory))


def _started(
    service: Service, served: Served, names: Sequence[str], progress: Reporter
) -> dict[str, Any]:
    """The stack with these services alone, and the engine's probes recorded while it is cold."""

    def chosen(home: Home, settings: Settings, ports: Ports) -> list[Program]:
        return [each for each in services(home, settings, ports) if each.name in names]

    status = stack.up(
        service.home,
        service.settings,
        served,
        make=chosen,
        wait_for=[name for name in names if name != "watchdog"],
        progress=lambda name, state: progress.say(f"  {name}: {state}"),
    )
    probe_served(service)
    return status


def _doors(home: Home, settings: Settings, endpoint: str) -> tuple[Target, Target]:
    """The engine's socket, asked as the gateway asks it, and the gateway."""
    engine = Target("engine", "http://engine", home.engine_socket(BLUE), {"cache_salt": "0" * 64})
    return engine, Target("gateway", endpoint)


async def _measure(
    bench: EndpointBench,
    service: Service,
    doors: tuple[Target, Target],
    process: psutil.Process,
    versions: tuple[Served, Served],
    progress: Reporter,
) -> dict[str, Any]:
    body = {
        "model": service.settings.model.name,
        "max_tokens": bench.tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    async with clients(doors, body) as (direct, gateway):
        for client in (direct, gateway):
            await client.burst(2 * max(bench.at_once), max(bench.at_once))  # warm
        rows = [
            await _latency(bench, count, direct, gateway, process, progress)
            for count in bench.at_once
        ]
        first = await _first_token(bench, direct, gateway, progress)
        shuttle = Shuttle(service, doors[1], versions, progress)
        swaps = await swapped(bench.swaps, bench.streams, gateway, shuttle)
    return {"latency": rows, "first_token": first, "swap": swaps}


async def _latency(
    bench: EndpointBench,
    at_once: int,
    direct: Client,
    gateway: Client,
    process: psutil.Process,
    progress: Reporter,
) -> dict[str, float]:
    advance = progress.track(f"{at_once} at once", bench.turns)
    requests = max(4 * at_once, bench.requests if at_once > 1 else bench.requests // 4)
    timings: tuple[list[Burst], list[Burst]] = ([], [])
    cpu_s = 0.0
    for turn in range(bench.turns):
        for client, bursts in _in_turn(turn, (direct, timings[0]), (gateway, timings[1])):
            before_s = _cpu_s(process)
            bursts.append(await client.burst(requests, at_once))
            cpu_s += (_cpu_s(process) - before_s) * (client is gateway)
        advance(turn + 1)
    return compared(at_once, *timings, cpu_s)


def _cpu_s(process: psutil.Process) -> float:
    """Processor time of a process so far, its threads together."""
    times = process.cpu_times()
    return float(times.user + times.system)


def _pid(status: Mapping[str, Any], name: str) -> int:
    return int(next(each["pid"] for each in status["services"] if each["name"] == name))


async def _first_token(
    bench: EndpointBench, direct: Client, gateway: Client, progress: Reporter
) -> dict[str, float]:
    turns = bench.turns * 8
    advance = progress.track("first token", turns)
    timings: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        for client, seconds in _in_turn(turn, (direct, timings[0]), (gateway, timings[1])):
            seconds.append(await client.first_token())
        advance(turn + 1)
    low, high = (1000 * median(each) for each in timings)
    return {"direct_ms": low, "gateway_ms": high, "added_ms": high - low}


def _in_turn(turn: int, *pairs: Any) -> Any:
    """First one first, then the other first."""
    return pairs if turn % 2 == 0 else pairs[::-1]


def _within(document: Mapping[str, Any]) -> bool:
    """Whether what the endpoint promises was measured: at one and at several requests a time."""
    swaps = document["swap"].values()
    return (
        all(row["added_p50_ms"] <= ADDED_MS for row in document["latency"] if row["at_once"] == 1)
        and all(row["throughput_ratio"] >= THROUGHPUT for row in document["latency"])
        and all(each["pause_p95_ms"] <= PAUSE_MS for each in swaps)
        and not any(each["failed_swaps"] + each["failed_answers"] for each in swaps)
        and ("rollback" not in document or rollbacks_within(document["rollback"]))
    )
