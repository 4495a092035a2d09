"""A round's rows follow from the traffic there was, not from when it came."""

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent.config import load
from agent.home import Home
from agent.store.experience import Answer, Interaction, Judgement
from agent.store.forget import rounds_of
from agent.store.intake import text_hash
from evaluators.task import Row
from flows.learn.collect import Collected, collect_rows, mark_used
from flows.service import Service

COUNT = 24
OWNERS = ("ann", "bob", "eve")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def service(root: Path) -> Service:
    home = Home.at(root)
    (home.root / "salt").write_text("a salt of tests")
    return Service(home, load(None, tasks={"rows": 40}))


def asked(row: Row, number: int, created: float) -> Interaction:
    """A request that names no known row: it brings its own."""
    text = json.dumps(dict(row))
    return Interaction(
        inference_id=f"i{random.getrandbits(60):x}",
        created=created,
        endpoint="chat.completions",
        model="anchorage",
        version="a" * 64,
        principal=OWNERS[number % len(OWNERS)],
        status="ok",
        latency_s=0.1,
        prompt_tokens=3,
        completion_tokens=5,
        task="gsm8k",
        source="submitted",
        example=text,
        prompt=json.dumps([{"role": "user", "content": f"asked {text}"}]),
        prompt_hash=text_hash(f"asked {text}"),
        row_hash=text_hash(text),
        group_hash=text_hash(f"group {text}"),
        answers=(Answer(0, "7", "stop"),),
    )


def fill(opened: Service, rows: Sequence[Row], order: Sequence[int]) -> None:
    """Record and judge these rows, one after another in this order."""
    begun = time.time() - len(order)
    for place, number in enumerate(order):
        request = asked(rows[number], number, begun + place)
        opened.experience.record([request])
        judged = Judgement(request.inference_id, 0, judged=begun + place, reward=1.0, format=1.0)
        opened.experience.judge([judged])


def collected(root: Path, order: Sequence[int], count: int = COUNT) -> tuple[Service, Collected]:
    opened = service(root)
    rows = opened.rows("gsm8k", "train", 8 * COUNT)[-2 * COUNT :]  # not those taken anyway
    fill(opened, rows, order)
    return opened, collect_rows(opened, "gsm8k", count)


@pytest.mark.parametrize("count", [COUNT, COUNT // 4])  # room for all traffic, and for a part
def test_equal_traffic_in_any_order_gives_equal_rounds(tmp_path: Path, count: int) -> None:
    order = list(range(COUNT)) * 2  # each row twice: the second is a duplicate
    _, one = collected(tmp_path / "one", order, count)
    _, other = collected(tmp_path / "other", order[::-1], count)
    assert one.rows == other.rows
    assert one.to_json() == other.to_json()
    assert [each.principal for each in one.traffic] == [each.principal for each in other.traffic]
    assert 0 < one.from_traffic <= count
    assert one.counts()["duplicates"] >= COUNT // 2  # those of rows in the other pools are theirs


def test_every_used_request_stands_where_its_row_does(tmp_path: Path) -> None:
    opened, told = collected(tmp_path, random.Random(1).sample(range(COUNT), COUNT))
    assert len(told.rows) == COUNT
    assert len(told.traffic) == told.from_traffic > 3
    keys = [opened.task("gsm8k").key(row) for row in told.rows[: told.from_traffic]]
    assert keys == sorted(keys)
    assert [json.loads(each.example or "") for each in told.traffic] == [
        dict(row) for row in told.rows[: told.from_traffic]
    ]
    mark_used(opened, "round", told)
    for owner in OWNERS:
        for use in rounds_of(opened.experience, owner):
            assert {told.traffic[place].principal for place in use.positions} == {owner}


def test_without_traffic_a_round_asks_the_tasks_own_rows(tmp_path: Path) -> None:
    opened = service(tmp_path)
    told = collect_rows(opened, "gsm8k", COUNT)
    assert list(told.rows) == opened.rows("gsm8k", "train", COUNT)
    assert (told.from_traffic, told.traffic) == (0, ())
