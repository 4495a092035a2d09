"""A candidate on trial: whom it answers, what its failures cost, and what nobody sees."""

import json
import time
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import select

from agent.gateway.hold import CandidateTrial, Route
from agent.gateway.upstream import TransportLine, Upstream
from agent.store.experience_db import interactions

A, B = "a" * 64, "b" * 64
HELLO = [{"role": "user", "content": "hello"}]
RIGHT = json.dumps({"answer": "B"})


def begin(running: Any, candidate: Any, share: float, *, shadow: bool = False) -> None:
    """A trial of the candidate's engine, for a minute."""
    upstream = Upstream(TransportLine(candidate, httpx.Timeout(5.0)), 1)

    def act() -> None:
        loop = running.app.state.parts.capture._writers[0].get_loop()
        until = loop.time() + 60.0
        trial = CandidateTrial(Route(B, upstream), share, shadow, "salt", until)
        running.app.state.parts.admission.trial = trial

    running.call(act)


@pytest.fixture
def candidate(engine: Any) -> Any:
    """Another engine of the same kind, with other weights."""
    made = type(engine)()
    made.weights = "B"
    return made


def ask(running: Any, session: str | None, **more: Any) -> str:
    """The version that answered."""
    about = {"session_id": session} if session else {}
    with running.openai() as client:
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, metadata=about | more.pop("metadata", {}), **more
        )
        if more.get("stream"):
            return str(next(iter(answer)).system_fingerprint)
        return str(answer.system_fingerprint)


def metrics(running: Any) -> str:
    with running.http() as client:
        return str(client.get("/metrics").text)


def recorded(running: Any) -> list[tuple[str, str, str]]:
    """(endpoint, version, status) of every row."""
    columns = interactions.c.endpoint, interactions.c.version, interactions.c.status
    with running.store.engine.connect() as connection:
        return sorted(tuple(row) for row in connection.execute(select(*columns)))


def test_a_session_stays_with_its_version_and_the_share_is_kept() -> None:
    trial = CandidateTrial(Route(B, None), 0.1, False, "salt", 0.0)  # type: ignore[arg-type]
    taken = [trial.takes(f"ann\0session {n}") for n in range(20_000)]
    assert sum(taken) / len(taken) == pytest.approx(0.1, abs=0.01)
    assert taken[:500] == [trial.takes(f"ann\0session {n}") for n in range(500)]
    other = CandidateTrial(Route(B, None), 0.1, False, "pepper", 0.0)  # type: ignore[arg-type]
    assert taken[:500] != [other.takes(f"ann\0session {n}") for n in range(500)]


@pytest.mark.parametrize("stream", [False, True])
def test_sessions_on_trial_are_answered_by_the_candidate(
    running: Any, candidate: Any, stream: bool
) -> None:
    begin(running, candidate, 0.5)
    sessions = [f"s{number}" for number in range(16)]
    first = [ask(running, session, stream=stream) for session in sessions]
    assert set(first) == {A[:12], B[:12]}
    assert [ask(running, session) for session in sessions] == first
    alone = {ask(running, None) for _ in range(4)}  # without a session: its principal's
    assert len(alone) == 1
    text = metrics(running)
    count = 2 * first.count(B[:12]) + 4 * (alone == {B[:12]})
    assert (
        f'anchorage_answers_total{{kind="trial",status="ok",version="bbbbbbbbbbbb"}} {count}.0'
        in text
    )


def test_a_version_that_is_asked_for_by_name_takes_no_part(running: Any, candidate: Any) -> None:
    begin(running, candidate, 0.999)
    with running.openai() as client:
        answer = client.chat.completions.create(model=f"tiny@{A[:12]}", messages=HELLO)
    assert answer.system_fingerprint == A[:12]
    assert candidate.seen == []


def test_a_candidate_that_is_asked_for_by_name_is_not_replaced(start: Any, candidate: Any) -> None:
    """Its failure is the answer: nobody who names a version gets another one."""
    running = start()
    begin(running, candidate, 0.001)
    candidate.fault = "down"
    with running.openai() as client, pytest.raises(openai.APIStatusError) as told:
        client.chat.completions.create(model=f"tiny@{B[:12]}", messages=HELLO)
    assert told.value.status_code == 503


@pytest.mark.parametrize("fault", ["down", "error"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_candidate_that_fails_costs_no_client_an_answer(
    running: Any, candidate: Any, fault: str, stream: bool
) -> None:
    begin(running, candidate, 0.999)
    candidate.fault = fault
    assert ask(running, "s", stream=stream) == A[:12]
    running.settled()
    assert recorded(running) == [
        ("chat.completions", A, "ok"), ("chat.completions", B, "error")
    ]  # fmt: skip
    assert [each.status for each in running.store.answered(B)] == ["error"]


def test_a_clients_mistake_is_not_the_candidates(running: Any, candidate: Any) -> None:
    begin(running, candidate, 0.999)
    candidate.fault = "refuse"
    with running.http() as client:
        body = {"model": "tiny", "messages": HELLO}
        assert client.post("/v1/chat/completions", json=body).status_code == 400
    running.settled()
    assert recorded(running) == []


def test_a_trial_that_nobody_renews_lapses(running: Any, candidate: Any) -> None:
    begin(running, candidate, 0.999)
    assert ask(running, "s") == B[:12]

    def lapse() -> None:
        admission = running.app.state.parts.admission
        before = admission.trial
        admission.trial = CandidateTrial(before.route, before.share, False, before.salt, 0.0)

    running.call(lapse)
    assert ask(running, "s") == A[:12]
    with running.admin() as admin:
        assert admin.get("/state").json()["trial"] is None


def shadowed(running: Any, count: int) -> None:
    """Wait until so many shadow answers are recorded."""
    until = time.monotonic() + 10
    while sum(endpoint == "shadow" for endpoint, _, _ in recorded(running)) < count:
        assert time.monotonic() < until
        running.settled()
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_shadow_answers_for_the_record_alone(running: Any, candidate: Any, stream: bool) -> None:
    begin(running, candidate, 0.999, shadow=True)
    about = {"metadata": {"task": "gsm8k", "example": RIGHT}}
    assert ask(running, "s", stream=stream, **about) == A[:12]
    shadowed(running, 1)
    assert recorded(running) == [("chat.completions", A, "ok"), ("shadow", B, "ok")]
    assert [each.reward for each in running.store.earned(B)] == [1.0]
    assert [each.version for each in running.store.rows("gsm8k")] == [A]  # nothing to train on
    assert [each.version for each in running.store.rewards("local")] == [A]
    assert running.store.verified("gsm8k") == 1
    assert 'kind="shadow",status="ok",version="bbbbbbbbbbbb"} 1.0' in metrics(running)


def test_a_shadow_that_fails_is_recorded_against_its_version(running: Any, candidate: Any) -> None:
    begin(running, candidate, 0.999, shadow=True)
    candidate.fault = "error"
    assert ask(running, "s") == A[:12]
    shadowed(running, 1)
    assert ("shadow", B, "error") in recorded(running)


def test_shadow_answers_that_are_under_way_at_the_end_of_a_trial_are_not_its_errors(
    running: Any, candidate: Any
) -> None:
    begin(running, candidate, 0.999, shadow=True)
    candidate.fault = "stuck"
    assert ask(running, "s") == A[:12]
    until, shadows = time.monotonic() + 10, running.app.state.parts.shadows
    while not candidate.running:
        assert time.monotonic() < until
        time.sleep(0.01)
    with running.admin() as admin:
        assert admin.post("/trial/end", json={"version": B}).json()["trial"] is None
    while shadows:
        assert time.monotonic() < until
        time.sleep(0.01)
    running.settled()
    assert recorded(running) == [("chat.completions", A, "ok")]
    assert 'kind="shadow"' not in metrics(running)


def test_the_admin_side_begins_renews_and_ends_a_trial(running: Any, tmp_path: Any) -> None:
    order = {
        "version": B, "socket": str(tmp_path / "green.sock"), "share": 0.25, "shadow": False,
        "salt": "s", "deadline_s": 60.0,
    }  # fmt: skip
    with running.admin() as admin:
        assert admin.post("/trial", json=order | {"version": A}).status_code == 409
        assert admin.post("/trial", json=order | {"share": 1.5}).status_code == 400
        first = admin.post("/trial", json=order).json()["trial"]
        assert (first["version"], first["share"]) == (B, 0.25)
        again = admin.post("/trial", json=order | {"deadline_s": 600.0}).json()["trial"]
        assert again["deadline_in_s"] > first["deadline_in_s"]
        assert admin.post("/trial/end", json={"version": A}).json()["trial"] is not None
        assert admin.post("/trial/end", json={"version": B}).json()["trial"] is None
        admin.post("/trial", json=order)
        flipped = admin.post("/flip", json={"version": B, "socket": order["socket"]}).json()
        assert (flipped["version"], flipped["trial"]) == (B, None)
