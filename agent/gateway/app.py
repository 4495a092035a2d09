"""The endpoint: ``create_app`` puts the parts together."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.types import ASGIApp

from agent.errors import UserError
from agent.gateway import paths
from agent.gateway.capture import Capture, Verifier, Verify
from agent.gateway.doorkeeper import ONE_MODEL, Door, Doorkeeper
from agent.gateway.hold import Admission, Recover, Route
from agent.gateway.keys import KeyStore, Quota
from agent.gateway.metrics import Metrics
from agent.gateway.paths import GatewayParts, Kept
from agent.gateway.requests import read_chat, read_completion
from agent.gateway.settings import GatewayOptions
from agent.gateway.upstream import TransportLine, Upstream
from agent.store.experience import ExperienceStore
from agent.store.forget import expire

STOP_S = 20.0  # for rows and verdicts to be written at the end
RETENTION_EVERY_S = 3600.0
DAY_S = 86_400.0


def create_app(
    settings: GatewayOptions,
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
    service = GatewayParts(
        settings=settings,
        admission=_admission(settings, Route(version, _upstream(settings, upstream)), metrics),
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
    return Endpoint(service)


def engine_at(settings: GatewayOptions, socket: Path) -> Upstream:
    """An engine behind a socket, with the gateway's timeouts."""
    return Upstream.at(
        socket,
        connect_timeout_s=settings.connect_timeout_s,
        idle_timeout_s=settings.idle_timeout_s,
        retry_after_s=settings.retry_after_s,
    )


def _upstream(settings: GatewayOptions, engine: httpx.AsyncBaseTransport | Path) -> Upstream:
    if isinstance(engine, Path):
        return engine_at(settings, engine)
    timeout = httpx.Timeout(
        settings.idle_timeout_s,
        connect=settings.connect_timeout_s,
        pool=settings.connect_timeout_s,
    )
    return Upstream(TransportLine(engine, timeout), settings.retry_after_s)


def _admission(settings: GatewayOptions, route: Route, metrics: Metrics) -> Admission:
    return Admission(
        route=route,
        max_in_flight=settings.max_in_flight,
        max_queued=settings.max_queued,
        queue_timeout_s=settings.queue_timeout_s,
        retry_after_s=settings.retry_after_s,
        on_pause=metrics.pause.observe,
        on_mixed=metrics.mixed.inc,
    )


def _watch(service: GatewayParts) -> None:
    gate, watch = service.admission, service.metrics.watch
    watch("in_flight", "Requests inside the engine", lambda: gate.in_flight)
    watch("queued", "Requests waiting to enter", lambda: gate.queued)
    watch("paused", "1 while a swap holds the door", lambda: gate.lease is not None)
    watch("capture_backlog", "Rows and verdicts not yet written", lambda: service.capture.backlog)


DOORS = {
    b"/v1/chat/completions": Door("chat.completions", "POST", paths.completer(read_chat)),
    b"/v1/completions": Door("completions", "POST", paths.completer(read_completion)),
    b"/v1/models": Door("models", "GET", paths.list_models),
    ONE_MODEL: Door("model", "GET", paths.one_model),
    b"/v1/feedback": Door("feedback", "POST", paths.give_feedback),
    b"/v1/rewards": Door("rewards", "GET", paths.list_rewards),
    b"/healthz": Door("healthz", "GET", paths.health),
    b"/metrics": Door("metrics", "GET", paths.metrics_text),
    b"/openapi.json": Door("openapi", "GET", paths.description),
}


class Endpoint(Starlette):
    """Its begin, its end and its state are Starlette's; who gets where is the doorkeeper's."""

    def __init__(self, service: GatewayParts) -> None:
        super().__init__(lifespan=_lifespan)
        self.state.service = service

    def build_middleware_stack(self) -> ASGIApp:
        """One layer: the doorkeeper finds the path, and answers every error in OpenAI's shape."""
        service: GatewayParts = self.state.service
        return Doorkeeper(
            self.router,
            DOORS,
            metrics=service.metrics,
            version=lambda: service.admission.route.version,
            loopback_only=lambda: service.keys.open,
        )


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    service: GatewayParts = app.state.service
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


async def _retention(service: GatewayParts) -> None:
    """Delete what is older than the settings allow, now and every hour."""
    while service.settings.retention_days:
        before = time.time() - service.settings.retention_days * DAY_S
        with suppress(SQLAlchemyError):  # a busy database is tried again an hour later
            await asyncio.to_thread(expire, service.store, before)
        await asyncio.sleep(RETENTION_EVERY_S)
