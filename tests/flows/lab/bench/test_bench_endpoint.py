"""The endpoint's bench: its figures, and its clients against doors whose delays are known."""

import asyncio
from typing import Any

import pytest
from aiohttp import web

from agent.errors import UserError
from flows.lab.bench.endpoint import EndpointBench, compared, table
from flows.lab.bench.load import Burst, Target, clients, percentile
from flows.lab.bench.swapping import rollbacks_within

pytestmark = pytest.mark.proof


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([7.0], 0.5) == 7.0


def test_a_door_that_adds_a_millisecond_and_a_tenth_of_the_time_says_so() -> None:
    direct = [Burst((0.010, 0.012, 0.014), 0.030), Burst((0.010, 0.012, 0.014), 0.040)]
    slower = [Burst(tuple(s + 0.001 for s in b.latencies), b.seconds / 0.9) for b in direct]
    row = compared(8, direct, slower, cpu_s=0.022)
    assert row["added_p50_ms"] == pytest.approx(1.0)
    assert row["added_p99_ms"] == pytest.approx(1.0)
    assert row["throughput_ratio"] == pytest.approx(0.9)
    assert row["gateway_cpu_ms"] == pytest.approx(1.0)  # of 2 bursts of 3, and 2 of 8 before them


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(UserError, match="counts from 1"):
        EndpointBench(turns=0)


def test_a_client_counts_whole_streams_and_measures_the_first_event() -> None:
    """A server that waits 20 ms before the first event, 30 ms after it, and cuts some streams."""
    cut: list[bool] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await request.json()
        if not body["stream"]:
            return web.json_response({})
        reply = web.StreamResponse(headers={"x-model-version": "v"})
        await reply.prepare(request)
        await asyncio.sleep(0.02)
        await reply.write(b'data: {"system_fingerprint":"v"}\n\n')
        await asyncio.sleep(0.03)
        if not cut:
            await reply.write(b"data: [DONE]\n\n")
        return reply

    async def run() -> tuple[float, list[bool], int]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            async with clients([Target("d", f"http://127.0.0.1:{port}")], {}) as (client,):
                first = await client.first_token()
                whole = [await client.stream()]
                cut.append(True)
                whole.append(await client.stream())
                burst = await client.burst(7, 3)
        finally:
            await runner.cleanup()
        return first, whole, len(burst.latencies)

    first, whole, answered = asyncio.run(run())
    assert first >= 0.02
    assert whole == [True, False]
    assert answered == 7


def test_the_table_names_every_measurement() -> None:
    swaps = {
        "swaps": 4, "failed_swaps": 0, "failed_answers": 1, "pause_p50_ms": 100.0,
        "pause_p95_ms": 120.0,
    }  # fmt: skip
    told: dict[str, Any] = {
        "latency": [compared(1, [Burst((0.01,), 0.01)], [Burst((0.011,), 0.011)], 0.0)],
        "first_token": {"direct_ms": 1.0, "added_ms": 0.5},
        "swap": {"idle": swaps, "under 8 streams": swaps},
    }
    assert table(told).row_count == 4
    times = {"served_p50_s": 0.2, "served_max_s": 0.3, "whole_p50_s": 0.4, "whole_max_s": 2.1}
    told["rollback"] = {"act": times, "command": times}
    assert table(told).row_count == 6
    assert not rollbacks_within(told["rollback"])
    assert rollbacks_within({"act": times | {"whole_max_s": 1.9}})
