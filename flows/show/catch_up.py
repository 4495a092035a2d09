"""MLflow as a subscriber: shows what journal, ledger and round files have and it does not.

Learning and serving write those and never call MLflow. A pass over a home (``catch_up``) shows what
is new, oldest first; every pass can be repeated, and what one missed the next one makes up for.
``Display`` makes passes in a thread of its own: the flows' process has one while the stack is up,
a command that runs without a stack (``showing``) until it ends.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.home import locked, read_sealed, write_sealed
from agent.registry import STATE
from flows.round_files import RoundFiles
from flows.service import Service
from flows.show import mlflow
from flows.show.report import RoundReport
from flows.show.terminal import Reporter

LOG = logging.getLogger("anchorage.display")
LOCK_S = 60.0  # longest wait for another process that shows the same home
LOOK_S = 0.5  # between two looks for new rows
LAST_S = 20.0  # longest wait of a command, at its end, for what is not shown yet


def catch_up(service: Service) -> list[str]:
    """One pass: show everything that is not shown yet; what was done, a line each.

    The cursors (per round, and of the ledger) are written after what they stand for, so that a pass
    that was cut short is repeated from there. One process at a time: two would log points twice.

    Raises:
        Exception: Whatever MLflow raises; what was shown until then stays shown.
    """
    taken = f"MLflow: another process has been writing to it for {LOCK_S:.0f} s"
    with locked(service.home.shown_lock, taken=taken, wait_s=LOCK_S):
        newest = _newest(service)  # read first: a row that comes meanwhile is shown next time
        done = _show_origin(service)
        for run in service.journal.runs():
            try:
                done += show_run(service, run.run_id)
            except Exception as error:
                # Where MLflow answers, the fault is this round's (its weights are gone, for
                # instance): later rounds are shown. Where it does not, this call raises as well.
                service.registry.version(service.origin.digest)
                LOG.warning("round %s cannot be shown: %s", run.run_id, error)
        done += _show_states(service)
        mlflow.show_aliases(service)
        if done or newest != _shown(service):
            write_sealed(service.home.shown_json, newest)
        return done


def put_back(service: Service, version: str, note: str) -> None:
    """Answer a person's move of the champion alias that was refused: a note, and the alias back."""
    if note:
        service.registry.note(version, note)
    mlflow.show_aliases(service, answered=version)


def refuse_review(service: Service, version: str, note: str) -> None:
    """Remove a review tag that counts for nothing, with a note that says why."""
    service.registry.refuse_review(version, note)


def behind(service: Service) -> bool:
    """Whether journal or ledger have rows that were not shown; MLflow is not called for it."""
    if _newest(service) != _shown(service):
        return True
    return any(
        RoundFiles(service.home, run.run_id).shown() != _complete(service, run.run_id)
        for run in service.journal.runs()
    )


def _show_origin(service: Service) -> list[str]:
    """The original model's version. An MLflow without it is new: all rounds are shown again.

    So they are in another MLflow than at the last pass, which has only what it was shown before.
    """
    known = service.registry.version(service.origin.digest) is not None
    if not known or _shown(service)["server"] != _newest(service)["server"]:
        for run in service.journal.runs():
            RoundFiles(service.home, run.run_id).forget_shown()
    if known:
        return []
    mlflow.show_origin(service)
    return ["the original model"]


def show_run(service: Service, run_id: str) -> list[str]:
    """What is new of one round: its generations, then its report and version."""
    files, done = RoundFiles(service.home, run_id), list[str]()
    shown, complete = files.shown(), _complete(service, run_id)
    if shown == complete:
        return done
    pace = {row["generation"]: row for row in files.pace()}
    for each in service.journal.generations(run_id)[shown["generations"] :]:
        mlflow.show_generation(service, run_id, each.drift, pace.get(each.generation, {}))
        files.write_shown(each.generation + 1, shown["report"])
        done.append(f"generation {each.generation} of {run_id}")
    judged = files.judged()
    if judged is not None and complete["report"] != shown["report"]:
        tables = {who: [Path(path) for path in paths] for who, paths in judged["tables"].items()}
        mlflow.show_round(service, RoundReport(**judged["report"]), tables)
        files.write_shown(int(complete["generations"] or 0), complete["report"])
        done.append(f"round {run_id}")
    return done


def _complete(service: Service, run_id: str) -> dict[str, int | None]:
    """The cursor of a round of which everything is shown."""
    judged_at = RoundFiles(service.home, run_id).judged_at()
    return {"generations": service.journal.next_generation(run_id), "report": judged_at}


def _show_states(service: Service) -> list[str]:
    """The ledger's state of each version as a tag, and what to do at the head of its page."""
    states, versions = service.ledger.states(), service.registry.versions()
    done = mlflow.show_heads(service, versions)
    for version in versions:
        state = states.get(version.digest)
        if state is not None and state != version.state:
            service.registry.tag(version.digest, STATE, state)
            done.append(f"version {version.number}: {state}")
    return done


def _newest(service: Service) -> dict[str, Any]:
    """Number of the ledger's newest row, and which MLflow is to show it ("": the home's own).

    There is always a row, the original model's.
    """
    server = service.settings.projection.mlflow_url
    return {"ledger": service.ledger.history(1)[0].seq, "server": server}


def _shown(service: Service) -> dict[str, Any]:
    """The same of the last whole pass: the row up to which states and aliases are shown."""
    path = service.home.shown_json
    return {"ledger": 0, "server": ""} | (read_sealed(path) if path.is_file() else {})


class Display:
    """Shows a home in MLflow from a thread of its own; whoever writes rows waits for nothing.

    A look costs the times of two files, or a query. New rows are shown at once; besides, a pass is
    made every ``every_s`` (what MLflow itself lost, such as an alias, is set again), and so is a
    failed one.
    """

    def __init__(self, service: Service, every_s: float) -> None:
        self._service, self._every_s = service, every_s
        self._ending = threading.Event()
        self._error = ""
        # A daemon: a pass that hangs in MLflow does not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)
        self._thread.start()

    def finish(self, seconds: float) -> str:
        """End, after a last pass where rows are not shown; why MLflow is behind, '' if it is not.

        No pass follows one that failed: the caller would wait for the same failure again.
        """
        self.stop()
        self._thread.join(seconds)
        if self._error or not self._thread.is_alive():
            return self._error
        return f"no answer within {seconds:g} s"

    def stop(self) -> None:
        """End without waiting."""
        self._ending.set()

    def _run(self) -> None:
        seen, due = self._mark(), time.monotonic()
        while True:
            last = self._ending.wait(LOOK_S)
            mark = self._mark()
            retry = time.monotonic() >= due and not (last and self._error)
            fresh = (last or mark != seen) and not self._error
            if retry or (fresh and self._is_behind()):
                self._pass()
                due = time.monotonic() + self._every_s
            if last:
                return
            seen = mark

    def _mark(self) -> tuple[int, ...]:
        """What changes when journal or ledger are written; nothing while they cannot be read."""
        try:
            return self._service.journal.database.mark()
        except Exception:  # the pass that is due says so
            return ()

    def _is_behind(self) -> bool:
        try:
            return behind(self._service)
        except Exception as error:
            LOG.warning("rows that are not shown: %s", error)
            return False

    def _pass(self) -> None:
        """The boundary of one pass: its failure is logged, and the next one makes up for it."""
        try:
            catch_up(self._service)
        except Exception as error:
            self._error = " ".join(str(error).split()) or type(error).__name__
            LOG.warning("MLflow is behind and will be brought level: %s", self._error)
        else:
            self._error = ""


@contextmanager
def showing(service: Service, progress: Reporter, is_up: bool) -> Iterator[None]:
    """Show in MLflow what the block writes, and wait at its end for the rest, bounded.

    Where the stack is up (``is_up``) its flows' process shows everything, and nothing is done here.
    """
    if is_up:
        yield
        return
    display = Display(service, service.settings.projection.reconcile_seconds)
    try:
        yield
    except BaseException:
        display.stop()  # the error is printed at once
        raise
    error = display.finish(LAST_S)
    if error:
        progress.say(f"MLflow is behind, the next command or `up` brings it level: {error}")


def shown_within(service: Service, seconds: float) -> bool:
    """Wait for another process's display; whether everything is shown by then."""
    until = time.monotonic() + seconds
    while behind(service):
        if time.monotonic() >= until:
            return False
        time.sleep(LOOK_S)
    return True
