"""serving.json: which weights an engine has to serve, whatever happened to the one before.

An engine that starts, for whatever reason, loads what this file names, so that a crash at any
moment ends in the version that was written last. The file is replaced by a rename, never written
in place.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from agent.errors import UserError
from agent.home import Home, read_sealed, write_sealed

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
    return _read(home.serving_json)


def write_served(home: Home, served: Served) -> None:
    """Choose what every later start serves."""
    write_sealed(home.serving_json, asdict(served))


def read_slot(home: Home, slot: str) -> Served:
    """What the engine of one slot loads: the champion in the active slot, else the slot's own."""
    champion = read_served(home)
    return champion if champion.slot == slot else _read(home.slot_json(slot))


def write_slot(home: Home, served: Served) -> None:
    """Choose what an engine beside the active one loads."""
    write_sealed(home.slot_json(served.slot), asdict(served))


def _read(path: Path) -> Served:
    try:
        return Served(**read_sealed(path))
    except FileNotFoundError:
        raise UserError(f"{path.name}: no version was chosen to serve in {path.parent}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: is not a served version: {error}") from None
