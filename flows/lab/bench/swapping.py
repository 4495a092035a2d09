"""Times of version changes on a running service: the pause of a swap, and rollbacks.

Swaps are measured with and without streaming clients. Rollbacks are measured twice, as a call of
`flows.serve.swaps.rollback` in this process and as the command `anchorage rollback`, whose times
include the start of a Python process:

    served    from the call until the earlier version is verified and chosen (serving.json)
    whole     from the call until everything is written (MLflow follows by itself)
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from agent.errors import UserError
from deploy.serving.controller import change
from deploy.serving.served import Served, read_served
from flows.lab.bench.load import Client, Target, percentile
from flows.serve import promote, swaps
from flows.service import Service
from flows.session import Session
from flows.show.terminal import Reporter, Silent

PAUSE = "anchorage_swap_pause_seconds_sum"
ROLLBACK_S = 2.0  # longest rollback by call
BETWEEN_S = 0.05  # so that every version answers some requests


@dataclass(frozen=True, slots=True)
class Shuttle:
    """The service, its endpoint and the two versions that are swapped."""

    service: Service
    door: Target
    versions: tuple[Served, Served]
    progress: Reporter


async def swapped(count: int, streams: int, gateway: Client, shuttle: Shuttle) -> dict[str, Any]:
    """Swap ``count`` times without clients, then with ``streams`` streaming clients."""
    if count == 0:
        return {}
    idle = await asyncio.to_thread(back_and_forth, count, shuttle, "idle")
    loaded, answers, failed = await _under_streams(
        streams, gateway, lambda: asyncio.to_thread(back_and_forth, count, shuttle, "busy")
    )
    return {
        "idle": idle | {"answers": 0, "failed_answers": 0},
        f"under {streams} streams": loaded | {"answers": answers, "failed_answers": failed},
    }


def back_and_forth(count: int, shuttle: Shuttle, what: str) -> dict[str, Any]:
    """Swap ``count`` times and measure each pause."""
    advance = shuttle.progress.track(f"swaps, {what}", count)
    pauses: list[float] = []
    failed = 0
    for done in range(count):
        before = _paused_s(shuttle.door)
        failed += not _swap(shuttle, shuttle.versions[(done + 1) % 2])
        pauses.append(1000 * (_paused_s(shuttle.door) - before))
        advance(done + 1)
        time.sleep(BETWEEN_S)
    return {
        "swaps": count,
        "failed_swaps": failed,
        "pause_p50_ms": percentile(pauses, 0.5),
        "pause_p95_ms": percentile(pauses, 0.95),
        "pause_max_ms": max(pauses),
    }


def _swap(shuttle: Shuttle, target: Served) -> bool:
    outcome = change(
        shuttle.service.home,
        target.digest,
        Path(target.directory),
        anchor=shuttle.service.anchor,
        record=lambda _event, _digest, _why: None,
    )
    return outcome.swapped


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
        result = await act()
    finally:
        stop.set()
        await asyncio.gather(*tasks)
    return result, len(whole), whole.count(False)


def _paused_s(door: Target) -> float:
    """All pauses of the gateway so far."""
    text = httpx.get(f"{door.url}/metrics", timeout=10).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == PAUSE:
                return float(sample.value)
    raise UserError(f"{door.url}/metrics: no {PAUSE}")


def rollbacks(
    service: Service, other: Served, count: int, progress: Reporter
) -> dict[str, dict[str, float]]:
    """Promote ``other`` and roll back ``count`` times by call and by command; seconds."""
    _make_known(service, other)
    session, root = Session(service, Silent()), str(service.home.root)
    if read_served(service.home).digest != service.champion():
        swaps.serve_champion(session)

    def act() -> None:
        swaps.rollback(session, service.anchor.digest, "a bench")

    def command() -> None:
        argv = [sys.executable, "-m", "flows.cli", "rollback", "previous", "--home", root, "--json"]
        finished = subprocess.run(argv, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise UserError(f"anchorage rollback: {finished.stderr.strip()}")

    timings = {}
    for name, back in (("act", act), ("command", command)):
        advance = progress.track(f"rollbacks, {name}", count)
        timings[name] = _timed_rollbacks(session, other, count, back, advance)
    return {"setup": {"count": count}, **timings}


def rollbacks_within(timings: Mapping[str, Any]) -> bool:
    """Whether every rollback by call was fast enough."""
    return bool(timings["act"]["whole_max_s"] <= ROLLBACK_S)


def _timed_rollbacks(
    session: Session,
    other: Served,
    count: int,
    back: Callable[[], None],
    advance: Callable[[int], None],
) -> dict[str, float]:
    service, served, whole = session.service, [], []
    chosen = service.home.serving_json
    for done in range(count):
        promote.promote(session, other.digest, "a bench")
        began = time.time()  # as files tell it
        back()
        whole.append(time.time() - began)
        if read_served(service.home).digest != service.anchor.digest:
            raise UserError(f"rollback: {read_served(service.home).digest} is served")
        served.append(chosen.stat().st_mtime - began)
        advance(done + 1)
    return {
        "served_p50_s": median(served),
        "served_max_s": max(served),
        "whole_p50_s": median(whole),
        "whole_max_s": max(whole),
    }


def _make_known(service: Service, other: Served) -> None:
    """Journal and ledger as after a round that made ``other`` and passed the gate."""
    anchor, run = service.anchor.digest, "0001-bench"
    service.journal.open_run(
        run,
        anchor_digest=anchor,
        parent_digest=anchor,
        target=service.target().name,
        run_seed=0,
        plan={},
        now=time.time(),
    )
    service.journal.finish(run, other.digest, "a bench", time.time())
    for state in ("PROPOSED", "EVALUATED", "PASSED"):
        service.record(other.digest, state, "a bench")
