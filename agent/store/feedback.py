"""What comes after an answer: feedback, of no weight in training, and a row that judges it.

Both may be late and may be sent again. A client gives the row (its gold answer), never the reward:
that is the verifier's.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, func, select
from sqlalchemy.exc import IntegrityError

from agent.store.experience import ExperienceStore, Unjudged
from agent.store.experience_db import SEAL, answers, feedback, interactions
from agent.store.seals import insert_sealed, update_sealed

Refusal = Literal[
    "unknown_inference",
    "unknown_feedback",
    "already_superseded",
    "id_reused",
    "text_not_kept",
    "other_task",
    "row_known",
]


class FeedbackRefusedError(Exception):
    """Why a feedback was not recorded: ``reason`` for programs, the message for people."""

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Feedback:
    """One opinion about one answer; the same ``feedback_id`` twice is one opinion."""

    feedback_id: str
    inference_id: str
    principal: str
    metric_name: str
    value: float
    tags: Mapping[str, str]
    rationale: str | None = None
    supersedes: str | None = None


def add(store: ExperienceStore, item: Feedback, now: float, *, any_owner: bool = False) -> bool:
    """Record it beside the version that answered; False where the same was recorded before.

    Raises FeedbackRefusedError for an unknown inference (or another principal's, unless
    ``any_owner``), an id used before for something else, and a correction of what is not there or
    was corrected already.
    """
    found = store.find(item.inference_id)
    if found is None or (found.principal != item.principal and not any_owner):
        raise FeedbackRefusedError(
            "unknown_inference", f"inference_id: {item.inference_id!r} is not one of yours"
        )
    values = _values(item) | {"inference_id": found.inference_id}
    context = {"version": found.version, "created": now, "weight": 0.0}
    try:
        return _write(store, values, context)
    except IntegrityError:  # two at once on PostgreSQL: the other one came first, now it is seen
        return _write(store, values, context)


@dataclass(frozen=True, slots=True)
class LateRow:
    """The row that judges an answer given before, as ``metadata.example`` would have brought it."""

    inference_id: str
    principal: str
    task: str
    example: str  # JSON object
    row_hash: str


def keep_row(store: ExperienceStore, row: LateRow, *, any_owner: bool = False) -> list[Unjudged]:
    """Keep the row beside its answers, which can be judged then; [] where it is there already.

    Raises FeedbackRefusedError for an unknown inference (or another principal's, unless
    ``any_owner``), one whose text was not kept, that named another task, or that has another row.
    """
    with store.writing() as connection:  # one transaction: of two rows for an answer one is kept
        query = select(interactions).where(
            (interactions.c.inference_id == row.inference_id)
            | (interactions.c.response_id == row.inference_id)
        )
        interaction = (
            connection.execute(query.order_by(interactions.c.id).limit(1)).mappings().first()
        )
        if interaction is None or (interaction["principal"] != row.principal and not any_owner):
            raise FeedbackRefusedError(
                "unknown_inference", f"inference_id: {row.inference_id!r} is not one of yours"
            )
        if _known_already(interaction, row):
            return []
        values = {"task": row.task, "source": "submitted", "example": row.example}
        this = interactions.c.id == interaction["id"]
        update_sealed(connection, interactions, this, **values, row_hash=row.row_hash)
        kept = select(answers.c.choice, answers.c.completion, answers.c.tool_calls).where(
            answers.c.interaction_id == interaction["id"]
        )
        return [
            Unjudged(
                inference_id=interaction["inference_id"],
                choice=choice,
                task=row.task,
                example_id=None,
                example=row.example,
                completion=completion or "",
                version=interaction["version"],
                principal=interaction["principal"],
                prompt=interaction["prompt"],
                tool_calls=tool_calls,
            )
            for choice, completion, tool_calls in connection.execute(kept)
        ]


def _known_already(interaction: RowMapping, row: LateRow) -> bool:
    """Whether the interaction has this very row; FeedbackRefusedError where it can take none."""
    if interaction["prompt"] is None or interaction["status"] != "ok":
        raise FeedbackRefusedError(
            "text_not_kept", "inference_id: its text was not kept; ask with store: true or a task"
        )
    if interaction["task"] not in (None, row.task):
        raise FeedbackRefusedError(
            "other_task", f"task: {row.task!r}; the request named {interaction['task']!r}"
        )
    if interaction["row_hash"] not in (None, row.row_hash):
        raise FeedbackRefusedError("row_known", "inference_id: it has another row already")
    return interaction["row_hash"] is not None


def of(store: ExperienceStore, inference_id: str) -> list[Mapping[str, Any]]:
    """Feedback on one answer, oldest first; the standing one of a chain is the last."""
    columns = [each for each in feedback.c if each.name != SEAL]
    query = select(*columns).where(feedback.c.inference_id == inference_id)
    with store.engine.connect() as connection:
        return [dict(row._mapping) for row in connection.execute(query.order_by(feedback.c.id))]


def counts(store: ExperienceStore) -> list[dict[str, Any]]:
    """Metric, number and mean value of the feedback that stands (what was corrected left out)."""
    newer = feedback.alias()
    corrected = select(newer.c.id).where(
        newer.c.principal == feedback.c.principal, newer.c.supersedes == feedback.c.feedback_id
    )
    query = (
        select(feedback.c.metric_name, func.count(), func.avg(feedback.c.value))
        .where(~corrected.exists())
        .group_by(feedback.c.metric_name)
        .order_by(feedback.c.metric_name)
    )
    with store.engine.connect() as connection:
        rows = connection.execute(query).all()
    return [{"metric": str(row[0]), "n": int(row[1]), "mean": float(row[2])} for row in rows]


def _write(store: ExperienceStore, values: dict[str, Any], context: dict[str, Any]) -> bool:
    with store.writing() as connection:
        return _insert(connection, values, context)


def _insert(connection: Connection, values: dict[str, Any], context: dict[str, Any]) -> bool:
    before = _one(connection, values["principal"], values["feedback_id"])
    if before is not None:
        if any(before[name] != value for name, value in values.items()):
            raise FeedbackRefusedError(
                "id_reused", f"id: {values['feedback_id']!r} stands for another feedback"
            )
        return False
    if values["supersedes"] is not None:
        _correctable(connection, values)
    insert_sealed(connection, feedback, [values | context])
    return True


def _correctable(connection: Connection, values: dict[str, Any]) -> None:
    target = _one(connection, values["principal"], values["supersedes"])
    same = ("inference_id", "metric_name")
    if target is None or any(target[name] != values[name] for name in same):
        raise FeedbackRefusedError(
            "unknown_feedback",
            f"supersedes: {values['supersedes']!r} is no feedback of yours on this answer's metric",
        )
    query = select(feedback.c.feedback_id).where(
        feedback.c.principal == values["principal"],
        feedback.c.supersedes == values["supersedes"],
    )
    if newer := connection.execute(query).scalar():
        raise FeedbackRefusedError(
            "already_superseded", f"supersedes: {values['supersedes']!r} was corrected by {newer!r}"
        )


def _one(connection: Connection, principal: str, feedback_id: str) -> Mapping[str, Any] | None:
    query = select(feedback).where(
        feedback.c.principal == principal, feedback.c.feedback_id == feedback_id
    )
    row = connection.execute(query).first()
    return None if row is None else dict(row._mapping)


def _values(item: Feedback) -> dict[str, Any]:
    values = asdict(item)
    values["tags"] = json.dumps(dict(item.tags), sort_keys=True)
    return values
