"""The plan: every member once, no idle engine, nothing lost when engines break."""

from collections.abc import Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.population.schedule import (
    Assign,
    Event,
    Failed,
    Finished,
    Joined,
    NoEngineError,
    agreed,
    plan,
)

Plan = Generator[tuple[Assign, ...], Event, tuple[Failed, ...]]


class Drive:
    """Plays engines: keeps what runs, and checks at every yield what the plan promises."""

    def __init__(self, decisions: Plan, members: int, engines: int):
        self.decisions, self.waiting = decisions, members
        self.free, self.busy = set(range(engines)), dict[int, int]()
        self.away = set[int]()
        self.finished: list[int] = []
        self.survived: tuple[Failed, ...] | None = None
        self.take(next(decisions))

    def take(self, starts: tuple[Assign, ...]) -> None:
        """Start what the plan says; afterwards no engine may be free while a member waits."""
        for assign in starts:
            assert assign.engine in self.free
            self.free.remove(assign.engine)
            self.busy[assign.engine] = assign.member
            self.waiting -= 1
        assert not self.free or not self.waiting

    def send(self, event: Event) -> None:
        """Tell the plan what happened."""
        member = self.busy.pop(event.engine, None)
        if isinstance(event, Failed):
            self.free.discard(event.engine)
            self.waiting += member is not None
            (self.away.add if event.mending else self.away.discard)(event.engine)
        else:
            self.free.add(event.engine)
            self.away.discard(event.engine)
            if isinstance(event, Finished) and member is not None:
                self.finished.append(member)
        try:
            self.take(self.decisions.send(event))
        except StopIteration as stop:
            self.survived = stop.value


@given(
    members=st.integers(1, 12),
    engines=st.integers(1, 5),
    script=st.lists(st.tuples(st.integers(0, 99), st.sampled_from("ffffxmj")), max_size=60),
)
def test_every_member_is_evaluated_once_and_no_engine_waits(
    members: int, engines: int, script: list[tuple[int, str]]
) -> None:
    drive = Drive(plan(range(members), range(engines), tries=99), members, engines)
    failed = 0
    for pick, what in script:
        if drive.survived is not None or not (drive.busy or drive.away):
            break
        pool = sorted(drive.away) if what == "j" and drive.away else sorted(drive.busy)
        if not pool:
            continue
        number = pool[pick % len(pool)]
        if number in drive.away:
            drive.send(Joined(number))
        elif what == "m" or (what == "x" and len(drive.busy) + len(drive.away) > 1):
            failed += 1
            drive.send(Failed(number, "broke", mending=what == "m"))
        else:
            drive.send(Finished(number))
    while drive.survived is None:
        number = min(drive.busy or drive.away)
        drive.send(Finished(number) if number in drive.busy else Joined(number))
    assert sorted(drive.finished) == list(range(members))
    assert len(drive.survived) == failed


def test_a_failed_engine_gives_its_member_back_to_the_front() -> None:
    decisions = plan([10, 11, 12, 13], [0, 1])
    assert next(decisions) == (Assign(0, 10), Assign(1, 11))
    assert decisions.send(Failed(0, "killed")) == ()
    assert decisions.send(Finished(1)) == (Assign(1, 10),)
    assert decisions.send(Finished(1)) == (Assign(1, 12),)
    assert decisions.send(Joined(0)) == (Assign(0, 13),)


def test_a_free_engine_that_fails_is_not_used() -> None:
    decisions = plan([1, 2], [0, 1, 2])
    assert next(decisions) == (Assign(0, 1), Assign(1, 2))
    assert decisions.send(Failed(2, "lost while free")) == ()
    assert decisions.send(Failed(0, "killed")) == ()
    assert decisions.send(Finished(1)) == (Assign(1, 1),)


def test_no_engine_left_names_each_reason() -> None:
    decisions = plan([1, 2, 3], [0, 1])
    next(decisions)
    decisions.send(Failed(0, "out of memory"))
    with pytest.raises(NoEngineError, match=r"3 members wait.*0: out of memory; engine 1: killed"):
        decisions.send(Failed(1, "killed"))
    with pytest.raises(NoEngineError, match="none was given"):
        next(plan([1], []))


def test_an_engine_being_mended_is_waited_for() -> None:
    decisions = plan([1], [0])
    next(decisions)
    assert decisions.send(Failed(0, "killed", mending=True)) == ()
    assert decisions.send(Joined(0)) == (Assign(0, 1),)
    decisions.send(Failed(0, "killed", mending=True))
    with pytest.raises(NoEngineError, match="did not start"):
        decisions.send(Failed(0, "did not start"))


def test_a_member_that_breaks_every_engine_ends_the_plan() -> None:
    decisions = plan([1, 2], [0, 1, 2], tries=2)
    assert next(decisions) == (Assign(0, 1), Assign(1, 2))
    assert decisions.send(Failed(0, "crash")) == (Assign(2, 1),)
    with pytest.raises(NoEngineError, match="member 1 broke 2 engines: crash again"):
        decisions.send(Failed(2, "crash again"))


def test_nothing_to_do_is_done() -> None:
    with pytest.raises(StopIteration):
        next(plan([], [0]))


def test_agreement_is_the_majority_and_the_first_on_a_draw() -> None:
    assert agreed(["a", "b", "b"]) == "b"
    assert agreed(["b", "a"]) == "b"
    with pytest.raises(ValueError, match="one per engine"):
        agreed([])


def test_members_wait_for_an_engine_that_is_coming() -> None:
    decisions = plan(range(2), [], coming=[4])
    assert next(decisions) == ()
    assert decisions.send(Joined(4)) == (Assign(4, 0),)
    assert decisions.send(Joined(9)) == (Assign(9, 1),)  # one that nobody named
    gone = plan(range(2), [], coming=[4])
    next(gone)
    with pytest.raises(NoEngineError, match="2 members wait"):
        gone.send(Failed(4, "no place"))
