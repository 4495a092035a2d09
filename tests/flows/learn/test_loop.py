"""A loop that ends between its verdict and what follows: whoever watches does it, nobody else."""

from contextlib import suppress
from typing import Any

import pytest

from deploy.serving.served import Served, write_served
from flows.learn import loop
from flows.learn.weigh import weigh
from flows.serve import promote
from flows.serve.reconcile import poll
from flows.session import Session

pytestmark = pytest.mark.proof


class Killed(BaseException):
    """As a signal is: nothing in between catches it."""


def killed_after_its_verdict(session: Session, serve: bool) -> str:
    """A candidate that passed, and nobody acted on it; meanwhile somebody watched."""
    service = session.service
    write_served(service.home, Served(service.origin.digest, str(service.origin.directory)))
    learnt = loop.learn(session, "gsm8k")
    assert loop.learn(session, "gsm8k") == learnt, "it is judged before another round begins"

    def weighed() -> dict[str, Any]:
        weigh(session, learnt.run_id, serve=serve)
        poll(session)
        assert service.ledger.state(learnt.digest) == "PASSED", "left to the loop, which lives"
        raise Killed

    with suppress(Killed):
        loop.conclude(session, learnt.digest, weighed, dict)
    return learnt.digest


@pytest.mark.parametrize(
    ("serve", "mode", "state"),
    [(True, "auto", "CHAMPION"), (False, "auto", "PASSED"), (True, "manual", "AWAIT_REVIEW")],
)
def test_a_verdict_that_its_loop_did_not_live_to_carry_out_is_carried_out(
    planted: Any, serve: bool, mode: str, state: str
) -> None:
    """In another process, without anybody's act; what was learnt by hand is a person's to serve."""
    more = {"review": {"mode": mode}, "baking": {"minutes": 0}}
    with_verdict = killed_after_its_verdict(planted("home", **more), serve)
    session = planted("home")
    before = session.service.champion()
    poll(session)
    assert session.service.ledger.state(with_verdict) == state
    served = session.service.champion()
    assert served == (with_verdict if state == "CHAMPION" else before)
    rows = session.service.ledger.history()
    poll(session)
    assert session.service.ledger.history() == rows
    session.service.ledger.verify()


def test_a_verdict_beside_another_champion_than_todays_is_history(planted: Any) -> None:
    session = planted("home", baking={"minutes": 0})
    digest = killed_after_its_verdict(session, serve=True)
    assert promote.is_owed(session.service, digest, "PASSED")
    other = killed_after_its_verdict(session, serve=True)
    promote.promote(session, other)
    assert not promote.is_owed(session.service, digest, "PASSED")
