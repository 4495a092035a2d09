"""A request's bytes checked and read into a ``Call``: the engine's payload, and what to capture."""

import hashlib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from agent.gateway.errors import ApiError
from agent.gateway.fields import (
    IGNORED,
    MAX_EXAMPLE_CHARACTERS,
    ChatRequest,
    CompletionRequest,
    RewardRequest,
    Sampling,
    SchemaFormat,
)
from agent.gateway.responses import ResponsesRequest, ResponsesSchema, chat_body
from agent.gateway.schema import SchemaError, check_schema
from agent.sections_running import GatewaySettings
from agent.store.intake import text_hash

Endpoint = Literal["chat.completions", "completions"]
MAX_DEPTH = 64  # of a whole request
MAX_SCHEMA_DEPTH = 32  # of a tool's parameters or a response schema
MAX_SCHEMA_BYTES = 65_536
MAX_STOP = 4  # stop strings, as at OpenAI
MAX_METADATA_CHARACTERS = 512  # OpenAI's; `example` alone may be longer
SHOWN_VALUE = 80  # characters of an offending value in a message

Shape = TypeVar("Shape", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the endpoint serves: a model under one name, and the tasks a request may name."""

    name: str  # the name clients ask for
    max_tokens: int  # largest max_tokens a request may ask for
    tasks: frozenset[str] = frozenset()
    engine_name: str = ""  # the engine's own name of the model; empty: the same

    @property
    def upstream_name(self) -> str:
        """The name the engine answers to."""
        return self.engine_name or self.name


@dataclass(frozen=True, slots=True)
class TaskAsked:
    """A request for a verified reward: a known row by id, the row itself, or a row to come."""

    task: str
    example_id: str | None
    example: str | None  # JSON object, as the client wrote it


@dataclass(frozen=True, slots=True)
class Call:
    """A checked request."""

    endpoint: Endpoint
    model: str
    stream: bool
    wants_usage: bool  # the client asked for the stream's usage chunk
    payload: Mapping[str, Any]  # for the engine, less model and cache_salt
    prompt: Any  # messages, or the prompt
    task: TaskAsked | None
    store: bool
    session_id: str | None
    constrained: bool = False  # a schema of the client's bounds the answer
    responses: ResponsesRequest | None = None  # the request this was translated from

    @property
    def captures_text(self) -> bool:
        """Whether anything of the text may be kept."""
        return self.store or self.task is not None


def parse(body: bytes, shape: type[Shape]) -> tuple[dict[str, Any], Shape]:
    """A JSON object as it was written and as the model that checked it; ApiError 400."""
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"body: not JSON at character {error.pos}") from error
    # Fewer brackets than the limit cannot be nested deeper: most requests need no walk.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _depth(raw) > MAX_DEPTH:
        raise ApiError(400, f"body: nested deeper than {MAX_DEPTH}")
    if not isinstance(raw, dict):
        raise ApiError(400, f"body: a JSON {type(raw).__name__}; allowed: an object")
    try:
        return raw, shape.model_validate(raw)
    except ValidationError as error:
        raise _refusal(error) from None


def read_chat(body: bytes, settings: GatewaySettings, model: ServedModel) -> Call:
    """A chat completion request."""
    return _chat_call(*parse(body, ChatRequest), settings, model)


def read_responses(body: bytes, settings: GatewaySettings, model: ServedModel) -> Call:
    """A request of the Responses API, as the chat request that asks for the same answer."""
    raw, checked = parse(body, ResponsesRequest)
    _cap("max_output_tokens", checked.max_output_tokens, model.max_tokens)
    _check_size("text.format", raw.get("text"))
    if checked.text and isinstance(checked.text.format, ResponsesSchema):
        _check_schema("text.format", checked.text.format.schema_)
    chat = chat_body(checked)
    try:
        call = _chat_call(chat, ChatRequest.model_validate(chat), settings, model)
    except ValidationError as error:
        raise _refusal(error) from None
    return replace(call, responses=checked, wants_usage=True)


def _chat_call(
    raw: dict[str, Any], checked: ChatRequest, settings: GatewaySettings, model: ServedModel
) -> Call:
    _check_size("tools", raw.get("tools"))
    for tool in checked.tools or ():
        _check_schema("tools", tool.function.parameters)
    _check_template_variables(checked.chat_template_kwargs or {}, settings)
    if checked.top_logprobs and not checked.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
    _cap("max_completion_tokens", checked.max_completion_tokens, model.max_tokens)
    return _call("chat.completions", raw, checked, raw["messages"], 1, settings, model)


def read_completion(body: bytes, settings: GatewaySettings, model: ServedModel) -> Call:
    """A plain completion request."""
    raw, checked = parse(body, CompletionRequest)
    prompt = raw["prompt"]
    batch = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return _call("completions", raw, checked, prompt, len(prompt) if batch else 1, settings, model)


def _call(
    endpoint: Endpoint,
    raw: dict[str, Any],
    checked: Sampling,
    prompt: Any,
    prompts: int,
    settings: GatewaySettings,
    model: ServedModel,
) -> Call:
    # Cheapest first: a schema is walked only once the counts are known to be small.
    _cap("n", (checked.n or 1) * prompts, settings.max_n)
    _cap("max_tokens", checked.max_tokens, model.max_tokens)
    _cap("stop", len(checked.stop) if isinstance(checked.stop, list) else 1, MAX_STOP)
    _check_size("response_format", raw.get("response_format"))
    if isinstance(checked.response_format, SchemaFormat):
        _check_schema("response_format", checked.response_format.json_schema.schema_)
    if checked.stream_options and not checked.stream:
        raise ApiError(400, "stream_options: needs stream: true", param="stream_options")
    metadata = checked.metadata or {}
    return Call(
        endpoint=endpoint,
        model=checked.model,
        stream=bool(checked.stream),
        wants_usage=bool(checked.stream_options and checked.stream_options.include_usage),
        payload=_payload(raw, bool(checked.stream)),
        prompt=prompt,
        task=_task(metadata, model.tasks),
        store=bool(checked.store),
        session_id=metadata.get("session_id"),
        constrained=raw.get("response_format") is not None or raw.get("tools") is not None,
    )


def _payload(raw: dict[str, Any], stream: bool) -> dict[str, Any]:
    """What the engine gets; a stream always reports its usage, the gateway counts it."""
    payload = {name: value for name, value in raw.items() if name not in IGNORED}
    if stream:
        payload["stream_options"] = {**(raw.get("stream_options") or {}), "include_usage": True}
    return payload


def _task(metadata: Mapping[str, str], tasks: frozenset[str]) -> TaskAsked | None:
    # The example has a cap of its own; a session id is stored in an index.
    for name, value in metadata.items():
        if name != "example":
            _cap(
                f"metadata.{name}",
                len(value),
                128 if name == "session_id" else MAX_METADATA_CHARACTERS,
            )
    task, example_id, example = (metadata.get(k) for k in ("task", "example_id", "example"))
    if task is None:
        return None
    if task not in tasks:
        allowed = ", ".join(sorted(tasks)) or "none"
        raise ApiError(
            400, f"metadata.task: {_shown(task)}; allowed: {allowed}", param="metadata.task"
        )
    if example_id is not None and example is not None:
        raise ApiError(
            400,
            "metadata: example_id and example; allowed: one of them, or neither for a row that "
            "comes by POST /v1/rewards",
            param="metadata.example_id",
        )
    if example is not None:
        _check_object(example)
    return TaskAsked(task, example_id, example)


def _check_object(example: str) -> None:
    name = "metadata.example"
    try:
        row = orjson.loads(example)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"{name}: not JSON at character {error.pos}", param=name) from None
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise ApiError(400, f"{name}: a JSON {kind}; allowed: an object", param=name)
    if _depth(row) > MAX_SCHEMA_DEPTH:
        raise ApiError(400, f"{name}: nested deeper than {MAX_SCHEMA_DEPTH}", param=name)


def read_late_row(body: bytes, tasks: frozenset[str]) -> tuple[str, TaskAsked]:
    """The inference id and the row of POST /v1/rewards, checked as ``metadata.example`` is."""
    raw, checked = parse(body, RewardRequest)
    example = orjson.dumps(raw["example"]).decode()
    _cap("example (characters)", len(example), MAX_EXAMPLE_CHARACTERS)
    asked = _task({"task": checked.task, "example": example}, tasks)
    assert asked is not None
    return checked.inference_id, asked


def kept(call: Call) -> Mapping[str, Any]:
    """Columns of a row that come from the request: text only where the call allows it."""
    if not call.captures_text:
        return {"session_id": call.session_id}
    tools = call.payload.get("tools")
    sent = call.prompt if tools is None else {"messages": call.prompt, "tools": tools}
    prompt = orjson.dumps(sent).decode()
    prompt_hash = text_hash(prompt)
    conversation = f"session:{call.session_id}" if call.session_id else prompt_hash
    columns: dict[str, Any] = {
        "session_id": call.session_id,
        "prompt": prompt,
        "prompt_hash": prompt_hash,
        "group_hash": hashlib.sha256(conversation.encode()).hexdigest(),
    }
    return columns | (_task_columns(call.task) if call.task else {})


def row_hash(task: str, example_id: str | None, example: str | None) -> str | None:
    """What makes two task rows the same: the known id, or the row in any key order.

    None where neither is there: the row comes later, or never.
    """
    if example_id is None and example is None:
        return None
    if example is None:
        return text_hash(f"{task}\nid\n{example_id}")
    canonical = orjson.dumps(orjson.loads(example), option=orjson.OPT_SORT_KEYS).decode()
    return text_hash(f"{task}\nrow\n{canonical}")


def _task_columns(asked: TaskAsked) -> dict[str, Any]:
    return {
        "task": asked.task,
        "source": "known" if asked.example is None else "submitted",
        "example_id": asked.example_id,
        "example": asked.example,
        "row_hash": row_hash(asked.task, asked.example_id, asked.example),
    }


def _cap(name: str, value: int | None, most: int) -> None:
    if value is not None and value > most:
        raise ApiError(400, f"{name}: {value}; allowed: at most {most}", param=name)


def _check_size(name: str, value: Any) -> None:
    """Schemas are free in form, so their depth and size are bounded here."""
    if value is None:
        return
    if _depth(value) > MAX_SCHEMA_DEPTH:
        raise ApiError(400, f"{name}: nested deeper than {MAX_SCHEMA_DEPTH}", param=name)
    _cap(f"{name} (bytes)", len(orjson.dumps(value)), MAX_SCHEMA_BYTES)


def _check_schema(name: str, schema: dict[str, Any] | None) -> None:
    try:
        check_schema(schema or {})
    except SchemaError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from None


def _check_template_variables(variables: Mapping[str, Any], settings: GatewaySettings) -> None:
    allowed = settings.chat_template_kwargs
    if unknown := [name for name in variables if name not in allowed]:
        raise ApiError(
            400,
            f"chat_template_kwargs: {unknown[0]}; allowed: {', '.join(allowed) or 'none'}",
            param=f"chat_template_kwargs.{unknown[0]}",
        )


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion."""
    level, layer = 0, [value]
    while layer := [x for x in layer if isinstance(x, dict | list)]:
        level += 1
        layer = [y for x in layer for y in (x.values() if isinstance(x, dict) else x)]
    return level


def _refusal(error: ValidationError) -> ApiError:
    """The first mismatch, in OpenAI's words where it has some.

    A wrong kind comes before the fields that are missing for the kind expected.
    """
    mismatches = error.errors(include_url=False)
    first = next((each for each in mismatches if each["type"] == "literal_error"), mismatches[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {where}"
    elif first["type"] == "missing":
        message = f"Missing required parameter: {where}"
    else:
        message = f"{where}: {_shown(first['input'])}; {first['msg']}"
    return ApiError(400, message, param=where or None)


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    text = reprlib.repr(value)  # bounded in length and in depth
    return text if len(text) <= SHOWN_VALUE else text[:SHOWN_VALUE] + "..."
