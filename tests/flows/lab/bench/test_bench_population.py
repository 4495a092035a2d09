"""The population's bench: its arithmetic, and a turn on planted engines beside a known rate."""

from collections.abc import Callable
from multiprocessing import Pipe
from threading import Thread
from typing import Any

import psutil
import pytest

from flows.lab.bench.population import (
    PopulationBench,
    _company,
    medians,
    one_turn,
    population_table,
)
from flows.session import Session

TOKENS = {"tokens": 9, "plain_tokens": 8}
TURNS = [
    {"render": 0.1, "update": 0.1, "member": 2.0, "read": 1.0, "plain": 1.8} | TOKENS,
    {"render": 0.2, "update": 0.2, "member": 4.0, "read": 1.0, "plain": 4.0} | TOKENS,
    {"render": 0.1, "update": 0.0, "member": 1.0, "read": 1.0, "plain": 3.0} | TOKENS,
]


def test_ratios_are_taken_turn_by_turn() -> None:
    case = medians(TURNS)
    assert case["member_s"] == 2.0
    assert case["ratio"] == 1.0  # of 0.9, 1 and 3; of the medians it would be 1.5
    assert case["read_ratio"] == 3.0
    assert (case["tokens"], case["plain_tokens"]) == (9, 8)
    assert case["weight_share"] == pytest.approx(0.1)
    document = {"target": "t", "prompts": 1, "members": 1, "busy": 0}
    drawn = population_table(document | {"cases": [{"shots": 0} | case]})
    assert drawn.row_count == 1
    assert "busy" not in str(drawn.title)


def test_company_computes_and_ends() -> None:
    def children() -> list[psutil.Process]:
        return [each for each in psutil.Process().children() if "while True" in str(each.cmdline())]

    with _company(2):
        others = children()
        assert len(others) == 2
    assert not [each for each in others if each.is_running()]


@pytest.mark.proof
def test_a_turn_asks_both_the_same_prompts(planted: Callable[..., Session]) -> None:
    session = planted()
    service, population = session.service, session.population
    population.open(service.anchor.directory)
    task = service.task("gsm8k")
    rows = service.rows("gsm8k", "train", 3)
    prompts = [task.messages(row) for row in rows]
    near, far = Pipe()
    arrived: list[Any] = []

    def plain() -> None:
        arrived.append(far.recv())
        far.send((0.25, 9))

    thread = Thread(target=plain)
    thread.start()
    turn = one_turn(PopulationBench("gsm8k", members=4), task, population, near, (rows, prompts))
    thread.join()
    assert arrived == [prompts]
    assert (turn["render"], turn["plain"]) == (0.5, 0.25)
    assert turn["tokens"] == turn["plain_tokens"] == 9  # 3 a planted answer
    assert turn["member"] > turn["update"] > 0
