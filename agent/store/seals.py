"""The seal of a row of the experience store: the hash of its columns, compared when it counts.

SQLite checks the structure of its pages, not what is written in them. Whoever learns, judges or
admits by a row reads it through here; a row from before there were seals is taken as it is.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, TypeVar

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    Float,
    RowMapping,
    Select,
    Table,
    delete,
    insert,
    select,
    update,
)

from agent.store.database import canonical, digest_field
from agent.store.experience_db import (
    SEAL,
    answers,
    feedback,
    forgotten,
    interactions,
    keys,
    rounds_used,
    writing,
)

T = TypeVar("T")
SEALED = (interactions, answers, feedback, keys, rounds_used, forgotten)


def seal_of(table: Table, row: Mapping[Any, Any], owner: str = "") -> str:
    """sha256 of a row's columns, and of the inference id of the interaction it belongs to.

    The numbers of rows are left out: the database gives them out, and a row that one leads astray
    has another owner.
    """
    columns = [each for each in table.c if each.name not in ("id", "interaction_id", SEAL)]
    fields = {each.name: _as_read(each, row.get(each.name)) for each in columns}
    return digest_field(canonical(fields) + owner)


def _as_read(column: Column[Any], value: Any) -> Any:
    """A value as the database gives it back; damaged ones may be of any type."""
    if isinstance(value, bytes):
        return repr(value)
    return float(value) if isinstance(column.type, Float) and isinstance(value, int) else value


def is_whole(table: Table, row: Mapping[Any, Any], owner: str = "") -> bool:
    """Whether a row is what was written."""
    return row[SEAL] is None or row[SEAL] == seal_of(table, row, owner)


def insert_sealed(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows with their seals."""
    if rows:
        connection.execute(insert(table), [{**row, SEAL: seal_of(table, row)} for row in rows])


def update_sealed(
    connection: Connection, table: Table, which: ColumnElement[bool], **values: Any
) -> int:
    """Change rows, each under a new seal; how many there were.

    A damaged one keeps its seal: with a new one it would pass for what was written.
    """
    (key,) = table.primary_key
    rows = connection.execute(select(table).where(which)).mappings().all()
    for row in rows:
        seal = seal_of(table, {**row, **values}) if is_whole(table, row) else row[SEAL]
        connection.execute(update(table).where(key == row[key]).values({**values, SEAL: seal}))
    return len(rows)


def damaged(engine: Engine) -> list[tuple[Table, Any]]:
    """Every row that is not what was written: its table and its key."""
    owners = answers.outerjoin(interactions)
    with engine.connect() as connection:
        found = []
        for table in SEALED:
            (key,) = table.primary_key
            query = select(table)
            if table is answers:
                query = query.add_columns(interactions.c.inference_id).select_from(owners)
            for row in connection.execute(query).mappings():
                own = {each.name: row[each] for each in table.c}
                owner = str(row[interactions.c.inference_id]) if table is answers else ""
                if not is_whole(table, own, owner):
                    found.append((table, row[key]))
    return found


def drop_damaged(engine: Engine) -> None:
    """Delete damaged traffic and opinions, and end damaged keys; what rounds used stays as it is.

    A key is not deleted: a database that had one once is never open to everybody again.
    """
    with writing(engine) as connection:
        for table, number in damaged(engine):
            (key,) = table.primary_key
            if table in (interactions, answers, feedback):
                connection.execute(delete(table).where(key == number))
            elif table is keys:
                row = connection.execute(select(keys).where(key == number)).mappings().one()
                ended = {**row, "revoked": 0.0}
                ended[SEAL] = seal_of(keys, ended)
                connection.execute(update(keys).where(key == number).values(ended))


JOINED = select(interactions, answers).select_from(answers.join(interactions))


def joined(engine: Engine, query: Select[Any], whole: bool = True) -> list[RowMapping]:
    """Rows of a query on ``JOINED``: those that are what was written, or the others."""
    with engine.connect() as connection:
        rows = [row._mapping for row in connection.execute(query)]
    return [row for row in rows if _is_whole_pair(row) is whole]


def whole_interactions(engine: Engine, query: Select[Any]) -> list[RowMapping]:
    """Interactions of a query that are what was written."""
    with engine.connect() as connection:
        rows = [row._mapping for row in connection.execute(query)]
    return [row for row in rows if is_whole(interactions, row)]


def damaged_of(engine: Engine, task: str, since: float) -> list[tuple[str, int]]:
    """(principal, answers) of a task's judged answers that are not what was written."""
    query = JOINED.where(interactions.c.task == task, interactions.c.created > since)
    rows = joined(engine, query.where(answers.c.judged.is_not(None)), whole=False)
    return sorted(Counter(str(row[interactions.c.principal]) for row in rows).items())


def _is_whole_pair(row: RowMapping) -> bool:
    """Whether an interaction and its answer are both what was written."""
    ours, owner = {each.name: row[each] for each in answers.c}, row[interactions.c.inference_id]
    theirs = {each.name: row[each] for each in interactions.c}
    return is_whole(interactions, theirs) and is_whole(answers, ours, owner)


def record_of(kind: Callable[..., T], row: RowMapping) -> T:
    """The fields of a record out of a joined row, by their names."""
    columns = {
        n: answers.c[n] if n in answers.c else interactions.c[n] for n in signature(kind).parameters
    }
    return kind(**{name: row[column] for name, column in columns.items()})
