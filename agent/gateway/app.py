"""The endpoint's public application: ``create_app`` puts the parts of a gateway together."""

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
from agent.gateway.allow_list import ONE_MODEL, AllowList, PublicPath
from agent.gateway.capture import Capture
from agent.gateway.exchange import GatewayParts, Versions
from agent.gateway.hold import Admission, Recover, Route
from agent.gateway.keys import KeyStore, Quota
from agent.gateway.metrics import Metrics
from agent.gateway.requests import ServedModel, read_chat, read_completion, read_responses
from agent.gateway.upstream import CONNECT_TIMEOUT_S, TransportLine, Upstream
from agent.gateway.verifier import Check, Verifier, Verify
from agent.sections_running import GatewaySettings
from agent.store.experience import ExperienceStore
from agent.store.forget import expire

STOP_S = 20.0  # for rows and verdicts to be written at the end
RETENTION_EVERY_S = 3600.0
DAY_S = 86_400.0


def create_app(
    settings: GatewaySettings,
    model: ServedModel,
    *,
    upstream: httpx.AsyncBaseTransport | Path,
    verify: Verify,
    check: Check = lambda _task, _row: None,
    experience: ExperienceStore,
    version: str,
    keys: KeyStore | None = None,
    recover: Recover | None = None,
    versions: Versions | None = None,
) -> Starlette:
    """The public application; its ``state.parts`` is what ``admin.create_admin`` works on.

    upstream: the engine's socket, or a transport in its place. verify, check: see
    ``verifier``. version: digest of the weights the engine serves now. keys: where None, those of
    ``experience``; beyond this machine there must be one from the start. recover: called with
    that digest when a hold runs out; it restores the engine and returns the digest served then.
    versions: those beside the champion. UserError where the settings contradict each other.
    """
    keys = keys or KeyStore(experience, open_until_first=settings.loopback)
    if not settings.loopback and not keys.list_keys():
        raise UserError(f"host: {settings.host} without keys; allowed: 127.0.0.1, or create a key")
    metrics = Metrics()
    parts = GatewayParts(
        settings=settings,
        model=model,
        admission=_admission(settings, Route(version, _upstream(settings, upstream)), metrics),
        capture=Capture(
            experience,
            Verifier(verify, settings.verify_workers, settings.verify_timeout_s, check),
            settings.capture_backlog,
            on_verdict=metrics.verdict,
            on_drop=metrics.dropped.inc,
        ),
        quota=Quota(settings.rate, settings.token_quota),
        metrics=metrics,
        store=experience,
        keys=keys,
        versions=versions or Versions(),
    )
    # After the parts: a lease that runs out asks for the engine of the moment through them.
    parts.admission.recover = recover
    _watch(parts)
    return GatewayApp(parts)


def engine_at(settings: GatewaySettings, socket: Path) -> Upstream:
    """An engine behind a socket, with the gateway's timeouts."""
    return Upstream.at(
        socket,
        silence_timeout_s=settings.silence_timeout_s,
        retry_after_s=settings.retry_after_s,
    )


def _upstream(settings: GatewaySettings, engine: httpx.AsyncBaseTransport | Path) -> Upstream:
    if isinstance(engine, Path):
        return engine_at(settings, engine)
    timeout = httpx.Timeout(
        settings.silence_timeout_s, connect=CONNECT_TIMEOUT_S, pool=CONNECT_TIMEOUT_S
    )
    return Upstream(TransportLine(engine, timeout), settings.retry_after_s)


def _admission(settings: GatewaySettings, route: Route, metrics: Metrics) -> Admission:
    return Admission(
        route=route,
        max_in_flight=settings.max_in_flight,
        max_queued=settings.max_queued,
        queue_timeout_s=settings.queue_timeout_s,
        retry_after_s=settings.retry_after_s,
        on_pause=metrics.pause.observe,
        on_mixed=metrics.mixed.inc,
    )


def _watch(parts: GatewayParts) -> None:
    admission, watch = parts.admission, parts.metrics.watch
    watch("in_flight", "Requests inside the engine", lambda: admission.in_flight)
    watch("queued", "Requests waiting to enter", lambda: admission.queued)
    watch("paused", "1 while a swap holds admission", lambda: admission.lease is not None)
    watch("capture_backlog", "Rows and verdicts not yet written", lambda: parts.capture.backlog)


PUBLIC_PATHS = {
    b"/v1/chat/completions": PublicPath("chat.completions", "POST", paths.completer(read_chat)),
    b"/v1/completions": PublicPath("completions", "POST", paths.completer(read_completion)),
    b"/v1/responses": PublicPath("responses", "POST", paths.completer(read_responses)),
    b"/v1/models": PublicPath("models", "GET", paths.list_models),
    ONE_MODEL: PublicPath("model", "GET", paths.one_model),
    b"/v1/feedback": PublicPath("feedback", "POST", paths.give_feedback),
    b"/v1/rewards": PublicPath("rewards", "GET, POST", paths.rewards),
    b"/healthz": PublicPath("healthz", "GET", paths.health),
    b"/metrics": PublicPath("metrics", "GET", paths.metrics_text),
    b"/openapi.json": PublicPath("openapi", "GET", paths.description),
}


class GatewayApp(Starlette):
    """Starlette's lifespan and state around an ``AllowList``, which does the routing."""

    def __init__(self, parts: GatewayParts) -> None:
        super().__init__(lifespan=_lifespan)
        self.state.parts = parts

    def build_middleware_stack(self) -> ASGIApp:
        """One layer in place of Starlette's own: fewer calls for each request."""
        parts: GatewayParts = self.state.parts
        return AllowList(
            self.router,
            PUBLIC_PATHS,
            metrics=parts.metrics,
            version=lambda: parts.admission.route.version,
            loopback_only=lambda: parts.keys.open,
        )


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    """Order at the end: admission ends, then rows are written, then engines let go."""
    parts: GatewayParts = app.state.parts
    await parts.capture.start()
    background = [
        asyncio.create_task(_retention(parts)),
        asyncio.create_task(parts.keys.until_closed()),
    ]
    try:
        yield
    finally:
        for task in background:
            task.cancel()
        parts.admission.drain()
        await parts.capture.stop(STOP_S)
        for route in (parts.admission.route, *parts.admission.warm.values()):
            await route.upstream.close()


async def _retention(parts: GatewayParts) -> None:
    """Delete what is older than the settings allow, now and every hour."""
    while True:
        before = time.time() - parts.settings.retention_days * DAY_S
        with suppress(SQLAlchemyError):  # a busy database is tried again an hour later
            await asyncio.to_thread(expire, parts.store, before)
        await asyncio.sleep(RETENTION_EVERY_S)
