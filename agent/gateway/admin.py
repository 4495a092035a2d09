"""The admin application, for the controller of swaps; it listens on a private socket only.

POST /hold {"max_wait_s", "deadline_s"?, "wait"?}   -> {"lease", "version"}; 409 when answers run on
POST /release {"version", "lease"?, "socket"?}      -> state; stamps the version and admits again
POST /flip {"version", "socket"}                    -> state; new requests go to another engine
GET  /drain ?version=&wait_s=                       -> {"in_flight", "drained"}
GET  /state, /metrics
"""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import orjson
from pydantic import Field, StringConstraints
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.gateway.app import engine_at
from agent.gateway.errors import ApiError
from agent.gateway.exchange import GatewayParts
from agent.gateway.fields import Strict
from agent.gateway.hold import CandidateTrial, HoldConflictError
from agent.gateway.hold import Route as EngineRoute
from agent.gateway.requests import parse
from agent.gateway.upstream import Upstream

POLL_S = 0.01
MAX_WAIT_S = 3600.0

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12,64}$")]
Seconds = Annotated[float, Field(gt=0, le=MAX_WAIT_S)]


class HoldRequest(Strict):
    """Stop admitting; the lease runs out ``deadline_s`` after the request."""

    max_wait_s: Annotated[float, Field(ge=0, le=MAX_WAIT_S)]
    deadline_s: Seconds | None = None
    wait: bool = True


class ReleaseRequest(Strict):
    """The digest the engine has now, and the engine's socket where it is another one."""

    version: Digest
    lease: str | None = None
    socket: str | None = None


class FlipRequest(Strict):
    """The digest and the socket of another engine, started and verified."""

    version: Digest
    socket: str


class TrialRequest(FlipRequest):
    """A candidate on another engine, started and verified, for a share of the requests."""

    share: Annotated[float, Field(gt=0, lt=1)]
    shadow: bool = False
    salt: str
    deadline_s: Seconds


class TrialEnd(Strict):
    """The digest whose trial ends; another one's goes on."""

    version: Digest


def create_admin(public: Starlette) -> Starlette:
    """The admin application of a public one; it must listen on a private socket only."""
    admin = Starlette(
        routes=[
            Route("/hold", hold, methods=["POST"]),
            Route("/release", release, methods=["POST"]),
            Route("/flip", flip, methods=["POST"]),
            Route("/trial", begin_trial, methods=["POST"]),
            Route("/trial/end", end_trial, methods=["POST"]),
            Route("/drain", drained, methods=["GET"]),
            Route("/state", state, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ],
        exception_handlers={ApiError: _refused, HoldConflictError: _conflict},
    )
    admin.state.parts = public.state.parts
    return admin


async def hold(request: Request) -> Response:
    """Return when no request is inside any more; the default lease is the wait and a minute."""
    _, order = parse(await request.body(), HoldRequest)
    admission = _parts(request).admission
    deadline_s = order.deadline_s or order.max_wait_s + 60.0
    lease = await admission.hold(order.max_wait_s, deadline_s, wait=order.wait)
    version, in_flight = admission.route.version, admission.in_flight
    return _json({"lease": lease, "version": version, "in_flight": in_flight})


async def release(request: Request) -> Response:
    """Admit again, with the version that answers from now on."""
    _, order = parse(await request.body(), ReleaseRequest)
    to = _engine(request, order.socket) if order.socket else None
    _parts(request).admission.release(order.version, order.lease, to)
    return await state(request)


async def flip(request: Request) -> Response:
    """Send new requests to another engine at once."""
    _, order = parse(await request.body(), FlipRequest)
    _parts(request).admission.flip(order.version, _engine(request, order.socket))
    return await state(request)


async def begin_trial(request: Request) -> Response:
    """Send a share of the requests to a candidate, for ``deadline_s`` unless it is asked again."""
    _, order = parse(await request.body(), TrialRequest)
    until = asyncio.get_running_loop().time() + order.deadline_s
    admission = _parts(request).admission
    if order.version == admission.route.version:
        raise HoldConflictError("the champion itself cannot be on trial")
    route = EngineRoute(order.version, _engine(request, order.socket))
    admission.trial = CandidateTrial(route, order.share, order.shadow, order.salt, until)
    return await state(request)


async def end_trial(request: Request) -> Response:
    """Send everything to the champion again; answers that the candidate has begun end there.

    Those that nobody sees are given up: its engine stops next, and answers that the stop cuts
    would be counted as errors of the version.
    """
    _, order = parse(await request.body(), TrialEnd)
    parts = _parts(request)
    trial = parts.admission.trial
    if trial is not None and trial.route.version == order.version:
        parts.admission.trial = None
        for task in parts.shadows:
            task.cancel()
    return await state(request)


async def drained(request: Request) -> Response:
    """How many requests are inside (of one version), after waiting up to ``wait_s`` for none."""
    admission = _parts(request).admission
    version = request.query_params.get("version", "")
    try:
        wait_s = min(float(request.query_params.get("wait_s", "0")), MAX_WAIT_S)
    except ValueError:
        raise ApiError(400, "wait_s: not a number", param="wait_s") from None

    def inside() -> int:
        return sum(n for v, n in admission.by_version().items() if v.startswith(version))

    until = asyncio.get_running_loop().time() + wait_s
    while inside() and asyncio.get_running_loop().time() < until:
        await asyncio.sleep(POLL_S)
    return _json({"in_flight": inside(), "drained": inside() == 0, "draining": admission.draining})


async def state(request: Request) -> Response:
    """Version, hold, queue and backlog, for controllers and status views."""
    parts = _parts(request)
    admission = parts.admission
    lease = admission.lease
    return _json(
        {
            "version": admission.route.version,
            "held": lease is not None,
            "lease": lease and lease.id,
            "deadline_in_s": lease and lease.deadline - asyncio.get_running_loop().time(),
            "recovering": bool(lease and lease.recovering),
            "draining": admission.draining,
            "in_flight": admission.in_flight,
            "in_flight_by_version": admission.by_version(),
            "queued": admission.queued,
            "warm": sorted(admission.warm),
            "trial": _trial(admission.trial),
            "capture_backlog": parts.capture.backlog,
        }
    )


async def metrics(request: Request) -> Response:
    """The same numbers as the public path, without a key."""
    return Response(_parts(request).metrics.exposition(), media_type="text/plain; version=0.0.4")


def _trial(trial: CandidateTrial | None) -> dict[str, Any] | None:
    left_s = trial.until - asyncio.get_running_loop().time() if trial else 0.0
    if trial is None or left_s <= 0:
        return None
    about = {"version": trial.route.version, "share": trial.share, "shadow": trial.shadow}
    return about | {"deadline_in_s": left_s}


def _parts(request: Request) -> GatewayParts:
    parts: GatewayParts = request.app.state.parts
    return parts


def _engine(request: Request, socket: str) -> Upstream:
    """The engine on that socket: one already known keeps its connections."""
    parts = _parts(request)
    admission = parts.admission
    tried = [admission.trial.route] if admission.trial else []
    for route in (admission.route, *tried, *admission.warm.values()):
        if route.upstream.socket == Path(socket):
            return route.upstream
    return engine_at(parts.settings, Path(socket))


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _conflict(_request: Request, error: Exception) -> Response:
    return ApiError(409, str(error), code="hold_conflict").response()
