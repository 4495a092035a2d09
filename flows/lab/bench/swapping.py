"""Length of the pause that swaps cause, with and without streaming clients."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from agent.errors import UserError
from deploy.serving.controller import change
from deploy.serving.served import Served
from flows.lab.bench.load import Client, Target, percentile
from flows.service import Service
from flows.show.progress import Reporter

PAUSE = "anchorage_swap_pause_seconds_sum"
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
