"""Any OpenAI-compatible endpoint as ``generate``: greedy, concurrent, retried where it is safe."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import httpx

from agent.errors import UserError
from evaluators.runner import Generate
from evaluators.task import Message

RETRIED = (408, 429, 500, 502, 503, 504)
MAX_WAIT_S = 30.0  # between two tries


@dataclass(frozen=True, slots=True)
class EndpointAnswer:
    """One completion; tokens is None where the endpoint does not count them."""

    text: str
    tokens: int | None
    finish: str


def openai_generate(
    url: str,
    key: str | None,
    model: str,
    *,
    concurrency: int = 16,
    timeout_s: float = 600.0,
    tries: int = 6,
    first_wait_s: float = 0.5,
    transport: httpx.BaseTransport | None = None,
) -> Generate:
    """A function that asks ``url`` (the base that ends in /v1) and keeps the order of the prompts.

    An answer that cannot be had stops the evaluation (it is not a wrong answer); asked again, it
    goes on where it stopped. An aborted answer (an engine that was paused) is asked again.

    Raises:
        UserError: from the returned function, when an answer fails after all tries.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    target = f"{url.rstrip('/')}/chat/completions"

    def ask(client: httpx.Client, messages: list[Message], max_tokens: int) -> EndpointAnswer:
        body = request_body(model, messages, max_tokens)
        told = ""
        for attempt in range(tries):
            answer, told, wait_s = _try(client, target, body)
            if answer is not None:
                return answer
            if attempt + 1 < tries:
                Event().wait(min(wait_s or first_wait_s * 2**attempt, MAX_WAIT_S))
        raise UserError(f"{target}: {told} after {tries} tries; model {model!r}")

    def generate(chats: list[list[Message]], max_tokens: list[int]) -> Sequence[EndpointAnswer]:
        with (
            httpx.Client(timeout=timeout_s, headers=headers, transport=transport) as client,
            ThreadPoolExecutor(concurrency) as pool,
        ):
            try:
                return list(pool.map(ask, [client] * len(chats), chats, max_tokens))
            finally:  # after one failure the rest is not worth asking
                pool.shutdown(wait=True, cancel_futures=True)

    return generate


def request_body(model: str, messages: list[Message], max_tokens: int) -> dict[str, Any]:
    """A greedy request; first words given to the assistant are continued, not answered."""
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0.0,
    }
    if messages[-1]["role"] == "assistant":
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body


def _try(
    client: httpx.Client, url: str, body: dict[str, Any]
) -> tuple[EndpointAnswer | None, str, float | None]:
    """(answer, what went wrong, seconds the server asks to wait)."""
    try:
        response = client.post(url, json=body)
    except httpx.TransportError as error:
        return None, f"{type(error).__name__}: {error}", None
    if response.status_code in RETRIED:
        return None, f"status {response.status_code}", _retry_after(response)
    if response.status_code != 200:
        raise UserError(f"{url}: status {response.status_code}: {response.text[:200]!r}")
    answer = read_answer(response.json())
    return (None, "aborted", None) if answer.finish == "abort" else (answer, "", None)


def _retry_after(response: httpx.Response) -> float | None:
    seconds = response.headers.get("retry-after", "")
    return float(seconds) if seconds.isdigit() else None


def read_answer(value: Any) -> EndpointAnswer:
    """The first choice of a chat completion; a null content is an empty text."""
    choice = value["choices"][0]
    usage = value.get("usage") or {}
    return EndpointAnswer(
        text=choice["message"].get("content") or "",
        tokens=usage.get("completion_tokens"),
        finish=choice.get("finish_reason") or "stop",
    )
