"""The function that answers each public path, and their OpenAPI document.

Order in each: who asks (401), the request (400), whether the key allows it (403), quota (429).
"""

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any
from uuid import uuid4

import orjson
from pydantic.json_schema import models_json_schema
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from agent.gateway.errors import ApiError, ClientGoneError
from agent.gateway.exchange import CHAMPION, Exchange, GatewayParts, unknown_model
from agent.gateway.fields import (
    ChatRequest,
    CompletionRequest,
    FeedbackRequest,
    RewardRequest,
)
from agent.gateway.keys import KeyStore, Principal
from agent.gateway.requests import Call, ServedModel, TaskAsked, parse, read_late_row, row_hash
from agent.gateway.responses import ResponsesRequest
from agent.gateway.stream import StreamedAnswer
from agent.sections_running import GatewaySettings
from agent.store.feedback import Feedback, FeedbackRefusedError, LateRow, add, keep_row

BODY_TIMEOUT_S = 30.0  # for a request's body to arrive
SETTLE_S = 5.0  # for an answer's row to be written before feedback on it is looked up
MAX_REWARDS = 1000  # rows of one /v1/rewards answer
REFUSALS = {"unknown_inference": 404, "unknown_feedback": 404, "already_superseded": 409}
REF = "#/components/schemas/{model}"
ERROR = {"description": "An error in OpenAI's shape", "content": {"application/json": {}}}
TEXT_FIELDS = frozenset({"prompt", "prompt_hash", "row_hash", "group_hash", "example"})

Read = Callable[[bytes, GatewaySettings, ServedModel], Call]


def completer(read: Read) -> Callable[[Request], Awaitable[Response]]:
    """The function that answers one kind of completion; the kinds differ in ``read`` only."""

    async def complete(request: Request) -> Response:
        parts: GatewayParts = request.app.state.parts
        principal = await _principal(request, "infer")
        call = read(await _body(request), parts.settings, parts.model)
        if call.task is not None:
            _allow(principal, "submit_task")
        await parts.quota.take(principal.owner)
        if call.task is not None:
            await _fitting(parts, principal, call.task, "metadata.example")
        exchange = Exchange(parts, call, principal, request.state.request_id)
        return await exchange.respond(request.receive) or StreamedAnswer(exchange)

    return complete


async def list_models(request: Request) -> Response:
    """The champion under its plain name, then names and kept versions as ``name@version``."""
    await _principal(request, "infer")
    models = await asyncio.to_thread(_models, request.app.state.parts)
    return _json({"object": "list", "data": models})


async def one_model(request: Request) -> Response:
    """One entry of the list."""
    await _principal(request, "infer")
    name = request.scope["path"].removeprefix("/v1/models/")
    parts: GatewayParts = request.app.state.parts
    for model in await asyncio.to_thread(_models, parts):
        if model["id"] == name:
            return _json(model)
    raise unknown_model(name, parts)


async def give_feedback(request: Request) -> Response:
    """Record an opinion: 201 when new, 200 when it was recorded before."""
    parts: GatewayParts = request.app.state.parts
    principal = await _principal(request, "feedback")
    _, checked = parse(await _body(request), FeedbackRequest)
    await parts.quota.take(principal.owner)
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
    await parts.capture.settle(_own_id(item.inference_id), SETTLE_S)
    try:
        new = await asyncio.to_thread(
            add, parts.store, item, time.time(), any_owner=principal.may("review")
        )
    except FeedbackRefusedError as error:
        raise ApiError(REFUSALS.get(error.reason, 409), str(error), code=error.reason) from None
    record = {"id": item.feedback_id, "object": "feedback", "weight": 0, "recorded": new}
    return _json(record | {"inference_id": item.inference_id}, 201 if new else 200)


async def rewards(request: Request) -> Response:
    """GET: verdicts. POST: the row of an answer given before, so that it is judged."""
    return await (give_row(request) if request.method == "POST" else list_rewards(request))


async def give_row(request: Request) -> Response:
    """Keep a row that comes after its answer: 201 when new, 200 when it was there before."""
    parts: GatewayParts = request.app.state.parts
    principal = await _principal(request, "submit_task")
    inference_id, asked = read_late_row(await _body(request), parts.model.tasks)
    await parts.quota.take(principal.owner)
    await _fitting(parts, principal, asked, "example")
    await parts.capture.settle(_own_id(inference_id), SETTLE_S)
    row = LateRow(
        inference_id=inference_id,
        principal=principal.owner,
        task=asked.task,
        example=str(asked.example),
        row_hash=str(await asyncio.to_thread(row_hash, asked.task, None, asked.example)),
    )
    try:
        unjudged = await asyncio.to_thread(
            keep_row, parts.store, row, any_owner=principal.may("review")
        )
    except FeedbackRefusedError as error:
        raise ApiError(REFUSALS.get(error.reason, 409), str(error), code=error.reason) from None
    parts.capture.judge_later(unjudged)
    record = {"inference_id": inference_id, "object": "reward", "task": asked.task}
    return _json(record | {"recorded": bool(unjudged)}, 201 if unjudged else 200)


async def _fitting(parts: GatewayParts, who: Principal, asked: TaskAsked, name: str) -> None:
    """ApiError 400 for a row that does not fit its task."""
    if reason := await parts.capture.refusal(who.owner, asked):
        raise ApiError(400, f"{name}: {reason}", param=name, code="row_refused")


async def list_rewards(request: Request) -> Response:
    """Verdicts on the caller's own answers (a reviewer sees all), oldest first, after ``since``."""
    parts: GatewayParts = request.app.state.parts
    principal = await _principal(request, "submit_task", "review")
    since = _number(request, "since", 0.0)
    limit = min(max(1, int(_number(request, "limit", MAX_REWARDS))), MAX_REWARDS)
    owner = None if principal.may("review") else principal.owner
    rows = await asyncio.to_thread(parts.store.rewards, owner, since, limit)
    data = [{k: v for k, v in asdict(row).items() if k not in TEXT_FIELDS} for row in rows]
    next_since = rows[-1].judged if rows else since
    return _json({"object": "list", "data": data, "next_since": next_since})


async def health(request: Request) -> Response:
    """200 while requests can be answered or will be soon; 503 without an engine or at the end."""
    parts: GatewayParts = request.app.state.parts
    admission = parts.admission
    reachable = await admission.route.upstream.reachable()
    state = "draining" if admission.draining else "held" if admission.lease else "ok"
    if state == "ok" and not reachable:
        state = "engine_unreachable"
    report = {"status": state, "model": parts.model.name, "version": admission.route.version[:12]}
    return _json(report, 200 if state in ("ok", "held") else 503)


async def metrics_text(request: Request) -> Response:
    """Prometheus' text format."""
    await _principal(request, "review")
    return Response(
        request.app.state.parts.metrics.exposition(),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )


async def description(request: Request) -> Response:
    """The OpenAPI document."""
    return _json(document())


async def _principal(request: Request, *scopes: str) -> Principal:
    """The owner of the request's key, with at least one of the scopes; ApiError 401 or 403."""
    keys: KeyStore = request.app.state.parts.keys
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
    """The JSON body, bounded in size and time.

    Other content types are refused: a browser sends those without asking this server first.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "content-type: allowed: application/json")
    most = request.app.state.parts.settings.max_body_bytes
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


def _own_id(any_id: str) -> str:
    """The inference id in an answer's own: ``chatcmpl-ID`` of a chat, ``resp_ID`` of a response."""
    return re.split("[-_]", any_id)[-1]


def _models(parts: GatewayParts) -> list[dict[str, object]]:
    name = parts.model.name
    served = [route.version for route in parts.served()]
    named = {CHAMPION: served[0], **parts.versions.named()}
    digests = dict.fromkeys([*served, *parts.versions.kept()])  # each once, the champion first
    versions = [*named.items(), *((digest[:12], digest) for digest in digests)]
    return [_model(name, served[0], True)] + [
        _model(f"{name}@{version}", digest, digest in served) for version, digest in versions
    ]


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


def document() -> dict[str, Any]:
    """OpenAPI 3.1 of every public path."""
    models = (
        ChatRequest,
        CompletionRequest,
        FeedbackRequest,
        ResponsesRequest,
        RewardRequest,
    )
    _, schemas = models_json_schema([(m, "validation") for m in models], ref_template=REF)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Anchorage", "version": "1"},
        "paths": {
            "/v1/chat/completions": {"post": _post("createChatCompletion", ChatRequest)},
            "/v1/completions": {"post": _post("createCompletion", CompletionRequest)},
            "/v1/responses": {"post": _post("createResponse", ResponsesRequest)},
            "/v1/feedback": {"post": _post("createFeedback", FeedbackRequest)},
            "/v1/models": {"get": _get("listModels")},
            "/v1/models/{model}": {"get": _get("retrieveModel", [_path("model")])},
            "/v1/rewards": {
                "get": _get("listRewards", [_query("since", "number"), _query("limit", "integer")]),
                "post": _post("createReward", RewardRequest),
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
    summary = (model.__doc__ or "").partition("\n")[0]
    return _get(name) | {"summary": summary, "description": model.__doc__, "requestBody": body}


def _get(name: str, parameters: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    responses = {"2XX": {"description": "Done"}, "4XX": ERROR, "5XX": ERROR}
    return {"operationId": name, "parameters": parameters or [], "responses": responses}


def _query(name: str, kind: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": kind, "minimum": 0}}


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
