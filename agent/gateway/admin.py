"""The controller's side of the endpoint, on its own socket: hold, release, flip, drain, state.

POST /hold {"max_wait_s", "deadline_s"?, "wait"?}   -> {"lease", "version"}; 409 when answers run on
POST /renew {"lease", "deadline_s"}                 -> state
POST /release {"version", "lease"?, "socket"?}      -> state; stamps the version and opens
POST /flip {"version", "socket"}                    -> state; new requests go to another engine
POST /retire {"version"}                            -> state; a warm engine's version is refused
POST /drain                                         -> state; nobody is admitted any more
GET  /drain ?version=&wait_s=                       -> {"in_flight", "drained"}
GET  /state, /version, /metrics
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
from agent.gateway.fields import Strict
from agent.gateway.hold import HoldConflictError
from agent.gateway.paths import GatewayParts
from agent.gateway.requests import parse
from agent.gateway.upstream import Upstream

POLL_S = 0.01
MAX_WAIT_S = 3600.0

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12,64}$")]
Seconds = Annotated[float, Field(gt=0, le=MAX_WAIT_S)]


class HoldRequest(Strict):
    """Stop admitting; ``deadline_s`` after the beginning the lease runs out."""

    max_wait_s: Annotated[float, Field(ge=0, le=MAX_WAIT_S)]
    deadline_s: Seconds | None = None
    wait: bool = True


class RenewRequest(Strict):
    """Move the deadline."""

    lease: str
    deadline_s: Seconds


class ReleaseRequest(Strict):
    """Which weights the engine has now."""

    version: Digest
    lease: str | None = None
    socket: str | None = None


class FlipRequest(Strict):
    """Another engine, warm and verified."""

    version: Digest
    socket: str


class RetireRequest(Strict):
    """A version whose engine is about to be stopped."""

    version: Digest


def create_admin(public: Starlette) -> Starlette:
    """The admin application of a public one; it must listen on a private socket only."""
    admin = Starlette(
        routes=[
            Route("/hold", hold, methods=["POST"]),
            Route("/renew", renew, methods=["POST"]),
            Route("/release", release, methods=["POST"]),
            Route("/flip", flip, methods=["POST"]),
            Route("/retire", retire, methods=["POST"]),
            Route("/drain", drain, methods=["POST"]),
            Route("/drain", drained, methods=["GET"]),
            Route("/state", state, methods=["GET"]),
            Route("/version", version, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ],
        exception_handlers={ApiError: _refused, HoldConflictError: _conflict},
    )
    admin.state.service = public.state.service
    return admin


async def hold(request: Request) -> Response:
    """Return when nobody is inside any more; the default lease is the wait and a minute."""
    _, asked = parse(await request.body(), HoldRequest)
    gate = _service(request).admission
    deadline_s = asked.deadline_s or asked.max_wait_s + 60.0
    lease = await gate.hold(asked.max_wait_s, deadline_s, wait=asked.wait)
    return _json({"lease": lease, "version": gate.route.version, "in_flight": gate.in_flight})


async def renew(request: Request) -> Response:
    """More time for the same hold."""
    _, asked = parse(await request.body(), RenewRequest)
    _service(request).admission.renew(asked.lease, asked.deadline_s)
    return await state(request)


async def release(request: Request) -> Response:
    """Open the door with the version that answers from now on."""
    _, asked = parse(await request.body(), ReleaseRequest)
    to = _engine(request, asked.socket) if asked.socket else None
    _service(request).admission.release(asked.version, asked.lease, to)
    return await state(request)


async def flip(request: Request) -> Response:
    """Send new requests to another engine at once."""
    _, asked = parse(await request.body(), FlipRequest)
    _service(request).admission.flip(asked.version, _engine(request, asked.socket))
    return await state(request)


async def retire(request: Request) -> Response:
    """Refuse a warm version and close the connections to its engine."""
    _, asked = parse(await request.body(), RetireRequest)
    route = _service(request).admission.retire(asked.version)
    await route.upstream.close()
    return await state(request)


async def drain(request: Request) -> Response:
    """The end: whoever comes is refused, whoever is inside is answered."""
    _service(request).admission.drain()
    return await state(request)


async def drained(request: Request) -> Response:
    """How many are inside (of one version), after waiting up to ``wait_s`` for none."""
    gate = _service(request).admission
    asked = request.query_params.get("version", "")
    try:
        wait_s = min(float(request.query_params.get("wait_s", "0")), MAX_WAIT_S)
    except ValueError:
        raise ApiError(400, "wait_s: not a number", param="wait_s") from None

    def inside() -> int:
        return sum(n for v, n in gate.by_version().items() if v.startswith(asked))

    until = asyncio.get_running_loop().time() + wait_s
    while inside() and asyncio.get_running_loop().time() < until:
        await asyncio.sleep(POLL_S)
    return _json({"in_flight": inside(), "drained": inside() == 0, "draining": gate.draining})


async def state(request: Request) -> Response:
    """Everything a controller or a status view wants to know."""
    service = _service(request)
    gate = service.admission
    left = gate.lease and gate.lease.deadline - asyncio.get_running_loop().time()
    return _json(
        {
            "version": gate.route.version,
            "held": gate.lease is not None,
            "lease": gate.lease and gate.lease.id,
            "deadline_in_s": left,
            "recovering": bool(gate.lease and gate.lease.recovering),
            "draining": gate.draining,
            "in_flight": gate.in_flight,
            "in_flight_by_version": gate.by_version(),
            "queued": gate.queued,
            "warm": sorted(gate.warm),
            "capture_backlog": service.capture.backlog,
        }
    )


async def version(request: Request) -> Response:
    """The whole digest served now."""
    return _json({"version": _service(request).admission.route.version})


async def metrics(request: Request) -> Response:
    """The same numbers as the public path, without a key."""
    return Response(_service(request).metrics.exposition(), media_type="text/plain; version=0.0.4")


def _service(request: Request) -> GatewayParts:
    service: GatewayParts = request.app.state.service
    return service


def _engine(request: Request, socket: str) -> Upstream:
    """The engine on that socket: one already known keeps its connections."""
    gate = _service(request).admission
    for route in (gate.route, *gate.warm.values()):
        if route.upstream.socket == Path(socket):
            return route.upstream
    return engine_at(_service(request).settings, Path(socket))


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _conflict(_request: Request, error: Exception) -> Response:
    return ApiError(409, str(error), code="hold_conflict").response()
