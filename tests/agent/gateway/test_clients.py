"""Other people's clients, unchanged: the openai package of Node, and bare httpx streaming."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

SHORT = "a" * 12
SCRIPT = Path(__file__).with_name("client.mjs")
PACKAGE = "openai@6"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.integration
@pytest.mark.skipif(
    shutil.which("npm") is None and "CI" not in os.environ,
    reason="no Node on this machine (CI installs Debian's)",
)
def test_the_openai_package_of_node_works_unchanged(running: Any, tmp_path: Path) -> None:
    script = tmp_path / SCRIPT.name
    shutil.copy(SCRIPT, script)
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", PACKAGE]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    ran = subprocess.run(
        ["node", str(script), f"{running.url}/v1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {
        "plain": "AAAAA",
        "fingerprint": SHORT,
        "version": SHORT,
        "streamed": "AAAAA",
        "tokens": 5,
        "tool": "look",
        "after": "AAAAA",
        "models": ["tiny", "tiny@champion", f"tiny@{SHORT}"],
        "error": [True, "model_not_found"],
    }


def test_httpx_reads_a_stream_line_by_line_as_it_comes(running: Any) -> None:
    running.engine.delay_s = 0.02
    with running.http() as client:
        with client.stream("POST", "/v1/chat/completions", json=ASK | {"stream": True}) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            assert reply.headers["x-model-version"] == SHORT
            lines = [line for line in reply.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        text = "".join(event["choices"][0]["delta"]["content"] for event in events)
        assert (text, len(events)) == ("AAAAA", 5)
        assert {event["system_fingerprint"] for event in events} == {SHORT}


def test_an_agent_calls_a_tool_reads_its_result_and_answers(running: Any) -> None:
    """Turn by turn as agent frameworks do it: the whole history goes back, as it was received."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    history: list[dict[str, Any]] = []
    with running.openai() as client:
        for question in ("what is there?", "and there?"):
            history.append({"role": "user", "content": question})
            while history[-1]["role"] != "assistant":
                message = (
                    client.chat.completions.create(
                        model="tiny",
                        messages=history,  # type: ignore[arg-type]
                        tools=[tool],  # type: ignore[list-item]
                        tool_choice="auto",
                        parallel_tool_calls=False,
                    )
                    .choices[0]
                    .message
                )
                history.append(message.model_dump(exclude_unset=True))
                for call in message.tool_calls or ():
                    assert json.loads(call.function.arguments) == {"x": 1}
                    history.append({"role": "tool", "tool_call_id": call.id, "content": "a cat"})
    assert [each["role"] for each in history] == ["user", "assistant", "tool", "assistant"] * 2
    assert history[-1]["content"] == "AAAAA"
    sent = [body["messages"] for _, body in running.engine.seen]
    assert sent[-1] == history[:-1]


def test_a_stream_that_ends_early_is_no_whole_one_for_httpx(running: Any) -> None:
    running.engine.fault = "cut"
    with running.http() as client:
        reply = client.post("/v1/chat/completions", json=ASK | {"stream": True})
    assert "data: [DONE]" not in reply.text
    assert httpx.codes.is_success(reply.status_code)
    assert "engine_failed" in reply.text
