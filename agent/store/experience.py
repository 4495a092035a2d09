"""The experience store: interactions, their answers, and the rewards that verifiers gave them."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sqlalchemy import (
    BindParameter,
    Connection,
    Engine,
    Row,
    Select,
    bindparam,
    distinct,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)

from agent.store.database import BUSY_SECONDS
from agent.store.experience_db import (
    SEAL,
    answers,
    interactions,
    keys,
    open_engine,
    rounds_used,
    writing,
)
from agent.store.seals import (
    JOINED,
    insert_sealed,
    is_whole,
    joined,
    record_of,
    seal_of,
    update_sealed,
    whole_interactions,
)

Status = Literal["ok", "error", "cancelled"]
Source = Literal["known", "submitted"]
Pool = Literal["train", "selection"]
PLACE = ("round_id", "pool", "position", "inference_id", "principal")  # columns of rounds_used
SHADOW = "shadow"  # endpoint of an answer that its client never saw: it judges its version alone
SEEN = interactions.c.endpoint != SHADOW


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of an interaction; text is None where it was not to be kept."""

    choice: int
    completion: str | None
    finish: str | None
    tool_calls: str | None = None  # JSON


@dataclass(frozen=True, slots=True)
class Interaction:
    """One request that reached the engine, and who asked which version."""

    inference_id: str
    created: float  # unix seconds
    endpoint: str
    model: str
    version: str
    principal: str
    status: Status
    latency_s: float
    prompt_tokens: int
    completion_tokens: int
    response_id: str | None = None
    session_id: str | None = None
    task: str | None = None
    source: Source | None = None
    example_id: str | None = None
    example: str | None = None  # JSON object
    prompt: str | None = None  # JSON
    prompt_hash: str | None = None
    row_hash: str | None = None
    group_hash: str | None = None
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verifier's word on one answer, or why there is none (``error``).

    Both where the answer was judged and its row is not to be trained on.
    """

    inference_id: str
    choice: int
    judged: float
    reward: float | None = None
    format: float | None = None
    extracted: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ExperienceRow:
    """One verified answer, as collecting, baking and owners read it."""

    inference_id: str
    choice: int
    created: float
    version: str
    principal: str
    session_id: str | None
    task: str
    source: Source
    example_id: str | None
    example: str | None
    prompt: str | None
    prompt_hash: str
    row_hash: str
    group_hash: str
    reward: float | None
    format: float | None
    extracted: str | None
    error: str | None
    judged: float
    prompt_tokens: int = 0  # of the prompt as the engine counted it


@dataclass(frozen=True, slots=True)
class Unjudged:
    """An answer that asked for a reward and has none yet."""

    inference_id: str
    choice: int
    task: str
    example_id: str | None
    example: str | None
    completion: str
    version: str
    principal: str
    prompt: str | None = None  # JSON
    tool_calls: str | None = None  # JSON


class Turn(NamedTuple):
    """One request of a session."""

    principal: str
    session_id: str
    prompt: str  # JSON


class Found(NamedTuple):
    """Whose answer an id is, and which version gave it."""

    inference_id: str
    version: str
    principal: str


class Earned(NamedTuple):
    """One verified reward."""

    inference_id: str
    task: str
    reward: float
    principal: str


class VersionTraffic(NamedTuple):
    """One request as its engine ended it."""

    created: float
    status: Status
    latency_s: float
    principal: str


class ExperienceStore:
    """Owns one database; safe to use from several threads, and several processes on one file."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def open(cls, where: str | Path, wait_s: float = BUSY_SECONDS) -> "ExperienceStore":
        """From a file's path, or a ``sqlite:///`` or ``postgresql://`` URL; schema up to date."""
        return cls(open_engine(where, wait_s))

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def writing(self) -> AbstractContextManager[Connection]:
        """One write transaction."""
        return writing(self.engine)

    def record(self, batch: Iterable[Interaction]) -> None:
        """Insert interactions and their answers, all or none."""
        items = list(batch)
        choices = [
            (columns := _columns(answer))
            | {"owner": item.inference_id, SEAL: seal_of(answers, columns, item.inference_id)}
            for item in items
            for answer in item.answers
        ]
        with self.writing() as connection:
            insert_sealed(connection, interactions, [_columns(item) for item in items])
            if choices:
                owner = _id_of(bindparam("owner")).scalar_subquery()
                connection.execute(insert(answers).values(interaction_id=owner), choices)

    def judge(self, batch: Iterable[Judgement]) -> None:
        """Write verdicts; the first word on an answer stands."""
        with self.writing() as connection:
            for item in batch:
                owner, verdict = item.inference_id, _columns(item)
                del verdict["inference_id"], verdict["choice"]
                query = select(answers).where(
                    answers.c.interaction_id == _id_of(owner).scalar_subquery(),
                    answers.c.choice == item.choice,
                    answers.c.judged.is_(None),
                )
                row = connection.execute(query).mappings().first()
                if row is not None and is_whole(answers, row, owner):
                    verdict[SEAL] = seal_of(answers, {**row, **verdict}, owner)
                    open_still = (answers.c.id == row["id"]) & answers.c.judged.is_(None)
                    connection.execute(update(answers).where(open_still).values(verdict))

    def unjudged(self, before: float, limit: int = 1000) -> list[Unjudged]:
        """Answers older than ``before`` whose verdict never came: a process died in between."""
        query = (
            JOINED.where(interactions.c.task.is_not(None), interactions.c.status == "ok")
            .where(interactions.c.created < before)
            .where(interactions.c.row_hash.is_not(None))  # its row may still be on its way
            .where(answers.c.judged.is_(None), answers.c.completion.is_not(None))
            .order_by(interactions.c.id)
            .limit(limit)
        )
        return [record_of(Unjudged, row) for row in joined(self.engine, query)]

    def find(self, any_id: str) -> "Found | None":
        """By inference id, or by the answer's own id."""
        of = interactions.c
        query = select(of.inference_id, of.version, of.principal).order_by(of.id).limit(1)
        query = query.where(or_(of.inference_id == any_id, of.response_id == any_id))
        with self.engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else Found(*row)

    def rows(
        self, task: str, since: float = 0.0, until: float | None = None
    ) -> list[ExperienceRow]:
        """Verified answers of a task created in (since, until], oldest first; errors left out."""
        query = _verified().where(
            interactions.c.task == task, answers.c.reward.is_not(None), answers.c.error.is_(None)
        )
        query = query.where(interactions.c.created > since)
        if until is not None:
            query = query.where(interactions.c.created <= until)
        return [record_of(ExperienceRow, row) for row in joined(self.engine, query)]

    def turns(self, task: str, since: float = 0.0) -> list[Turn]:
        """Requests of sessions that named a task and were answered, with a reward or without."""
        found = interactions.c
        query = (
            select(interactions)
            .where(found.task == task, found.status == "ok", found.created > since, SEEN)
            .where(found.session_id.is_not(None), found.prompt.is_not(None))
        )
        return [record_of(Turn, row) for row in whole_interactions(self.engine, query)]

    def errors(self, task: str, since: float = 0.0) -> list[tuple[str, str, int]]:
        """(principal, error, interactions) of a task's answers created after ``since``."""
        count = func.count(distinct(interactions.c.id))
        query = (
            JOINED.with_only_columns(interactions.c.principal, answers.c.error, count)
            .where(interactions.c.task == task, answers.c.error.is_not(None), SEEN)
            .where(interactions.c.created > since)
            .group_by(interactions.c.principal, answers.c.error)
            .order_by(interactions.c.principal, answers.c.error)
        )
        return [(str(row[0]), str(row[1]), int(row[2])) for row in self._all(query)]

    def waiting(self, task: str, since: float = 0.0, *, sessions: bool = False) -> int:
        """Interactions of a task created after ``since`` whose row has not come yet.

        ``sessions``: a row of any request of a session is the whole session's.
        """
        query = (
            select(func.count())
            .select_from(interactions)
            .where(interactions.c.task == task, interactions.c.row_hash.is_(None))
            .where(interactions.c.created > since, interactions.c.status == "ok", SEEN)
        )
        if sessions:
            other = interactions.alias()
            same = [other.c[n] == interactions.c[n] for n in ("principal", "session_id", "task")]
            has_row = exists().where(*same, other.c.row_hash.is_not(None))
            query = query.where(~has_row)
        return int(self._all(query)[0][0])

    def verified(self, task: str, since: float = 0.0) -> int:
        """Interactions of a task created after ``since`` that have a reward."""
        query = JOINED.with_only_columns(func.count(distinct(interactions.c.id)))
        query = query.where(interactions.c.task == task, interactions.c.created > since)
        query = query.where(answers.c.reward.is_not(None), answers.c.error.is_(None), SEEN)
        return int(self._all(query)[0][0])

    def rewards(
        self, principal: str | None, since: float = 0.0, limit: int = 1000
    ) -> list[ExperienceRow]:
        """Verdicts given after ``since``, errors included, of one principal or (None) of all."""
        query = _verified(answers.c.judged, answers.c.id).where(answers.c.judged > since)
        if principal is not None:
            query = query.where(interactions.c.principal == principal)
        return [record_of(ExperienceRow, row) for row in joined(self.engine, query.limit(limit))]

    def earned(
        self,
        version: str,
        since: float = 0.0,
        until: float | None = None,
        newest: int | None = None,
    ) -> list[Earned]:
        """Rewards of one version on any task, created in (since, until], by inference id.

        ``newest``: so many at most, the newest of each principal in turn.
        """
        query = JOINED.where(answers.c.reward.is_not(None))
        rows = joined(self.engine, _of_version(query, version, since, until, newest))
        return sorted(record_of(Earned, row) for row in rows)

    def answered(
        self,
        version: str,
        since: float = 0.0,
        until: float | None = None,
        newest: int | None = None,
    ) -> list[VersionTraffic]:
        """What one version answered or failed, created in (since, until], oldest first.

        ``newest``: as `earned`.
        """
        query = select(interactions).where(interactions.c.status != "cancelled")
        rows = whole_interactions(self.engine, _of_version(query, version, since, until, newest))
        return sorted(record_of(VersionTraffic, row) for row in rows)

    def use(self, round_id: str, pool: Pool, rows: Sequence[ExperienceRow]) -> None:
        """Note that these rows, in this order, are a round's prompts."""
        with self.writing() as connection:
            values = [
                (round_id, pool, at, r.inference_id, r.principal) for at, r in enumerate(rows)
            ]
            places = [dict(zip(PLACE, each, strict=True)) for each in values]
            insert_sealed(connection, rounds_used, places)

    def key_owners(self) -> set[str]:
        """Owners of keys that are not revoked."""
        query = select(keys.c.owner).where(keys.c.revoked.is_(None))
        return {str(row[0]) for row in self._all(query)}

    def principals(self, round_id: str) -> dict[int, str]:
        """Place of a training row in a round's prompts -> whose it is."""
        used = rounds_used.c
        query = select(used.position, used.principal)
        rows = self._all(query.where(used.round_id == round_id, used.pool == "train"))
        return {int(row[0]): str(row[1]) for row in rows}

    def name_candidate(self, round_id: str, digest: str) -> None:
        """Note which weights a round made."""
        with self.writing() as connection:
            update_sealed(
                connection, rounds_used, rounds_used.c.round_id == round_id, digest=digest
            )

    def _all(self, query: Select[Any]) -> Sequence[Row[Any]]:
        with self.engine.connect() as connection:
            return connection.execute(query).all()


def _columns(record: Any) -> dict[str, Any]:
    """Fields of a record as columns; PostgreSQL keeps no NUL in text, so neither do we."""
    values = {f.name: getattr(record, f.name) for f in fields(record) if f.name != "answers"}
    return {k: v.replace("\0", "�") if isinstance(v, str) else v for k, v in values.items()}


def _verified(*order: Any) -> Select[Any]:
    order = order or (interactions.c.created, answers.c.id)
    return JOINED.where(answers.c.judged.is_not(None), SEEN).order_by(*order)


def _of_version(
    query: Select[Any], version: str, since: float, until: float | None, newest: int | None
) -> Select[Any]:
    """The newest rows of one version within a time, of each principal in turn.

    So that one who sends thousands does not leave the others out of the newest ones.
    """
    query = query.where(interactions.c.version == version, interactions.c.created > since)
    if until is not None:
        query = query.where(interactions.c.created <= until)
    newest_first = interactions.c.created.desc()
    turn = func.row_number().over(partition_by=interactions.c.principal, order_by=newest_first)
    return query.order_by(turn, newest_first).limit(newest)


def _id_of(inference_id: str | BindParameter[Any]) -> Select[Any]:
    return select(interactions.c.id).where(interactions.c.inference_id == inference_id)
