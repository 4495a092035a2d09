"""The engine's answers as bytes: cut into events, read for capture, written for the client.

``ChatAnswer`` leaves them as they are but for the version; ``ResponsesAnswer`` writes them as the
Responses API does.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from agent.gateway.responses import Json, ResponsesRequest
from agent.store.experience import Answer

# Inside a JSON string every quote is escaped, so an unescaped match is a key of the answer itself.
FINGERPRINT = b'"system_fingerprint"'
VALUE = re.compile(rb'\s*:\s*(?:null|"[^"\\]*")')
SOME_CHOICE = b'"choices":[{'  # as the engine writes it; spares the slower pattern below
ABORTED = re.compile(rb'(?<!\\)"finish_reason"\s*:\s*"abort"')
NO_CHOICES = re.compile(rb'(?<!\\)"choices"\s*:\s*\[\s*\]')
NOT_ECHOED = {"chat_template_kwargs", "include", "input", "stream", "stream_options"}
DATA = b"data: "
DONE = b"data: [DONE]"
MAX_EVENT_BYTES = 4 << 20  # an event longer than this is not an answer of this service


class BrokenStreamError(Exception):
    """The engine broke off, or sent no stream of events."""


def stamp(body: bytes, version: str) -> bytes:
    """The answer with ``system_fingerprint`` set to the version; every other byte as it was."""
    mark = FINGERPRINT + b':"' + version.encode() + b'"'
    at = body.find(FINGERPRINT)
    while at >= 0:
        value = VALUE.match(body, at + len(FINGERPRINT))
        if value is not None and body[at - 1 : at] != b"\\":
            return body[:at] + mark + body[value.end() :]
        at = body.find(FINGERPRINT, at + 1)
    if not body.startswith(b"{") or body[1:2] in (b"}", b""):
        return body
    return b"{" + mark + b"," + body[1:]


def stamp_event(event: bytes, version: str) -> bytes:
    """One server-sent event, stamped if it carries an answer."""
    if not event.startswith(b"data: {") or event.startswith(b'data: {"error"'):
        return event
    return b"data: " + stamp(event[6:], version)


class AnswerForm(Protocol):
    """How one answer is written for the client."""

    @property
    def answer_id(self) -> str | None:
        """The answer's id where it is not the engine's."""

    def whole(self, content: bytes) -> bytes:
        """The body for the engine's whole answer."""

    def event(self, event: bytes) -> bytes:
        """What is sent for one event of the engine, less its blank line; may be nothing."""

    def end(self) -> bytes:
        """What ends a sound stream."""

    def failure(self, error: bytes) -> bytes:
        """What ends a broken one: ``error`` is a body of ``errors.error_body``."""


class ChatAnswer:
    """The engine's own form, a chat or plain completion, with the version as fingerprint."""

    answer_id = None

    def __init__(self, version: str) -> None:
        self._version = version

    def whole(self, content: bytes) -> bytes:
        """The same bytes, stamped."""
        return stamp(content, self._version)

    def event(self, event: bytes) -> bytes:
        """The same event, stamped."""
        return stamp_event(event, self._version) + b"\n\n"

    def end(self) -> bytes:
        """The end mark of the API."""
        return DONE + b"\n\n"

    def failure(self, error: bytes) -> bytes:
        """An event with the error, and no end mark."""
        return DATA + error + b"\n\n"


def is_usage(event: bytes) -> bool:
    """Whether an event is the closing one that only counts tokens."""
    return SOME_CHOICE not in event and NO_CHOICES.search(event) is not None


class Events:
    """Cuts a byte stream at its blank lines: ``feed`` yields whole events without it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Events completed by this data."""
        *whole, self._rest = (self._rest + data).split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise BrokenStreamError("an event without an end")
        yield from whole


@dataclass(slots=True)
class Draft:
    """One choice while it is being streamed."""

    text: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    finish: str | None = None


@dataclass(slots=True)
class Answered:
    """An answer's id, token counts and text, gathered from its JSON or from its stream."""

    response_id: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    choices: dict[int, Draft] = field(default_factory=dict)

    def read(self, answer: dict[str, Any], *, text: bool) -> None:
        """Add a whole answer, or one chunk of it; without ``text`` only ids, ends and counts."""
        self.response_id = self.response_id or str(answer.get("id", ""))[:128] or None
        if usage := answer.get("usage"):
            self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            self.completion_tokens = int(usage.get("completion_tokens") or 0)
        for choice in answer.get("choices", ()):
            draft = self.choices.setdefault(int(choice.get("index", 0)), Draft())
            draft.finish = choice.get("finish_reason") or draft.finish
            if text:
                _add(draft, choice.get("delta") or choice.get("message") or choice)

    def answers(self) -> tuple[Answer, ...]:
        """One record a choice."""
        return tuple(
            Answer(
                choice=index,
                completion="".join(draft.text),
                finish=draft.finish,
                tool_calls=_calls(draft) if draft.calls else None,
            )
            for index, draft in sorted(self.choices.items())
        )


def aborted(answer: bytes) -> bool:
    """Whether the engine cut a choice off, which it reports as a success."""
    return b'"abort"' in answer and ABORTED.search(answer) is not None


def _calls(draft: Draft) -> str:
    return orjson.dumps(list(draft.calls.values())).decode()


def _add(draft: Draft, part: dict[str, Any]) -> None:
    piece = part.get("content") or part.get("text")
    if piece:
        draft.text.append(piece)
    for position, call in enumerate(part.get("tool_calls") or ()):
        known = draft.calls.setdefault(
            int(call.get("index", position)), {"name": "", "arguments": ""}
        )
        function = call.get("function") or {}
        known["name"] += function.get("name") or ""
        known["arguments"] += function.get("arguments") or ""


@dataclass(slots=True)
class OutputItem:
    """One item of the output while it is generated: reasoning, a message, or a function call."""

    kind: str  # reasoning, message, function_call
    id: str
    index: int  # in the output
    text: str = ""  # or the arguments
    call_id: str = ""
    name: str = ""

    def item(self, status: str) -> Json:
        """The item as the client sees it now."""
        base: Json = {"type": self.kind, "id": self.id, "status": status}
        if self.kind == "function_call":
            return base | {"call_id": self.call_id, "name": self.name, "arguments": self.text}
        content = [self.part()] if status == "completed" else []
        if self.kind == "reasoning":
            return base | {"summary": [], "content": content}
        return base | {"role": "assistant", "content": content}

    def part(self) -> Json:
        """The message's or reasoning's only piece of content."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}


@dataclass(slots=True)
class ResponsesAnswer:
    """One answer in the form of the Responses API."""

    request: ResponsesRequest
    inference_id: str
    version: str  # digest prefix
    created: int = field(default_factory=lambda: int(time.time()))
    items: list[OutputItem] = field(default_factory=list)
    current: int | None = None  # the tool call that is open, by its index in the engine's answer
    finish: str | None = None
    usage: Json | None = None
    events: int = 0

    @property
    def answer_id(self) -> str:
        """The response's id, by which feedback finds the answer."""
        return f"resp_{self.inference_id}"

    def whole(self, content: bytes) -> bytes:
        """The response of a whole chat completion; ValueError and the like for anything else."""
        answer = orjson.loads(content)
        choice = answer["choices"][0]
        for _ in self._read(choice["message"]):
            pass
        self.finish, self.usage = choice.get("finish_reason"), answer.get("usage")
        return orjson.dumps(self._response(self._status()))

    def event(self, event: bytes) -> bytes:
        """The Responses events of one chunk."""
        if not event.startswith(b"data: {"):
            return b""
        chunk = orjson.loads(event[6:])
        self.usage = chunk.get("usage") or self.usage
        sent = [] if self.events else list(self._begin())
        for choice in chunk.get("choices", ()):
            sent += self._read(choice.get("delta") or {})
            self.finish = choice.get("finish_reason") or self.finish
        return b"".join(sent)

    def end(self) -> bytes:
        """The events that close a sound stream."""
        status = self._status()
        sent = [] if self.events else list(self._begin())
        sent += self._close()
        sent.append(self._send(f"response.{status}", response=self._response(status)))
        return b"".join(sent)

    def failure(self, error: bytes) -> bytes:
        """The event that ends a broken stream; the OpenAI client raises it as an APIError."""
        details = orjson.loads(error)["error"]
        said = {name: details[name] for name in ("message", "code", "param")}
        return self._send("error", **said, error=details)

    def _begin(self) -> Iterator[bytes]:
        for name in ("response.created", "response.in_progress"):
            yield self._send(name, response=self._response("in_progress"))

    def _status(self) -> str:
        return "incomplete" if self.finish == "length" else "completed"

    def _read(self, part: Json) -> Iterator[bytes]:
        """The events of a message or of one piece of it."""
        for kind, texts in (
            ("reasoning", (part.get("reasoning") or part.get("reasoning_content"),)),
            ("message", (part.get("content"), part.get("refusal"))),
        ):
            for text in filter(None, texts):
                if not self.items or self.items[-1].kind != kind or self.current is not None:
                    yield from self._open(kind)
                yield self._delta(text)
        for position, call in enumerate(part.get("tool_calls") or ()):
            yield from self._read_call(call, int(call.get("index", position)))

    def _read_call(self, call: Json, index: int) -> Iterator[bytes]:
        function = call.get("function") or {}
        if self.current != index:
            yield from self._open("function_call", call.get("id") or "", function.get("name") or "")
            self.current = index
        if function.get("arguments"):
            yield self._delta(function["arguments"])

    def _open(self, kind: str, call_id: str = "", name: str = "") -> Iterator[bytes]:
        """Close the item before, and begin another one."""
        yield from self._close()
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        index = len(self.items)
        item = OutputItem(kind, f"{prefix}_{self.inference_id}_{index}", index)
        item.call_id, item.name = call_id or f"call_{self.inference_id}_{index}", name
        self.items.append(item)
        yield self._send(
            "response.output_item.added", output_index=index, item=item.item("in_progress")
        )
        if kind == "message":
            yield self._of(item, "response.content_part.added", part=item.part())

    def _delta(self, text: str) -> bytes:
        item = self.items[-1]
        item.text += text
        if item.kind == "function_call":
            return self._of(item, "response.function_call_arguments.delta", delta=text)
        if item.kind == "reasoning":
            return self._of(item, "response.reasoning_text.delta", delta=text)
        return self._of(item, "response.output_text.delta", delta=text, logprobs=[])

    def _close(self) -> Iterator[bytes]:
        """The events that end the open item, if there is one."""
        self.current = None
        if not self.items:
            return
        item = self.items[-1]
        if item.kind == "function_call":
            done = {"name": item.name, "arguments": item.text}
            yield self._of(item, "response.function_call_arguments.done", **done)
        elif item.kind == "reasoning":
            yield self._of(item, "response.reasoning_text.done", text=item.text)
        else:
            yield self._of(item, "response.output_text.done", text=item.text, logprobs=[])
            yield self._of(item, "response.content_part.done", part=item.part())
        yield self._send(
            "response.output_item.done", output_index=item.index, item=item.item("completed")
        )

    def _of(self, item: OutputItem, name: str, /, **fields: Any) -> bytes:
        place: Json = {"item_id": item.id, "output_index": item.index}
        if item.kind != "function_call":
            place["content_index"] = 0
        return self._send(name, **place, **fields)

    def _send(self, name: str, /, **fields: Any) -> bytes:
        event = {"type": name, "sequence_number": self.events, **fields}
        self.events += 1
        return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"

    def _response(self, status: str) -> Json:
        """The response object: what was asked for, and the output so far."""
        asked = self.request.model_dump(by_alias=True, exclude=NOT_ECHOED)
        text = {"format": {"type": "text"}} | _without_none(asked.pop("text") or {})
        done = status != "in_progress"
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return asked | {
            "id": self.answer_id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.request.model,
            "system_fingerprint": self.version,
            "output": [item.item("completed") for item in self.items] if done else [],
            "incomplete_details": cut,
            "error": None,
            "metadata": {**(self.request.metadata or {}), "model_version": self.version},
            "parallel_tool_calls": self.request.parallel_tool_calls is not False,
            "store": bool(self.request.store),
            "text": text,
            "tool_choice": asked["tool_choice"] or "auto",
            "tools": asked["tools"] or [],
            "truncation": "disabled",
            "usage": _usage(self.usage) if done else None,
        }


def _usage(usage: Json | None) -> Json:
    counts = usage or {}
    cached = (counts.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (counts.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    before, after = counts.get("prompt_tokens") or 0, counts.get("completion_tokens") or 0
    return {
        "input_tokens": before,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": after,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": before + after,
    }


def _without_none(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value is not None}
