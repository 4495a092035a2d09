"""From verified traffic and data-set rows to the prompts of a round.

A client's request is asked again as it was sent: its own system message and turns; of a task that
judges conversations a session is one prompt. The task's template asks the rows of the data set
only. Nothing that is stored ends a round: a row that cannot
be used is set aside, with its principal and the reason. Rows are kept as long as the settings allow
(``sweep``), in the store and in the files of rounds.
"""

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, cast

from agent.errors import UserError
from agent.gateway.keys import LOCAL
from agent.store.experience import ExperienceRow, Pool
from agent.store.forget import expire, gone
from agent.store.intake import Caps, Intake, SetAside, Why, collect
from agent.store.seals import damaged_of
from evaluators.held_out import HeldOut, leaks, row_text
from evaluators.task import Row, Task, form_problem, row_problem
from flows.learn.prompts import Asked, as_sent, over, sessions, too_long
from flows.round_files import ROWS, SELECTING, RoundFiles
from flows.service import Service

LOG = logging.getLogger("anchorage.flows")
DAY_S = 86_400.0
DAMAGED = "its stored row is not what was written"
SHOWN_PROMPTS = 2  # of each kind, in `collect`
SHOWN_REASONS = 20  # lines about what was set aside; the rest is counted in one more

Refusal = tuple[Why, str]  # the kind of reason a row is set aside for, and the reason


@dataclass(frozen=True)
class Collected:
    """The prompts of a round, in the order every member answers them, and where they came from.

    ``traffic`` holds the requests behind the first prompts, one each, in their order.
    ``choosing`` are the prompts of the selection rows, those of ``choosing_traffic`` first.
    ``refused`` counts requests whose row was refused when it came: (principal, reason, requests).
    ``waiting`` counts requests that named the task and whose row has not come yet.
    ``leaks`` counts prompts that hold a row that judges, by the task of that row.
    """

    asked: tuple[Asked, ...]
    traffic: tuple[ExperienceRow, ...]
    choosing: tuple[Asked, ...]
    choosing_traffic: tuple[ExperienceRow, ...]
    set_aside: tuple[SetAside, ...]
    refused: tuple[tuple[str, str, int], ...]
    leaks: Mapping[str, int]
    waiting: int

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows alone."""
        return tuple(each.row for each in self.asked)

    @property
    def from_traffic(self) -> int:
        """How many of the prompts clients sent."""
        return len(self.traffic)

    def counts(self) -> dict[str, int]:
        """Requests set aside by the kind of reason, ``unverified`` for those refused at once."""
        counted = Counter[str](each.why for each in self.set_aside)
        counted["unverified"] = sum(requests for _, _, requests in self.refused)
        return dict(sorted(counted.items()))

    def to_json(self) -> dict[str, Any]:
        """Counts only, without text or names: a round's plan is kept for good."""
        return {
            "rows": len(self.asked),
            "from_traffic": self.from_traffic,
            "from_dataset": len(self.asked) - self.from_traffic,
            "selection_rows": len(self.choosing),
            "selection_from_traffic": len(self.choosing_traffic),
            "set_aside": self.counts(),
            "waiting_for_their_row": self.waiting,
            "leaks": dict(self.leaks),
        }

    def reasons(self) -> list[dict[str, Any]]:
        """Principal, reason and how many requests, most first."""
        requests_of = Counter[tuple[str, str, str]]()
        for each in self.set_aside:
            requests_of[each.row.principal, each.why, each.reason] += 1
        for principal, reason, requests in self.refused:
            requests_of[principal, "unverified", reason] += requests
        return [
            {"principal": principal, "why": why, "reason": reason, "requests": requests}
            for (principal, why, reason), requests in requests_of.most_common()
        ]

    def lines(self) -> list[str]:
        """What was set aside, one line a principal and reason."""
        reasons = self.reasons()
        lines = [
            f"set aside: {each['requests']} of {each['principal']}: {each['why']}: {each['reason']}"
            for each in reasons[:SHOWN_REASONS]
        ]
        rest = sum(each["requests"] for each in reasons[SHOWN_REASONS:])
        return lines + ([f"set aside: {rest} more, for other reasons"] if rest else [])

    def preview(self) -> dict[str, Any]:
        """Counts, reasons, and the first prompts of both kinds, for a person to look at."""
        sent = self.asked[: self.from_traffic][:SHOWN_PROMPTS]
        own = self.asked[self.from_traffic :][:SHOWN_PROMPTS]
        shown = {"as sent by clients": sent, "by the task's template": own}
        prompts = {
            name: [
                [*each.messages, *(m for turn in each.follow or () for m in turn)] for each in some
            ]
            for name, some in shown.items()
        }
        return {**self.to_json(), "reasons": self.reasons(), "prompts": prompts}


def collect_rows(service: Service, target: str, count: int, seed: int = 0) -> Collected:
    """``count`` prompts of the target: verified traffic first, the task's own rows after.

    The task's rows are taken in turn: each round on a target begins where the last one ended, and
    each ``seed`` further on.
    When traffic came plays no part: equal traffic gives an equal round.
    """
    task = service.task(target)
    known = service.training_rows(target)
    earlier = sum(run.target == target for run in service.journal.runs())
    since = time.time() - service.settings.gateway.retention_days * 86_400
    intake = _intake(service, task, count, since, turn=str(earlier))
    # Sorted by key below: which rows a round has decides its outcome, not the order of principals.
    live: dict[str, tuple[Asked, ExperienceRow]] = {}
    set_aside = list(intake.set_aside)
    for request in intake.train:
        sent = _as_sent(task, request, known)
        key = task.key(sent.row)
        if key in live:
            set_aside.append(SetAside(request, "duplicates", "another prompt asks the same row"))
        elif len(live) >= count:
            set_aside.append(SetAside(request, "no_room", f"the round's {count} rows are full"))
        else:
            live[key] = (sent, request)
    prompts = {key: live[key][0] for key in sorted(live)}
    used = tuple(live[key][1] for key in sorted(live))
    choosing, choosing_used = _choosing(service, task, intake, {*known, *prompts}, set_aside)
    own = deque(known.items())
    own.rotate(-(earlier + seed) * count)
    shots = service.shots(target)
    for key, row in own:
        if len(prompts) >= count:
            break
        asked = Asked(row, task.messages(row, shots(row)), sent=False)
        if (
            key not in prompts.keys() | choosing.keys()
            and too_long(service, task, asked.messages) is None
        ):
            prompts[key] = asked
    damaged = damaged_of(service.experience.engine, target, since)
    refused = service.experience.errors(target, since)
    refused += [(owner, DAMAGED, rows) for owner, rows in damaged]
    texts = [each.text for each in (*prompts.values(), *choosing.values())]
    return Collected(
        tuple(prompts.values()),
        used,
        tuple(choosing.values()),
        choosing_used,
        tuple(set_aside),
        tuple(refused),
        leaks(held_out(service, target), texts),
        service.experience.waiting(target, since, sessions=task.converse is not None),
    )


def _choosing(
    service: Service,
    task: Task,
    intake: Intake,
    trained: Collection[str],
    set_aside: list[SetAside],
) -> tuple[dict[str, Asked], tuple[ExperienceRow, ...]]:
    """The prompts of the selection rows by key, and the requests behind the first of them.

    Clients' rows come first and the task's own fill up ``learner.selection``. A row that this or
    another round trains on chooses nothing; what is left out is added to ``set_aside``.
    """
    prompts: dict[str, Asked] = {}
    used = []
    for request in intake.selection:
        sent = _as_sent(task, request, service.training_rows(task.name))
        key = task.key(sent.row)
        if key in trained:
            why = "rounds train on its row, and it fell to those that choose a candidate"
            set_aside.append(SetAside(request, "overlapping", why))
        elif key in prompts:
            set_aside.append(SetAside(request, "duplicates", "another prompt asks the same row"))
        else:
            prompts[key] = sent
            used.append(request)
    shots = service.shots(task.name)
    for row in service.selection_rows(task.name):
        if len(prompts) >= service.settings.learner.selection:
            break
        asked = Asked(row, task.messages(row, shots(row)), sent=False)
        if too_long(service, task, asked.messages) is None:
            prompts.setdefault(task.key(row), asked)
    return prompts, tuple(used)


@dataclass(frozen=True)
class _Judging:
    """Which rows judge, so that those of equal settings are read once in a process."""

    settings: str
    tasks: tuple[str, ...]
    service: Service = field(compare=False)


def held_out(service: Service, target: str) -> HeldOut:
    """The rows of all tasks that judge a round on this target: open, selection and sealed ones.

    Reading and indexing 10,000 rows takes some seconds, once a process. A task whose rows are not
    to be had now cannot judge now either; it is left out, with a line in the log.
    """
    settings = service.settings
    chosen = (settings.model, settings.tasks, settings.gate)
    text = "".join(section.model_dump_json() for section in chosen)
    tasks = tuple(sorted({target, *service.priors(target)}))
    return _held_out(_Judging(text, tasks, service))


@lru_cache(maxsize=2)
def _held_out(judging: _Judging) -> HeldOut:
    made = HeldOut()
    for name in judging.tasks:
        try:
            made.add(judging.service.task(name), evaluation_pool(judging.service, name))
        except UserError as error:
            LOG.warning("rows of %s are not compared with traffic: %s", name, error)
    made.hit("")  # makes the index now
    return made


def evaluation_pool(service: Service, target: str) -> Sequence[Row]:
    """The rows that may judge the target, in all stages; a round never trains on them."""
    settings = service.settings
    return service.rows(target, "eval", (3 + settings.gate.extend) * settings.tasks.rows)


def mark_used(service: Service, round_id: str, collected: Collected) -> None:
    """Remember which rows a round learnt from, so that a deletion can name its rounds."""
    pools: Mapping[Pool, Sequence[ExperienceRow]] = {
        "train": collected.traffic,
        "selection": collected.choosing_traffic,
    }
    for pool, rows in pools.items():
        if rows:
            service.experience.use(round_id, pool, rows)


def admit(service: Service, task: Task, row: object) -> str | None:
    """Why a row that a client sends is not taken, or None: what can be tried at once."""
    if problem := form_problem(task, row):
        return problem
    return too_long(service, task, task.messages(cast(Row, row)))


def admission(
    service: Service, task: Task, row: object, judging_rows: HeldOut | None
) -> Refusal | None:
    """Why a row that a client sent is not learnt from, or None; the kind of reason, and it.

    The same for every row, by whatever way it comes: its form and length, the verdicts on its gold
    and on a wrong answer, and whether it is a row that judges, however it is spelt.
    """
    if problem := admit(service, task, row) or row_problem(task, row):
        return "refused", problem
    return lookalike(judging_rows, row_text(task, cast(Row, row)))


def lookalike(judging_rows: HeldOut | None, text: str) -> Refusal | None:
    """Whether a text holds a row that judges; None where these are not read yet."""
    held = None if judging_rows is None else judging_rows.hit(text)
    return ("overlapping", f"it holds a row that judges {held.task}") if held else None


def _intake(service: Service, task: Task, count: int, since: float, turn: str) -> Intake:
    """Verified traffic of the target within its days of retention, shared among principals."""
    rows, inner = service.experience.rows(task.name, since), list[SetAside]()
    if task.converse is not None:
        rows, inner = sessions(rows, service.experience.turns(task.name, since))
    known = service.training_rows(task.name)
    judging_rows = held_out(service, task.name) if rows else None

    @cache  # the same request often comes many times
    def refusal_of(
        example: str | None, example_id: str | None, prompt: str | None
    ) -> Refusal | None:
        return _refusal(service, task, known, judging_rows, (example, example_id, prompt))

    def refuse(row: ExperienceRow) -> Refusal | None:
        if refusal := refusal_of(row.example, row.example_id, row.prompt):
            return refusal
        reason = over(service, task, row.prompt_tokens)
        return ("not_as_sent", reason) if reason else None

    intake = collect(
        rows,
        Caps(
            count,
            service.settings.gateway.principal_cap,
            selection_rows=service.settings.learner.selection,
        ),
        salt=service.salt,
        refuse=refuse,
        alone=len(_principals(service, rows)) <= 1,
        turn=turn,
    )
    return replace(intake, set_aside=(*intake.set_aside, *inner))


def _principals(service: Service, rows: Sequence[ExperienceRow]) -> set[str]:
    """Everybody who could compete for a round's rows: owners of keys, and who sent something.

    Not the user of this machine, who needed no key before the first one was made: with one owner
    of keys, that is the same person.
    """
    owners = service.experience.key_owners()
    return {*owners, *(row.principal for row in rows)} - {LOCAL.owner}


def _refusal(
    service: Service,
    task: Task,
    known: Mapping[str, Row],
    judging_rows: HeldOut | None,
    request: tuple[str | None, ...],
) -> Refusal | None:
    """Why a stored request cannot be learnt from. Old homes hold rows that nobody checked."""
    example, example_id, prompt = request
    refusal: Refusal | None
    row: Row = {}
    if example is None:
        refusal = None if example_id in known else ("refused", "no training row has its example_id")
    else:
        try:
            row = json.loads(example)
            refusal = admission(service, task, row, judging_rows)
        except (ValueError, RecursionError):
            refusal = "refused", "its row is not JSON"
    if refusal is not None:
        return refusal
    try:
        asked = as_sent(task, row, prompt)
    except ValueError as error:
        return "not_as_sent", str(error)
    return lookalike(judging_rows, asked.text)


def _as_sent(task: Task, request: ExperienceRow, known: Mapping[str, Row]) -> Asked:
    """The prompt and the row of a request that was not refused."""
    row = (
        known[request.example_id or ""] if request.example is None else json.loads(request.example)
    )
    return as_sent(task, row, request.prompt)


def sweep(service: Service) -> int:
    """Delete captured text older than ``gateway.retention_days``, also from rounds' files.

    Returns:
        How many interactions were deleted.
    """
    before = time.time() - service.settings.gateway.retention_days * DAY_S
    removed = expire(service.experience, before)
    for (run_id, pool), positions in gone(service.experience).items():
        delete_rows(service, run_id, pool, positions)
    return removed


def delete_rows(service: Service, run_id: str, pool: str, positions: Collection[int]) -> None:
    """Delete rows from a round's file; a round that is not finished is given up by it."""
    finished = service.journal.run(run_id).digest is not None
    name = SELECTING if pool == "selection" else ROWS
    RoundFiles(service.home, run_id).blank_rows(positions, finished=finished, name=name)
