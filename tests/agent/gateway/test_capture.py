"""Rewards from traffic: what is kept, what is verified, and what the owner is told."""

import asyncio
import json
import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from sqlalchemy import select

from agent.gateway.capture import _written
from agent.gateway.keys import KeyStore
from agent.gateway.requests import row_hash
from agent.gateway.verifier import RowRefusedError, Turns
from agent.store import feedback
from agent.store.experience import Answer, Interaction, Unjudged
from agent.store.experience_db import answers, interactions
from agent.store.seals import update_sealed

A = "a" * 64
HELLO = [{"role": "user", "content": "hello"}]
RIGHT = json.dumps({"answer": "A"})
WRONG = json.dumps({"answer": "B"})


def ask(running: Any, **options: Any) -> Any:
    with running.openai() as client:
        answer = client.chat.completions.create(**({"model": "tiny", "messages": HELLO} | options))
        if options.get("stream"):
            answer = list(answer)
    running.settled()
    return answer


def rows(running: Any, table: Any) -> list[dict[str, Any]]:
    with running.store.engine.connect() as connection:
        return [
            dict(row._mapping) for row in connection.execute(select(table).order_by(table.c.id))
        ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_task_earns_a_verified_reward_beside_the_version_that_answered(
    running: Any, stream: bool
) -> None:
    ask(running, stream=stream, metadata={"task": "gsm8k", "example": RIGHT, "session_id": "s1"})
    ask(running, stream=stream, metadata={"task": "gsm8k", "example": WRONG})
    ask(running, stream=stream, metadata={"task": "gsm8k", "example_id": "known-1"})
    right, wrong, known = running.store.rows("gsm8k")
    assert (right.reward, wrong.reward, known.reward) == (1.0, 0.0, 1.0)
    assert (right.source, known.source) == ("submitted", "known")
    assert (right.session_id, right.principal, right.version) == ("s1", "local", A)
    assert json.loads(right.prompt) == HELLO
    kept = rows(running, interactions)[0]
    assert (kept["prompt_tokens"], kept["completion_tokens"]) == (3, 5)
    assert kept["response_id"] == "chatcmpl-engine"
    assert kept["latency_s"] > 0
    assert rows(running, answers)[0]["completion"] == "AAAAA"
    assert rows(running, answers)[0]["extracted"] == "A"


def test_every_choice_is_verified_on_its_own(running: Any) -> None:
    ask(running, n=3, metadata={"task": "gsm8k", "example": RIGHT})
    assert [row.choice for row in running.store.rows("gsm8k")] == [0, 1, 2]


def test_without_store_or_task_nothing_of_the_text_is_kept(running: Any) -> None:
    ask(running)
    ask(running, metadata={"session_id": "s"})
    for kept in rows(running, interactions):
        assert kept["status"] == "ok"
        assert {kept[name] for name in ("prompt", "prompt_hash", "example", "group_hash")} == {None}
    assert rows(running, answers) == []


def test_store_keeps_the_text_without_a_reward(running: Any) -> None:
    ask(running, store=True)
    assert json.loads(rows(running, interactions)[0]["prompt"]) == HELLO
    kept = rows(running, answers)[0]
    assert (kept["completion"], kept["reward"], kept["judged"]) == ("AAAAA", None, None)


def test_tool_calls_are_kept_with_the_text(running: Any) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    ask(running, store=True, tools=tools)
    calls = json.loads(rows(running, answers)[0]["tool_calls"])
    assert calls == [{"name": "look", "arguments": '{"x": 1}'}]


@pytest.mark.parametrize(
    ("example", "error"),
    [
        ({"other": 1}, "KeyError"),
        ({"answer": "A", "nan": True}, "reward not finite"),
        ({"answer": "A", "slow": 3}, "timeout after 0.1 s"),
    ],
)
def test_a_verifiers_failure_is_an_error_and_never_a_zero(
    start: Any, example: dict[str, Any], error: str
) -> None:
    running = start(verify_timeout_s=0.1)
    ask(running, metadata={"task": "gsm8k", "example": json.dumps(example)})
    assert running.store.rows("gsm8k") == []
    (told,) = running.store.rewards("local")
    assert (told.reward, told.error) == (None, error)
    with running.http() as client:
        text = client.get("/metrics").text
    assert (
        'anchorage_verdicts_total{outcome="error",task="gsm8k",version="aaaaaaaaaaaa"} 1.0' in text
    )


def test_a_refused_row_is_kept_with_the_reason_and_earns_nothing(start: Any) -> None:
    def refuse(answer: Unjudged, row: Any) -> Any:
        raise RowRefusedError(f"{answer.task}: its gold answer scores 0" + "!" * 300)

    running = start(verify=refuse)
    ask(running, metadata={"task": "gsm8k", "example": RIGHT})
    (told,) = running.store.rewards("local")
    assert told.reward is None
    assert told.error.startswith("row refused: gsm8k: its gold answer scores 0!")
    assert len(told.error) == 256
    assert running.store.errors("gsm8k") == [("local", told.error, 1)]


def test_a_sound_row_that_is_not_trained_on_is_judged_all_the_same(start: Any) -> None:
    """Its reward counts for the version that answered; collecting never sees it."""

    def refuse(answer: Unjudged, row: Any) -> Any:
        verdict = SimpleNamespace(reward=1.0, format=0.0, extracted="A")
        raise RowRefusedError("it judges", verdict)

    running = start(verify=refuse)
    ask(running, metadata={"task": "gsm8k", "example": RIGHT})
    (told,) = running.store.rewards("local")
    assert (told.reward, told.error) == (1.0, "row refused: it judges")
    assert running.store.rows("gsm8k") == []
    assert [each.reward for each in running.store.earned(A)] == [1.0]
    with running.http() as client:
        assert 'outcome="judged",task="gsm8k"' in client.get("/metrics").text


def test_a_row_that_cannot_fit_is_400_before_the_engine_is_asked(start: Any) -> None:
    running = start(check=lambda task, row: None if "answer" in row else f"{task}: no answer")
    with pytest.raises(openai.BadRequestError, match="gsm8k: no answer") as told:
        ask(running, metadata={"task": "gsm8k", "example": "{}"})
    assert (told.value.param, told.value.code) == ("metadata.example", "row_refused")
    assert running.engine.seen == []
    ask(running, metadata={"task": "gsm8k", "example": RIGHT})
    ask(running, metadata={"task": "gsm8k", "example_id": "known-1"})
    assert len(running.store.rows("gsm8k")) == 2


def test_a_check_that_hangs_or_fails_delays_a_request_and_does_not_refuse_it(start: Any) -> None:
    release = threading.Event()
    running = start(check=lambda task, row: str(release.wait(60)))
    try:
        ask(running, metadata={"task": "gsm8k", "example": RIGHT})
    finally:
        release.set()
    assert [row.reward for row in running.store.rows("gsm8k")] == [1.0]


def test_a_verdict_that_cannot_be_written_costs_no_other_one(start: Any) -> None:
    """Three of one moment; what the second one's verifier read is no Unicode."""

    def verify(answer: Unjudged, row: Any) -> Any:
        read = "\ud800" if answer.choice == 1 else "A"
        return SimpleNamespace(reward=1.0, format=0.0, extracted=read)

    running = start(verify=verify)
    ask(running, n=3, metadata={"task": "gsm8k", "example": RIGHT})
    assert [row.choice for row in running.store.rows("gsm8k")] == [0, 2]


def test_an_interaction_that_cannot_be_written_costs_no_other_one(
    store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def write(batch: Any) -> list[Interaction]:
        store.record(batch)
        return list(batch)

    rows_sent = [
        Interaction(ident, 1.0, "completions", model, A, "ann", "ok", 0.1, 1, 1)
        for ident, model in (("a", "tiny"), ("b", "\ud800"), ("c", "tiny"))
    ]
    assert [row.inference_id for row in _written(write, rows_sent, "rows")] == ["a", "c"]
    assert store.find("b") is None
    assert [record.fields["count"] for record in caplog.records] == [1]  # type: ignore[attr-defined]


def test_one_owners_slow_rows_end_nobody_elses_verifications(start: Any, store: Any) -> None:
    """Twenty whose verifier hangs; they are told, and another owner's row is judged."""
    keys = KeyStore(store)
    slow, honest = (
        {"Authorization": f"Bearer {keys.create_key(name, ['infer', 'submit_task']).token}"}
        for name in ("eve", "ann")
    )
    release = threading.Event()

    def verify(answer: Unjudged, row: Any) -> Any:
        if row.get("slow"):
            release.wait(60)
        return SimpleNamespace(reward=1.0, format=0.0, extracted="A")

    running = start(keys=keys, verify=verify, verify_timeout_s=0.05, verify_workers=2)
    body = {"model": "tiny", "messages": HELLO}
    ill = body | {"n": 5, "metadata": {"task": "gsm8k", "example": '{"slow": 1}'}}
    well = body | {"metadata": {"task": "gsm8k", "example": RIGHT}}
    try:
        with running.http() as client:
            for sent, who in ((ill, slow),) * 4 + ((well, honest),):
                assert client.post("/v1/chat/completions", json=sent, headers=who).is_success
        running.settled()
    finally:
        release.set()
    assert [(row.principal, row.reward) for row in store.rows("gsm8k")] == [("ann", 1.0)]
    assert {row.error for row in store.rewards("eve")} == {"timeout after 0.05 s", "verifier stuck"}


async def served_in_turn(waiting: list[str]) -> list[str]:
    """Who of those that wait for the one place got it, in order."""
    turns, served = Turns(1), list[str]()
    begun, end = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with turns.of("first"):
            begun.set()
            await end.wait()

    async def one(owner: str) -> None:
        async with turns.of(owner):
            served.append(owner)

    tasks = [asyncio.create_task(first())]
    await begun.wait()
    tasks += [asyncio.create_task(one(owner)) for owner in waiting]
    await asyncio.sleep(0)
    tasks[1].cancel()  # one that gives up keeps no place
    end.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(5), turns.of("last"):
        return served


def test_those_who_wait_for_a_verification_are_served_in_turn() -> None:
    served = asyncio.run(served_in_turn(["gone", *["eve"] * 50, "ann", "bob", "ann"]))
    assert served[:5] == ["eve", "ann", "bob", "eve", "ann"]
    assert len(served) == 53


def give(running: Any, expected: int, **fields: Any) -> Any:
    """POST /v1/rewards with the row of an earlier answer."""
    body = {"task": "gsm8k", "example": {"answer": "A"}} | fields
    with running.http() as client:
        response = client.post("/v1/rewards", json=body)
    assert response.status_code == expected, response.text
    running.settled()
    return response.json()


@pytest.mark.parametrize(
    "options", [{"metadata": {"task": "gsm8k"}}, {"store": True}, {"store": True, "n": 2}]
)
def test_a_row_may_come_after_its_answer_and_is_judged_then(
    running: Any, options: dict[str, Any]
) -> None:
    """Two minutes late: the verifier's reward, on the prompt that was sent."""
    ask(running, **options)
    with running.store.writing() as connection:
        everything = interactions.c.id > 0
        update_sealed(connection, interactions, everything, created=time.time() - 120)
    assert running.store.rows("gsm8k") == []
    told = give(running, 201, inference_id="chatcmpl-engine")
    assert told["recorded"] is True
    rows_kept = running.store.rows("gsm8k", since=time.time() - 600)
    assert [row.reward for row in rows_kept] == [1.0] * options.get("n", 1)
    assert json.loads(rows_kept[0].prompt) == HELLO
    assert rows_kept[0].row_hash == row_hash("gsm8k", None, RIGHT)
    assert give(running, 200, inference_id="chatcmpl-engine")["recorded"] is False
    other = give(running, 409, inference_id="chatcmpl-engine", example={"answer": "B"})
    assert other["error"]["code"] == "row_known"


def test_a_late_row_is_refused_as_an_early_one_is(start: Any) -> None:
    running = start(check=lambda task, row: None if "answer" in row else "no answer")
    ask(running)
    this = {"inference_id": "chatcmpl-engine"}
    assert give(running, 409, **this)["error"]["code"] == "text_not_kept"
    assert give(running, 404, inference_id="x")["error"]["code"] == "unknown_inference"
    assert give(running, 400, **this, example={})["error"]["message"] == "example: no answer"
    assert give(running, 400, **this, task="nope")["error"]["param"] == "metadata.task"
    assert give(running, 400, **this, example={"answer": "x" * 16_384})["error"]["type"]
    assert give(running, 400, **this, reward=1.0)["error"]["message"].startswith("Unrecognized")
    with running.http() as client:
        head = {"content-type": "application/json"}
        for text in ("[]", '{"inference_id": "x", "task": "gsm8k", "example": "{}"}'):
            assert client.post("/v1/rewards", content=text, headers=head).status_code == 400
        assert client.put("/v1/rewards", json={}).headers["allow"] == "GET, HEAD, POST"


def test_a_late_row_of_another_task_than_the_request_named_is_refused(running: Any) -> None:
    ask(running, metadata={"task": "countdown"})
    told = give(running, 409, inference_id="chatcmpl-engine")
    assert told["error"]["message"] == "task: 'gsm8k'; the request named 'countdown'"


def test_an_answer_that_waits_for_its_row_is_not_judged_by_the_next_process(
    running: Any,
) -> None:
    ask(running, metadata={"task": "gsm8k"})
    assert running.store.unjudged(before=time.time() + 60) == []
    assert running.store.waiting("gsm8k") == 1
    assert running.store.waiting("countdown") == 0


def test_tools_are_kept_beside_the_messages(running: Any) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    ask(running, tools=tools, metadata={"task": "gsm8k", "example": RIGHT})
    assert json.loads(rows(running, interactions)[0]["prompt"]) == {
        "messages": HELLO,
        "tools": tools,
    }


def test_a_failed_or_abandoned_answer_earns_nothing(running: Any) -> None:
    running.engine.fault = "cut"
    with pytest.raises(Exception, match="broke off"):
        ask(running, stream=True, metadata={"task": "gsm8k", "example": RIGHT})
    running.settled()
    assert running.store.rewards("local") == []
    assert rows(running, interactions)[0]["status"] == "error"
    assert rows(running, answers) == []


def test_an_answer_left_unjudged_is_judged_by_the_next_process(start: Any, store: Any) -> None:
    store.record(
        [
            Interaction(
                inference_id="old",
                created=time.time() - 120,
                endpoint="completions",
                model="tiny",
                version=A,
                principal="local",
                status="ok",
                latency_s=0.1,
                prompt_tokens=1,
                completion_tokens=1,
                task="gsm8k",
                source="submitted",
                example=RIGHT,
                prompt="[]",
                prompt_hash="p",
                row_hash="r",
                group_hash="g",
                answers=(Answer(0, "A", "stop"),),
            )
        ]
    )
    running = start()
    running.settled()
    assert [row.reward for row in store.rows("gsm8k")] == [1.0]


def test_owners_read_their_rewards_in_order_and_from_where_they_stopped(running: Any) -> None:
    for example in (RIGHT, WRONG, RIGHT):
        ask(running, metadata={"task": "gsm8k", "example": example})
    with running.http() as client:
        first = client.get("/v1/rewards", params={"limit": 2}).json()
        rest = client.get("/v1/rewards", params={"since": first["next_since"]}).json()
        assert client.get("/v1/rewards", params={"since": "nan"}).status_code == 400
    assert [row["reward"] for row in first["data"]] == [1.0, 0.0]
    assert [row["reward"] for row in rest["data"]] == [1.0]
    assert "prompt" not in first["data"][0]


def test_rows_that_differ_in_key_order_and_case_are_the_same_row() -> None:
    one = row_hash("gsm8k", None, '{"a": 1, "question": "How  many?"}')
    assert one == row_hash("gsm8k", None, '{"question": "how many?", "a": 1}')
    assert one != row_hash("countdown", None, '{"question": "how many?", "a": 1}')
    assert row_hash("gsm8k", "1", None) != row_hash("gsm8k", None, "1")


def opinion(running: Any, expected: int, **fields: Any) -> dict[str, Any]:
    with running.http() as client:
        response = client.post(
            "/v1/feedback", json={"metric_name": "helpful", "value": True} | fields
        )
    assert response.status_code == expected, response.text
    told: dict[str, Any] = response.json()
    return told


def test_feedback_is_recorded_once_with_the_version_and_no_weight(running: Any) -> None:
    with running.http() as client:  # at once after the answer: its row may still be on its way
        answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO})
    inference_id = answer.headers["x-request-id"]
    told = opinion(running, 201, inference_id=inference_id, id="f1", tags={"ui": "web"})
    assert told["weight"] == 0
    opinion(running, 200, inference_id=inference_id, id="f1", tags={"ui": "web"})
    reused = opinion(running, 409, inference_id=inference_id, id="f1", value=False)
    assert reused["error"]["code"] == "id_reused"
    (kept,) = feedback.of(running.store, inference_id)
    assert (kept["value"], kept["weight"], kept["version"]) == (1.0, 0.0, A)


def test_feedback_finds_the_answer_by_its_own_id_too(running: Any) -> None:
    ask(running)
    opinion(running, 201, inference_id="chatcmpl-engine")


def test_feedback_is_corrected_by_a_newer_one_and_only_once(running: Any) -> None:
    ask(running)
    this = {"inference_id": "chatcmpl-engine"}
    opinion(running, 201, **this, id="f1", value=0.2)
    opinion(running, 201, **this, id="f2", value=0.9, supersedes="f1")
    late = opinion(running, 409, **this, id="f3", value=0.5, supersedes="f1")
    assert late["error"]["code"] == "already_superseded"
    opinion(running, 404, **this, id="f4", supersedes="nothing")
    other = opinion(running, 404, **this, id="f5", supersedes="f2", metric_name="speed")
    assert other["error"]["code"] == "unknown_feedback"


def test_feedback_refuses_unknown_answers_and_values_that_are_no_numbers(running: Any) -> None:
    assert opinion(running, 404, inference_id="x")["error"]["code"] == "unknown_inference"
    ask(running)
    for value in (math.nan, math.inf, "good", None):
        body = json.dumps({"inference_id": "chatcmpl-engine", "metric_name": "m", "value": value})
        with running.http() as client:
            response = client.post(
                "/v1/feedback", content=body, headers={"content-type": "application/json"}
            )
        assert response.status_code == 400
