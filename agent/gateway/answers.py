"""The engine's answers as bytes: stamped with a version, cut into events, read for capture."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from agent.gateway.errors import error_body
from agent.store.experience import Answer

# Inside a JSON string every quote is escaped, so an unescaped match is a key of the answer itself.
FINGERPRINT = b'"system_fingerprint"'
VALUE = re.compile(rb'\s*:\s*(?:null|"[^"\\]*")')
SOME_CHOICE = b'"choices":[{'  # as the engine writes it; spares the slower pattern below
ABORTED = re.compile(rb'(?<!\\)"finish_reason"\s*:\s*"abort"')
NO_CHOICES = re.compile(rb'(?<!\\)"choices"\s*:\s*\[\s*\]')
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


def is_usage(event: bytes) -> bool:
    """Whether an event is the closing one that only counts tokens."""
    return SOME_CHOICE not in event and NO_CHOICES.search(event) is not None


def error_event(message: str, code: str) -> bytes:
    """The error event that ends a stream which has begun."""
    return b"data: " + error_body(message, "server_error", code=code)


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
