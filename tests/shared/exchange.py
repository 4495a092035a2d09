"""An agent's traffic: it calls a tool, gets a question back, and answers; a row judges the end."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
# The same as an environment of several turns of `verifiers`; its rewards look at all of them.
TASKSET = """
import json
from pathlib import Path
import verifiers.v1 as vf

class Question(vf.TaskData):
    question: str
    answer: str

class Desk(vf.Task[Question, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        if trace.num_turns > 1:  # a session, not a row of the data set
            assert trace.tool_messages[0].content.startswith(self.data.question)
        wanted = self.data.answer.rpartition("#### ")[2]
        return float(trace.last_reply.rpartition("#### ")[2] == wanted)

class DeskSet(vf.Taskset[Desk, vf.TasksetConfig]):
    def load(self):
        for line in Path(__file__).with_name("questions.jsonl").read_text().splitlines():
            row = json.loads(line)
            yield Desk(Question(prompt=row["question"] + ASK, **row))

__all__ = ["DeskSet"]
"""
TASKSET_TASK = """
from evaluators.environments import from_verifiers
TASK = from_verifiers("desk_set", "agents.jsonl", name="agents", max_tokens=96)
"""
TOOLS: list[Any] = [{"type": "function", "function": {"name": "next_question"}}]
ASKED = "Take the next question from the desk and answer it."
CALL = {"id": "c1", "type": "function", "function": {"name": "next_question", "arguments": "{}"}}


def desk(
    root: Path,
    rows: Iterable[Row],
    name: str = "desk",
    text: str = TASK,
    **sections: dict[str, Any],
) -> Service:
    """A home of the embedded model with an own target: one that judges conversations."""
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{name}.py").write_text(text)
    (root / f"{name}.jsonl").write_text("\n".join(json.dumps(dict(row)) for row in rows))
    home = Home.at(root / "home")
    (home.root / "salt").write_text("a salt of tests")
    tasks = {"target": name, "files": [f"{root / name}.py:TASK"], "priors": ["piqa"]}
    tasks |= {"rows": 40, "curve_every": 0} | sections.pop("tasks", {})
    settings = load(None, tasks=tasks, **sections)
    home.settings_json.write_text(settings.model_dump_json())
    return Service(home, settings)


def taskset_desk(root: Path, rows: Sequence[Row], count: int, **sections: Any) -> Service:
    """The desk of a taskset of several turns; the first ``count`` rows are answered in sessions.

    ``root`` has to be on the path that modules are found by.
    """
    from evaluators.environments import taskset_rows

    root.mkdir(parents=True, exist_ok=True)
    (root / "desk_set.py").write_text(f"ASK = {told({'question': ''})!r}\n{TASKSET}")
    (root / "questions.jsonl").write_text("\n".join(json.dumps(dict(row)) for row in rows))
    written = list(taskset_rows("desk_set"))
    service = desk(root, written[count:], "agents", TASKSET_TASK, **sections)
    converse(service, written[:count])
    return service


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
    with connected(service, Scripted()) as client:
        name = service.settings.tasks.target
        return [_session(client, name, f"s{number}", row) for number, row in enumerate(rows)]


@contextmanager
def connected(service: Service, engine: httpx.MockTransport) -> Iterator[openai.OpenAI]:
    """A client of the home's endpoint, whose answers are a scripted engine's."""
    app = create_app(
        service.settings.gateway,
        ServedModel("anchorage", 4096, frozenset(service.tasks)),
        upstream=engine,
        verify=lambda answer, row: verify(service, answer, row),
        experience=service.experience,
        version=service.anchor.digest,
    )
    with TestClient(app, base_url="http://127.0.0.1") as http:
        yield openai.OpenAI(base_url="http://127.0.0.1/v1", api_key="local", http_client=http)


def _session(client: openai.OpenAI, task: str, session: str, row: Row) -> str:
    about = {"task": task, "session_id": session}
    messages: list[Any] = [{"role": "user", "content": ASKED}]

    def ask(**metadata: str) -> Any:
        return client.chat.completions.create(
            model="anchorage", messages=messages, tools=TOOLS, metadata=about | metadata
        )

    call = ask().choices[0].message
    messages.append(call.model_dump(exclude_none=True))
    messages.append(
        {
            "role": "tool",
            "tool_call_id": call.tool_calls[0].id,
            "content": told(row.get("data", row)),
        }
    )
    answer = ask(example=json.dumps(dict(row)))
    return str(answer.id)


def questions(count: int) -> list[Row]:
    """Rows of the embedded model's gsm8k."""
    return list(up_to("gsm8k", "train", count, seed=0))
