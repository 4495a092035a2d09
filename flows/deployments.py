"""The loop as Prefect flows: schedules and visibility. The only importer of Prefect here.

Prefect remembers nothing that matters: a killed flow run is taken up from the journal and the
ledger by whichever run comes next. Nothing that its server returns is executed: it says which
runs are due; what runs is one of the functions here, in a process with a command line of our own,
after deployment and run were compared with what was registered (`flows.learn.loop`). Prefect's
own runner would import an entrypoint, perform pull steps and unpickle results that whoever
reaches the server sets.
"""

import inspect
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.utilities.callables import parameter_schema

from agent.errors import UserError
from agent.home import Home, is_locked
from flows.learn import loop
from flows.learn.collect import collect_rows
from flows.learn.loop import Due, RowTrigger, decide, note_refusals, refusal, registered
from flows.learn.weigh import weigh
from flows.serve import promote, swaps
from flows.serve.bake import bake
from flows.serve.outlook import deployment_name, new_rows
from flows.serve.reconcile import attempt, poll, repair
from flows.service import Service
from flows.session import Session, session
from flows.show.catch_up import Display
from flows.show.prefect import (
    CURRENT,
    RunState,
    ShownProgress,
    announce,
    ending,
    reported,
    server_answers,
    show_page,
    stop_left,
    tell,
)
from flows.show.terminal import Silent

LOG = logging.getLogger("anchorage.flows")
# What a server that is away, refuses us or is no Prefect leads to.
UNWILLING = (httpx.HTTPError, PrefectException, ValueError)
PREFECT_S = 60.0  # between two lines that say it does not answer, and two registrations
POLL_S = 5.0  # between two looks for runs that are due


@flow(name="collect")
def collect_flow(home: str, target: str | None = None) -> dict[str, Any]:
    """The rows the next round would train on."""
    with working(home) as opened:
        service = opened.service
        name = service.target(target).name
        return collect_rows(service, name, service.settings.learner.prompts).to_json()


@flow(name="improve")
def improve_flow(
    home: str, target: str | None = None, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One round from the champion to a candidate."""
    with working(home) as opened:
        made = loop.learn(opened, opened.service.target(target).name, changes)
        return {"round": made.run_id, "digest": made.digest, "ended": made.outcome.reason}


@flow(name="evaluate")
def evaluate_flow(home: str, run_id: str, serve: bool = False) -> dict[str, Any]:
    """Anchor, champion and candidate on every task, and the gate's verdict."""
    with working(home) as opened:
        report = weigh(opened, run_id, serve=serve).report
        show_page(opened.service, report)
        return report.to_json()


@flow(name="promote")
def promote_flow(home: str, digest: str) -> dict[str, Any]:
    """Serve a passed candidate; a swap that fails ends in the version before it."""
    with working(home) as opened:
        return promote.promote(opened, opened.service.find(digest)).to_json()


@flow(name="rollback")
def rollback_flow(home: str, digest: str, reason: str) -> dict[str, Any]:
    """Serve an earlier version again."""
    with working(home) as opened:
        return swaps.rollback(opened, opened.service.find(digest), reason).to_json()


@flow(name="bake")
def bake_flow(home: str) -> dict[str, Any]:
    """Judge a fresh promotion by its live traffic; roll back one that is worse."""
    with working(home) as opened:
        return bake(opened)


@flow(name="reconcile")
def reconcile_flow(home: str) -> list[str]:
    """Make alias and served digest what the ledger says; what was done."""
    with working(home) as opened:
        return repair(opened)


@flow(name="loop")
def loop_flow(
    home: str, target: str | None = None, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Collect, improve, evaluate, and act on the verdict."""
    with working(home) as opened:
        name = opened.service.target(target).name
        collected = run_flow("collect", home, name)
        made = run_flow("improve", home, name, changes)
        report, outcome = loop.conclude(
            opened,
            made["digest"],
            weighed=lambda: run_flow("evaluate", home, made["round"], True),
            promoted=lambda: run_flow("promote", home, made["digest"]),
        )
        return {"collected": collected, "report": report, "outcome": outcome}


PARTS = (collect_flow, improve_flow, evaluate_flow, promote_flow, rollback_flow, bake_flow)
FLOWS: dict[str, Any] = {each.name: each for each in (*PARTS, reconcile_flow, loop_flow)}


def run_flow(name: str, *arguments: Any) -> Any:
    """Run a flow's function in this process, shown as a run where the Prefect server answers.

    Without one the same function runs unseen: Prefect never stands in the way of the work. Inside
    another shown run it is one of that run's tasks, as a subflow is.
    """
    function = FLOWS[name].fn
    if not server_answers():
        return function(*arguments)
    parameters = dict(inspect.signature(function).bind(*arguments).arguments)
    outer = CURRENT.get(None)
    task = outer.begin_task(name) if outer else None
    shown: dict[str, Any] = {
        "parameters": parameters,
        "parent_task_run_id": UUID(task) if task else None,
    }
    try:
        with get_client(sync_client=True) as client:
            made = client.create_flow_run(FLOWS[name], **shown)
    except UNWILLING as error:  # a server may be well and refuse us
        LOG.warning("Prefect: %s is not shown: %s", name, " ".join(str(error).split()))
        return function(*arguments)
    with reported(made.id, name, parameters) as finish:
        result = finish(function(*arguments))
    if outer:
        outer.end_task(task, ending(result))
    return result


@contextmanager
def working(home: str) -> Iterator[Session]:
    """The home's session; what it reports is shown on the page of the run too.

    A flow waits for a database server as long as it takes: begun again later, it would begin with
    the same wait.
    """
    with session(Path(home)) as opened, opened.service.patient():
        before = opened.progress
        if not isinstance(before, ShownProgress):
            opened.progress = ShownProgress(before)
        try:
            yield opened
        finally:
            opened.progress = before


def process_of(home: Path, name: str, run_id: UUID) -> list[str]:
    """The command of one run; its parameters come on stdin."""
    argv = [sys.executable, "-m", "flows.cli", "service", "run", name, str(run_id)]
    return [*argv, "--home", str(home)]


class Runner:
    """Registers the flows of a home with Prefect and runs those that are due, one process each.

    Args:
        home: The folder whose flows these are.
        minutes: From a loop's end to the next planned one; 0: none is planned.
        client: Of Prefect's server.
        rows: Says when new rows start a loop.
        note: Keeps why a run was refused: flow, reason.
        command: home, flow, run -> the command that runs it.
        label: Name of the deployments on a server that others use, too: there those of another
            home are left alone. Without it each has its flow's name, and all are ours.
    """

    def __init__(
        self,
        home: Home,
        minutes: float,
        client: SyncPrefectClient,
        command: Callable[[Path, str, UUID], list[str]] = process_of,
        rows: RowTrigger | None = None,
        note: Callable[[str, str], None] = lambda _name, _why: None,
        label: str | None = None,
    ) -> None:
        self._home, self._client, self._label = home, client, label
        self._command, self._rows, self._note = command, rows, note
        self._every = timedelta(minutes=minutes) if minutes else None
        self._names: dict[UUID, str] = {}  # deployment -> flow
        self._running: dict[UUID, tuple[str, subprocess.Popen[str]]] = {}

    def register(self) -> None:
        """Make every deployment what it should be; one that is already stays, with its runs."""
        self._names = {self._registered(name): name for name in FLOWS}

    def _registered(self, name: str) -> UUID:
        """A deployment's id; one that differs is deleted first, as an update may leave parts."""
        every, home = self._every if name == "loop" else None, str(self._home.root)
        label = self._label or name
        try:
            found = self._client.read_deployment_by_name(f"{name}/{label}")
        except ObjectNotFound:
            pass
        else:
            if self._label:
                loop.refuse_foreign(f"{name}/{label}", home, found)
            wrong = refusal(name, home, found)
            planned = [getattr(each.schedule, "interval", None) for each in found.schedules]
            if wrong is None and planned == ([every] if every else []):
                return found.id
            LOG.warning("deployment %s is made anew: %s", name, wrong or "it has another schedule")
            self._client.delete_deployment(found.id)  # its planned runs go with it
        plan = [DeploymentScheduleCreate(schedule=_from_now(every), active=True)] if every else []
        return self._client.create_deployment(
            self._client.create_flow(FLOWS[name]),
            label,
            schedules=plan,
            description=inspect.getdoc(FLOWS[name].fn),
            parameter_openapi_schema=parameter_schema(FLOWS[name].fn).model_dump_for_openapi(),
            enforce_parameter_schema=True,
            **registered(name, home),
        )

    def looks(self) -> Iterator[None]:
        """Look again and again; between two looks the caller sleeps. A lost server is waited for.

        What is registered is looked after once in ``PREFECT_S``: its database may have been lost.
        """
        registered_at = told_at = -PREFECT_S
        while True:
            now = time.monotonic()
            try:
                if now - registered_at >= PREFECT_S:
                    self.register()
                    stop_left(list(self._names), self._running)
                    registered_at = now
                self.tick()
            except (*UNWILLING, UserError) as error:
                registered_at = -PREFECT_S
                if now - told_at >= PREFECT_S:
                    line = " ".join(str(error).split())
                    LOG.warning("Prefect at %s: %s", self._client.api_url, line)
                    told_at = now
            yield

    def tick(self) -> None:
        """Settle what has ended, then start, skip or refuse what is due."""
        for run_id in list(self._running):
            self._settle(run_id)
        if self._rows and self._rows.due():
            loop_id = next(key for key, name in self._names.items() if name == "loop")
            where = {"home": str(self._home.root)}
            self._client.create_flow_run_from_deployment(loop_id, parameters=where)
            self._rows.asked()
        runs = self._client.get_scheduled_flow_runs_for_deployments(
            list(self._names), scheduled_before=datetime.now(UTC)
        )
        fresh = [run for run in runs if run.id not in self._running]  # its start was not shown
        allowed = {run.id: (name, run) for run in fresh if (name := self._allowed(run))}
        due = [Due.of(name, run) for name, run in allowed.values()]
        running = [name for name, _ in self._running.values()]
        for run_id, why in decide(due, running, is_locked(self._home.round_lock)).items():
            if why:
                LOG.info("run %s: %s", run_id, why)
                tell(run_id, RunState("CANCELLED", "Skipped", why))
            else:
                self._start(*allowed[run_id])

    def _allowed(self, run: Any) -> str | None:
        """The flow of a run; None for one that is not as registered, which is told.

        Then everything is registered anew, so that the next run is right again.
        """
        name, home = self._names[run.deployment_id], str(self._home.root)
        why = refusal(name, home, self._client.read_deployment(run.deployment_id), run)
        if why is None:
            try:
                FLOWS[name].validate_parameters(run.parameters)
            except Exception as error:  # pydantic's, or Prefect's own
                why = f"the run's parameters: {' '.join(str(error).split())}"
        if why is None:
            return name
        LOG.error("run %s of %s is refused: %s", run.id, name, why)
        tell(run.id, RunState("CANCELLED", "Refused", f"refused: {why}"))
        self._note(name, why)
        self.register()
        return None

    def _start(self, name: str, run: Any) -> None:
        """A process of its own; what was compared is handed over, not read from Prefect again."""
        tell(run.id, RunState("PENDING", "Pending"))  # not due any more
        command = self._command(self._home.root, name, run.id)
        child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        assert child.stdin is not None
        with suppress(BrokenPipeError), child.stdin as pipe:  # one that died is settled later
            json.dump(run.parameters, pipe)
        self._running[run.id] = (name, child)

    def _settle(self, run_id: UUID) -> None:
        """Follow a process: cancelled in Prefect's page, or ended; a round's end plans the next."""
        name, child = self._running[run_id]
        state = self._client.read_flow_run(run_id).state
        if state is not None and state.is_cancelling():
            child.terminate()
            child.wait()
            tell(run_id, RunState("CANCELLED", "Cancelled", "cancelled in Prefect"))
        if child.poll() is None:
            return
        del self._running[run_id]
        if state is not None and not state.is_final() and not state.is_cancelling():
            tell(
                run_id, RunState("CRASHED", "Crashed", f"its process ended with {child.returncode}")
            )
        if name == "loop":
            self._plan_next()

    def _plan_next(self) -> None:
        """Count the interval from now; a schedule that a person changed keeps their interval."""
        for deployment in [key for key, name in self._names.items() if name == "loop"]:
            for each in self._client.read_deployment_schedules(deployment):
                if isinstance(each.schedule, IntervalSchedule):
                    later = _from_now(each.schedule.interval)
                    self._client.update_deployment_schedule(deployment, each.id, schedule=later)

    def close(self) -> None:
        """End what runs."""
        for _, child in self._running.values():
            child.terminate()
        for _, child in self._running.values():
            child.wait()


def _from_now(every: timedelta) -> IntervalSchedule:
    return IntervalSchedule(interval=every, anchor_date=datetime.now(UTC) + every)


def run_one(name: str, run_id: str, parameters: Mapping[str, Any]) -> None:
    """The process of one run: its function, shown under the run's id."""
    with reported(UUID(run_id), name, parameters) as finish:
        finish(FLOWS[name].fn(**parameters))


def serve_flows(service: Service) -> None:
    """Run what is due until a signal; beside it, watch that all agree.

    The loop runs on its schedule; the others wait to be asked for in Prefect's UI.
    """
    watcher = threading.Thread(target=watch, args=[service], name="reconcile", daemon=True)
    watcher.start()
    while not server_answers(wait_s=PREFECT_S):
        url = os.environ.get("PREFECT_API_URL")
        LOG.warning("Prefect at %s: no answer; schedules wait for it, nothing else does", url)
        time.sleep(POLL_S if url else PREFECT_S)
    plan, target = service.settings.projection, service.settings.tasks.target
    label = deployment_name(service.settings, "") or None
    rows = RowTrigger(plan.loop_rows, lambda: new_rows(service, target))
    with get_client(sync_client=True) as client:
        note = note_refusals(service)
        runner = Runner(service.home, plan.loop_minutes, client, rows=rows, note=note, label=label)
        with closing(runner):
            for _ in runner.looks():
                time.sleep(POLL_S)


def watch(service: Service) -> None:
    """Reconcile and bake for as long as the process lives, and show the home in MLflow.

    The display has a thread of its own: an MLflow that hangs delays no repair and no rollback. A
    flow is run only where something disagrees, so that Prefect's list of runs stays short.
    No duty's failure ends the thread, which nobody would start again.
    """
    opened = Session(Service(service.home, service.settings), Silent())
    Display(opened.service, service.settings.projection.reconcile_seconds)
    while True:
        time.sleep(service.settings.projection.reconcile_seconds)
        poll(opened, lambda: _settle(str(service.home.root)))
        attempt("events", lambda: announce(opened.service))


def _settle(home: str) -> None:
    """Reconcile where Prefect shows it, and all the same where Prefect itself fails."""
    try:
        run_flow("reconcile", home)
    except Exception as error:
        LOG.warning("reconcile as a flow: %s", error)
        reconcile_flow.fn(home)
