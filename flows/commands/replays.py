"""Weights from the journal alone: rebuilt, checked after every generation, exported."""

import time
from pathlib import Path
from typing import Any

from agent.store.replay import replay
from agent.store.weights import Anchor, export
from flows.service import Service


def replay_now(home: Path | None, candidate: str, snapshots: bool) -> dict[str, Any]:
    """Rebuild a candidate from the anchor, or from the newest sound snapshot.

    Raises:
        UserError: The first row of the journal that does not lead where it says.
    """
    service = Service.at(home)
    began = time.monotonic()
    name = _name(service, candidate)
    folder = service.home.snapshots if snapshots else None
    parameters = replay(
        service.journal, _anchor(service, name), name, folder, importance=service.home.importance
    )
    return {
        "candidate": name,
        "digest": parameters.digest(),
        "delta_hash": parameters.delta_hash(),
        "seconds": round(time.monotonic() - began, 3),
    }


def export_now(home: Path | None, candidate: str, into: Path) -> dict[str, Any]:
    """Replay a candidate and write it as a Hugging Face directory under ``into``."""
    service = Service.at(home)
    name = _name(service, candidate)
    parameters = replay(
        service.journal, _anchor(service, name), name, importance=service.home.importance
    )
    directory = export(parameters, into)
    return {"digest": directory.name, "directory": str(directory)}


def _name(service: Service, candidate: str) -> str:
    """A round's id as it is, else the digest its beginning means."""
    known = {run.run_id for run in service.journal.runs()}
    return candidate if candidate in known else service.find(candidate)


def _anchor(service: Service, name: str) -> Anchor:
    """What a round's id or a digest was tied to when it was made."""
    if name in {run.run_id for run in service.journal.runs()}:
        return service.open_anchor(service.journal.run(name).anchor_digest)
    made_here = name != service.origin.digest
    made = service.journal.candidate(name).anchor_digest if made_here else name
    return service.open_anchor(made)
