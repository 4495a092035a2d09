"""How runs and decisions look in Prefect: names, states, logs, task runs, artifacts and events.

Requests to the REST API of the server that the environment names; Prefect itself is not imported.
A server that is away costs a warning, and the work goes on.
"""

import base64
import io
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, UUID, uuid5

import httpx

from agent.home import read_sealed, write_sealed
from agent.store.ledger import Entry
from agent.store.weights import short
from flows.service import Service

if TYPE_CHECKING:
    from flows.show.report import RoundReport
    from flows.show.terminal import Advance, Reporter

LOG = logging.getLogger("anchorage.prefect")
TIMEOUT_S = 10.0
BUSY_TRIES, BUSY_S = 5, 0.3
QUIET_S = 60.0  # after a failure nothing more of a run's work is sent for so long
LINE_EVERY = 30.0  # seconds between two lines of the log about one piece of work
# Ledger state -> event. An automation of Prefect acts on these names.
EVENTS = {
    "PASSED": "anchorage.gate.promote",
    "HOLD": "anchorage.gate.hold",
    "REJECT": "anchorage.gate.reject",
    "AWAIT_REVIEW": "anchorage.review.wanted",
    "CHAMPION": "anchorage.champion",
    "ROLLED_BACK": "anchorage.rollback",
    "REFUSED": "anchorage.refused",
    "STALLED": "anchorage.stalled",
}
ALARM = "anchorage.alarm"
ALARMED = "norm grows"  # how the reason of a round begins that the drift alarm ended


@dataclass(frozen=True)
class RunState:
    """A state of a run as Prefect's REST API takes it."""

    type: str  # PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, CRASHED: the colour of its page
    name: str
    message: str = ""

    def to_json(self) -> dict[str, str]:
        """The body of a request."""
        return {"type": self.type, "name": self.name, "message": self.message}


RUNNING = RunState("RUNNING", "Running")
COMPLETED = RunState("COMPLETED", "Completed")
VERDICTS = {
    "promote": RunState("COMPLETED", "Passed"),
    "hold": RunState("CANCELLED", "Held"),
    "reject": RunState("FAILED", "Rejected"),
    "unchanged": RunState("CANCELLED", "Unchanged"),
}
UNDER_WAY = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
STOPPED = RunState("CANCELLED", "Stopped", "the service was stopped; the next round goes on")


def ending(result: object) -> RunState:
    """The state of a run that ended with this result: verdicts and swaps differ in the list.

    A result is what a flow returns: a report, what became of a swap, both (a loop), or neither.
    """
    if not isinstance(result, Mapping):
        return COMPLETED
    report, outcome = result.get("report", result), result.get("outcome", result)
    served, state = outcome.get("served"), outcome.get("state")
    reason = str(outcome.get("reason") or "; ".join(map(str, report.get("reasons", ()))))[:500]
    if served is not None and served == outcome.get("asked"):
        return RunState("COMPLETED", "Promoted", reason)
    if state == "ROLLED_BACK":
        return RunState("FAILED", "Rolled back", reason)
    if report.get("verdict") in VERDICTS:
        verdict = VERDICTS[report["verdict"]]
        return RunState(verdict.type, verdict.name, reason)
    return COMPLETED


def run_name(flow: str, parameters: Mapping[str, Any], result: object = None) -> str:
    """The name of a run: its flow, then the round or target, and the digest, as far as known."""
    known = dict(parameters)
    if isinstance(result, Mapping):
        known |= result.get("report") or result
    subject = known.get("round") or known.get("run_id") or known.get("target")
    digest = known.get("digest")
    parts = [flow, subject, short(str(digest)) if digest else None]
    return " ".join(str(part) for part in parts if part)


def event_of(entry: Entry) -> dict[str, Any] | None:
    """The event of a row of the ledger; None for one that nobody acts on.

    Its id follows from the row, so that a row sent twice is one event.
    """
    name = EVENTS.get(entry.state)
    if entry.state == "PROPOSED" and f": {ALARMED}" in entry.why:
        name = ALARM
    if name is None:
        return None
    return {
        "id": str(uuid5(NAMESPACE_URL, f"anchorage:{entry.hash}")),
        "occurred": datetime.fromtimestamp(entry.time, UTC).isoformat(),
        "event": name,
        "resource": {
            "prefect.resource.id": f"anchorage.version.{short(entry.digest)}",
            "prefect.resource.name": short(entry.digest),
        },
        "payload": {
            "digest": entry.digest,
            "state": entry.state,
            "why": entry.why[:2000],
            "actor": entry.actor,
            "served": entry.after,
        },
    }


def round_page(report: "RoundReport", drift: Sequence[Mapping[str, Any]]) -> str:
    """A round as Markdown with its plots inside: table, reasons, accuracy, drift."""
    from flows.show import plots
    from flows.show.review import markdown

    figures = {"Drift and reward": plots.drift(drift)}
    if any(row["n"] for row in report.tasks.values()):
        figures["Accuracy by task"] = plots.accuracies(report.tasks, "Accuracy by task")
    pictures = [f"![{title}]({_inline(figure)})" for title, figure in figures.items()]
    return "\n\n".join([markdown(report, drift, ""), *pictures])


def _inline(figure: Any) -> str:
    """A matplotlib figure as the address of a PNG that holds its bytes."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=80)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def show_page(service: Service, report: "RoundReport") -> None:
    """A judged round as an artifact of the run that this thread works for, if it is shown."""
    if (shown := CURRENT.get(None)) is not None:
        drift = [each.drift for each in service.journal.generations(report.round_id)]
        name = f"round {report.round_id}"
        shown.artifact(name, round_page(report, drift), f"{name}: {report.verdict}")


# -- requests -----------------------------------------------------------------------------------


def server_answers(wait_s: float = 0.0) -> bool:
    """Whether the Prefect server that the environment names is up, waiting for it if asked."""
    url = os.environ.get("PREFECT_API_URL")
    until = time.monotonic() + wait_s
    while url is not None:  # its health is asked without a password, as Prefect's own client asks
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=2).status_code == httpx.codes.OK:
                return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.5)
    return False


def signed(environment: Mapping[str, str]) -> dict[str, str]:
    """The header that signs a request in, by the variables that Prefect's own client reads."""
    if basic := environment.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(basic.encode()).decode()}"}
    key = environment.get("PREFECT_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def ask(method: str, path: str, body: object = None) -> Any:
    """One request to the server that the environment names; {} for an empty reply or null.

    Raises:
        httpx.HTTPError: The server is away or refuses it.
        ValueError: What answers is no Prefect: a page where JSON was due.
    """
    url = f"{os.environ['PREFECT_API_URL']}{path}"
    with httpx.Client(headers=signed(os.environ), timeout=TIMEOUT_S) as client:
        for _ in range(BUSY_TRIES):
            reply = client.request(method, url, json=body)
            if reply.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(BUSY_S)  # what Prefect answers while its SQLite is locked
    reply.raise_for_status()
    document = reply.json() if reply.content else None
    return {} if document is None else document  # /logs/ answers null


def told(method: str, path: str, body: object) -> Any:
    """The same where nothing depends on it: a failure is a warning, and None."""
    try:
        return ask(method, path, body)
    except (httpx.HTTPError, KeyError, ValueError) as error:
        LOG.warning("Prefect: %s is not shown: %s", path, " ".join(str(error).split()))
        return None


def tell(run_id: UUID, state: RunState) -> None:
    """Set a run's state."""
    told("POST", f"/flow_runs/{run_id}/set_state", {"state": state.to_json(), "force": True})


def stop_left(deployments: Sequence[UUID], running: Collection[UUID]) -> None:
    """Settle runs that a service which was stopped left as running, and what ran inside them."""
    wanted = {"deployment_id": {"any_": [str(each) for each in deployments]}}
    while wanted:
        found = told("POST", "/flow_runs/filter", {"flow_runs": wanted | UNDER_WAY}) or []
        left = [run["id"] for run in found if UUID(run["id"]) not in running]
        for run_id in left:
            tell(UUID(run_id), STOPPED)
        wanted = {"parent_flow_run_id": {"any_": left}} if left else {}


@dataclass
class ShownRun:
    """A flow run whose work is shown: its log lines, its pieces of work, its artifacts."""

    run_id: UUID
    tasks: list[str] = field(default_factory=list)  # task runs that have begun and not ended
    begun: int = 0
    quiet_until: float = 0.0  # on the monotonic clock

    def send(self, path: str, body: object) -> Any:
        """One request. A server that hangs costs one time-out a minute, not one a line."""
        if time.monotonic() < self.quiet_until:
            return None
        reply = told("POST", path, body)
        if reply is None:
            self.quiet_until = time.monotonic() + QUIET_S
        return reply

    def begin_task(self, name: str) -> str | None:
        """A task run of this run; None where the server is away."""
        self.begun += 1
        made = self.send(
            "/task_runs/",
            {
                "flow_run_id": str(self.run_id),
                "task_key": name.split(" ")[0],
                "dynamic_key": str(self.begun),
                "name": name,
                "state": RUNNING.to_json(),
            },
        )
        if made is None:
            return None
        self.tasks.append(made["id"])
        return str(made["id"])

    def end_task(self, task_id: str | None, state: RunState) -> None:
        """End a task run that has not ended."""
        if task_id is not None and task_id in self.tasks:
            self.tasks.remove(task_id)
            body = {"state": state.to_json(), "force": True}
            self.send(f"/task_runs/{task_id}/set_state", body)

    def artifact(self, key: str, text: str, description: str) -> None:
        """A Markdown page of this run; a key has small letters, digits and dashes."""
        key = "".join(sign if sign.isalnum() else "-" for sign in key.lower())
        body = {"key": key, "type": "markdown", "data": text, "description": description}
        self.send("/artifacts/", body | {"flow_run_id": str(self.run_id)})

    def line(self, text: str, name: str = "anchorage.round", level: int = logging.INFO) -> None:
        """A line of the run's log."""
        line = {"name": name, "level": level, "message": text, "flow_run_id": str(self.run_id)}
        self.send("/logs/", [line | {"timestamp": datetime.now(UTC).isoformat()}])


CURRENT: ContextVar[ShownRun | None] = ContextVar("the run that this thread works for")


class RunLog(logging.Handler):
    """Sends what the thread that works for a run logs to the run's page.

    Not what a run inside it logs, which has a handler of its own on the same logger.
    """

    def __init__(self, shown: ShownRun) -> None:
        super().__init__()
        self._shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        """One line; what this module itself says would come back to it."""
        if CURRENT.get(None) is self._shown and record.name != LOG.name:
            self._shown.line(record.getMessage(), record.name, record.levelno)


class ShownProgress:
    """A Reporter beside another one: lines go to the log of the run, pieces of work are tasks."""

    def __init__(self, beside: "Reporter") -> None:
        self.beside = beside

    def track(self, what: str, total: int) -> "Advance":
        """A piece of work: a task run, and a line every LINE_EVERY seconds and at its end."""
        advance, shown = self.beside.track(what, total), CURRENT.get(None)
        if shown is None:
            return advance
        task, began = shown.begin_task(what), time.monotonic()
        said = began

        def shown_too(done: int, note: str = "") -> None:
            nonlocal said
            advance(done, note)
            now = time.monotonic()
            if now - said >= LINE_EVERY or done >= total:
                said = now
                shown.line(f"{what}: {done}/{total} after {now - began:.0f} s {note}".rstrip())
            if done >= total:
                shown.end_task(task, COMPLETED)

        return shown_too

    def say(self, text: str) -> None:
        """A line."""
        self.beside.say(text)
        if (shown := CURRENT.get(None)) is not None:
            shown.line(text)


@contextmanager
def reported(
    run_id: UUID, flow: str = "", parameters: Mapping[str, Any] | None = None
) -> Iterator[Callable[[Any], Any]]:
    """Show a run while the block is: its name, its state, its log, and how it ended.

    Args:
        run_id: Of a flow run that Prefect knows.
        flow: Its flow; without it the name is left as it is.
        parameters: Of the run.

    Yields:
        Takes the run's result, which decides its name and its last state, and returns it.
    """
    shown, results = ShownRun(run_id), list[Any]()
    tell(run_id, RUNNING)
    _rename(run_id, flow, parameters)
    logger, handler, token = logging.getLogger("anchorage"), RunLog(shown), CURRENT.set(shown)
    logger.addHandler(handler)

    def ended(state: RunState) -> None:
        for task in list(shown.tasks):
            shown.end_task(task, state if state.type != "COMPLETED" else COMPLETED)
        tell(run_id, state)

    def finish(result: Any) -> Any:
        results.append(result)
        return result

    try:
        yield finish
    except Exception as error:
        ended(RunState("FAILED", "Failed", " ".join(f"{type(error).__name__}: {error}".split())))
        raise
    except BaseException as end:  # a signal, or Ctrl-C
        ended(RunState("CRASHED", "Crashed", f"ended by {type(end).__name__}"))
        raise
    else:
        _rename(run_id, flow, parameters, *results)
        ended(ending(results[-1] if results else None))
    finally:
        logger.removeHandler(handler)
        CURRENT.reset(token)


def _rename(
    run_id: UUID, flow: str, parameters: Mapping[str, Any] | None, result: object = None
) -> None:
    if flow:
        told("PATCH", f"/flow_runs/{run_id}", {"name": run_name(flow, parameters or {}, result)})


def announce(service: Service) -> None:
    """Send the ledger's new rows as events; a server that is away gets them at a later look.

    The cursor is written after the server has them. A home that never announced begins with its
    next row: old decisions set off no automation.
    """
    if "PREFECT_API_URL" not in os.environ:
        return
    path, newest = service.home.announced_json, service.ledger.history(1)[0].seq
    if not path.is_file():
        write_sealed(path, {"ledger": newest})
    seen = int(read_sealed(path)["ledger"])
    if newest == seen:
        return
    rows = [row for row in reversed(service.ledger.history(newest - seen)) if row.seq > seen]
    events = [event for row in rows if (event := event_of(row)) is not None]
    if not events or told("POST", "/events", events) is not None:
        write_sealed(path, {"ledger": newest})
