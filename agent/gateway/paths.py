"""What each public path does. Order everywhere: who asks, then what, then whether it may.

The endpoint's description for tools, built from the models that check the requests.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import orjson
from pydantic.json_schema import models_json_schema
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from agent.gateway.errors import ApiError, ClientGoneError
from agent.gateway.exchange import Exchange, Gateway, unknown_model
from agent.gateway.fields import ChatRequest, CompletionRequest, FeedbackRequest
from agent.gateway.keys import KeyStore, Principal
from agent.gateway.requests import Call, parse
from agent.gateway.settings import GatewayOptions
from agent.gateway.stream import StreamedAnswer
from agent.store.experience import ExperienceStore
from agent.store.feedback import Feedback, FeedbackRefusedError, add

REF = "#/components/schemas/{model}"
ERROR = {"description": "An error in OpenAI's shape", "content": {"application/json": {}}}


def document() -> dict[str, Any]:
    """OpenAPI 3.1 of every public path."""
    models = (ChatRequest, CompletionRequest, FeedbackRequest)
    _, schemas = models_json_schema([(m, "validation") for m in models], ref_template=REF)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Anchorage", "version": "1"},
        "paths": {
            "/v1/chat/completions": {"post": _post("createChatCompletion", ChatRequest)},
            "/v1/completions": {"post": _post("createCompletion", CompletionRequest)},
            "/v1/feedback": {"post": _post("createFeedback", FeedbackRequest)},
            "/v1/models": {"get": _get("listModels")},
            "/v1/models/{model}": {"get": _get("retrieveModel", [_path("model")])},
            "/v1/rewards": {
                "get": _get("listRewards", [_query("since", "number"), _query("limit", "integer")])
            },
            "/healthz": {"get": _get("health")},
            "/metrics": {"get": _get("metrics")},
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(name: str, model: type) -> dict[str, Any]:
    schema = {"$ref": REF.format(model=model.__name__)}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return _get(name) | {"requestBody": body}


def _get(name: str, parameters: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    responses = {"2XX": {"description": "Done"}, "4XX": ERROR, "5XX": ERROR}
    return {"operationId": name, "parameters": parameters or [], "responses": responses}


def _query(name: str, kind: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": kind, "minimum": 0}}


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


BODY_TIMEOUT_S = 30.0  # for a request's body to arrive
SETTLE_S = 5.0  # for an answer's row to be written before feedback on it is looked up
MAX_REWARDS = 1000  # rows of one /v1/rewards answer
REFUSALS = {"unknown_inference": 404, "unknown_feedback": 404, "already_superseded": 409}
TEXT_FIELDS = frozenset({"prompt", "prompt_hash", "row_hash", "group_hash", "example"})

Read = Callable[[bytes, GatewayOptions], Call]
Kept = Callable[[], Sequence[str]]


@dataclass(slots=True)
class GatewayParts(Gateway):
    """The parts behind every path."""

    store: ExperienceStore
    keys: KeyStore
    kept: Kept


def completer(read: Read) -> Callable[[Request], Awaitable[Response]]:
    """The function of one kind of completion, which differ in how a request is read."""

    async def complete(request: Request) -> Response:
        service: GatewayParts = request.app.state.service
        principal = await _principal(request, "infer")
        call = read(await _body(request), service.settings)
        if call.task is not None:
            _allow(principal, "submit_task")
        await service.quota.take(principal.owner)
        exchange = Exchange(service, call, principal, request.state.request_id)
        return await exchange.respond(request.receive) or StreamedAnswer(exchange)

    return complete


async def list_models(request: Request) -> Response:
    """The champion under its plain name, then every kept version as ``name@digest``."""
    await _principal(request, "infer")
    return _json({"object": "list", "data": _models(request.app.state.service)})


async def one_model(request: Request) -> Response:
    """One entry of the list."""
    await _principal(request, "infer")
    name = request.scope["path"].removeprefix("/v1/models/")
    for model in _models(request.app.state.service):
        if model["id"] == name:
            return _json(model)
    raise unknown_model(name)


async def give_feedback(request: Request) -> Response:
    """Record an opinion: 201 when new, 200 when it was recorded before."""
    service: GatewayParts = request.app.state.service
    principal = await _principal(request, "feedback")
    _, checked = parse(await _body(request), FeedbackRequest)
    await service.quota.take(principal.owner)
    item = Feedback(
        feedback_id=checked.id or uuid4().hex,
        inference_id=checked.inference_id,
        principal=principal.owner,
        metric_name=checked.metric_name,
        value=float(checked.value),
        tags=checked.tags or {},
        rationale=checked.rationale,
        supersedes=checked.supersedes,
    )
    await service.capture.settle(item.inference_id.rpartition("-")[2], SETTLE_S)
    try:
        new = await asyncio.to_thread(
            add, service.store, item, time.time(), any_owner=principal.may("review")
        )
    except FeedbackRefusedError as error:
        raise ApiError(REFUSALS.get(error.reason, 409), str(error), code=error.reason) from None
    told = {"id": item.feedback_id, "object": "feedback", "weight": 0, "recorded": new}
    return _json(told | {"inference_id": item.inference_id}, 201 if new else 200)


async def list_rewards(request: Request) -> Response:
    """Verdicts on the caller's own answers (a reviewer sees all), oldest first, after ``since``."""
    service: GatewayParts = request.app.state.service
    principal = await _principal(request, "submit_task", "review")
    since = _number(request, "since", 0.0)
    limit = min(max(1, int(_number(request, "limit", MAX_REWARDS))), MAX_REWARDS)
    owner = None if principal.may("review") else principal.owner
    rows = await asyncio.to_thread(service.store.rewards, owner, since, limit)
    data = [{k: v for k, v in asdict(row).items() if k not in TEXT_FIELDS} for row in rows]
    next_since = rows[-1].judged if rows else since
    return _json({"object": "list", "data": data, "next_since": next_since})


async def health(request: Request) -> Response:
    """200 while requests can be answered or will be soon; 503 without an engine or at the end."""
    service: GatewayParts = request.app.state.service
    gate = service.admission
    reachable = await gate.route.upstream.reachable()
    state = "draining" if gate.draining else "held" if gate.lease else "ok"
    if state == "ok" and not reachable:
        state = "engine_unreachable"
    told = {"status": state, "model": service.settings.model, "version": gate.route.version[:12]}
    return _json(told, 200 if state in ("ok", "held") else 503)


async def metrics_text(request: Request) -> Response:
    """Prometheus' text format."""
    await _principal(request, "review")
    return Response(
        request.app.state.service.metrics.exposition(),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )


async def description(request: Request) -> Response:
    """The OpenAPI document."""
    return _json(document())


async def _principal(request: Request, *scopes: str) -> Principal:
    """Who asks, with at least one of the scopes; ApiError 401 or 403."""
    keys: KeyStore = request.app.state.service.keys
    who = await keys.principal(request.headers.get("authorization"))
    request.state.principal = who.owner
    _allow(who, *scopes)
    return who


def _allow(who: Principal, *scopes: str) -> None:
    if not any(who.may(scope) for scope in scopes):
        needed = " or ".join(scopes)
        raise ApiError(
            403,
            f"this key lacks the scope: {needed}",
            kind="permission_error",
            code="missing_scope",
        )


async def _body(request: Request) -> bytes:
    """The JSON body, bounded in size and time. Any other type a browser could send unasked."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "content-type: allowed: application/json")
    most = request.app.state.service.settings.max_body_bytes
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                size += len(piece)
                if size > most:
                    raise ApiError(413, f"body: allowed: at most {most} bytes", code="too_large")
                pieces.append(piece)
    except ClientDisconnect:
        raise ClientGoneError from None
    except TimeoutError:
        raise ApiError(408, "body: did not arrive in time") from None
    return b"".join(pieces)


def _models(service: GatewayParts) -> list[dict[str, object]]:
    gate, name = service.admission, service.settings.model
    served = [gate.route.version, *gate.warm]
    kept = [digest for digest in service.kept() if digest not in served]
    models: list[dict[str, object]] = [_model(name, gate.route.version, True)]
    models += [_model(f"{name}@{digest[:12]}", digest, True) for digest in served]
    return models + [_model(f"{name}@{digest[:12]}", digest, False) for digest in kept]


def _model(name: str, digest: str, served: bool) -> dict[str, object]:
    entry = {"id": name, "object": "model", "created": 0, "owned_by": "anchorage"}
    return entry | {"digest": digest, "served": served}


def _number(request: Request, name: str, default: float) -> float:
    text = request.query_params.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ApiError(400, f"{name}: {text!r}; allowed: a number from 0", param=name)
    return value


def _json(content: object, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")
