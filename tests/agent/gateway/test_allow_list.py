"""No other path of the engine is reachable, however spelled; no word of a prompt is logged."""

import json
import logging
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CANARY = "XYLOPHONE-7351-CANARY"
ENGINE_PATHS = (
    "/collective_rpc",
    "/pause",
    "/resume",
    "/sleep",
    "/wake_up",
    "/reset_prefix_cache",
    "/update_weight_version",
    "/weight_info",
    "/weight_checker",
    "/tokenize",
    "/detokenize",
    "/invocations",
    "/inference/v1/generate",
    "/v1/load_lora_adapter",
    "/v1/embeddings",
    "/v1/completions/render",
    "/v1/chat/completions/batch",
    "/server_info",
    "/load",
    "/ping",
    "/version",
    "/docs",
)
SPELLINGS = (
    "//collective_rpc",
    "/v1//chat/completions",
    "/v1/../collective_rpc",
    "/v1/chat/completions/../../../collective_rpc",
    "/v1/chat/completions/..%2f..%2fpause",
    "/v1/%2e%2e/pause",
    "/v1/%2e%2e%2fpause",
    "/%2e/pause",
    "/./pause",
    "/v1/chat/completions/",
    "/v1/chat/completions;/pause",
    "/v1/chat/completions;x=1",
    "/v1/chat/completions%00",
    "/v1/chat/completions%20",
    "/v1/chat/completions.",
    "/v1/chat/completions%3f",
    "/v1/chat/completions%23/pause",
    "/V1/chat/completions",
    "/v1/Chat/Completions",
    "/v1/chat%2fcompletions",
    "/v1%2Fchat/completions",
    "/v1/ch%61t/completions",
    "/v1\\chat\\completions",
    "/v1/chat/completions\\..\\pause",
    "/%76%31/chat/completions",
    "/v1/models/../pause",
    "/v1/models/..",
    "/v1/models/%2e%2e/pause",
    "/v1/models//pause",
    "/v1/models/tiny/./pause",
    "http://engine/pause",
    "http://engine/collective_rpc",
    "engine:80",
    "*",
    "/\uff0e\uff0e/pause",
)


def raw(port: int, method: str, target: str, body: bytes = b"{}", extra: str = "") -> int:
    """One request as bytes, so that no client tidies up the path; the status that came back."""
    head = (
        f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n{extra}\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(head.encode() + body)
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return int(answer.split(b" ", 2)[1])


def test_no_spelling_of_an_engine_path_gets_through(running: Any) -> None:
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x"}]}).encode()
    for target in (*ENGINE_PATHS, *SPELLINGS):
        for method in ("POST", "GET"):
            status = raw(running.port, method, target, body)
            assert status in (400, 404), (method, target, status)
    assert running.engine.seen == []


ROUTES = """
import json, os
os.environ.update(VLLM_SERVER_DEV_MODE="1", VLLM_LOGGING_LEVEL="ERROR")
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.tasks import POOLING_TASKS
from vllm.utils.argparse_utils import FlexibleArgumentParser
args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
app = build_app(args, ("generate", "transcription", "realtime", *POOLING_TASKS))
def paths(routes):
    for route in routes:
        yield from paths(getattr(route, "routes", None) or ())
        if getattr(route, "path", ""):
            yield route.path
print(json.dumps(sorted(set(paths(app.routes)))))
"""
OURS = {
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/metrics",
    "/openapi.json",
}  # fmt: skip


@pytest.mark.integration
def test_no_route_of_the_engine_gets_through_whatever_vllm_adds(running: Any) -> None:
    """The list is the installed server's own, every kind of model and the control routes on."""
    listing = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ROUTES], capture_output=True, text=True, check=True
    )
    routes = set(json.loads(listing.stdout.splitlines()[-1]))
    assert {"/pause", "/collective_rpc", "/tokenize", "/v1/chat/completions"} <= routes
    assert len(routes) > 40
    for path in sorted(routes - OURS):
        target = re.sub(r"\{[^}]*\}", "x", path)
        for method in ("POST", "GET"):
            assert raw(running.port, method, target) in (400, 404), (method, target)
    assert running.engine.seen == []


def test_only_two_paths_ever_reach_the_engine(running: Any) -> None:
    with running.http() as client:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/healthz"):
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"):
                content = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
                client.request(method, path, json=content)
        client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert {path for path, _ in running.engine.seen} == {"/v1/chat/completions", "/v1/completions"}
    assert len(running.engine.seen) == 2


def test_requests_that_two_servers_could_read_differently_are_refused(running: Any) -> None:
    body = b'{"model":"tiny","messages":[{"role":"user","content":"x"}]}'
    smuggled = body + b"POST /pause HTTP/1.1\r\nHost: x\r\n\r\n"
    for extra in ("Transfer-Encoding: chunked\r\n", "Content-Length: 4\r\n", "Host: other\r\n"):
        status = raw(running.port, "POST", "/v1/chat/completions", smuggled, extra)
        assert status in (400, 421), extra
    assert running.engine.seen == []


def test_hop_headers_and_addresses_of_a_client_stay_here(running: Any) -> None:
    headers = {
        "x-request-id": "mine",
        "authorization": "Bearer secret",
        "x-forwarded-for": "1.2.3.4",
    }
    with running.http(**headers) as client:
        content = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
        answer = client.post("/v1/chat/completions", json=content)
    assert answer.headers["x-request-id"] != "mine"


@pytest.mark.parametrize("fault", ["", "error", "nonsense", "cut", "down", "boom"])
def test_no_word_of_a_prompt_reaches_a_log(
    running: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    running.engine.fault = fault
    if fault == "boom":
        running.app.state.parts.quota.take = _boom  # a defect whose message quotes the prompt
    content = {
        "model": "tiny",
        "messages": [{"role": "user", "content": CANARY}],
        "metadata": {"task": "gsm8k", "example": json.dumps({"q": CANARY})},
        "store": True,
    }
    bad = content | {CANARY: CANARY, "temperature": CANARY}
    with running.http() as client:
        for body in (content, content | {"stream": True}, bad):
            client.post("/v1/chat/completions", json=body)
        client.post("/v1/completions", json={"model": CANARY, "prompt": CANARY})
        client.get(f"/{CANARY}")
        client.get("/v1/rewards", params={"since": CANARY})
    running.settled()
    logged = "\n".join(
        f"{record.getMessage()} {vars(record).get('fields')} {record.exc_text} {record.exc_info}"
        for record in caplog.records
        if record.name.startswith("anchorage")
    )
    assert "request" in logged
    out, err = capfd.readouterr()
    assert CANARY not in logged + out + err


def _boom(*_: object) -> None:
    raise RuntimeError(CANARY)


def test_a_failing_store_costs_rows_but_no_answers_and_no_words(
    running: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with running.store.writing() as connection:
        connection.exec_driver_sql("DROP TABLE answers")
    content = {"model": "tiny", "messages": [{"role": "user", "content": CANARY}], "store": True}
    with running.http() as client:
        assert client.post("/v1/chat/completions", json=content).status_code == 200
    running.settled()
    assert "rows lost" in caplog.text
    assert CANARY not in caplog.text


def test_a_path_has_its_method_and_models_have_names(running: Any) -> None:
    with running.http() as client:
        wrong = client.get("/v1/chat/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        wrong = client.post("/v1/models", json={})
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, HEAD")
        assert wrong.json()["error"]["type"] == "invalid_request_error"
        head = client.head("/healthz")
        assert (head.status_code, head.content) == (200, b"")
        assert client.get("/v1/models/").status_code == 404
        assert client.get("/v1/models/tiny").json()["id"] == "tiny"
