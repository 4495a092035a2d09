"""Requests of OpenAI's Responses API, translated into chat completions.

vLLM has a Responses API of its own; behind it admission, capture and the version stamp would be
done twice. The way back is ``answers.ResponsesAnswer``.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from agent.gateway.errors import ApiError
from agent.gateway.fields import (
    Function,
    JsonSchema,
    Metadata,
    NamedFunction,
    PlainFormat,
    Strict,
    TemplateVariables,
)

Json = dict[str, Any]

SAME = ("model", "temperature", "top_p", "parallel_tool_calls", "stream", "metadata", "store",
        "chat_template_kwargs")  # fmt: skip


class InputText(Strict):
    """A piece of a Responses message; an answer's pieces may come back as they were received."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


InputContent = Annotated[
    list[InputText], BeforeValidator(_as_parts, json_schema_input_type=str | list[InputText])
]


class InputMessage(Strict):
    """One turn of a Responses request."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputFunctionCall(Strict):
    """A call the model asked for, sent back."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(max_length=128)]
    name: Annotated[str, Field(max_length=64)]
    arguments: str
    id: str | None = None
    status: str | None = None


class InputFunctionOutput(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(max_length=128)]
    output: InputContent
    id: str | None = None
    status: str | None = None


class InputReasoning(Strict):
    """The model's reasoning, sent back; the chat template has no place for it."""

    type: Literal["reasoning"]
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: str | None = None


def _kind(item: Any) -> Any:
    """The kind of an input item; one without a ``type`` is a message."""
    return item.get("type", "message") if isinstance(item, dict) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputFunctionCall, Tag("function_call")]
    | Annotated[InputFunctionOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponsesTool(Function):
    """A function, as a Responses request has it."""

    type: Literal["function"]


class ResponsesNamedTool(NamedFunction):
    """A forced choice of one function."""

    type: Literal["function"]


class ResponsesSchema(JsonSchema):
    """JSON that follows a schema, as a Responses request has it."""

    type: Literal["json_schema"]


class TextOptions(Strict):
    """The form of the text."""

    format: Annotated[PlainFormat | ResponsesSchema, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Strict):
    """How long the model may reason."""

    effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: None = None


class ResponsesStreamOptions(Strict):
    """Accepted, never passed on."""

    include_obfuscation: bool | None = None


class ResponsesRequest(Strict):
    """POST /v1/responses: text and function calls; answers are not kept to be referred to."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=1024),
        BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesNamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    chat_template_kwargs: TemplateVariables | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None


def chat_body(request: ResponsesRequest) -> Json:
    """The chat request that asks for the same answer; ApiError 400 where there is none.

    ``instructions`` become the first system message, ``developer`` messages system ones (chat
    templates know no other), calls in a row one assistant message.
    """
    if request.previous_response_id is not None:
        raise ApiError(
            400,
            "previous_response_id: answers are not kept to be referred to; "
            "send the whole conversation as input",
            param="previous_response_id",
        )
    body: Json = {name: getattr(request, name) for name in SAME}
    body["messages"] = _messages(request)
    body["max_tokens"] = request.max_output_tokens
    if request.tools:
        body["tools"] = [_tool(tool.model_dump(exclude_none=True)) for tool in request.tools]
        choice = request.tool_choice
        named = choice is not None and not isinstance(choice, str)
        body["tool_choice"] = _tool(choice.model_dump()) if named else choice  # type: ignore[union-attr]
    if request.reasoning:
        body["reasoning_effort"] = request.reasoning.effort
    if request.text and request.text.format:
        body["response_format"] = _format(request.text.format.model_dump(by_alias=True))
    return {name: value for name, value in body.items() if value is not None}


def _tool(flat: Json) -> Json:
    return {"type": flat.pop("type"), "function": flat}


def _format(flat: Json) -> Json:
    if flat["type"] != "json_schema":
        return flat
    given = {name: value for name, value in flat.items() if value is not None and name != "type"}
    return {"type": "json_schema", "json_schema": given}


def _messages(request: ResponsesRequest) -> list[Json]:
    messages: list[Json] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    for item in request.input:
        if item.type == "message":
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": _text(item.content)})
        elif item.type == "function_call":
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            _assistant(messages).setdefault("tool_calls", []).append(call)
        elif item.type == "function_call_output":
            output = _text(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
    if not messages:
        raise ApiError(400, "input: no message; allowed: at least one", param="input")
    return messages


def _assistant(messages: list[Json]) -> Json:
    """The assistant's turn that a call belongs to: the last message, or a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _text(content: list[InputText]) -> str:
    return "".join(part.text for part in content)
