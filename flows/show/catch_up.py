"""What MLflow missed while it was away: generations, judged rounds, versions, states, aliases.

Beside each round lie its report and how much of it was shown, so that one way serves both: a round
under way shows what is new, and whoever comes later shows what is left.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agent.home import locked, write_atomically
from agent.registry import STATE
from flows.learn.curve import points_of
from flows.learn.evaluate import Who
from flows.service import Service
from flows.show import mlflow
from flows.show.report import RoundReport

WAIT_S = 60.0  # for another process that shows the same


def catch_up(service: Service) -> list[str]:
    """Show everything that was not shown, oldest first; what was done, a line each.

    Raises what MLflow raises; what was shown until then stays shown.
    """
    done = []
    if service.registry.version(service.origin.digest) is None:
        mlflow.show_anchor(service)
        done.append("the original model")
    for run in service.journal.runs():
        done += show_run(service, run.run_id)
    return done + _states(service)


def show_run(service: Service, run_id: str, pace: Mapping[str, float] | None = None) -> list[str]:
    """Show what is new of one round; ``pace`` is what its newest generation cost."""
    path = _folder(service, run_id) / "shown.json"
    if _read(path) == _wanted(service, run_id):
        return []
    taken = f"MLflow: another process has been writing rounds to it for {WAIT_S:.0f} s"
    with locked(service.home.shown_lock, taken=taken, wait_s=WAIT_S):
        return _show_run(service, run_id, path, pace or {})


def keep(service: Service, report: RoundReport, tables: Mapping[Who, Sequence[Path]]) -> None:
    """Keep a judged round's report and where its per-sample tables lie, to be shown at any time."""
    path = _folder(service, report.round_id) / "judged.json"
    kept = {who: [str(each) for each in paths] for who, paths in tables.items()}
    write_atomically(
        path, json.dumps({"report": asdict(replace(report, curve=())), "tables": kept})
    )


def _show_run(service: Service, run_id: str, path: Path, pace: Mapping[str, float]) -> list[str]:
    now, wanted = _read(path), _wanted(service, run_id)
    done = []
    generations = service.journal.generations(run_id)
    for each in generations[now["generations"] :]:
        newest = each.generation == generations[-1].generation
        mlflow.show_generation(service, run_id, each.drift, pace if newest else {})
        now["generations"] = each.generation + 1
        write_atomically(path, json.dumps(now))
        done.append(f"generation {each.generation} of {run_id}")
    if wanted["report"] != now["report"]:
        _show_report(service, run_id)
        write_atomically(path, json.dumps(wanted))
        done.append(f"round {run_id}")
    return done


def _show_report(service: Service, run_id: str) -> None:
    kept = json.loads((_folder(service, run_id) / "judged.json").read_text("utf-8"))
    report = RoundReport(**kept["report"])
    tables = {who: [Path(each) for each in paths] for who, paths in kept["tables"].items()}
    mlflow.show_round(service, replace(report, curve=points_of(service, run_id)), tables)


def _wanted(service: Service, run_id: str) -> dict[str, Any]:
    """How much of a round there is to show: generations, and when its report was written."""
    report = _folder(service, run_id) / "judged.json"
    written = report.stat().st_mtime_ns if report.is_file() else None
    return {"generations": service.journal.next_generation(run_id), "report": written}


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"generations": 0, "report": None}
    return found | (json.loads(path.read_text("utf-8")) if path.is_file() else {})


def _states(service: Service) -> list[str]:
    """The ledger's word on each version, as a tag."""
    done = []
    states = service.ledger.states()
    for version in service.registry.versions():
        state = states.get(version.digest)
        if state is not None and state != version.state:
            service.registry.tag(version.digest, STATE, state)
            done.append(f"version {version.number}: {state}")
    return done


def _folder(service: Service, run_id: str) -> Path:
    folder = service.home.run(run_id)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
