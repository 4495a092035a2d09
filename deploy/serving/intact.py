"""What an engine may load: the chosen version, if its files hold it; else rebuilt; else the anchor.

An engine that starts on changed weights would answer under a version that it does not have. So
the files are hashed before vLLM reads them and again before anybody is answered; what differs is
written anew from the anchor and the journal. Where that fails the anchor is served, and the
gateway is told so first.
"""

import logging
from pathlib import Path

from agent.config import Settings, kept
from agent.errors import UserError
from agent.home import Home
from agent.store.anchor import Anchor
from agent.store.journal import Journal
from agent.store.ledger import Ledger
from agent.store.replay import rebuild
from agent.store.weights import require
from deploy.model import resolve
from deploy.serving.control import ControlError, GatewayControl
from deploy.serving.lease import Leases
from deploy.serving.served import Served, read_served, read_slot, write_served

LOG = logging.getLogger("anchorage.engine")


def intact(home: Home, slot: str) -> Served:
    """What the engine of a slot loads now, checked; mended or replaced where it is damaged.

    Raises:
        UserError: Neither it nor the anchor can be served, or a swap decides what is.
    """
    served = read_slot(home, slot)
    try:
        require(Path(served.directory), served.digest)
    except UserError as damage:
        LOG.error("%s: %s", served.digest[:12], damage)
        return _mended(home, served, damage)
    return served


def _mended(home: Home, served: Served, damage: UserError) -> Served:
    """The same version rebuilt, else the anchor; raises the damage where there is no other."""
    anchor = Anchor.open(resolve(_settings(home, damage).model, home.models))
    if served.directory == str(anchor.directory):
        raise damage
    try:
        mend(home, served.digest, anchor)
    except UserError as error:
        LOG.error("%s: cannot be rebuilt: %s", served.digest[:12], error)
    else:
        LOG.warning("%s: rebuilt from the anchor and the journal", served.digest[:12])
        return served
    active = read_served(home).slot == served.slot
    swapping = Leases(home).current() is not None  # whoever swaps goes back by itself
    if swapping or not active or not _known(home, anchor.digest):
        raise damage
    return _fall_back(home, Served(anchor.digest, str(anchor.directory), served.slot))


def _known(home: Home, digest: str) -> bool:
    """Whether the ledger began with this model; one that was lost with its file cannot say no."""
    ledger = Ledger(home.state_db)
    try:
        return ledger.champion() is None or any(e.state == "ANCHOR" for e in ledger.of(digest))
    finally:
        ledger.close()


def mend(home: Home, digest: str, origin: Anchor) -> Path:
    """Rebuild a kept version from the anchor it was learnt from, which may be a kept one itself.

    Raises:
        UserError: The journal does not lead to it, or its own anchor is damaged for good.
    """
    journal = Journal(home.state_db)
    try:
        tied = journal.candidate(digest).anchor_digest
        anchor = origin if tied == origin.digest else Anchor.open(home.weights / tied)
        if anchor.digest != tied:
            anchor = Anchor.open(mend(home, tied, origin))
        directory = rebuild(journal, anchor, digest, home)
    finally:
        journal.close()
    require(directory, digest)
    return directory


def _fall_back(home: Home, served: Served) -> Served:
    """Serve the anchor from now on; the gateway's stamp changes before the engine answers.

    A gateway that does not run reads serving.json when it starts. The ledger is told by whoever
    reconciles: it names a champion that cannot be served.
    """
    require(Path(served.directory), served.digest)
    write_served(home, served)
    try:
        with GatewayControl.at(home.admin_socket) as gateway:
            gateway.flip(served.digest, home.engine_socket(served.slot))
    except ControlError as error:
        if home.admin_socket.exists() and "HTTP" in str(error):
            raise UserError(f"the gateway keeps its version: {error}") from None
        LOG.warning("gateway: %s", error)
    LOG.error("the anchor %s is served instead", served.digest[:12])
    return served


def _settings(home: Home, damage: UserError) -> Settings:
    try:
        return kept(home)
    except FileNotFoundError:
        raise damage from None
