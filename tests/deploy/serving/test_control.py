"""The control clients: errors of one line, and a name that leads to one process only."""

import json
import socket
from pathlib import Path

import httpx
import pytest

from deploy.serving.control import ControlError, EngineControl, GatewayControl, pinned


def engine(handler: httpx.MockTransport | None = None, **replies: object) -> EngineControl:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=replies[request.url.path.strip("/").replace("/", "_")])

    return EngineControl(handler or httpx.MockTransport(answer))


def test_what_an_engine_refuses_is_one_line() -> None:
    refuse = httpx.MockTransport(lambda _: httpx.Response(500, text="first\n  second"))
    with pytest.raises(ControlError, match=r"^/resume: HTTP 500 first second$"):
        engine(refuse).resume()


def test_an_engine_that_is_gone_is_not_healthy() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    control = engine(httpx.MockTransport(gone))
    assert not control.healthy()
    with pytest.raises(ControlError, match="ConnectError"):
        control.paused()


def test_workers_that_disagree_are_an_error() -> None:
    replies = {"results": [{"digest": "a"}, {"digest": "b"}]}
    with pytest.raises(ControlError, match="disagree"):
        engine(collective_rpc=replies).load("/x", 1.0)
    same = {"results": [{"digest": "a"}, {"digest": "a"}]}
    assert engine(collective_rpc=same).load("/x", 1.0) == "a"


def test_probabilities_come_back_in_the_order_of_the_prompts() -> None:
    def choice(index: int, logprob: float) -> dict[str, object]:
        return {"index": index, "logprobs": {"top_logprobs": [{"token_id:3": logprob}]}}

    replies = {"choices": [choice(1, -2.0), choice(0, -1.0)]}
    found = engine(v1_completions=replies).top_logprobs("m", [[1], [2]], 1, 1)
    assert found == [[{3: -1.0}], [{3: -2.0}]]


@pytest.mark.parametrize(("last", "continued"), [("user", False), ("assistant", True)])
def test_a_last_message_of_the_assistant_is_continued(last: str, continued: bool) -> None:
    asked: list[dict[str, object]] = []

    def tokenize(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(200, json={"tokens": [5]})

    messages = [{"role": "user", "content": "?"}, {"role": last, "content": "x"}]
    assert engine(httpx.MockTransport(tokenize)).tokens(messages) == [5]
    assert asked[0]["continue_final_message"] is continued
    assert asked[0]["add_generation_prompt"] is not continued


def test_a_release_names_only_what_is_known() -> None:
    sent: list[dict[str, str]] = []

    def remember(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, json={})

    gateway = GatewayControl(httpx.MockTransport(remember))
    gateway.release("v")
    gateway.release("v", "h", Path("/s"))
    assert sent == [{"version": "v"}, {"version": "v", "lease": "h", "socket": "/s"}]


def test_a_pinned_name_leads_to_the_first_listener_only(tmp_path: Path) -> None:
    """Another one behind the same path is not reached; the pinned name goes with the block."""
    path = tmp_path / "engine.sock"

    def listen() -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        return listener

    first = listen()
    with pinned(path) as name:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(name))
        first.close()
        path.unlink()
        with listen(), socket.socket(socket.AF_UNIX) as client:
            with pytest.raises(ConnectionRefusedError):
                client.connect(str(name))
            client.connect(str(path))
    assert not name.exists()


def test_nobody_to_pin_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"engine\.sock"), pinned(tmp_path / "engine.sock"):
        pass
