"""The loop as Prefect flows: schedules, visibility and retries. The only importer of Prefect here.

Prefect remembers nothing that matters: a killed flow run is taken up from the journal and the
ledger by whichever run comes next.
"""

import logging
import os
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, serve
from prefect.schedules import Interval

from flows.learn import loop
from flows.learn.collect import collect_rows
from flows.learn.weigh import weigh
from flows.serve import promote, swaps
from flows.serve.bake import bake
from flows.serve.reconcile import poll, repair
from flows.service import Service
from flows.session import Session, session
from flows.show.catch_up import Display
from flows.show.progress import Silent

LOG = logging.getLogger("anchorage.flows")
PREFECT_S = 60.0  # between two lines that say it does not answer


@flow(name="collect")
def collect_flow(home: str, target: str | None = None) -> dict[str, Any]:
    """The rows the next round would train on."""
    with session(Path(home)) as opened:
        service = opened.service
        name = service.target(target).name
        return collect_rows(service, name, service.settings.learner.prompts).to_json()


@flow(name="improve")
def improve_flow(
    home: str, target: str | None = None, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One round from the champion to a candidate."""
    with session(Path(home)) as opened:
        made = loop.learn(opened, opened.service.target(target).name, changes)
        return {"round": made.run_id, "digest": made.digest, "ended": made.outcome.reason}


@flow(name="evaluate")
def evaluate_flow(home: str, run_id: str, serve: bool = False) -> dict[str, Any]:
    """Anchor, champion and candidate on every task, and the gate's verdict."""
    with session(Path(home)) as opened:
        return weigh(opened, run_id, serve=serve).report.to_json()


@flow(name="promote")
def promote_flow(home: str, digest: str) -> dict[str, Any]:
    """Serve a passed candidate; a swap that fails ends in the version before it."""
    with session(Path(home)) as opened:
        return promote.promote(opened, opened.service.find(digest)).to_json()


@flow(name="rollback")
def rollback_flow(home: str, digest: str, reason: str) -> dict[str, Any]:
    """Serve an earlier version again."""
    with session(Path(home)) as opened:
        return swaps.rollback(opened, opened.service.find(digest), reason).to_json()


@flow(name="bake")
def bake_flow(home: str) -> dict[str, Any]:
    """Judge a fresh promotion by its live traffic; roll back one that is worse."""
    with session(Path(home)) as opened:
        return bake(opened)


@flow(name="reconcile", retries=2, retry_delay_seconds=5)
def reconcile_flow(home: str) -> list[str]:
    """Make alias and served digest what the ledger says; what was done."""
    with session(Path(home)) as opened:
        return repair(opened)


@flow(name="loop")
def loop_flow(
    home: str, target: str | None = None, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Collect, improve, evaluate, and act on the verdict."""
    with session(Path(home)) as opened:
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


FLOWS: dict[str, Any] = {
    "collect": collect_flow,
    "improve": improve_flow,
    "evaluate": evaluate_flow,
    "promote": promote_flow,
    "rollback": rollback_flow,
    "bake": bake_flow,
    "reconcile": reconcile_flow,
    "loop": loop_flow,
}


def run_flow(name: str, *arguments: Any) -> Any:
    """Run a flow in this process, shown by the Prefect server where one answers.

    Without one the same function runs unseen: Prefect never stands in the way of the work.
    """
    flow_ = FLOWS[name]
    return flow_(*arguments) if server_answers() else flow_.fn(*arguments)


def server_answers(wait_s: float = 0.0) -> bool:
    """Whether the Prefect server that the environment names is up, waiting for it if asked."""
    url = os.environ.get("PREFECT_API_URL")
    until = time.monotonic() + wait_s
    while url is not None:
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == httpx.codes.OK:
                return True
        except httpx.HTTPError:
            pass
        if time.monotonic() >= until:
            return False
        time.sleep(0.5)
    return False


def serve_flows(service: Service) -> None:
    """Serve the deployments until a signal; beside them, watch that all agree.

    The loop runs on its schedule; the others wait to be asked for in Prefect's UI.
    """
    home = {"home": str(service.home.root)}
    every = timedelta(minutes=service.settings.projection.loop_minutes)
    schedule = Interval(every, anchor_date=datetime.now(UTC) + every)
    watcher = threading.Thread(target=watch, args=[service], name="reconcile", daemon=True)
    watcher.start()
    while "PREFECT_API_URL" in os.environ and not server_answers(wait_s=PREFECT_S):
        LOG.warning("Prefect does not answer; its schedules wait for it, nothing else does")
    deployments = [
        each.to_deployment(
            name=name, parameters=home, schedule=schedule if name == "loop" else None
        )
        for name, each in FLOWS.items()
    ]
    serve(*deployments, print_starting_message=False, pause_on_shutdown=False)


def watch(service: Service) -> None:
    """Reconcile and bake for as long as the process lives, and show the home in MLflow.

    The display has a thread of its own: an MLflow that hangs delays no repair and no rollback. A
    flow is run only where something disagrees, so that Prefect's list of runs stays short.
    """
    opened = Session(Service(service.home, service.settings), Silent())
    Display(opened.service, service.settings.projection.reconcile_seconds)
    while True:
        time.sleep(service.settings.projection.reconcile_seconds)
        poll(opened, lambda: _settle(str(service.home.root)))


def _settle(home: str) -> None:
    """Reconcile where Prefect shows it, and all the same where Prefect itself fails."""
    try:
        run_flow("reconcile", home)
    except Exception as error:
        LOG.warning("reconcile as a flow: %s", error)
        reconcile_flow.fn(home)
