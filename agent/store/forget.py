"""Deletion: by principal on request, by age on schedule, and which rounds had used the rows.

A deletion leaves one row behind (``forgotten``): the hash of the principal, when it was, and the
places of its rows in rounds, so that these rounds can be replayed without them later.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from sqlalchemy import Connection, delete, select

from agent.store.experience import ExperienceStore
from agent.store.experience_db import feedback, forgotten, interactions, keys, rounds_used
from agent.store.seals import insert_sealed, update_sealed

NOBODY = "(forgotten)"  # owner of a forgotten principal's keys; no key can be made for this name


@dataclass(frozen=True, slots=True)
class RoundUse:
    """Where one principal's rows stood in a round: columns to leave out when it is replayed."""

    round_id: str
    digest: str | None
    pool: str
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What a deletion removed, and the rounds whose weights still carry its traces."""

    interactions: int
    feedback: int
    keys: int
    rounds: tuple[RoundUse, ...]


def forget(store: ExperienceStore, principal: str, now: float) -> Forgotten:
    """Delete every row of a principal, and its text from the database's files; end its keys.

    Its keys stay, revoked and without its name: a database that had a key once is never open to
    everybody again.
    """
    # One transaction: a crash must not leave rows of somebody whose tombstone says they are gone.
    with store.writing() as connection:
        update_sealed(
            connection, keys, (keys.c.owner == principal) & keys.c.revoked.is_(None), revoked=now
        )
        ended = update_sealed(connection, keys, keys.c.owner == principal, owner=NOBODY)
        used = _rounds(connection, principal)
        answered = select(interactions.c.inference_id).where(interactions.c.principal == principal)
        opinions = connection.execute(
            delete(feedback).where(
                (feedback.c.principal == principal) | feedback.c.inference_id.in_(answered)
            )
        ).rowcount
        removed = connection.execute(
            delete(interactions).where(interactions.c.principal == principal)
        ).rowcount
        connection.execute(delete(rounds_used).where(rounds_used.c.principal == principal))
        insert_sealed(connection, forgotten, [_tombstone(principal, now, removed, used)])
    _scrub(store)  # after the commit: deleted text stays in free pages and the log until then
    return Forgotten(removed, opinions, ended, used)


def known(store: ExperienceStore, principal: str) -> bool:
    """Whether anything of a principal is kept, or was before it was forgotten."""
    columns = (
        interactions.c.principal,
        feedback.c.principal,
        keys.c.owner,
        rounds_used.c.principal,
    )
    with store.engine.connect() as connection:  # rows first: they may go meanwhile
        return any(
            connection.execute(select(column).where(column == principal).limit(1)).first()
            for column in columns
        ) or _was_forgotten(connection, principal)


def principals(store: ExperienceStore) -> list[str]:
    """Everybody of whom an interaction or a key is kept."""
    with store.engine.connect() as connection:
        sent = connection.execute(select(interactions.c.principal).distinct()).scalars()
        owners = connection.execute(select(keys.c.owner).where(keys.c.owner != NOBODY)).scalars()
        return sorted({*sent, *owners})


def expire(store: ExperienceStore, before: float) -> int:
    """Delete interactions created before a moment (retention), with their feedback."""
    old = select(interactions.c.inference_id).where(interactions.c.created < before)
    with store.writing() as connection:
        connection.execute(delete(feedback).where(feedback.c.inference_id.in_(old)))
        removed = connection.execute(
            delete(interactions).where(interactions.c.created < before)
        ).rowcount
    if removed:
        _scrub(store)
    return removed


def rounds_of(store: ExperienceStore, principal: str) -> tuple[RoundUse, ...]:
    """The rounds that used a principal's rows, those of an earlier deletion included."""
    with store.engine.connect() as connection:  # rows first, as above; then some are in both
        now = _rounds(connection, principal)
        kept = connection.execute(
            select(forgotten.c.rounds).where(forgotten.c.principal_hash == _hash(principal))
        ).scalars()
        before = [RoundUse(**use) for text in kept for use in json.loads(text)]
    earlier = (replace(use, positions=tuple(use.positions)) for use in before)
    return tuple(dict.fromkeys((*earlier, *now)))


def gone(store: ExperienceStore) -> dict[tuple[str, str], tuple[int, ...]]:
    """Round and pool -> places of its rows whose interactions are no longer kept."""
    kept = select(interactions.c.inference_id)
    query = (
        select(rounds_used.c.round_id, rounds_used.c.pool, rounds_used.c.position)
        .where(rounds_used.c.inference_id.not_in(kept))
        .order_by(rounds_used.c.id)
    )
    places: dict[tuple[str, str], list[int]] = {}
    with store.engine.connect() as connection:
        for round_id, pool, position in connection.execute(query):
            places.setdefault((round_id, pool), []).append(position)
    return {use: tuple(positions) for use, positions in places.items()}


def _rounds(connection: Connection, principal: str) -> tuple[RoundUse, ...]:
    used = rounds_used.c
    query = select(used.round_id, used.digest, used.pool, used.position)
    query = query.where(used.principal == principal).order_by(used.id)
    places: dict[tuple[str, str | None, str], list[int]] = {}
    for round_id, digest, pool, position in connection.execute(query):
        places.setdefault((round_id, digest, pool), []).append(position)
    return tuple(RoundUse(*key, tuple(positions)) for key, positions in places.items())


def _tombstone(
    principal: str, now: float, removed: int, used: tuple[RoundUse, ...]
) -> dict[str, object]:
    return {
        "principal_hash": _hash(principal),
        "created": now,
        "interactions": removed,
        "rounds": json.dumps([asdict(use) for use in used]),
    }


def _was_forgotten(connection: Connection, principal: str) -> bool:
    query = select(forgotten.c.id).where(forgotten.c.principal_hash == _hash(principal))
    return connection.execute(query.limit(1)).first() is not None


def _hash(principal: str) -> str:
    return hashlib.sha256(principal.encode()).hexdigest()


def _scrub(store: ExperienceStore) -> None:
    """SQLite: what was deleted leaves the write-ahead log as well."""
    if store.engine.dialect.name == "sqlite":
        with store.engine.connect() as connection:
            connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
