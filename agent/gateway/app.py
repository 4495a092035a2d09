"""The endpoint: ``create_app`` puts the parts together."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.errors import UserError
from agent.gateway import paths
from agent.gateway.capture import Capture
from agent.gateway.doorkeeper import Doorkeeper
from agent.gateway.errors import ApiError
from agent.gateway.hold import Admission, Recover
from agent.gateway.hold import Route as EngineRoute
from agent.gateway.keys import KeyStore
from agent.gateway.metrics import Metrics
from agent.gateway.paths import Kept, Service
from agent.gateway.quota import Quota
from agent.gateway.requests import read_chat, read_completion
from agent.gateway.settings import GatewaySettings
from agent.gateway.upstream import TransportLine, Upstream
from agent.gateway.verify import Verifier, Verify
from agent.store.experience import ExperienceStore
from agent.store.forget import expire

STOP_S = 20.0  # for rows and verdicts to be written at the end
RETENTION_EVERY_S = 3600.0
DAY_S = 86_400.0


def create_app(
    settings: GatewaySettings,
    *,
    upstream: httpx.AsyncBaseTransport | Path,
    verify: Verify,
    experience: ExperienceStore,
    version: str,
    keys: KeyStore | None = None,
    recover: Recover | None = None,
    kept: Kept = tuple,
) -> Starlette:
    """The public application; its ``state.service`` is what ``admin.create_admin`` works on.

    upstream: the engine's socket, or a transport that plays the engine. verify: see
    ``verify.Verify``. version: digest of the weights the engine serves now. keys: where None, those
    of ``experience``; beyond this machine there must be one from the start. recover: called with
    that digest when a hold runs out; it restores the engine and returns the digest served then.
    kept: digests to list beside the champion. UserError where the settings contradict each other.
    """
    keys = keys or KeyStore(experience, open_until_first=settings.loopback)
    if not settings.loopback and not keys.list_keys():
        raise UserError(f"host: {settings.host} without keys; allowed: 127.0.0.1, or create a key")
    metrics = Metrics()
    service = Service(
        settings=settings,
        admission=_admission(
            settings, EngineRoute(version, _upstream(settings, upstream)), metrics
        ),
        capture=Capture(
            experience,
            Verifier(verify, settings.verify_workers, settings.verify_timeout_s),
            settings.capture_backlog,
            on_verdict=metrics.verdict,
            on_drop=metrics.dropped.inc,
        ),
        quota=Quota(settings.rate, settings.token_quota, settings.quota_storage),
        metrics=metrics,
        store=experience,
        keys=keys,
        kept=kept,
    )
    service.admission.recover = recover
    _watch(service)
    return _application(service)


def engine_at(settings: GatewaySettings, socket: Path) -> Upstream:
    """An engine behind a socket, with the gateway's timeouts."""
    return Upstream.at(
        socket,
        connect_timeout_s=settings.connect_timeout_s,
        idle_timeout_s=settings.idle_timeout_s,
        retry_after_s=settings.retry_after_s,
    )


def _upstream(settings: GatewaySettings, engine: httpx.AsyncBaseTransport | Path) -> Upstream:
    if isinstance(engine, Path):
        return engine_at(settings, engine)
    timeout = httpx.Timeout(
        settings.idle_timeout_s,
        connect=settings.connect_timeout_s,
        pool=settings.connect_timeout_s,
    )
    return Upstream(TransportLine(engine, timeout), settings.retry_after_s)


def _admission(settings: GatewaySettings, route: EngineRoute, metrics: Metrics) -> Admission:
    return Admission(
        route=route,
        max_in_flight=settings.max_in_flight,
        max_queued=settings.max_queued,
        queue_timeout_s=settings.queue_timeout_s,
        retry_after_s=settings.retry_after_s,
        on_pause=metrics.pause.observe,
        on_mixed=metrics.mixed.inc,
    )


def _watch(service: Service) -> None:
    gate, watch = service.admission, service.metrics.watch
    watch("in_flight", "Requests inside the engine", lambda: gate.in_flight)
    watch("queued", "Requests waiting to enter", lambda: gate.queued)
    watch("paused", "1 while a swap holds the door", lambda: gate.lease is not None)
    watch("capture_backlog", "Rows and verdicts not yet written", lambda: service.capture.backlog)


def _application(service: Service) -> Starlette:
    routes = [
        Route("/v1/chat/completions", paths.completer(read_chat), methods=["POST"]),
        Route("/v1/completions", paths.completer(read_completion), methods=["POST"]),
        Route("/v1/models", paths.list_models, methods=["GET"]),
        Route("/v1/models/{model:path}", paths.one_model, methods=["GET"]),
        Route("/v1/feedback", paths.give_feedback, methods=["POST"]),
        Route("/v1/rewards", paths.list_rewards, methods=["GET"]),
        Route("/healthz", paths.health, methods=["GET"]),
        Route("/metrics", paths.metrics_text, methods=["GET"]),
        Route("/openapi.json", paths.description, methods=["GET"]),
    ]
    door = Middleware(
        Doorkeeper,
        metrics=service.metrics,
        version=lambda: service.admission.route.version,
        loopback_only=lambda: service.keys.open,
    )
    app = Starlette(
        routes=routes,
        middleware=[door],
        lifespan=_lifespan,
        exception_handlers={HTTPException: _plain_error},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    service: Service = app.state.service
    await service.capture.start()
    background = [
        asyncio.create_task(_retention(service)),
        asyncio.create_task(service.keys.until_closed()),
    ]
    try:
        yield
    finally:
        for task in background:
            task.cancel()
        service.admission.drain()
        await service.capture.stop(STOP_S)
        for route in (service.admission.route, *service.admission.warm.values()):
            await route.upstream.close()


async def _retention(service: Service) -> None:
    """Delete what is older than the settings allow, now and every hour."""
    while service.settings.retention_days:
        before = time.time() - service.settings.retention_days * DAY_S
        with suppress(SQLAlchemyError):  # a busy database is tried again an hour later
            await asyncio.to_thread(expire, service.store, before)
        await asyncio.sleep(RETENTION_EVERY_S)


async def _plain_error(_request: Request, error: Exception) -> Response:
    """What the router itself refuses: a wrong method."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, error.detail, headers=error.headers).response()
