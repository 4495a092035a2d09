"""The experience store: what it keeps, what it forgets, and that its schema grows by steps."""

import asyncio
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, func, insert, select, text
from sqlalchemy.exc import IntegrityError

from agent.errors import UserError
from agent.gateway.errors import ApiError
from agent.gateway.keys import KeyStore
from agent.store import feedback
from agent.store.experience import Answer, ExperienceStore, Interaction, Judgement
from agent.store.experience_db import (
    METADATA,
    answers,
    forgotten,
    interactions,
    migrate,
    rounds_used,
)
from agent.store.feedback import Feedback, FeedbackRefusedError, LateRow, keep_row
from agent.store.forget import RoundUse, expire, forget, rounds_of
from agent.store.seals import damaged, damaged_of, drop_damaged

A, B = "a" * 64, "b" * 64
SECRET = "the-text-nobody-may-find-again"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ExperienceStore]:
    opened = ExperienceStore.open(tmp_path / "experience.db")
    yield opened
    opened.close()


def interaction(number: int, **options: Any) -> Interaction:
    defaults: dict[str, Any] = {
        "inference_id": f"i{number}",
        "created": float(number),
        "endpoint": "chat.completions",
        "model": "tiny",
        "version": A,
        "principal": "ann",
        "status": "ok",
        "latency_s": 0.1,
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "task": "gsm8k",
        "source": "submitted",
        "example": "{}",
        "prompt": f"[{number}]",
        "prompt_hash": f"p{number}",
        "row_hash": f"r{number}",
        "group_hash": f"g{number}",
        "answers": (Answer(0, f"answer {number}", "stop"),),
    }
    return Interaction(**(defaults | options))


def judged(number: int, reward: float | None, **options: Any) -> Judgement:
    fields = {"judged": 100.0 + number, "reward": reward, "format": 1.0} | options
    return Judgement(f"i{number}", 0, **fields)


def fill(store: ExperienceStore, count: int, **options: Any) -> None:
    store.record(interaction(i, **options) for i in range(count))
    store.judge(judged(i, float(i % 2)) for i in range(count))


def size(store: ExperienceStore, table: Any) -> int:
    with store.engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def test_what_is_recorded_and_judged_is_read_back(store: ExperienceStore) -> None:
    fill(store, 4)
    rows = store.rows("gsm8k", since=0.0)
    assert [(r.inference_id, r.reward) for r in rows] == [("i1", 1.0), ("i2", 0.0), ("i3", 1.0)]
    assert [r.inference_id for r in store.rows("gsm8k", since=1.0, until=2.0)] == ["i2"]
    assert store.rows("countdown") == []
    earned = [("i1", 1.0), ("i2", 0.0), ("i3", 1.0)]
    assert store.earned(A) == [(ident, "gsm8k", value, "ann") for ident, value in earned]
    assert store.earned(A, since=1.0, until=2.0) == [("i2", "gsm8k", 0.0, "ann")]
    assert [row.inference_id for row in store.earned(A, newest=2)] == ["i2", "i3"]
    assert store.earned(B) == []


def test_an_error_is_no_reward(store: ExperienceStore) -> None:
    store.record([interaction(1)])
    store.judge([judged(1, None, error="KeyError", format=None)])
    assert store.rows("gsm8k") == []
    assert store.earned(A) == []
    assert [r.error for r in store.rewards("ann")] == ["KeyError"]


def test_the_first_verdict_stands(store: ExperienceStore) -> None:
    store.record([interaction(1)])
    store.judge([judged(1, 1.0)])
    store.judge([judged(1, 0.0)])
    assert [r.reward for r in store.rows("gsm8k")] == [1.0]


def test_what_has_no_verdict_can_be_found(store: ExperienceStore) -> None:
    store.record([interaction(1), interaction(2, task=None), interaction(3, status="cancelled")])
    store.record([interaction(9)])
    (orphan,) = store.unjudged(before=5.0)
    assert (orphan.inference_id, orphan.completion, orphan.version) == ("i1", "answer 1", A)


def test_a_batch_is_written_whole_or_not_at_all(store: ExperienceStore) -> None:
    with pytest.raises(IntegrityError):
        store.record([interaction(1), interaction(1)])
    assert size(store, interactions) == 0


def test_text_of_any_kind_survives_but_for_nul(store: ExperienceStore) -> None:
    text = "ünï \u2028 𝄞 '; DROP TABLE answers; -- \0"
    store.record([interaction(1, answers=(Answer(0, text, "stop"),))])
    with store.engine.connect() as connection:
        kept = connection.execute(select(answers.c.completion)).scalar_one()
    assert kept == text.replace("\0", "\ufffd")


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    stores = [ExperienceStore.open(tmp_path / "experience.db") for _ in range(4)]

    def write(store: ExperienceStore, start: int) -> None:
        for i in range(start, start + 25):
            store.record([interaction(i)])

    threads = [
        threading.Thread(target=write, args=(store, 100 * n)) for n, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert size(stores[0], interactions) == 100
    for store in stores:
        store.close()


def test_the_file_is_its_owners_alone(tmp_path: Path, store: ExperienceStore) -> None:
    fill(store, 1)
    for path in tmp_path.glob("experience.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_round_names_its_rows_and_the_weights_it_made(store: ExperienceStore) -> None:
    fill(store, 3)
    store.record([interaction(7, principal="bob")])
    store.judge([judged(7, 1.0)])
    rows = store.rows("gsm8k")
    store.use("round-1", "train", rows)
    store.use("round-1", "selection", rows[:1])
    store.name_candidate("round-1", B)
    with pytest.raises(IntegrityError):
        store.use("round-1", "train", rows)
    assert rounds_of(store, "bob") == (RoundUse("round-1", B, "train", (2,)),)
    assert rounds_of(store, "ann") == (
        RoundUse("round-1", B, "train", (0, 1)),
        RoundUse("round-1", B, "selection", (0,)),
    )


def test_forgetting_removes_a_principal_and_names_the_rounds(
    tmp_path: Path, store: ExperienceStore
) -> None:
    secret = (Answer(0, SECRET, "stop"),)
    store.record([interaction(1, prompt=SECRET, answers=secret), interaction(2, principal="bob")])
    store.judge([judged(1, 1.0, extracted=SECRET), judged(2, 1.0)])
    store.use("round-1", "train", store.rows("gsm8k"))
    feedback.add(store, Feedback("f", "i1", "ann", "m", 1.0, {}, rationale=SECRET), 1.0)
    opinion = Feedback("g", "i1", "eve", "m", 1.0, {}, rationale=SECRET)
    feedback.add(store, opinion, 1.0, any_owner=True)
    gone = forget(store, "ann", now=5.0)
    assert (gone.interactions, gone.feedback) == (1, 2)
    assert gone.rounds == (RoundUse("round-1", None, "train", (0,)),)
    assert store.rewards("ann") == []
    assert [row.principal for row in store.rows("gsm8k")] == ["bob"]
    assert (size(store, interactions), size(store, answers)) == (1, 1)
    assert (size(store, feedback.feedback), size(store, rounds_used)) == (0, 1)
    for path in tmp_path.glob("experience.db*"):
        assert SECRET.encode() not in path.read_bytes(), path
    with store.engine.connect() as connection:
        tombstone = connection.execute(select(forgotten)).one()
    assert "round-1" in tombstone.rounds
    assert "ann" not in str(tombstone)
    assert forget(store, "nobody", now=6.0).interactions == 0


def test_what_is_too_old_expires_with_its_feedback(tmp_path: Path, store: ExperienceStore) -> None:
    fill(store, 4, prompt=SECRET)
    for number in (0, 3):
        feedback.add(store, Feedback(f"f{number}", f"i{number}", "ann", "m", 1.0, {}), 9.0)
    assert expire(store, before=3.0) == 3
    assert [r.inference_id for r in store.rows("gsm8k")] == ["i3"]
    assert feedback.of(store, "i0") == []
    assert len(feedback.of(store, "i3")) == 1
    assert expire(store, before=3.0) == 0


def test_feedback_never_weighs_anything(store: ExperienceStore) -> None:
    fill(store, 1)
    feedback.add(store, Feedback("f", "i0", "ann", "m", 1.0, {}), 1.0)
    row = dict(feedback.of(store, "i0")[0]) | {"id": 99, "feedback_id": "h", "weight": 1.0}
    with pytest.raises(IntegrityError), store.writing() as connection:
        connection.execute(insert(feedback.feedback), row)


def test_feedback_may_come_late_but_not_after_deletion(store: ExperienceStore) -> None:
    fill(store, 1)
    late = Feedback("f", "i0", "ann", "m", 0.0, {})
    assert feedback.add(store, late, now=1e9)
    assert not feedback.add(store, late, now=2e9)
    forget(store, "ann", now=3e9)
    with pytest.raises(FeedbackRefusedError) as caught:
        feedback.add(store, late, now=4e9)
    assert caught.value.reason == "unknown_inference"


@pytest.mark.parametrize(
    "where", ["mysql://x/y", "nonsense://", "sqlite://", "sqlite:///:memory:", "a://b://c"]
)
def test_other_databases_are_refused(where: str) -> None:
    with pytest.raises(UserError, match="allowed"):
        ExperienceStore.open(where)


def difference(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, METADATA))


def test_the_steps_lead_to_the_tables_the_code_uses(store: ExperienceStore) -> None:
    assert difference(store.engine) == []


def test_an_old_database_is_brought_up_with_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    engine = create_engine(f"sqlite:///{path}")
    migrate(engine, to="0001")
    assert difference(engine) != []
    with engine.begin() as connection:  # as its own program wrote them, without seals
        for number in range(3):
            row = asdict(interaction(number))
            del row["answers"]
            connection.execute(insert(interactions).values(row))
            answer = {"interaction_id": number + 1, "choice": 0, "completion": "a"}
            connection.execute(insert(answers).values(**answer, reward=1.0, judged=1.0))
    engine.dispose()
    opened = ExperienceStore.open(path)
    assert difference(opened.engine) == []
    assert [row.inference_id for row in opened.rows("gsm8k")] == ["i1", "i2"]
    assert damaged(opened.engine) == []
    opened.close()


CHANGES = [  # as a flipped bit leaves them
    "UPDATE interactions SET prompt = '[3]' WHERE inference_id = 'i1'",
    "UPDATE interactions SET example = '{ }' WHERE inference_id = 'i1'",
    "UPDATE interactions SET principal = 'aon' WHERE inference_id = 'i1'",
    "UPDATE interactions SET version = 'q' || substr(version, 2) WHERE inference_id = 'i1'",
    "UPDATE interactions SET created = created * 2 WHERE inference_id = 'i1'",
    "UPDATE interactions SET prompt = CAST(prompt AS BLOB) WHERE inference_id = 'i1'",
    "UPDATE interactions SET prompt = CAST(x'5bff5d' AS TEXT) WHERE inference_id = 'i1'",
    "UPDATE interactions SET prompt_tokens = 1027 WHERE inference_id = 'i1'",
    "UPDATE answers SET reward = 0.5 WHERE interaction_id = 2",
    "UPDATE answers SET reward = NULL WHERE interaction_id = 2",
    "UPDATE answers SET completion = 'answes 1' WHERE interaction_id = 2",
    "UPDATE answers SET interaction_id = 4, choice = 1 WHERE interaction_id = 2",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_that_was_changed_is_neither_learnt_nor_judged_by(
    store: ExperienceStore, change: str
) -> None:
    fill(store, 5)
    assert damaged(store.engine) == []
    with store.writing() as connection:
        connection.execute(text(change))
    assert {row.inference_id for row in store.rows("gsm8k")} == {"i2", "i3", "i4"}
    assert all(row.choice == 0 for row in store.rows("gsm8k"))
    assert "i1" not in {row.inference_id for row in store.earned(A)}
    assert len(store.rewards(None)) == 4
    [(table, _)] = damaged(store.engine)
    assert table.name in change
    store.judge([judged(1, 1.0)])  # a later word on it makes it no whole row
    store.name_candidate("r", B)
    assert len(damaged(store.engine)) == 1
    drop_damaged(store.engine)
    assert damaged(store.engine) == []
    assert {row.inference_id for row in store.rows("gsm8k")} == {"i2", "i3", "i4"}


def test_damage_is_told_with_whose_row_it_is(store: ExperienceStore) -> None:
    fill(store, 4)
    with store.writing() as connection:
        connection.execute(text("UPDATE interactions SET prompt = 'x' WHERE id > 2"))
    assert damaged_of(store.engine, "gsm8k", 0.0) == [("ann", 2)]
    assert damaged_of(store.engine, "piqa", 0.0) == []


def test_every_way_of_writing_leaves_whole_rows(store: ExperienceStore) -> None:
    """Numbers of another type than their column's, late rows, rounds, opinions, deletion."""
    store.record([interaction(1, created=1, latency_s=2, task=None, row_hash=None, example=None)])
    late = LateRow("i1", "ann", "gsm8k", '{"q": "\u20ac"}', "r1")
    [item] = keep_row(store, late)
    store.judge([Judgement(item.inference_id, 0, judged=7, reward=1, format=0)])
    store.use("1-r", "train", store.rows("gsm8k"))
    store.name_candidate("1-r", B)
    feedback.add(store, Feedback("f", "i1", "ann", "helpful", 1, {"a": "b"}), now=8)
    keys_of = KeyStore(store)
    kept, gone = keys_of.create_key("ann", ["infer"]), keys_of.create_key("bob", ["infer"])
    keys_of.revoke(gone.key_id)
    assert damaged(store.engine) == []
    assert [row.reward for row in store.rows("gsm8k")] == [1.0]
    forget(store, "ann", now=9)
    assert damaged(store.engine) == []
    assert {row["owner"] for row in keys_of.list_keys()} == {"(forgotten)", "bob"}
    assert {row["key_id"] for row in keys_of.list_keys()} == {kept.key_id, gone.key_id}


def test_a_damaged_key_admits_nobody_and_ends(store: ExperienceStore) -> None:
    keys_of = KeyStore(store)
    token = keys_of.create_key("ann", ["infer"]).token
    assert asyncio.run(keys_of.principal(f"Bearer {token}")).scopes == {"infer"}
    with store.writing() as connection:
        connection.execute(text("UPDATE keys SET scopes = 'admin'"))
    with pytest.raises(ApiError, match="key"):
        asyncio.run(KeyStore(store).principal(f"Bearer {token}"))
    drop_damaged(store.engine)
    assert damaged(store.engine) == []
    [row] = keys_of.list_keys()  # it stays: a database that had a key is not open again
    assert row["revoked"] is not None


@pytest.mark.parametrize("trial", range(10))
def test_all_who_open_a_new_file_at_once_succeed(tmp_path: Path, trial: int) -> None:
    together = threading.Barrier(6)

    def begin(_: int) -> ExperienceStore:
        together.wait()
        return ExperienceStore.open(tmp_path / "new.db")

    with ThreadPoolExecutor(6) as pool:
        for store in pool.map(begin, range(6)):
            store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["new.db"]


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    store = ExperienceStore.open(f"sqlite:///{tmp_path}/deep/er/experience.db")
    store.close()
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["experience.db"]
