"""How runs look in Prefect: names and states by what became of them, events, the round's page."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID, uuid4

import pytest

from agent.errors import UserError
from agent.store.ledger import Entry
from flows.learn import loop
from flows.learn.weigh import weigh
from flows.serve.reconcile import attempt
from flows.show import prefect
from flows.show.prefect import (
    CURRENT,
    ShownProgress,
    announce,
    ending,
    event_of,
    reported,
    round_page,
    run_name,
    signed,
    stop_left,
)
from flows.show.report import RoundReport
from flows.show.terminal import Silent

VERDICTS = ("PASSED", "HOLD", "REJECT")
DIGEST, OTHER = "d" * 64, "e" * 64
MADE = {"round": "0003-gsm8k", "digest": DIGEST}
ROUND = "0003-gsm8k dddddddddddd"
REPORT = {"verdict": "promote", "round": "0003-gsm8k", "digest": DIGEST, "reasons": ["+9 points"]}
SERVED = {"asked": DIGEST, "served": DIGEST, "state": "SWAPPED", "reason": ""}
BACK = {"asked": DIGEST, "served": OTHER, "state": "ROLLED_BACK", "reason": "probes differ"}


@pytest.mark.parametrize(
    ("result", "kind", "name"),
    [
        (REPORT, "COMPLETED", "Passed"),
        (REPORT | {"verdict": "hold"}, "CANCELLED", "Held"),
        (REPORT | {"verdict": "reject"}, "FAILED", "Rejected"),
        (REPORT | {"verdict": "unchanged"}, "CANCELLED", "Unchanged"),
        ({"report": REPORT, "outcome": SERVED, "collected": {}}, "COMPLETED", "Promoted"),
        ({"report": REPORT, "outcome": {"state": "promote"}}, "COMPLETED", "Passed"),
        ({"report": REPORT, "outcome": BACK}, "FAILED", "Rolled back"),
        (SERVED, "COMPLETED", "Promoted"),
        (BACK, "FAILED", "Rolled back"),
        ({"state": "ROLLED_BACK", "rewards": 3}, "FAILED", "Rolled back"),
        ({"state": "CHAMPION"}, "COMPLETED", "Completed"),
        ({"rows": 24}, "COMPLETED", "Completed"),
        (["done"], "COMPLETED", "Completed"),
        (None, "COMPLETED", "Completed"),
    ],
)
def test_a_run_ends_in_the_state_of_its_verdict(result: object, kind: str, name: str) -> None:
    state = ending(result)
    assert (state.type, state.name) == (kind, name)


def test_verdicts_and_reasons_are_told_apart_at_a_glance() -> None:
    verdicts = [ending(REPORT | {"verdict": word}) for word in ("promote", "hold", "reject")]
    assert len({state.type for state in verdicts}) == len({state.name for state in verdicts}) == 3
    assert ending(REPORT).message == "+9 points"
    assert ending(BACK).message == "probes differ"


@pytest.mark.parametrize(
    ("flow", "parameters", "result", "name"),
    [
        ("collect", {"home": "/h", "target": "gsm8k"}, None, "collect gsm8k"),
        ("loop", {"home": "/h", "target": None}, None, "loop"),
        ("loop", {"home": "/h"}, {"report": REPORT, "outcome": SERVED}, f"loop {ROUND}"),
        ("improve", {"target": "gsm8k"}, MADE, f"improve {ROUND}"),
        ("evaluate", {"run_id": "0003-gsm8k", "serve": True}, None, "evaluate 0003-gsm8k"),
        ("promote", {"digest": DIGEST}, SERVED, "promote dddddddddddd"),
        ("reconcile", {"home": "/h"}, ["done"], "reconcile"),
    ],
)
def test_a_run_is_called_by_its_round_and_digest(
    flow: str, parameters: dict[str, Any], result: object, name: str
) -> None:
    assert run_name(flow, parameters, result) == name


def row(state: str, why: str = "why", digest: str = "h") -> Entry:
    return Entry(7, 1.7e9, 3, "ann", DIGEST, state, why, {}, OTHER, DIGEST, digest)


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (row("PASSED"), "anchorage.gate.promote"),
        (row("HOLD"), "anchorage.gate.hold"),
        (row("REJECT"), "anchorage.gate.reject"),
        (row("AWAIT_REVIEW"), "anchorage.review.wanted"),
        (row("ROLLED_BACK"), "anchorage.rollback"),
        (row("REFUSED"), "anchorage.refused"),
        (row("STALLED"), "anchorage.stalled"),
        (row("PROPOSED", "round 3 ended: norm grows, reward flat: in 10"), "anchorage.alarm"),
        (row("PROPOSED", "round 3 ended: completed"), None),
        (row("SWAPPED"), None),
    ],
)
def test_decisions_are_events(entry: Entry, name: str | None) -> None:
    event = event_of(entry)
    assert (event or {}).get("event") == name
    if event is not None:
        assert event["resource"]["prefect.resource.id"] == "anchorage.version.dddddddddddd"
        assert event["payload"]["why"] == entry.why
        assert event["id"] == event_of(entry)["id"]  # type: ignore[index]
        assert event["id"] != event_of(row(entry.state, entry.why, "another"))["id"]  # type: ignore[index]


def test_the_reason_of_an_alarm_begins_as_the_learner_says_it() -> None:
    from agent.learner.drift import Drift, alarm

    history = [Drift(i, 1.0 + i, 1.0, {}, 1.0, None, 0.5, 0.1, None) for i in range(40)]
    assert str(alarm(history)).startswith(prefect.ALARMED)


def test_the_page_of_a_round_has_its_table_and_its_plots() -> None:
    figures = {"n": 100, "anchor": 0.4, "champion": 0.4, "candidate": 0.6, "outcome": "pass"}
    figures |= {"difference": 0.2, "low": 0.1, "high": 0.3, "role": "target"}
    figures |= {"interval": dict.fromkeys(("anchor", "champion", "candidate"), (0.3, 0.7))}
    report = RoundReport("1", "gsm8k", 1, "ended", DIGEST, "promote", (), {"gsm8k": figures})
    drift = {"generation": 0, "norm": 1.0, "predicted_norm": 1.0, "reward_mean": 0.5}
    page = round_page(report, [drift | {"reward_std": 0.1}])
    assert "| gsm8k | 100 | 40.0 | 40.0 | 60.0 |" in page
    assert page.count("](data:image/png;base64,iVBOR") == 2


class Server:
    """Prefect's REST API as far as a shown run calls it: what came, and whether it answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.fails, self.busy = False, 0  # busy: requests that are answered 503 before others
        self.status: dict[str, int] = {}  # by path; "": of every other one
        self.runs: dict[str, list[UUID]] = {}  # under way, by their deployment or by the run around
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                size = int(self.headers["Content-Length"] or 0)
                body = json.loads(self.rfile.read(size)) if size else None
                server.asked.append((self.command, self.path, body))
                ids: Any = None if self.path.endswith("/logs/") else {"id": str(uuid4())}
                if self.path.endswith("/flow_runs/filter"):
                    wanted = body["flow_runs"]
                    key = wanted.get("deployment_id") or wanted["parent_flow_run_id"]
                    runs = [run for each in key["any_"] for run in server.runs.get(each, ())]
                    ids = [{"id": str(run)} for run in runs]
                reply = json.dumps(ids).encode()  # null for logs, as Prefect answers
                server.busy -= 1
                usual = 500 if server.fails else 503 if server.busy >= 0 else 201
                self.send_response(server.status.get(self.path, server.status.get("", usual)))
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            do_GET = do_POST = do_PATCH = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Nothing is printed."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/api"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def bodies(self, method: str, end: str) -> list[Any]:
        return [body for how, path, body in self.asked if how == method and path.endswith(end)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    monkeypatch.setenv("PREFECT_API_URL", made.url)
    yield made
    made.http.shutdown()
    made.http.server_close()


RUN = UUID(int=7)


@pytest.mark.parametrize(
    ("variables", "header"),
    [
        ({}, {}),
        ({"PREFECT_API_AUTH_STRING": "me:p", "PREFECT_API_KEY": "k"}, "Basic bWU6cA=="),
        ({"PREFECT_API_AUTH_STRING": "", "PREFECT_API_KEY": "k"}, "Bearer k"),
        ({"PREFECT_API_AUTH_STRING": "", "PREFECT_API_KEY": ""}, {}),
    ],
)
def test_requests_are_signed_as_prefects_own_client_signs_them(
    variables: dict[str, str], header: object
) -> None:
    assert signed(variables) == (header and {"Authorization": header})


@pytest.mark.proof
def test_a_server_that_is_well_and_refuses_us_does_not_end_a_flow(
    server: Server, planted: Any
) -> None:
    """401: the password was changed; 201 with a page of ours: what answers is no Prefect."""
    from flows.deployments import run_flow

    root = str(planted().service.home.root)
    for status in (401, 201):
        server.status, server.asked = {"/api/health": 200, "": status}, []
        assert run_flow("collect", root, "gsm8k")["rows"] > 0
        assert len(server.asked) > 1  # not its health alone


def test_what_a_stopped_service_left_running_is_settled_with_its_parts(server: Server) -> None:
    loop, deployment = uuid4(), uuid4()
    left, ours, part, inner, own_part = (uuid4() for _ in range(5))
    server.runs = {str(loop): [left], str(deployment): [ours], str(left): [part]}
    server.runs |= {str(part): [inner], str(ours): [own_part]}
    stop_left([loop, deployment], {ours})
    settled = [path.split("/")[-2] for _, path, _ in server.asked if path.endswith("/set_state")]
    assert settled == [str(left), str(part), str(inner)]
    assert {body["state"]["name"] for body in server.bodies("POST", "/set_state")} == {"Stopped"}
    looked = [body["flow_runs"]["state"] for body in server.bodies("POST", "/flow_runs/filter")]
    assert all(set(each["type"]["any_"]) >= {"RUNNING", "PENDING"} for each in looked)


def test_a_run_shows_its_name_lines_tasks_and_end(server: Server) -> None:
    progress = ShownProgress(Silent())
    with reported(RUN, "loop", {"target": "gsm8k"}) as finish:
        progress.say("a line")
        advance = progress.track("improve 0003", 2)
        progress.track("left open", 5)
        for done in (1, 2):
            advance(done)
        finish({"report": REPORT | {"verdict": "reject"}, "outcome": {"state": "reject"}})
    assert CURRENT.get(None) is None
    names = [body["name"] for body in server.bodies("PATCH", str(RUN))]
    assert names == ["loop gsm8k", "loop 0003-gsm8k dddddddddddd"]
    states = [body["state"]["name"] for body in server.bodies("POST", f"{RUN}/set_state")]
    assert states == ["Running", "Rejected"]
    lines = [line["message"] for body in server.bodies("POST", "/logs/") for line in body]
    assert lines[0] == "a line"
    assert lines[1].startswith("improve 0003: 2/2 after")
    tasks = server.bodies("POST", "/task_runs/")
    assert [task["name"] for task in tasks] == ["improve 0003", "left open"]
    assert {task["flow_run_id"] for task in tasks} == {str(RUN)}
    ended = [path for _, path, _ in server.asked if "/task_runs/" in path and "set_state" in path]
    assert len(ended) == 2


def test_what_is_logged_is_on_the_page_of_the_innermost_run_once(server: Server) -> None:
    log, inner = logging.getLogger("anchorage.a_test"), UUID(int=8)
    with reported(RUN), reported(inner):
        log.warning("of the inner run")
    with reported(RUN):
        log.warning("of the outer run")
        threading.Thread(target=log.warning, args=["of nobody"]).start()
    lines = [line for body in server.bodies("POST", "/logs/") for line in body]
    assert [(line["flow_run_id"], line["message"]) for line in lines] == [
        (str(inner), "of the inner run"),
        (str(RUN), "of the outer run"),
    ]
    left = logging.getLogger("anchorage").handlers
    assert not [each for each in left if isinstance(each, prefect.RunLog)]


def test_an_error_is_the_last_state_and_travels(server: Server) -> None:
    with pytest.raises(LookupError), reported(RUN):
        raise LookupError("no such row")
    assert server.bodies("PATCH", str(RUN)) == []
    last = server.bodies("POST", f"{RUN}/set_state")[-1]["state"]
    assert last == {"type": "FAILED", "name": "Failed", "message": "LookupError: no such row"}


def test_a_server_that_fails_is_asked_once_a_minute_for_what_a_run_says(server: Server) -> None:
    progress = ShownProgress(Silent())
    with reported(RUN):
        server.fails = True
        for _ in range(5):
            progress.say("a line")
        progress.track("work", 1)(1)
        server.fails = False
    assert len(server.bodies("POST", "/logs/")) == 1
    assert server.bodies("POST", "/task_runs/") == []
    assert server.bodies("POST", f"{RUN}/set_state")[-1]["state"]["name"] == "Completed"


def test_a_server_whose_database_is_locked_is_asked_again(server: Server) -> None:
    server.busy = 2
    assert set(prefect.ask("POST", "/artifacts/", {})) == {"id"}
    assert len(server.bodies("POST", "/artifacts/")) == 3


def test_decisions_are_announced_once_and_after_an_outage(server: Server, planted: Any) -> None:
    opened = planted()
    service = opened.service
    announce(service)  # the first look: what was decided before it is no news
    learnt = loop.learn(opened, "gsm8k", {"generations": 1})
    weigh(opened, learnt.run_id)
    opened.close()
    server.fails = True
    announce(service)
    server.fails = False
    server.asked.clear()
    announce(service)
    announce(service)
    (events,) = server.bodies("POST", "/events")
    service.home.announced_json.write_text('{"ledger": 9}x')
    with pytest.raises(UserError, match=r"announced\.json: is damaged"):
        announce(service)
    attempt("events", lambda: announce(service))  # as the service's look does: it goes on
    (verdict,) = [each for each in service.ledger.of(learnt.digest) if each.state in VERDICTS]
    assert [event["event"] for event in events] == [prefect.EVENTS[verdict.state]]
