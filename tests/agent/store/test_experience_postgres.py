"""The experience store on a real PostgreSQL server: the same answers as on SQLite."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from postgres_server import needs_server
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

from agent.gateway.keys import KeyStore
from agent.store import feedback
from agent.store.experience import Answer, ExperienceStore, Interaction, Judgement
from agent.store.experience_db import METADATA
from agent.store.feedback import Feedback
from agent.store.forget import RoundUse, expire, forget, known, rounds_of

A, B = "a" * 64, "b" * 64

pytestmark = [pytest.mark.integration, needs_server]


@pytest.fixture
def store(url: str) -> Iterator[ExperienceStore]:
    opened = ExperienceStore.open(url)
    yield opened
    opened.close()


def interaction(number: int, principal: str = "ann") -> Interaction:
    return Interaction(
        inference_id=f"i{number}",
        created=1.7e9 + number / 7,
        endpoint="chat.completions",
        model="tiny",
        version=A,
        principal=principal,
        status="ok",
        latency_s=0.1,
        prompt_tokens=3,
        completion_tokens=5,
        task="gsm8k",
        source="known",
        example_id="x",
        prompt="[]",
        prompt_hash=f"p{number}",
        row_hash=f"r{number}",
        group_hash=f"g{number}",
        answers=(Answer(0, "ünï 𝄞 \0", "stop"),),
    )


def test_the_steps_lead_to_the_tables_the_code_uses(store: ExperienceStore) -> None:
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert list(compare_metadata(context, METADATA)) == []


def test_rows_verdicts_and_rounds_are_the_same_as_on_sqlite(
    store: ExperienceStore, tmp_path: Path
) -> None:
    other = ExperienceStore.open(tmp_path / "experience.db")
    told = []
    for each in (store, other):
        each.record(interaction(i, "ann" if i % 2 else "bob") for i in range(6))
        each.judge(Judgement(f"i{i}", 0, 1.7e9 + i / 3, i / 3, 1.0) for i in range(5))
        each.judge([Judgement("i0", 0, 2e9, 9.0, 9.0)])
        each.use("round", "train", each.rows("gsm8k"))
        each.name_candidate("round", B)
        first = (each.rows("gsm8k", since=1.7e9), each.rewards("ann", limit=2))
        live = each.earned(A, newest=3), each.answered(A), each.unjudged(before=2e9)
        gone = forget(each, "ann", now=2e9)
        told.append((first, live, gone, each.rows("gsm8k"), expire(each, 2e9)))
    assert told[0] == told[1]
    assert told[0][2].rounds == (RoundUse("round", B, "train", (1, 3)),)
    other.close()


def test_feedback_is_recorded_once_even_when_sent_at_the_same_moment(
    store: ExperienceStore,
) -> None:
    store.record([interaction(1)])
    outcomes: list[bool] = []

    def send() -> None:
        outcomes.append(feedback.add(store, Feedback("f", "i1", "ann", "m", 1.0, {}), 1.0))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 5 + [True]
    assert len(feedback.of(store, "i1")) == 1


def test_constraints_hold(store: ExperienceStore) -> None:
    with pytest.raises(IntegrityError):
        store.record([interaction(1), interaction(1)])
    assert store.unjudged(before=2e9) == []


def test_several_openings_at_once_migrate_once(url: str) -> None:
    opened: list[ExperienceStore] = []
    threads = [
        threading.Thread(target=lambda: opened.append(ExperienceStore.open(url))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    for store in opened:
        store.close()


def test_the_first_key_counts_also_when_it_is_made_between_two_statements(
    store: ExperienceStore,
) -> None:
    gateway = KeyStore(store, open_until_first=True)
    made: list[str] = []

    @event.listens_for(store.engine, "after_cursor_execute")
    def meanwhile(*_args: object) -> None:
        if not made:
            made.append("")
            made[0] = KeyStore(store).create_key("ann", {"infer"}).token

    asyncio.run(gateway.principal(None))
    assert asyncio.run(gateway.principal(f"Bearer {made[0]}")).owner == "ann"


@pytest.mark.parametrize(
    ("ask", "told"),
    [(known, True), (rounds_of, (RoundUse("round", B, "train", (0,)),))],
)
def test_what_a_principal_left_is_found_also_when_it_is_forgotten_between_two_statements(
    store: ExperienceStore, ask: Callable[[ExperienceStore, str], object], told: object
) -> None:
    store.record([interaction(1)])
    store.judge([Judgement("i1", 0, 1.7e9, 1.0, 1.0)])
    store.use("round", "train", store.rows("gsm8k"))
    store.name_candidate("round", B)
    statements: list[int] = []

    @event.listens_for(store.engine, "after_cursor_execute")
    def meanwhile(*_args: object) -> None:
        statements.append(1)
        if len(statements) == 1:
            forget(store, "ann", now=2e9)

    assert ask(store, "ann") == told
    assert ask(store, "ann") == told
