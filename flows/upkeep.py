"""What a service does by itself between flows: settle what disagrees, bake, catch up."""

import logging
from collections.abc import Callable
from typing import Any

from flows.baking import bake
from flows.catch_up import catch_up
from flows.reconcile import disagreements, repair
from flows.session import Session

LOG = logging.getLogger("anchorage.upkeep")


def poll(session: Session, settle: Callable[[], Any] | None = None) -> None:
    """One look, after which all agree, as far as everything needed can be reached.

    Args:
        session: The home's parts.
        settle: How disagreements are settled; by default here.
    """
    service = session.service

    def reconcile() -> None:
        if disagreements(service):
            settle() if settle else repair(session)

    def judge_fresh() -> None:
        if service.ledger.unsettled() is not None:
            bake(session)

    _each("reconcile", reconcile)
    _each("baking", judge_fresh)
    _each("MLflow", lambda: catch_up(service))


def _each(what: str, act: Callable[[], Any]) -> None:
    """The boundary of one duty: what fails is tried again at the next look, the others go on."""
    try:
        act()
    except Exception as error:
        LOG.warning("%s: %s", what, error)
