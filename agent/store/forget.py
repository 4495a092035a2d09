"""Deletion: by principal on request, by age on schedule, and which rounds had used the rows."""

import hashlib
import json
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, insert, select

from agent.store.experience import ExperienceStore
from agent.store.experience_db import feedback, forgotten, interactions, rounds_used


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
    rounds: tuple[RoundUse, ...]


def forget(store: ExperienceStore, principal: str, now: float) -> Forgotten:
    """Delete every row of a principal, and its text from the database's files."""
    with store.writing() as connection:
        used = _rounds(connection, principal)
        mine = select(interactions.c.inference_id).where(interactions.c.principal == principal)
        opinions = connection.execute(
            delete(feedback).where(
                (feedback.c.principal == principal) | feedback.c.inference_id.in_(mine)
            )
        ).rowcount
        removed = connection.execute(
            delete(interactions).where(interactions.c.principal == principal)
        ).rowcount
        connection.execute(delete(rounds_used).where(rounds_used.c.principal == principal))
        connection.execute(insert(forgotten), _tombstone(principal, now, removed, used))
    _scrub(store)
    return Forgotten(removed, opinions, used)


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
    """The rounds that used a principal's rows, while it is still known."""
    with store.engine.connect() as connection:
        return _rounds(connection, principal)


def gone(store: ExperienceStore) -> dict[str, tuple[int, ...]]:
    """Places of rounds' training rows whose interactions are no longer kept."""
    kept = select(interactions.c.inference_id)
    query = (
        select(rounds_used.c.round_id, rounds_used.c.position)
        .where(rounds_used.c.pool == "train", rounds_used.c.inference_id.not_in(kept))
        .order_by(rounds_used.c.id)
    )
    places: dict[str, list[int]] = {}
    with store.engine.connect() as connection:
        for round_id, position in connection.execute(query):
            places.setdefault(round_id, []).append(position)
    return {round_id: tuple(positions) for round_id, positions in places.items()}


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
        "principal_hash": hashlib.sha256(principal.encode()).hexdigest(),
        "created": now,
        "interactions": removed,
        "rounds": json.dumps([asdict(use) for use in used]),
    }


def _scrub(store: ExperienceStore) -> None:
    """SQLite: what was deleted leaves the write-ahead log as well."""
    if store.engine.dialect.name == "sqlite":
        with store.engine.connect() as connection:
            connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
