"""The whole service on real parts: stack, OpenAI client, a round, review, swap, rollback, down."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI

from agent.home import Home
from deploy.consoles import USER, credentials
from deploy.supervise import Probe, answers
from evaluators import examples
from flows.service import Service
from flows.show.catch_up import shown_within
from flows.show.prefect import VERDICTS

pytestmark = pytest.mark.integration

EXECUTABLE = Path(sys.executable).with_name("anchorage")
EXAMPLES = Path(examples.__file__).parent
SERVICE_PAGE = Path(__file__).parents[2] / "docs" / "service.md"
SETTINGS = """
[learner]
generations = 2
population = 4
prompts = 16

[tasks]
files = ["{own}/json_answer.py:TASK"]
rows = 24
curve_every = 2
curve_rows = 8
kl_rows = 8
priors = ["piqa", "refusal"]

[review]
mode = "manual"

[projection]
reconcile_seconds = 2.0
"""


@dataclass(frozen=True)
class Running:
    """A stack that is up."""

    home: Path
    endpoint: str
    status: dict[str, Any]
    client: OpenAI


def anchorage(*arguments: str, home: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the installed command as a user does."""
    told = subprocess.run(
        [EXECUTABLE, *arguments, "--home", str(home)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert not check or told.returncode == 0, told.stderr[-2000:]
    return told


def as_json(*arguments: str, home: Path) -> Any:
    return json.loads(anchorage(*arguments, "--json", home=home).stdout)


def of_home(home: Path) -> list[psutil.Process]:
    """Processes whose command or environment names the home."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.environ().get("ANCHORAGE_HOME", "")]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(str(home) in word for word in words):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("service") / "home"
    config = home.parent / "anchorage.toml"
    for name in ("json_answer.py", "json_answer.jsonl"):  # as a user copies the example
        shutil.copy(EXAMPLES / name, home.parent)
    config.write_text(SETTINGS.format(own=home.parent), encoding="utf-8")
    status = as_json("up", "--config", str(config), home=home)
    try:
        url = f"{status['endpoint']}/v1"
        with OpenAI(base_url=url, api_key="local", max_retries=5) as client:
            yield Running(home, status["endpoint"], status, client)
    finally:
        anchorage("down", home=home)
    assert of_home(home) == []


@pytest.fixture(scope="module")
def candidate(running: Running) -> dict[str, Any]:
    """One learnt and judged round on the copied example task, shown by Prefect."""
    until = time.monotonic() + 240  # its server starts in the background
    while not answers(Probe(f"{running.status['prefect']}/api/health")):
        assert time.monotonic() < until
        time.sleep(1)
    told: dict[str, Any] = as_json("improve", "--target", "json_answer", home=running.home)
    assert shown_within(Service.at(running.home), 300.0), "by the flows' process"
    return told


CANARY = "zylophon-4711-kanarienvogel"  # in prompts only: no log may ever have it


def chat(running: Running, text: str = "How do I write a note?", **more: Any) -> Any:
    return running.client.chat.completions.with_raw_response.create(
        model="anchorage",
        messages=[{"role": "user", "content": text}],
        max_tokens=8,
        temperature=0,
        **more,
    )


def test_status_names_every_service(running: Running) -> None:
    states = {each["name"]: each["state"] for each in running.status["services"]}
    wanted = {"engine", "gateway", "watchdog", "mlflow", "prefect", "flows"}
    assert {name for name, state in states.items() if state == "running"} == wanted
    assert len(running.status["champion"]) == 64


def test_an_engine_that_answers_counts_no_failed_start(running: Running) -> None:
    """Or every kill would let the next start wait longer."""
    count, until = Home.at(running.home).starts_json("engine"), time.monotonic() + 60
    while count.exists():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_plain_and_streamed_answers_are_the_same_and_carry_the_version(running: Running) -> None:
    raw = chat(running)
    plain = raw.parse()
    version = running.status["champion"][:12]
    assert raw.headers["x-model-version"] == version
    assert version in plain.system_fingerprint
    stream = running.client.chat.completions.create(
        model="anchorage",
        messages=[{"role": "user", "content": "How do I write a note?"}],
        max_tokens=8,
        temperature=0,
        stream=True,
    )
    parts = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in parts if c.choices)
    assert text == plain.choices[0].message.content
    assert all(version in (part.system_fingerprint or "") for part in parts)


def test_the_responses_api_gives_the_chats_answer(running: Running) -> None:
    plain = chat(running).parse().choices[0].message.content
    options: Any = {"model": "anchorage", "temperature": 0, "max_output_tokens": 8}
    question = "How do I write a note?"
    response = running.client.responses.create(input=question, **options)
    *_, last = running.client.responses.create(input=question, stream=True, **options)
    assert response.output_text == last.response.output_text == plain
    assert response.metadata == {"model_version": running.status["champion"][:12]}
    assert response.usage == last.response.usage


NOTE = {
    "type": "function",
    "name": "note",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"kind": {"enum": ["short", "long"]}},
        "required": ["kind"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_call_and_its_result_through_the_responses_api(
    running: Running, stream: bool
) -> None:
    """The embedded model knows no tools: its answer is forced into the function's schema."""
    options: Any = {"model": "anchorage", "temperature": 0, "tools": [NOTE]}
    history: list[Any] = [{"role": "user", "content": "Write a note."}]
    answer = running.client.responses.create(
        input=history, tool_choice="required", stream=stream, **options
    )
    response: Any = list(answer)[-1].response if stream else answer
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert (call.name, call.status) == ("note", "completed")
    assert json.loads(call.arguments)["kind"] in ("short", "long")
    history += [item.model_dump(exclude_none=True) for item in response.output]
    history += [{"type": "function_call_output", "call_id": call.call_id, "output": "noted"}]
    options |= {"tool_choice": "none", "max_output_tokens": 8}
    answer = running.client.responses.create(input=history, stream=stream, **options)
    response = list(answer)[-1].response if stream else answer
    assert response.output_text
    assert response.metadata == {"model_version": running.status["champion"][:12]}


def test_the_agents_sdk_works_unchanged(running: Running) -> None:
    """An agent whose function is called, and its last answer."""
    agents = pytest.importorskip("agents")
    kinds: list[str] = []

    @agents.function_tool
    def note(kind: Literal["short", "long"]) -> str:
        kinds.append(kind)
        return "noted"

    async def exchange() -> str:
        async with AsyncOpenAI(base_url=f"{running.endpoint}/v1", api_key="local") as client:
            agent = agents.Agent(
                "helper",
                instructions="Be short.",
                model=agents.OpenAIResponsesModel("anchorage", client),
                model_settings=agents.ModelSettings(tool_choice="required"),
                tools=[note],
            )
            untraced = agents.RunConfig(tracing_disabled=True)
            result = await agents.Runner.run(agent, "Write a note.", run_config=untraced)
            return str(result.final_output)

    assert asyncio.run(exchange())
    assert kinds in (["short"], ["long"])


def test_the_documented_agent_runs_as_it_is_printed(
    running: Running, scale: Callable[[int, int], int]
) -> None:
    """The lines of docs/service.md, with this stack's port."""
    if scale(0, 1) == 0:
        pytest.skip("a process that imports the Agents SDK: in the soak; the SDK is tested above")
    if find_spec("agents") is None:
        pytest.skip("the Agents SDK is not installed")
    blocks = re.findall(r"```python\n(.*?)```", SERVICE_PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (printed,) = [block for block in blocks if "OpenAIResponsesModel" in block]
    program = printed.replace("PORT", running.endpoint.rpartition(":")[2])
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nprint(answer.final_output)"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"type": "string", "pattern": "\\p{L}{1,1000}"},
        {"type": "string", "pattern": "\\p{L}+"},  # these four pass the gateway
        {"type": "integer", "multipleOf": 3},
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        {"type": "object", "minProperties": 5},
    ],
)
def test_a_schema_that_cannot_be_followed_is_the_clients_error(
    running: Running, schema: dict[str, Any], stream: bool
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises(openai.BadRequestError):
        list(
            running.client.chat.completions.create(
                model="anchorage",
                messages=[{"role": "user", "content": "?"}],
                max_tokens=4,
                response_format=form,  # type: ignore[call-overload]
                stream=stream,
            )
        )
    assert chat(running).status_code == 200


def test_an_unknown_model_and_a_malformed_body_are_openai_errors(running: Running) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        running.client.chat.completions.create(
            model="no-such-model", messages=[{"role": "user", "content": "?"}]
        )
    assert unknown.value.code == "model_not_found"
    assert "no-such-model" in str(unknown.value)
    with pytest.raises(openai.BadRequestError) as malformed:
        running.client.chat.completions.create(model="anchorage", messages="nothing")  # type: ignore[call-overload]
    assert malformed.value.type == "invalid_request_error"
    reply = httpx.post(
        f"{running.endpoint}/v1/chat/completions",
        content=b"{not json",
        headers={"content-type": "application/json"},
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_the_engines_control_routes_are_not_reachable(running: Running) -> None:
    for path in ("/collective_rpc", "/pause", "/resume", "/sleep", "/v1/../pause", "//pause"):
        reply = httpx.post(f"{running.endpoint}{path}", json={})
        assert reply.status_code in (400, 404, 405), path


def test_a_request_with_a_task_becomes_a_verified_reward(running: Running) -> None:
    for number in range(6):  # a round trains on most of them: the rest is kept for the gate
        asked = {"id": f"c{number}", "question": f"{CANARY} {number}: List it.", "answer": [number]}
        task = {"task": "json_answer", "example": json.dumps(asked)}
        chat(running, str(asked["question"]), metadata=task)
    row = {"question": f"{CANARY}: Tom has 3 pens, buys 4. How many?", "answer": "3+4=7\n#### 7"}
    task = {"task": "gsm8k", "example": json.dumps(row)}
    raw = chat(running, row["question"], metadata=task)
    inference = raw.parse().id
    for _ in range(100):
        rewards = httpx.get(f"{running.endpoint}/v1/rewards").json()["data"]
        mine = [each for each in rewards if each["task"] == "gsm8k"]
        if mine:
            break
        time.sleep(0.1)
    assert mine
    assert mine[0]["reward"] in (0.0, 1.0)
    assert running.status["champion"].startswith(mine[0]["version"][:12])
    reply = httpx.post(
        f"{running.endpoint}/v1/feedback",
        json={"inference_id": inference, "metric_name": "helpful", "value": 1.0},
    )
    assert reply.status_code in (200, 201), reply.text


def test_a_second_up_and_a_used_port_are_one_line(running: Running, tmp_path: Path) -> None:
    again = anchorage("up", home=running.home, check=False)
    assert again.returncode == 2
    assert "is up already" in again.stderr.strip().splitlines()[-1]
    port = running.endpoint.rpartition(":")[2]
    taken = anchorage("up", "--port", port, home=tmp_path / "other", check=False)
    assert taken.returncode == 2
    assert port in taken.stderr.strip().splitlines()[-1]
    assert of_home(tmp_path / "other") == []


def test_the_copied_example_task_trains_in_the_loop(
    running: Running, candidate: dict[str, Any]
) -> None:
    assert candidate["target"] == "json_answer"
    assert candidate["verdict"] in ("promote", "hold", "reject")
    assert candidate["digest"] != running.status["champion"]
    service = Service.at(running.home)
    assert candidate["generations"] == 2
    for generation in service.journal.generations(candidate["round"]):
        assert generation.rewards.std(axis=0).max() > 0  # members differ on the user's own rows
        assert not generation.step.no_op
    measured = candidate["tasks"]["json_answer"]
    assert measured["n"] == 24
    assert 0.2 < measured["anchor"] < 0.9


def test_lm_evaluation_harness_runs_against_the_endpoint(running: Running, tmp_path: Path) -> None:
    model = f"model=anchorage,base_url={running.endpoint}/v1/chat/completions"
    out = tmp_path / "results"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions"]
    command += ["--model_args", model, "--tasks", "anchorage_choices", "--include_path", "."]
    command += ["--apply_chat_template", "--log_samples", "--output_path", str(out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        command, cwd=EXAMPLES / "lm_eval", capture_output=True, text=True, env=os.environ | offline
    )
    assert told.returncode == 0, told.stderr[-2000:]
    [samples] = out.glob("*/samples_anchorage_choices_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == len((EXAMPLES / "lm_eval" / "choices.jsonl").read_text().splitlines())
    assert sum(row["exact_match"] for row in rows) / len(rows) > 0.9  # it knows these
    assert {"1", "2"} <= {row["resps"][0][0] for row in rows}


def signed_in(running: Running, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Sign this process's MLflow client in as the owner; user and password."""
    for name, value in credentials(Home(running.home)).items():
        monkeypatch.setenv(name, value)
    return USER, (running.home / "password").read_text()


def test_the_round_is_in_ledger_journal_mlflow_and_prefect(
    running: Running, candidate: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    states = [row["state"] for row in as_json("history", home=running.home)][::-1]
    assert states[:3] == ["ANCHOR", "PROPOSED", "EVALUATED"]
    replayed = as_json("replay", candidate["round"], home=running.home)
    assert replayed["digest"] == candidate["digest"]
    signed_in(running, monkeypatch)
    client = mlflow.MlflowClient(*[running.status["mlflow"]] * 2)  # not the process's registry
    experiment = client.get_experiment_by_name("anchorage")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    names = {run.data.tags["mlflow.runName"] for run in runs}
    assert {f"round {candidate['round']}", "generation 000", "generation 001"} <= names
    run = next(r for r in runs if r.data.tags["mlflow.runName"] == f"round {candidate['round']}")
    files = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"plots", "samples", "report.md", "verdict.json"} <= files
    plots = {f.path for f in client.list_artifacts(run.info.run_id, "plots")}
    assert "plots/shift.png" in plots
    moved = candidate["shift"]["candidate"]
    assert set(moved) == {"json_answer", "piqa", "refusal"}
    assert {task: run.data.metrics[f"kl.{task}"] for task in moved} == {
        task: row["kl"] for task, row in moved.items()
    }
    assert any(row["kl"] != 0.0 for row in moved.values())
    versions = client.search_model_versions("name = 'anchorage'")
    assert candidate["digest"] in {version.tags["anchorage.digest"] for version in versions}
    url, owner = (
        f"{running.status['prefect']}/api/flow_runs/filter",
        signed_in(running, monkeypatch),
    )
    flow_runs = httpx.post(url, json={}, auth=owner).json()
    ended = {run["name"].split()[0]: run["state_type"] for run in flow_runs}
    judged = VERDICTS[candidate["verdict"]].type
    assert (ended["improve"], ended["evaluate"]) == ("COMPLETED", judged)


def test_review_swap_rollback_and_forward(running: Running, candidate: dict[str, Any]) -> None:
    digest, anchor = candidate["digest"], running.status["champion"]
    refused = anchorage("promote", digest, home=running.home, check=False)
    assert refused.returncode == 2
    assert "`anchorage review approve" in refused.stderr
    mistyped = anchorage("improve", "--set", "sgima=1", home=running.home, check=False)
    assert (mistyped.returncode, mistyped.stderr.count("\n")) == (2, 1)
    assert "unknown key 'learner.sgima'" in mistyped.stderr
    as_json("review", "approve", digest, "--reason", "a test", home=running.home)
    assert chat(running).headers["x-model-version"] == digest[:12]
    as_json("rollback", "anchor", home=running.home)
    assert chat(running).headers["x-model-version"] == anchor[:12]
    as_json("promote", digest, home=running.home)
    assert chat(running).headers["x-model-version"] == digest[:12]
    assert as_json("status", home=running.home)["champion"] == digest


def test_no_word_of_a_prompt_is_in_a_log_or_in_mlflow_or_prefect_and_forget_removes_it(
    running: Running, candidate: dict[str, Any]
) -> None:
    """Last of all: requests, a round on their rows, a review, swaps and a rollback have run."""
    rows = running.home / "runs" / candidate["round"] / "rows.json"
    assert CANARY in rows.read_text(encoding="utf-8")
    for body in ({"messages": CANARY}, {"prompt": CANARY, CANARY: CANARY}):
        reply = httpx.post(f"{running.endpoint}/v1/chat/completions", json=body)
        assert reply.status_code == 400

    def found() -> set[str]:
        files = (path for path in running.home.rglob("*") if path.is_file())
        holding = [path for path in files if CANARY.encode() in path.read_bytes()]
        return {str(path.relative_to(running.home)) for path in holding}

    assert found() <= {"experience.db", "experience.db-wal", str(rows.relative_to(running.home))}
    told = as_json("forget", "local", home=running.home)
    assert told["interactions"] >= 6
    assert candidate["digest"] in told["versions"]
    assert found() == set()


def test_a_rounds_rows_are_a_dataset_version_in_mlflow(
    running: Running, candidate: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    signed_in(running, monkeypatch)
    client = mlflow.MlflowClient(*[running.status["mlflow"]] * 2)  # not the process's registry
    experiment = client.get_experiment_by_name("anchorage")
    assert experiment is not None
    wanted = f"tags.`anchorage.round` = '{candidate['round']}'"
    (run,) = client.search_runs([experiment.experiment_id], wanted)
    (used,) = run.inputs.dataset_inputs
    tags = {tag.key: tag.value for tag in used.tags}
    assert int(tags["anchorage.from_traffic"]) >= 1
    assert tags["anchorage.rows_sha256"].startswith(used.dataset.digest)


def test_the_base_model_answers_rows_of_a_task(running: Running, scale: Callable[..., int]) -> None:
    if scale(0, 1) == 0:
        pytest.skip("an engine of its own: in the soak")
    told = as_json("task", "check", "json_answer", "--model", "--limit", "16", home=running.home)
    assert (told["problems"], told["model"]["n"]) == ([], 16)
    assert 0 <= told["model"]["low"] <= told["model"]["reward"] <= told["model"]["high"] <= 1
