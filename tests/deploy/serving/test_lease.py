"""The lease: one holder, a deadline, and nobody who lost it writes anything."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import UserError
from agent.home import Home
from deploy.serving.lease import Lease, LeaseLostError, Leases
from deploy.serving.served import Served

OLD, NEW = Served("a" * 64, "/old"), Served("b" * 64, "/new")


@pytest.fixture
def leases(tmp_path: Path) -> Leases:
    return Leases(Home.at(tmp_path))


def begin(leases: Leases, now: float = 100.0) -> Lease:
    return leases.begin(OLD, NEW, lease_s=10.0, now=now, engine_pid=7)


def test_what_was_written_is_read(leases: Leases) -> None:
    lease = begin(leases)
    assert leases.current() == lease
    assert (lease.deadline, lease.phase, lease.engine_pid) == (110.0, "held", 7)
    leases.end(lease)
    assert leases.current() is None


def test_only_one_holds_it(leases: Leases) -> None:
    begin(leases)
    with pytest.raises(UserError, match="bbbbbbbbbbbb"):
        begin(leases)
    with pytest.raises(UserError):
        begin(leases, now=500.0)  # overdue: the watchdog settles it first


LATE: list[Callable[[Leases, Lease, float], object]] = [
    lambda leases, lease, now: leases.check(lease, now),
    lambda leases, lease, now: leases.advance(lease, "loading", now),
    lambda leases, lease, now: leases.renew(lease, now),
]


@pytest.mark.parametrize("act", LATE)
def test_nothing_is_allowed_at_or_after_the_deadline(
    leases: Leases, act: Callable[[Leases, Lease, float], object]
) -> None:
    lease = begin(leases)
    act(leases, lease, 109.9)
    lease = leases.advance(lease, "held", 109.0)
    late = lease.deadline if act is not LATE[2] else 125.0
    with pytest.raises(LeaseLostError):
        act(leases, lease, late)


@pytest.mark.parametrize("act", LATE)
def test_a_taken_lease_is_lost_even_before_its_new_deadline(
    leases: Leases, act: Callable[[Leases, Lease, float], object]
) -> None:
    lease = begin(leases)
    taken = leases.take(110.0)
    assert taken is not None
    with pytest.raises(LeaseLostError):
        act(leases, lease, 110.5)
    with pytest.raises(LeaseLostError):
        leases.end(lease)
    assert leases.current() == taken
    leases.end(taken)


def test_the_watchdog_takes_only_what_is_due(leases: Leases) -> None:
    assert leases.take(100.0) is None
    begin(leases)
    assert leases.take(109.9) is None
    assert leases.take(110.0) is not None
    assert leases.take(119.9) is None
    assert leases.take(120.0) is not None  # a watchdog that died in its work is followed


def test_a_loser_writes_nothing(leases: Leases) -> None:
    lease = begin(leases)
    leases.take(200.0)
    written: list[str] = []
    with pytest.raises(LeaseLostError):
        leases.advance(lease, "stamped", 200.0, lambda: written.append("serving.json"))
    assert written == []


def test_a_write_that_fails_leaves_the_phase(leases: Leases) -> None:
    lease = begin(leases)

    def full() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        leases.advance(lease, "stamped", 101.0, full)
    assert leases.current() == lease


@settings(deadline=None)
@given(now=st.floats(0, 1e10), lease_s=st.floats(0.1, 3600), later=st.floats(-1e5, 1e5))
def test_expiry_survives_a_clock_that_is_set_back(now: float, lease_s: float, later: float) -> None:
    """Due at the deadline; also when the clock says a time long before the lease was taken."""
    lease = Lease("x", "held", now + lease_s, lease_s, OLD, NEW, None)
    at = now + later
    assert lease.expired(at) == (at >= lease.deadline or at < lease.deadline - 2 * lease_s)
    assert not lease.expired(now + lease_s / 2) or lease_s < 1e-5 * now


@pytest.mark.parametrize("left", ["", "\0" * 200])
def test_a_file_that_a_power_cut_emptied_is_no_lease(tmp_path: Path, left: str) -> None:
    (tmp_path / "swap.json").write_text(left)
    leases = Leases(Home(tmp_path))
    assert leases.current() is None
    assert leases.take(now=1.0) is None
