"""Any OpenAI-compatible endpoint as ``generate``: greedy, concurrent, retried where it is safe.

The openai client makes the requests; the retries are ours, because an answer that an engine
aborted (it was paused for a swap) has to be asked again like a failed request.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any

from agent.errors import UserError
from evaluators.runner import Generate
from evaluators.task import Message

if TYPE_CHECKING:
    import openai

RETRIED = (408, 409, 429, 500, 502, 503, 504)
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
    http_client: Any = None,
) -> Generate:
    """A function that asks ``url`` (the base that ends in /v1) and keeps the order of the prompts.

    Args:
        key: API key, None where the endpoint asks for none.
        tries: requests for one answer at most; ``first_wait_s`` doubles between them.
        http_client: the transport (an httpx client) where the default one will not do.

    An answer that cannot be had stops the evaluation (it is not a wrong answer); asked again, it
    goes on where it stopped.

    Raises:
        UserError: from the returned function, when an answer fails after all tries.
    """
    import openai

    def ask(client: openai.OpenAI, messages: list[Message], max_tokens: int) -> EndpointAnswer:
        reason = ""
        for attempt in range(tries):
            answer, reason, wait_s = _try(client, model, messages, max_tokens)
            if answer is not None:
                return answer
            if attempt + 1 < tries:
                Event().wait(min(wait_s or first_wait_s * 2**attempt, MAX_WAIT_S))
        raise UserError(f"{url}: {reason} after {tries} tries; model {model!r}")

    def generate(chats: list[list[Message]], max_tokens: list[int]) -> Sequence[EndpointAnswer]:
        client = openai.OpenAI(
            base_url=url,
            api_key=key or "none",  # the client wants one; an endpoint without keys ignores it
            max_retries=0,
            timeout=timeout_s,
            http_client=http_client,
        )
        with client, ThreadPoolExecutor(concurrency) as pool:
            try:
                return list(pool.map(ask, [client] * len(chats), chats, max_tokens))
            finally:  # after one failure the rest is not worth asking
                pool.shutdown(wait=True, cancel_futures=True)

    return generate


def _try(
    client: "openai.OpenAI", model: str, messages: list[Message], max_tokens: int
) -> tuple[EndpointAnswer | None, str, float | None]:
    """(answer, what went wrong, seconds the server asks to wait)."""
    import openai

    # First words given to the assistant are continued, not answered.
    given = messages[-1]["role"] == "assistant"
    more = {"continue_final_message": True, "add_generation_prompt": False} if given else None
    chat: Any = messages
    try:
        completion = client.chat.completions.create(
            model=model, messages=chat, max_tokens=max_tokens, temperature=0.0, extra_body=more
        )
    except openai.APIStatusError as error:
        if error.status_code not in RETRIED:
            text = error.response.text[:200]
            raise UserError(f"{client.base_url}: status {error.status_code}: {text!r}") from None
        return None, f"status {error.status_code}", _retry_after(error.response.headers)
    except openai.APIConnectionError as error:
        cause = error.__cause__ or error
        return None, f"{type(cause).__name__}: {cause}", None
    answer = _read(completion)
    return (None, "aborted", None) if answer.finish == "abort" else (answer, "", None)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    seconds = headers.get("retry-after", "")
    return float(seconds) if seconds.isdigit() else None


def _read(completion: Any) -> EndpointAnswer:
    """The first choice of a chat completion; a null content is an empty text."""
    if not getattr(completion, "choices", None):
        raise UserError(f"no chat completion but {str(completion)[:200]!r}")
    choice, usage = completion.choices[0], completion.usage
    tokens = usage.completion_tokens if usage else None
    return EndpointAnswer(choice.message.content or "", tokens, choice.finish_reason or "stop")
