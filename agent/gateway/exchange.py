"""One request with the engine: admitted, sent, answered, recorded; or cancelled."""

import asyncio
import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

import httpx
import orjson
from starlette.responses import Response
from starlette.types import Receive

from agent.gateway.answers import Answered, AnswerForm, ChatAnswer, ResponsesAnswer, aborted
from agent.gateway.capture import Capture
from agent.gateway.errors import ApiError, answer_timeout, bad_gateway, unavailable, until_gone
from agent.gateway.hold import Admission, CandidateTrial, Route, Ticket
from agent.gateway.keys import LOCAL, KeyStore, Principal, Quota
from agent.gateway.metrics import Metrics
from agent.gateway.requests import Call, ServedModel
from agent.gateway.upstream import Reply
from agent.sections_running import GatewaySettings
from agent.store.experience import SHADOW, ExperienceStore, Interaction, Status

UNFOLLOWABLE = "response_format or tools: the engine cannot follow this schema"
PIN = re.compile("[0-9a-f]{12,64}")  # a digest, or its first characters, in `name@digest`
CHAMPION = "champion"


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions beside the champion, as the installation knows them; each is read when needed.

    kept: digests whose weights are on disk. named: digest by name (anchor, previous). standby: the
    digest the engine behind a socket was started with, which is another one once a swap has begun
    to start that engine anew.
    """

    kept: Callable[[], Sequence[str]] = tuple
    named: Callable[[], Mapping[str, str]] = dict
    standby: Callable[[Path], str | None] = lambda _socket: None


@dataclass(slots=True)
class GatewayParts:
    """The parts of one gateway; its handlers find them as ``app.state.parts``."""

    settings: GatewaySettings
    model: ServedModel
    admission: Admission
    capture: Capture
    quota: Quota
    metrics: Metrics
    store: ExperienceStore
    keys: KeyStore
    versions: Versions
    shadows: "set[asyncio.Task[None]]" = field(default_factory=set)  # answers that nobody sees

    def served(self) -> list[Route]:
        """The champion's route, then those of other engines that still hold their version."""
        trial = self.admission.trial
        seen = [trial.route] if trial is not None and not trial.shadow else []
        others = [*seen, *self.admission.warm.values()]
        return [self.admission.route, *(route for route in others if self._holds(route))]

    def _holds(self, route: Route) -> bool:
        socket = route.upstream.socket
        return socket is None or self.versions.standby(socket) == route.version

    def digest_of(self, name: str) -> str | None:
        """The digest a version's name means: champion, a name of the installation, or a prefix."""
        if name == CHAMPION:
            return self.admission.route.version
        return name if PIN.fullmatch(name) else self.versions.named().get(name)


@dataclass(slots=True)
class Exchange:
    """One request's state. ``close`` gives everything back and may be called at any moment."""

    parts: GatewayParts
    call: Call
    principal: Principal
    inference_id: str
    created: float = field(default_factory=time.time)
    began: float = field(default_factory=time.perf_counter)
    ticket: Ticket | None = None
    reply: Reply | None = None
    answered: Answered = field(default_factory=Answered)
    form: AnswerForm | None = None  # once the version is known
    recorded: bool = False
    shadow: bool = False  # answered by a candidate for the record alone

    async def respond(self, receive: Receive) -> Response | None:
        """The whole answer, or None with ``reply`` open for a stream.

        ApiError where there is none; ClientGoneError when the client left first.
        """
        self.parts.capture.begin(self.inference_id)
        try:
            return await until_gone(receive, self._ask())
        except BaseException as error:
            if self._engine_failed(error):
                self.finish("error")
            self.close()
            if self.reply is not None:
                await self.reply.close()
            raise

    @property
    def route(self) -> Route:
        """Where this request was admitted to."""
        assert self.ticket is not None
        return self.ticket.route

    def close(self) -> None:
        """Leave the engine; nothing more will be recorded."""
        if self.ticket is not None:
            self.parts.admission.leave(self.ticket)
        if not self.recorded:
            self.recorded = True
            self.parts.capture.end(self.inference_id)

    def finish(self, status: Status) -> None:
        """Record the answer, and leave the engine."""
        if self.recorded:
            return
        self.recorded = True
        row = self._row(status)
        self.parts.capture.submit(row, self.call)
        self.parts.metrics.answers.labels(row.version[:12], self._kind(), status).inc()
        self.parts.metrics.tokens.labels("prompt").inc(row.prompt_tokens)
        self.parts.metrics.tokens.labels("completion").inc(row.completion_tokens)
        if not self.shadow:
            self.parts.quota.spend(self.principal.owner, row.prompt_tokens + row.completion_tokens)
            self._begin_shadow(status)
        self.close()

    def _kind(self) -> str:
        trial, plain = self.parts.admission.trial, self.call.model == self.parts.model.name
        tried = trial is not None and plain and self.route == trial.route
        return "shadow" if self.shadow else "trial" if tried else "served"

    def first_event(self) -> None:
        """Note how long a stream took to begin."""
        self.parts.metrics.first_token.observe(time.perf_counter() - self.began)

    def refuse_mixed(self) -> None:
        """ApiError when the weights changed while this answer was generated."""
        assert self.ticket is not None
        if self.ticket.mixed:
            message = "the weights changed during this answer"
            raise unavailable(message, "version_changed", self.parts.settings.retry_after_s)

    def _engine_failed(self, error: BaseException) -> bool:
        """Whether the engine failed this request, rather than the client or a swap."""
        inside = self.ticket is not None and not self.ticket.mixed
        return inside and isinstance(error, ApiError) and error.status >= 500

    async def _ask(self) -> Response | None:
        """Wait for a place, then ask the engine.

        The route is looked up twice: before, so that a model that is not served needs no place in
        the queue, and after, because a swap may have ended while the request waited.
        """
        await self._requested_route()
        alone = self.principal == LOCAL
        self.ticket = await self.parts.admission.enter("" if alone else self.principal.owner)
        self.ticket.route = await self._requested_route()
        try:
            async with asyncio.timeout(self.parts.settings.answer_timeout_s):
                content = await self._content()
        except TimeoutError:
            raise answer_timeout() from None
        if content is None:
            return None
        assert self.reply is not None
        return self._whole(self.reply.status, content)

    async def _content(self) -> bytes | None:
        """The engine's answer; the champion's where a candidate on trial fails to begin one.

        A trial costs no client an answer. Its failure is recorded against its version.
        """
        if self._kind() != "trial":
            return await self._send(self._body())
        try:
            content = await self._send(self._body())
            if self.reply is None or self.reply.status < 500:
                return content
        except ApiError as error:
            if error.status < 500:
                raise
        failed = replace(self._row("error"), inference_id=uuid4().hex)
        self.parts.capture.submit(failed, self.call)
        self.parts.metrics.answers.labels(failed.version[:12], "trial", "error").inc()
        if self.reply is not None:
            await self.reply.close()
        assert self.ticket is not None
        self.ticket.route = self.parts.admission.route
        return await self._send(self._body())

    async def _send(self, body: bytes) -> bytes | None:
        """The engine's whole answer, or None where a stream has begun."""
        upstream = self.route.upstream
        self.reply = reply = await upstream.post(self.call.endpoint, body, self.inference_id)
        if self.call.stream and reply.status == httpx.codes.OK:
            return None
        try:
            return await reply.read()
        except httpx.HTTPError as error:
            raise upstream.failure(error) from error

    async def _requested_route(self) -> Route:
        """The champion or a candidate on trial, or the engine that holds the version of
        ``name@version``; else a 404.
        """
        if self.call.model == self.parts.model.name:
            trial = self._trial()
            return trial.route if trial and not trial.shadow else self.parts.admission.route
        name, _, version = self.call.model.rpartition("@")
        if name != self.parts.model.name:
            raise unknown_model(self.call.model, self.parts)
        # Names and slots are read from the installation's files and database.
        digest, served = await asyncio.to_thread(
            lambda: (self.parts.digest_of(version), self.parts.served())
        )
        for route in served:
            if digest is not None and route.version.startswith(digest):
                return route
        raise unknown_model(self.call.model, self.parts, digest)

    def _trial(self) -> CandidateTrial | None:
        """The trial this request is in, with all of its session, or else of its principal."""
        if self.call.model != self.parts.model.name:
            return None
        return self.parts.admission.on_trial(f"{self.principal.owner}\0{self.call.session_id}")

    def _begin_shadow(self, status: Status) -> None:
        """Have a candidate answer the same request once the client has its answer.

        Dropped while as many are under way as requests may be inside the engine.
        """
        trial, shadows = self._trial(), self.parts.shadows
        if trial is None or not trial.shadow or status != "ok":
            return
        if len(shadows) < self.parts.settings.max_in_flight:
            payload = {k: v for k, v in self.call.payload.items() if not k.startswith("stream")}
            call = replace(self.call, payload=payload, stream=False, responses=None)
            twin = Exchange(
                self.parts, call, self.principal, uuid4().hex, ticket=Ticket(trial.route)
            )
            twin.shadow = True
            task = asyncio.create_task(twin.in_shadow())
            shadows.add(task)
            task.add_done_callback(shadows.discard)

    async def in_shadow(self) -> None:
        """Ask, record, and show it to nobody."""
        try:
            async with asyncio.timeout(self.parts.settings.answer_timeout_s):
                content = await self._send(self._body())
            assert self.reply is not None
            self._whole(self.reply.status, content or b"")
        except (ApiError, TimeoutError):
            self.finish("error")
        finally:
            if self.reply is not None:
                await self.reply.close()

    def _body(self) -> bytes:
        """The request for the engine, with the engine's model name and a salt of its cache.

        The salt keeps cached prefixes apart by version, because a change of weights does not clear
        them, and by principal, so that the time an answer takes shows nothing of others' prompts.
        """
        salt = f"{self.route.version}\0{self.principal.owner}".encode()
        extra = {
            "model": self.parts.model.upstream_name,
            "cache_salt": hashlib.sha256(salt).hexdigest(),
        }
        return orjson.dumps({**self.call.payload, **extra})

    def _whole(self, status: int, content: bytes) -> Response:
        """The stamped answer; ApiError where the engine refused, failed or broke off.

        An engine that is paused in abort mode reports success with ``finish_reason`` abort.
        """
        if status != httpx.codes.OK:
            raise engine_error(status, content, constrained=self.call.constrained)
        if aborted(content):
            self.finish("error")
            retry_after_s = self.parts.settings.retry_after_s
            raise unavailable("the engine broke off", "aborted", retry_after_s)
        self.refuse_mixed()
        try:
            self.answered.read(orjson.loads(content), text=self.call.captures_text)
            body = self.answer_form().whole(content)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise bad_gateway("the engine's answer is no completion", "engine_failed") from error
        self.finish("ok")
        headers = {"x-model-version": self.route.version[:12]}
        return Response(body, headers=headers, media_type="application/json")

    def answer_form(self) -> AnswerForm:
        """How this answer is written: as the engine does, or as the Responses API does."""
        if self.form is None:
            version, responses = self.route.version[:12], self.call.responses
            self.form = (
                ChatAnswer(version)
                if responses is None
                else ResponsesAnswer(responses, self.inference_id, version)
            )
        return self.form

    def _row(self, status: Status) -> Interaction:
        text = self.call.captures_text and status == "ok"
        return Interaction(
            inference_id=self.inference_id,
            created=self.created,
            endpoint=SHADOW if self.shadow else self.call.endpoint,
            model=self.parts.model.name,
            version=self.route.version,
            principal=self.principal.owner,
            status=status,
            latency_s=time.perf_counter() - self.began,
            prompt_tokens=self.answered.prompt_tokens,
            completion_tokens=self.answered.completion_tokens,
            response_id=(self.form and self.form.answer_id) or self.answered.response_id,
            answers=self.answered.answers() if text else (),
        )


def unknown_model(name: str, parts: GatewayParts, digest: str | None = None) -> ApiError:
    """OpenAI's answer for a model that is not there, with what is served instead."""
    version = f" (version {digest[:12]})" if digest else ""
    served = f"{parts.model.name} (version {parts.admission.route.version[:12]})"
    return ApiError(
        404,
        f"The model `{name}`{version} does not exist or is not being served; served: {served}",
        param="model",
        code="model_not_found",
    )


def engine_error(status: object, content: bytes, *, constrained: bool = False) -> ApiError:
    """The engine's own refusal in OpenAI's shape; its inner failures are not passed on.

    constrained: the request had a schema. vLLM ends a request whose grammar it cannot build, or
    whose grammar allows no token, with this message and lives on; other failures have other words.
    """
    if constrained and status == 500 and b'"Internal server error"' in content:
        return ApiError(400, UNFOLLOWABLE, param="response_format")
    if not isinstance(status, int) or not 400 <= status < 500:
        return bad_gateway("the engine failed", "engine_failed")
    try:
        error = orjson.loads(content)["error"]
        return ApiError(status, str(error["message"]), param=error.get("param"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ApiError(status, "the engine refused the request")
