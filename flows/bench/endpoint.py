"""`anchorage bench endpoint`: the gateway beside the bare engine, and the swap under streams.

A stack of its own in a temporary home: the serving engine, the gateway, the watchdog. The same
requests go to the engine's socket and through the gateway in turns; then two versions are swapped
while clients stream, and once more while nobody asks; then rollbacks are timed (``rollbacks``).

    added latency   p(gateway) - p(direct) of the pooled latencies, p50 and p99, in ms
    throughput      median over the turns of answers/s through the gateway over answers/s direct
    first token     median to a stream's first event, gateway - direct, in ms
    swap pause      how long the gateway admitted nobody, answers under way waited for, in ms
"""

import asyncio
import math
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from agent.config import Home, Settings, load
from agent.errors import UserError
from agent.learner.noise import Address
from agent.store.weights import Parameters, export
from deploy import stack
from deploy.services import Ports, services
from deploy.serving.controller import change
from deploy.serving.served import BLUE, Served, socket_of
from deploy.supervise import Service as Process
from flows.bench import rollbacks
from flows.bench.load import Burst, Client, Door, clients
from flows.probing import probe_served
from flows.progress import Reporter, Silent
from flows.service import Service

ADDED_MS, THROUGHPUT, PAUSE_MS = 2.0, 0.95, 250.0  # what the endpoint promises
OTHER_SIGMA: Final = 0.001  # the second version is the anchor and this much noise
PAUSE = "anchorage_swap_pause_seconds_sum"
SILENT: Final = Silent()


@dataclass(frozen=True, slots=True)
class Bench:
    """How much is measured."""

    turns: int = 6
    """Bursts of each kind at each door."""
    requests: int = 64
    """Answers of a burst (a fourth of it one at a time)."""
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


def bench_endpoint(bench: Bench | None = None, progress: Reporter = SILENT) -> dict[str, Any]:
    """Start, measure, stop; the document of `--json`. `within`: every promise is kept."""
    bench = bench or Bench()
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
        told = asyncio.run(_measure(bench, service, doors, (anchor, other), progress))
        if bench.rollbacks:
            told["rollback"] = rollbacks.rollbacks(service, other, bench.rollbacks, progress)
    finally:
        stack.down(home)
        shutil.rmtree(folder, ignore_errors=True)
    return {"setup": asdict(bench), **told, "within": _within(told)}


def table(told: Mapping[str, Any]) -> Table:
    """The document for people."""
    drawn = Table(title="gateway beside the bare engine", title_justify="left")
    for column in ("at once", "direct p50 ms", "added p50 ms", "added p99 ms", "throughput"):
        drawn.add_column(column, justify="right")
    for row in told["latency"]:
        numbers = (row["direct_p50_ms"], row["added_p50_ms"], row["added_p99_ms"])
        cells = (f"{number:.2f}" for number in numbers)
        drawn.add_row(str(row["at_once"]), *cells, f"{row['throughput_ratio']:.3f}")
    first = told["first_token"]
    drawn.add_row("1, streamed", f"{first['direct_ms']:.2f}", f"{first['added_ms']:.2f}", "", "")
    for name, swaps in told["swap"].items():
        text = f"pause p50 {swaps['pause_p50_ms']:.0f} ms, p95 {swaps['pause_p95_ms']:.0f} ms"
        lost = f"{swaps['failed_swaps']} swaps and {swaps['failed_answers']} answers failed"
        drawn.add_row(f"{swaps['swaps']} swaps, {name}", text, lost, "", "")
    for name in ("act", "command") if "rollback" in told else ():
        row = told["rollback"][name]
        text = f"served p50 {row['served_p50_s']:.2f} s, longest {row['served_max_s']:.2f} s"
        drawn.add_row(f"rollback, {name}", text, f"whole p50 {row['whole_p50_s']:.2f} s", "", "")
    return drawn


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def compared(at_once: int, direct: Sequence[Burst], gateway: Sequence[Burst]) -> dict[str, float]:
    """One row of the document: bursts at the two doors, turn by turn."""
    pooled = [[s for burst in bursts for s in burst.latencies] for bursts in (direct, gateway)]
    low, high = ([1000 * percentile(door, share) for door in pooled] for share in (0.5, 0.99))
    ratios = [
        (len(g.latencies) / g.seconds) / (len(d.latencies) / d.seconds)
        for d, g in zip(direct, gateway, strict=True)
    ]
    return {
        "at_once": at_once,
        "direct_p50_ms": low[0],
        "added_p50_ms": low[1] - low[0],
        "added_p99_ms": high[1] - high[0],
        "throughput_ratio": median(ratios),
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

    def chosen(home: Home, settings: Settings, ports: Ports) -> list[Process]:
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


def _doors(home: Home, settings: Settings, endpoint: str) -> tuple[Door, Door]:
    """The engine's socket, asked as the gateway asks it, and the gateway."""
    salt = {"cache_salt": "0" * 64}
    return Door("engine", "http://engine", socket_of(home), salt), Door("gateway", endpoint)


async def _measure(
    bench: Bench,
    service: Service,
    doors: tuple[Door, Door],
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
        rows = [await _latency(bench, count, direct, gateway, progress) for count in bench.at_once]
        first = await _first_token(bench, direct, gateway, progress)
        swaps = await _swaps(bench, service, gateway, doors[1], versions, progress)
    return {"latency": rows, "first_token": first, "swap": swaps}


async def _latency(
    bench: Bench, at_once: int, direct: Client, gateway: Client, progress: Reporter
) -> dict[str, float]:
    advance = progress.track(f"{at_once} at once", bench.turns)
    requests = max(at_once, bench.requests if at_once > 1 else bench.requests // 4)
    found: tuple[list[Burst], list[Burst]] = ([], [])
    for turn in range(bench.turns):
        for client, bursts in _in_turn(turn, (direct, found[0]), (gateway, found[1])):
            bursts.append(await client.burst(requests, at_once))
        advance(turn + 1)
    return compared(at_once, *found)


async def _first_token(
    bench: Bench, direct: Client, gateway: Client, progress: Reporter
) -> dict[str, float]:
    turns = bench.turns * 8
    advance = progress.track("first token", turns)
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        for client, seconds in _in_turn(turn, (direct, found[0]), (gateway, found[1])):
            seconds.append(await client.first_token())
        advance(turn + 1)
    low, high = (1000 * median(each) for each in found)
    return {"direct_ms": low, "gateway_ms": high, "added_ms": high - low}


def _in_turn(turn: int, *pairs: Any) -> Any:
    """First one first, then the other first."""
    return pairs if turn % 2 == 0 else pairs[::-1]


async def _swaps(
    bench: Bench,
    service: Service,
    gateway: Client,
    door: Door,
    versions: tuple[Served, Served],
    progress: Reporter,
) -> dict[str, Any]:
    """Back and forth while nobody asks, then under streams."""
    if bench.swaps == 0:
        return {}

    async def swapping(what: str) -> dict[str, Any]:
        return await asyncio.to_thread(
            _back_and_forth, bench.swaps, service, door, versions, progress, what
        )

    idle = await swapping("idle")
    loaded, streams, failed = await _under_streams(bench.streams, gateway, lambda: swapping("busy"))
    name = f"under {bench.streams} streams"
    return {
        "idle": idle | {"answers": 0, "failed_answers": 0},
        name: loaded | {"answers": streams, "failed_answers": failed},
    }


async def _under_streams(
    count: int, gateway: Client, act: Callable[[], Awaitable[dict[str, Any]]]
) -> tuple[dict[str, Any], int, int]:
    """What ``act`` returns, done while clients stream; and their answers, whole and failed."""
    stop = asyncio.Event()
    whole: list[bool] = []

    async def client() -> None:
        while not stop.is_set():
            try:
                whole.append(await gateway.stream())
            except (UserError, OSError):
                whole.append(False)

    tasks = [asyncio.create_task(client()) for _ in range(count)]
    try:
        told = await act()
    finally:
        stop.set()
        await asyncio.gather(*tasks)
    return told, len(whole), whole.count(False)


def _back_and_forth(
    count: int,
    service: Service,
    door: Door,
    versions: tuple[Served, Served],
    progress: Reporter,
    what: str,
) -> dict[str, Any]:
    advance = progress.track(f"swaps, {what}", count)
    pauses: list[float] = []
    failed = 0
    for done in range(count):
        target = versions[(done + 1) % 2]
        before = _paused_s(door)
        outcome = change(
            service.home,
            target.digest,
            Path(target.directory),
            anchor=service.anchor,
            record=lambda _event, _digest, _why: None,
        )
        failed += not outcome.swapped
        pauses.append(1000 * (_paused_s(door) - before))
        advance(done + 1)
        time.sleep(0.05)  # so that clients meet every version
    return {
        "swaps": count,
        "failed_swaps": failed,
        "pause_p50_ms": percentile(pauses, 0.5),
        "pause_p95_ms": percentile(pauses, 0.95),
        "pause_max_ms": max(pauses),
    }


def _paused_s(door: Door) -> float:
    """All pauses of the gateway so far."""
    text = httpx.get(f"{door.url}/metrics", timeout=10).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == PAUSE:
                return float(sample.value)
    raise UserError(f"{door.url}/metrics: no {PAUSE}")


def _within(told: Mapping[str, Any]) -> bool:
    """Whether what the endpoint promises was measured: at one and at several requests a time."""
    swaps = told["swap"].values()
    return (
        all(row["added_p50_ms"] <= ADDED_MS for row in told["latency"] if row["at_once"] == 1)
        and all(row["throughput_ratio"] >= THROUGHPUT for row in told["latency"])
        and all(each["pause_p95_ms"] <= PAUSE_MS for each in swaps)
        and not any(each["failed_swaps"] + each["failed_answers"] for each in swaps)
        and ("rollback" not in told or rollbacks.within(told["rollback"]))
    )
