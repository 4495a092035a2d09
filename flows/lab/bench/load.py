"""Clients that measure latency and throughput of two endpoints for the same requests.

Measurements of the two are interleaved in changing order, so that other load on the machine
affects both alike.
"""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from agent.errors import UserError

PATH = "/v1/chat/completions"
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: an address or a unix socket; ``extra`` fields are added to them."""

    name: str
    url: str
    socket: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Burst:
    """What one burst of requests took, in seconds."""

    latencies: tuple[float, ...]
    seconds: float


class Client:
    """Sends requests to one endpoint; every prompt is new, so that no answer comes from a cache."""

    def __init__(
        self, session: aiohttp.ClientSession, door: Target, body: Mapping[str, Any]
    ) -> None:
        self._session, self._door, self._body = session, door, body
        self._numbers = itertools.count()

    async def answer(self) -> float:
        """Seconds of one whole answer."""
        began = time.perf_counter()
        async with self._post(stream=False) as reply:
            await reply.read()
        return time.perf_counter() - began

    async def first_token(self) -> float:
        """Seconds to the first event of a stream, which is then read to its end."""
        began = time.perf_counter()
        async with self._post(stream=True) as reply:
            await reply.content.readline()
            first = time.perf_counter() - began
            await reply.read()
        return first

    async def stream(self) -> bool:
        """Whether a streamed answer came whole, from one version."""
        async with self._post(stream=True) as reply:
            text = await reply.text()
        version = reply.headers.get("x-model-version", "")
        whole = text.rstrip().endswith("data: [DONE]") and '"error"' not in text
        return whole and text.count(f'"system_fingerprint":"{version}"') == text.count("data: {")

    async def burst(self, requests: int, at_once: int) -> Burst:
        """So many answers with so many under way at any time."""
        left = iter(range(requests))
        latencies: list[float] = []

        async def work() -> None:
            for _ in left:
                latencies.append(await self.answer())

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(at_once)))
        return Burst(tuple(latencies), time.perf_counter() - began)

    @asynccontextmanager
    async def _post(self, *, stream: bool) -> AsyncIterator[aiohttp.ClientResponse]:
        text = f"Question {next(self._numbers)}: Tom has 3 pens and buys 4. How many?"
        messages = [{"role": "user", "content": text}]
        body = {**self._body, **self._door.extra, "messages": messages, "stream": stream}
        async with self._session.post(self._door.url + PATH, json=body) as reply:
            if reply.status != 200:
                reason = " ".join((await reply.text()).split())[:200]
                raise UserError(f"{self._door.name}: HTTP {reply.status} {reason}")
            yield reply


@asynccontextmanager
async def clients(doors: Sequence[Target], body: Mapping[str, Any]) -> AsyncIterator[list[Client]]:
    """One client a door, with as many connections as it needs."""
    sessions = [
        aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(door.socket), limit=0)
            if door.socket
            else aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(TIMEOUT_S),
        )
        for door in doors
    ]
    try:
        yield [Client(s, door, body) for s, door in zip(sessions, doors, strict=True)]
    finally:
        for session in sessions:
            await session.close()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
