"""An agent's traffic: it calls a tool, gets a question back, and answers; a row judges the end."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import openai
from starlette.testclient import TestClient

from agent.config import load
from agent.gateway.app import create_app
from agent.gateway.requests import ServedModel
from agent.home import Home
from deploy.embedded.rows import up_to
from evaluators.task import Row
from flows.serve.gateway_process import verify
from flows.service import Service

TASK = '''
from dataclasses import replace
from evaluators.task import Source
from evaluators.tasks import TASKS

GSM8K = TASKS["gsm8k"]


def converse(messages, row):
    """The last answer decides, after the tool was heard."""
    assert messages[-2]["role"] == "tool", messages
    return GSM8K.verify(messages[-1]["content"] or "", row)


TASK = replace(
    GSM8K,
    name="desk",
    source=Source("", eval_split="train", file="desk.jsonl"),
    key=lambda row: row["question"],
    converse=converse,
)
'''
TOOLS: list[Any] = [{"type": "function", "function": {"name": "next_question"}}]
ASKED = "Take the next question from the desk and answer it."
CALL = {"id": "c1", "type": "function", "function": {"name": "next_question", "arguments": "{}"}}


def desk(root: Path, rows: Iterable[Row], **sections: dict[str, Any]) -> Service:
    """A home of the embedded model whose target judges conversations."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "desk.py").write_text(TASK)
    (root / "desk.jsonl").write_text("\n".join(json.dumps(dict(row)) for row in rows))
    home = Home.at(root / "home")
    (home.root / "salt").write_text("a salt of tests")
    tasks = {"target": "desk", "files": [f"{root / 'desk.py'}:TASK"], "priors": ["piqa"]}
    tasks |= {"rows": 40, "curve_every": 0} | sections.pop("tasks", {})
    settings = load(None, tasks=tasks, **sections)
    home.settings_json.write_text(settings.model_dump_json())
    return Service(home, settings)


def told(row: Row) -> str:
    """What the tool says."""
    return f'{row["question"]}\nThink step by step, then end with "#### number".'


class Scripted(httpx.MockTransport):
    """The serving engine: it calls the tool, then gives a wrong answer."""

    def __init__(self) -> None:
        super().__init__(self.handle)

    def handle(self, request: httpx.Request) -> httpx.Response:
        last = json.loads(request.content)["messages"][-1]
        message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        if last["role"] == "tool":
            message = {"role": "assistant", "content": "#### 1000"}
        usage = {"prompt_tokens": 60, "completion_tokens": 4, "total_tokens": 64}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return httpx.Response(200, json={"id": "x", "choices": [choice], "usage": usage})


def converse(service: Service, rows: Iterable[Row]) -> list[str]:
    """Have each of these rows answered in a session, through the endpoint; the final answers' ids.

    The row comes with the last request.
    """
    app = create_app(
        service.settings.gateway,
        ServedModel("anchorage", 4096, frozenset(service.tasks)),
        upstream=Scripted(),
        verify=lambda answer, row: verify(service, answer, row),
        experience=service.experience,
        version=service.anchor.digest,
    )
    with TestClient(app, base_url="http://127.0.0.1") as http:
        client = openai.OpenAI(base_url="http://127.0.0.1/v1", api_key="local", http_client=http)
        return [_session(client, f"s{number}", row) for number, row in enumerate(rows)]


def _session(client: openai.OpenAI, session: str, row: Row) -> str:
    about = {"task": "desk", "session_id": session}
    messages: list[Any] = [{"role": "user", "content": ASKED}]

    def ask(**metadata: str) -> Any:
        return client.chat.completions.create(
            model="anchorage", messages=messages, tools=TOOLS, metadata=about | metadata
        )

    call = ask().choices[0].message
    messages.append(call.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": told(row)})
    answer = ask(example=json.dumps(dict(row)))
    return str(answer.id)


def questions(count: int) -> list[Row]:
    """Rows of the embedded model's gsm8k."""
    return list(up_to("gsm8k", "train", count, seed=0))
