"""An OpenAI endpoint as a model: order, retries, and what is never taken for an answer."""

import json
from collections.abc import Callable
from threading import Lock

import httpx
import pytest

from agent.errors import UserError
from evaluators.openai_client import openai_generate
from evaluators.runner import Generate
from evaluators.task import Message

CHATS: list[list[Message]] = [[{"role": "user", "content": f"question {n}"}] for n in range(20)]


def reply(text: str | None, finish: str = "stop") -> dict[str, object]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"completion_tokens": 5}}


class Server:
    """Answers with the question; may fail the first times a question is asked."""

    def __init__(self, failures: int, fail: Callable[[], httpx.Response]) -> None:
        self.failures, self.fail = failures, fail
        self.bodies: list[dict[str, object]] = []
        self.seen: dict[str, int] = {}
        self.lock = Lock()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        text = body["messages"][-1]["content"]
        with self.lock:
            self.bodies.append(body | {"url": str(request.url), "headers": dict(request.headers)})
            self.seen[text] = self.seen.get(text, 0) + 1
            if self.seen[text] <= self.failures:
                return self.fail()
        return httpx.Response(200, json=reply(f"to {text}"))


def generate(server: Callable[[httpx.Request], httpx.Response], tries: int = 3) -> Generate:
    return openai_generate(
        "http://model.test/v1/",
        "sk-1",
        "anchor",
        concurrency=4,
        tries=tries,
        first_wait_s=0.0,
        http_client=httpx.Client(transport=httpx.MockTransport(server)),
    )


def test_answers_keep_the_order_of_the_prompts() -> None:
    server = Server(0, lambda: httpx.Response(500))
    answers = generate(server)(CHATS, list(range(1, 21)))
    assert [answer.text for answer in answers] == [f"to question {n}" for n in range(20)]
    assert {(answer.tokens, answer.finish) for answer in answers} == {(5, "stop")}
    for body in server.bodies:
        assert body["url"] == "http://model.test/v1/chat/completions"
        assert body["headers"]["authorization"] == "Bearer sk-1"  # type: ignore[index]
        assert (body["model"], body["temperature"]) == ("anchor", 0.0)
    asked = {body["messages"][0]["content"]: body["max_tokens"] for body in server.bodies}  # type: ignore[index]
    assert asked == {f"question {n}": n + 1 for n in range(20)}


@pytest.mark.parametrize(
    "fail",
    [
        lambda: httpx.Response(503, headers={"retry-after": "0"}),
        lambda: httpx.Response(429),
        lambda: httpx.Response(200, json=reply("half an", finish="abort")),
    ],
)
def test_a_busy_or_paused_server_is_asked_again(fail: Callable[[], httpx.Response]) -> None:
    server = Server(2, fail)
    answers = generate(server)(CHATS[:3], [9] * 3)
    assert [answer.text for answer in answers] == [
        "to question 0",
        "to question 1",
        "to question 2",
    ]
    assert set(server.seen.values()) == {3}


@pytest.mark.parametrize(
    ("status", "told"), [(503, "status 503 after 3 tries"), (401, "status 401: 'who'")]
)
def test_an_answer_that_cannot_be_had_stops_the_evaluation(status: int, told: str) -> None:
    server = Server(99, lambda: httpx.Response(status, text="who"))
    with pytest.raises(UserError, match=told):
        generate(server)(CHATS[:1], [9])


def test_an_unreachable_server_is_one_line() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(UserError, match=r"http://model\.test.*ConnectError: refused after 3 tries"):
        generate(refuse)(CHATS[:2], [9, 9])


def test_first_words_of_the_assistant_are_continued() -> None:
    server = Server(0, lambda: httpx.Response(500))
    chat = [*CHATS[0], {"role": "assistant", "content": "####"}]
    generate(server)([chat, CHATS[1]], [9, 9])
    flags = {len(b["messages"]): b.get("continue_final_message") for b in server.bodies}  # type: ignore[arg-type]
    assert flags == {2: True, 1: None}


def test_an_empty_content_and_missing_usage_are_told_as_such() -> None:
    def server(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=reply(None, "length") | {"usage": None})

    [answer] = generate(server)(CHATS[:1], [9])
    assert (answer.text, answer.tokens, answer.finish) == ("", None, "length")


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"error": "none"}, "text"])
def test_a_reply_that_is_no_completion_is_one_line(body: object) -> None:
    with pytest.raises(UserError, match="no chat completion but"):
        generate(lambda request: httpx.Response(200, json=body))(CHATS[:1], [9])
