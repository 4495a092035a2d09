"""A controller per command, forked from a process that has imported everything already.

    python controller.py HOME          commands: JSON lines on stdin, told: JSON lines on stdout

Each child opens the home anew, as `anchorage promote` does, and acts through the flows. Where a
command names a moment of the ledger or of an alias, the child signals itself there: the ledger and
the registry it is given are the real ones with that moment around one call.
"""

import json
import os
import signal
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import mlflow.tracking._model_registry.utils
import mlflow.tracking.client  # noqa: F401  forked, not imported a hundred times

from agent.errors import UserError
from agent.registry import DIGEST, Registry
from agent.store.ledger import Entry, Ledger
from flows.learn import loop
from flows.serve import promote, swaps
from flows.serve.bake import bake
from flows.service import Service
from flows.session import Session
from flows.show.catch_up import catch_up
from flows.show.terminal import Silent

HOME = Path(sys.argv[1])


def moments(point: str, number: int) -> Any:
    def here(name: str) -> None:
        if point == name:
            os.kill(os.getpid(), number)

    return here


class StoppableLedger(Ledger):
    here: Any

    def append(self, digest: str, state: str, **more: Any) -> Entry:
        self.here(f"ledger:{state}:before")
        entry = super().append(digest, state, **more)
        self.here(f"ledger:{state}:after")
        return entry


class StoppableRegistry(Registry):
    here: Any

    def set_alias(self, alias: Any, digest: str) -> None:
        self.here(f"alias:{alias}:before")
        super().set_alias(alias, digest)
        self.here(f"alias:{alias}:after")


class StoppableService(Service):
    """The home's parts, two of them with a moment; MLflow's is opened by who gets that far."""

    here: Any

    @cached_property
    def ledger(self) -> Ledger:
        ledger = StoppableLedger(self._state, self.wait_s)
        ledger.here = self.here
        return ledger

    @cached_property
    def registry(self) -> Registry:
        uri = f"sqlite:///{self.home.mlflow_db}"
        registry = StoppableRegistry(uri, self.settings.model.name, self.home.mlflow)
        registry.here = self.here
        return registry


def opened(command: dict[str, Any]) -> Session:
    service = StoppableService.at(HOME)
    point = command.get("point", "")
    service.here = moments(point, command.get("signal", signal.SIGKILL))
    if point.startswith("alias:"):
        _ = service.registry  # opened now, or the watch shows the aliases before it is
    return Session(service, Silent())


def register(session: Session, digests: list[str]) -> None:
    """Versions as a projection makes them, without copying weights a hundred times."""
    registry = session.service.registry
    for digest in digests:
        source = session.service.directory(digest).as_uri()
        registry._client.create_model_version(registry.name, source, tags={DIGEST: digest})


def race(command: dict[str, Any]) -> dict[str, Any]:
    """Two controllers that want the same promotions; how many each of them made."""
    told, tell = os.pipe()
    other = os.fork()
    try:
        made = promote_all(command)
        if other == 0:
            os.write(tell, b"%d" % made)
    finally:
        if other == 0:
            os._exit(0)
    os.close(tell)
    return {"made": [made, int(os.read(told, 9))]}


def promote_all(command: dict[str, Any]) -> int:
    """Promote whatever nobody else has; how many that were."""
    session, digests, made = opened(command), command["digests"], 0
    service = session.service
    for digest in digests:
        while service.ledger.state(digest) in ("PASSED", "SWAP_INTENT"):
            try:
                raced = promote.promote(session, digest, "raced", promote.PASSED)
                made += raced.served == digest
            except UserError:
                time.sleep(0.01)  # the other one is at work, or was quicker
    return made


def conclude(session: Session, digest: str) -> dict[str, Any]:
    """What a loop does once its candidate was asked everything."""

    def weighed() -> dict[str, Any]:
        session.service.record(digest, "PASSED", "a test", statistics={"serve": True})
        return {"verdict": "promote"}

    def promoted() -> dict[str, Any]:
        return promote.promote(session, digest, "a test").to_json()

    return loop.conclude(session, digest, weighed, promoted)[1]


def act(command: dict[str, Any]) -> dict[str, Any]:
    if command["act"] == "race":
        return race(command)
    session = opened(command)
    done = carried_out(session, command)
    if command.get("point", "").startswith("alias:"):
        catch_up(session.service)  # as a command without a stack does at its end
    return done


def carried_out(session: Session, command: dict[str, Any]) -> dict[str, Any]:
    match command["act"]:
        case "register":
            register(session, command["digests"])
            return {}
        case "promote":
            return promote.promote(session, command["digest"], "a test").to_json()
        case "conclude":
            return conclude(session, command["digest"])
        case "rollback":
            return swaps.rollback(session, command["digest"], "a test").to_json()
        case _:
            return bake(session)


def say(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told, default=str) + "\n")
    sys.stdout.flush()


def child(command: dict[str, Any]) -> None:
    if command.get("point", "").startswith("engine:"):
        plan = {"point": command["point"], "pid": os.getpid(), "signal": command["signal"]}
        (HOME / "plan.json").write_text(json.dumps(plan))
    say({"pid": os.getpid()})
    try:
        say({"ended": act(command)})
    except BaseException as error:
        say({"ended": None, "error": f"{type(error).__name__}: {error}"})
    os._exit(0)


say({"ready": True})
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        child(json.loads(line))
    _, status = os.waitpid(pid, 0)
    say({"exit": status})
