"""The endpoint as clients see it: the real openai client, and bytes."""

import json
import socket
import threading
import time
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest

from agent.errors import UserError
from agent.gateway.app import PUBLIC_PATHS, create_app
from agent.gateway.exchange import Versions
from agent.gateway.hold import Route
from agent.gateway.keys import KeyStore
from agent.gateway.requests import ServedModel
from agent.gateway.upstream import Upstream
from agent.sections_running import GatewaySettings

A = "a" * 64
SHORT = A[:12]
HELLO = [{"role": "user", "content": "hello"}]


def test_a_plain_completion_is_the_engines_bytes_but_for_the_fingerprint(running: Any) -> None:
    with running.http() as client:
        response = client.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "logprobs": True}
        )
    assert response.status_code == 200
    assert response.headers["x-model-version"] == SHORT
    assert len(response.headers["x-request-id"]) == 32
    answer = response.json()
    assert answer["system_fingerprint"] == SHORT
    assert response.content == json.dumps(answer, separators=(",", ":")).encode()
    path, sent = running.engine.seen[0]
    assert path == "/v1/chat/completions"
    salt = sent.pop("cache_salt")
    assert len(salt) == 64
    assert sent == {"model": "tiny", "messages": HELLO, "logprobs": True}


def test_the_openai_client_reads_plain_and_streamed_answers(running: Any) -> None:
    with running.openai() as client:
        whole = client.chat.completions.create(model="tiny", messages=HELLO, n=2)
        assert [c.message.content for c in whole.choices] == ["AAAAA", "AAAAA"]
        assert whole.system_fingerprint == SHORT
        chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "AAAAA"
        assert {c.system_fingerprint for c in chunks} == {SHORT}
        assert all(c.usage is None for c in chunks)
        plain = client.completions.create(model="tiny", prompt="hello", max_tokens=4)
        assert plain.choices[0].text == "AAAAA"
        assert plain.system_fingerprint == SHORT
        parts = list(client.completions.create(model="tiny", prompt="hello", stream=True))
        assert "".join(p.choices[0].text for p in parts) == "AAAAA"


def test_a_stream_carries_its_usage_only_for_those_who_asked(running: Any) -> None:
    with running.openai() as client:
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_tools_pass_through_and_an_agents_next_turn_is_accepted(running: Any) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    with running.openai() as client:
        first = client.chat.completions.create(
            model="tiny", messages=HELLO, tools=tools, tool_choice="auto"
        )
        message = first.choices[0].message
        assert message.tool_calls is not None
        assert message.tool_calls[0].function.name == "look"
        turns = [
            *HELLO,
            message.model_dump(),
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "4"},
        ]
        client.chat.completions.create(model="tiny", messages=turns, tools=tools)
    assert running.engine.seen[0][1]["tools"] == tools
    assert running.engine.seen[1][1]["messages"] == turns


def test_a_body_that_is_not_allowed_is_told_so_and_never_reaches_the_engine(running: Any) -> None:
    with running.http() as client:
        response = client.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "priority": -5}
        )
    assert response.status_code == 400
    assert response.json() == {
        "error": {
            "message": "Unrecognized request argument supplied: priority",
            "type": "invalid_request_error",
            "param": "priority",
            "code": None,
        }
    }
    assert response.headers["x-model-version"] == SHORT
    assert running.engine.seen == []


def test_a_body_that_is_too_large_or_of_another_type_is_refused(start: Any) -> None:
    running = start(max_body_bytes=1000)
    with running.http() as client:
        large = client.post("/v1/chat/completions", json={"model": "tiny", "x": "y" * 2000})
        assert large.status_code == 413
        plain = client.post("/v1/feedback", content=b"{}", headers={"content-type": "text/plain"})
        assert plain.status_code == 415


def test_an_unknown_model_is_openais_error(running: Any) -> None:
    with running.openai() as client:
        for name in ("gpt-4o", "tiny@", "tiny@" + "b" * 12, "tiny@aaa", "@" + SHORT, "tiny@nosuch"):
            with pytest.raises(openai.NotFoundError) as caught:
                client.chat.completions.create(model=name, messages=HELLO)
            assert caught.value.code == "model_not_found"
    assert running.engine.seen == []


KEPT = "c" * 64


@pytest.fixture
def versions() -> Versions:
    """An anchor that is kept, and a previous version that is the champion's own."""
    return Versions(kept=lambda: [KEPT, A], named=lambda: {"previous": A, "anchor": KEPT})


def test_models_lists_the_champion_its_names_and_the_kept_versions(
    start: Any, versions: Versions
) -> None:
    running = start(versions=versions)
    with running.openai() as client:
        listed = {m.id: m.served for m in client.models.list()}  # type: ignore[attr-defined]
        assert listed == {
            "tiny": True,
            "tiny@champion": True,
            "tiny@previous": True,
            "tiny@anchor": False,
            f"tiny@{SHORT}": True,
            f"tiny@{KEPT[:12]}": False,
        }
        for name in listed:
            assert client.models.retrieve(name).id == name


@pytest.mark.parametrize("stream", [True, False])
def test_a_version_by_name_is_answered_where_it_is_served(
    start: Any, versions: Versions, stream: bool
) -> None:
    running = start(versions=versions)
    with running.openai() as client:
        for version in ("champion", "previous", SHORT, A):
            raw = client.chat.completions.with_raw_response.create(
                model=f"tiny@{version}", messages=HELLO, stream=stream
            )
            assert raw.headers["x-model-version"] == SHORT
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="tiny@anchor", messages=HELLO, stream=stream)
    assert caught.value.code == "model_not_found"
    assert "`tiny@anchor` (version cccccccccccc)" in caught.value.message
    assert f"served: tiny (version {SHORT})" in caught.value.message
    assert len(running.engine.seen) == 4


def test_a_second_engine_answers_for_its_version_until_it_is_started_anew(
    start: Any, tmp_path: Any
) -> None:
    """Its socket outlives it: another version could answer there under the old one's name."""
    slot = {"digest": KEPT}
    running = start(versions=Versions(standby=lambda _socket: slot["digest"]))
    admission = running.app.state.parts.admission
    second = Upstream(running.engine, 1, tmp_path / "second.sock")
    second._line = admission.route.upstream._line
    running.call(lambda: admission.warm.update({KEPT: Route(KEPT, second)}))
    with running.openai() as client:
        name = f"tiny@{KEPT[:12]}"
        answer = client.chat.completions.create(model=name, messages=HELLO)
        assert answer.system_fingerprint == KEPT[:12]
        slot["digest"] = "d" * 64
        assert not {m.id: m.served for m in client.models.list()}.get(name)  # type: ignore[attr-defined]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=name, messages=HELLO)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("down", 503, "engine_unreachable"),
        ("silent", 504, "engine_timeout"),
        ("error", 502, "engine_failed"),
        ("nonsense", 502, "engine_failed"),
        ("abort", 503, "aborted"),
        ("refuse", 400, None),
    ],
)
def test_an_engines_failure_is_an_error_without_its_inner_details(
    running: Any, fault: str, status: int, code: str | None
) -> None:
    running.engine.fault = fault
    with running.http() as client:
        response = client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert "CUDA" not in response.text
    assert ("retry-after" in response.headers) == (status == 503)
    assert running.app.state.parts.admission.in_flight == 0


@pytest.mark.parametrize("fault", ["abort", "cut", "error_event"])
def test_a_stream_that_breaks_off_ends_with_an_error_and_no_done(running: Any, fault: str) -> None:
    running.engine.fault = fault
    with running.openai() as client, pytest.raises(openai.APIError, match="broke off"):
        list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    with running.http() as client:
        body = {"model": "tiny", "messages": HELLO, "stream": True}
        response = client.post("/v1/chat/completions", json=body)
    assert "[DONE]" not in response.text
    assert "inner detail" not in response.text


@pytest.mark.parametrize(
    ("fault", "status", "says"),
    [
        ("event 400 the schema has no such feature", 400, "the schema has no such feature"),
        ("event 500 Internal server error", 400, "cannot follow this schema"),
        ("event 500 out of memory at 0x7f", 502, "the engine failed"),
    ],
)
def test_a_stream_refused_before_its_first_event_is_an_error_of_its_own(
    running: Any, fault: str, status: int, says: str
) -> None:
    """Only the engine's own failure is recorded as one."""
    running.engine.fault = fault
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string"}}}
    body = {"model": "tiny", "messages": HELLO, "stream": True, "response_format": form}
    with running.http() as client:
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == status
    assert says in response.json()["error"]["message"]
    running.settled()
    with running.store.engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT status FROM interactions").all()
    assert [row[0] for row in rows] == (["error"] if status == 502 else [])
    assert running.app.state.parts.admission.in_flight == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_engine(running: Any, stream: bool) -> None:
    running.engine.fault = "stuck"
    body = {"model": "tiny", "messages": HELLO, "stream": stream}
    with running.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=body, timeout=0.3)
    until = time.monotonic() + 10
    while running.engine.running or running.app.state.parts.admission.in_flight:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert running.engine.broken_off == 1


def test_a_slow_reader_does_not_keep_its_place_in_the_engine(running: Any) -> None:
    running.engine.tokens, running.engine.weights = 3000, "A" * 5000  # beyond any socket's buffer
    body = {"model": "tiny", "messages": HELLO, "stream": True}
    with running.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as slow:
        pieces = slow.iter_raw()
        first = next(pieces)
        until = time.monotonic() + 10
        while running.app.state.parts.admission.in_flight:
            assert time.monotonic() < until
            time.sleep(0.01)
        rest = b"".join(pieces)
    assert len(first + rest) > 3000 * 5000
    assert rest.endswith(b"data: [DONE]\n\n")


def test_a_client_that_stops_reading_is_let_go(start: Any) -> None:
    running = start(silence_timeout_s=0.3)
    running.engine.tokens, running.engine.weights = 3000, "A" * 5000
    body = {"model": "tiny", "messages": HELLO, "stream": True}
    with running.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as mute:
        until = time.monotonic() + 10
        while not _counted(running, "499"):
            assert time.monotonic() < until
            time.sleep(0.02)
        with pytest.raises(httpx.RemoteProtocolError):
            b"".join(mute.iter_raw())


def _counted(running: Any, status: str) -> bool:
    counter = running.app.state.parts.metrics.requests
    return bool(counter.labels("chat.completions", status)._value.get())


def test_an_answer_that_takes_too_long_is_given_up(start: Any) -> None:
    running = start(answer_timeout_s=0.2)
    running.engine.fault = "stuck"
    with running.openai() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="tiny", messages=HELLO)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="too long"):
            list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    assert running.app.state.parts.admission.in_flight == 0


def test_one_principals_long_answers_keep_nobody_out(start: Any, store: Any) -> None:
    keys = KeyStore(store)
    eve, ann = (f"Bearer {keys.create_key(name, ['infer']).token}" for name in ("eve", "ann"))
    running = start(keys=keys, max_in_flight=4)
    body = json.dumps({"model": "tiny", "messages": HELLO}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {eve}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    running.engine.fault = "stuck"
    with ExitStack() as stack:
        for _ in range(8):  # sent, and never read
            sock = socket.create_connection(("127.0.0.1", running.port))
            stack.enter_context(sock).sendall(head.encode() + body)
        admission, until = running.app.state.parts.admission, time.monotonic() + 10
        while (admission.in_flight, admission.queued) != (3, 5):
            assert time.monotonic() < until
            time.sleep(0.01)
        running.engine.fault = ""
        with running.http(authorization=ann) as client:
            reply = client.post("/v1/chat/completions", json=json.loads(body))
        assert reply.status_code == 200
        assert (admission.in_flight, admission.queued) == (3, 5)


def test_over_the_queue_a_client_is_told_when_to_come_back(start: Any) -> None:
    running = start(max_in_flight=1, max_queued=1, retry_after_s=7)
    running.engine.delay_s = 0.1
    statuses: list[tuple[int, str | None]] = []

    def ask() -> None:
        with running.http() as client:
            response = client.post(
                "/v1/chat/completions", json={"model": "tiny", "messages": HELLO}
            )
        statuses.append((response.status_code, response.headers.get("retry-after")))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {(200, None), (503, "7")}
    assert statuses.count((200, None)) >= 2


def test_rates_and_quotas_answer_429_with_the_time_to_wait(start: Any) -> None:
    running = start(rate="2/hour", token_quota="1000/hour")
    with running.openai() as client:
        for _ in range(2):
            client.chat.completions.create(model="tiny", messages=HELLO)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="tiny", messages=HELLO)
    assert int(caught.value.response.headers["retry-after"]) > 0


def test_a_token_quota_counts_answers_of_both_kinds(start: Any) -> None:
    running = start(token_quota="12/hour")
    with running.openai() as client:
        client.chat.completions.create(model="tiny", messages=HELLO)
        list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
        with pytest.raises(openai.RateLimitError, match="quota"):
            client.chat.completions.create(model="tiny", messages=HELLO)


def test_healthz_says_what_is_served_and_metrics_count(running: Any) -> None:
    with running.http() as client:
        client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO})
        health = client.get("/healthz")
        text = client.get("/metrics").text
    assert health.json() == {"status": "ok", "model": "tiny", "version": SHORT}
    assert 'anchorage_requests_total{endpoint="chat.completions",status="200"} 1.0' in text
    assert 'anchorage_tokens_total{kind="completion"} 5.0' in text
    assert "anchorage_paused 0.0" in text


def test_without_keys_only_this_machine_is_served(start: Any, store: Any, engine: Any) -> None:
    with pytest.raises(UserError, match=r"0\.0\.0\.0 without keys"):
        create_app(
            GatewaySettings(host="0.0.0.0"),
            ServedModel("tiny", 4096),
            upstream=engine,
            verify=lambda *_: None,  # type: ignore[arg-type, return-value]
            experience=store,
            version=A,
        )
    running = start()
    with running.http() as client:
        assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 421
        assert client.get("/healthz", headers={"host": "localhost:8000"}).status_code == 200
        answer = client.get("/v1/models", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_the_description_names_every_public_path(running: Any) -> None:
    with running.http() as client:
        document = client.get("/openapi.json").json()
    served = {path.decode() for path in PUBLIC_PATHS} - {"/openapi.json", "/v1/models/"}
    assert set(document["paths"]) == served | {"/v1/models/{model}"}
    assert "ChatRequest" in document["components"]["schemas"]
