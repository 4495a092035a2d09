"""The experience store: what it keeps, what it forgets, and that its schema grows by steps."""

import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, func, insert, select
from sqlalchemy.exc import IntegrityError

from agent.errors import UserError
from agent.store import feedback
from agent.store.experience import Answer, ExperienceStore, Interaction, Judgement
from agent.store.experience_db import (
    METADATA,
    answers,
    forgotten,
    interactions,
    migrate,
    open_engine,
    rounds_used,
)
from agent.store.feedback import Feedback, FeedbackRefusedError
from agent.store.forget import RoundUse, expire, forget, rounds_of

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
    assert store.earned(A) == [("i1", "gsm8k", 1.0), ("i2", "gsm8k", 0.0), ("i3", "gsm8k", 1.0)]
    assert store.earned(A, since=1.0, until=2.0) == [("i2", "gsm8k", 0.0)]
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
    store.use("round-1", "gate", rows[:1])
    store.name_candidate("round-1", B)
    with pytest.raises(IntegrityError):
        store.use("round-1", "train", rows)
    assert rounds_of(store, "bob") == (RoundUse("round-1", B, "train", (2,)),)
    assert rounds_of(store, "ann") == (
        RoundUse("round-1", B, "train", (0, 1)),
        RoundUse("round-1", B, "gate", (0,)),
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
    old = ExperienceStore(engine)
    fill(old, 3)
    engine.dispose()
    opened = open_engine(path)
    assert difference(opened) == []
    assert len(ExperienceStore(opened).rows("gsm8k")) == 2
    opened.dispose()


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
