"""serving.json: which weights an engine has to serve, whatever happened to the one before.

An engine that starts, for whatever reason, loads what this file names; so a crash at any moment
ends in the version that was stamped last. It is replaced by a rename, never written in place.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from agent.config import Home
from agent.errors import UserError

BLUE = "engine"  # the slot that serves unless blue/green has flipped
GREEN = "engine-green"
SLOTS = (BLUE, GREEN)


@dataclass(frozen=True, slots=True)
class Served:
    """A version and the Hugging Face directory that holds it; ``slot`` is the engine it runs in."""

    digest: str
    directory: str
    slot: str = BLUE


def read_served(home: Home) -> Served:
    """What the service serves; UserError when no version was ever chosen."""
    return _read(home.root / "serving.json")


def write_served(home: Home, served: Served) -> None:
    """Choose what every later start serves."""
    write_atomically(home.root / "serving.json", json.dumps(asdict(served)))


def read_slot(home: Home, slot: str) -> Served:
    """What the engine of one slot loads: the champion in the active slot, else the slot's own."""
    champion = read_served(home)
    return champion if champion.slot == slot else _read(home.root / f"{slot}.json")


def write_slot(home: Home, served: Served) -> None:
    """Choose what an engine beside the active one loads."""
    write_atomically(home.root / f"{served.slot}.json", json.dumps(asdict(served)))


def socket_of(home: Home, slot: str = BLUE) -> Path:
    """The unix socket of a slot's engine."""
    return home.sockets / f"{slot}.sock"


def write_atomically(path: Path, text: str, *, durably: bool = True) -> None:
    """Replace a file's content: written beside it, flushed, renamed, the folder flushed.

    Without ``durably`` nothing is flushed: processes that die change nothing, a power cut may.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if durably:
            os.fsync(file.fileno())
    beside.rename(path)
    if durably:
        _flush_folder(path)


def _flush_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path) -> Served:
    try:
        return Served(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path.name}: no version was chosen to serve in {path.parent}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: is not a served version: {error}") from None
