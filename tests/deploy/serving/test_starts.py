"""Engines that end while they start wait longer each time, and a person can end the wait."""

import os
from pathlib import Path

import pytest

from agent.home import Home
from deploy.serving import starts
from deploy.serving.served import BLUE, GREEN
from deploy.serving.starts import LONGEST_S, POLL_S, begin, failing, forget_starts, wait_s


class Clock:
    """Time that passes while one sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path)
    home.logs.mkdir()
    home.log(BLUE).write_text("RuntimeError: no memory\n")
    return home


def waited(home: Home, clock: Clock, slot: str = BLUE) -> float:
    """Seconds that a start in a process of its own waits."""
    before = clock.now
    child = os.fork()
    if child == 0:  # a process id of its own, as of a start by supervisord
        begin(home, slot, clock, clock.sleep)
        os._exit(int(clock.now - before))
    seconds = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    clock.now += seconds
    return seconds


def test_the_wait_doubles_up_to_a_bound() -> None:
    assert [wait_s(failed) for failed in range(6)] == [0.0, 0.0, 5.0, 10.0, 20.0, 40.0]
    assert wait_s(8) == LONGEST_S == 300.0
    assert wait_s(100_000) == LONGEST_S


def test_starts_that_never_answered_wait_longer_and_longer(home: Home) -> None:
    clock = Clock()
    assert [waited(home, clock) for _ in range(5)] == [0, 0, 5, 10, 20]
    assert waited(home, clock, GREEN) == 0  # the other slot is another engine
    [(slot, count)] = failing(home)
    assert (slot, count.begun, count.failed, count.since) == (BLUE, 5, 4, 1000.0)
    assert "4 starts ended before it answered" in count.text(slot)
    assert "wrote: RuntimeError: no memory" in count.text(slot)
    forget_starts(home, BLUE)  # it answered
    assert failing(home) == []
    assert waited(home, clock) == 0


def test_one_process_that_begins_again_is_one_start(home: Home) -> None:
    """After weights were rebuilt the engine's program begins again in the same process."""
    clock = Clock()
    for _ in range(4):
        begin(home, BLUE, clock, clock.sleep)
    count = starts.starts(home, BLUE)
    assert (clock.now, count and count.begun) == (1000.0, 1)


def test_removing_the_count_ends_the_wait(home: Home) -> None:
    clock = Clock()
    for _ in range(4):
        waited(home, clock)

    def mended(_seconds: float) -> None:
        forget_starts(home, BLUE)

    before = clock.now
    begin(home, BLUE, clock, mended)
    assert clock.now - before < POLL_S


def test_a_damaged_count_begins_again(home: Home) -> None:
    clock = Clock()
    for _ in range(4):
        waited(home, clock)
    home.starts_json(BLUE).write_text(home.starts_json(BLUE).read_text().replace("4", "9"))
    assert failing(home) == []
    assert waited(home, clock) == 0
