"""From verified traffic and data-set rows to the prompts of a round.

A client's request is asked again as it was sent: its own system message and turns. The task's
template asks the rows of the data set only. Nothing that is stored ends a round: a row that cannot
be used is set aside, with its principal and the reason.
"""

import json
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from agent.gateway.keys import LOCAL
from agent.store.experience import ExperienceRow
from agent.store.intake import Caps, Intake, SetAside, Why, collect
from evaluators.task import Message, Row, Task, form_problem, row_problem
from flows.service import Service

MESSAGE_TOKENS = 8  # a chat template's own, for each message; measured ones add 4 to 6
SHOWN_PROMPTS = 2  # of each kind, in `collect`
SHOWN_REASONS = 20  # lines about what was set aside; the rest is counted in one more

FIELDS = frozenset({"row", "messages", "sent"})  # of an entry in a round's file

Told = tuple[Why, str]  # the kind of reason a row is set aside for, and the reason


@dataclass(frozen=True)
class Asked:
    """One prompt of a round and the row that judges its answers.

    ``sent``: the messages are those a client sent, with no template of the task around them.
    """

    row: Row
    messages: Sequence[Message]
    sent: bool

    def to_json(self) -> dict[str, Any]:
        """As the file of a round keeps it."""
        return {"row": self.row, "messages": self.messages, "sent": self.sent}


@dataclass(frozen=True)
class Collected:
    """The prompts of a round, in the order every member answers them, and where they came from.

    ``traffic`` holds the requests behind the first prompts, one each, in their order.
    ``refused`` counts requests whose row was refused when it came: (principal, reason, requests).
    """

    asked: tuple[Asked, ...]
    traffic: tuple[ExperienceRow, ...]
    set_aside: tuple[SetAside, ...]
    refused: tuple[tuple[str, str, int], ...]

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
            "set_aside": self.counts(),
        }

    def reasons(self) -> list[dict[str, Any]]:
        """Principal, reason and how many requests, most first."""
        told = Counter[tuple[str, str, str]]()
        for each in self.set_aside:
            told[each.row.principal, each.why, each.reason] += 1
        for principal, reason, requests in self.refused:
            told[principal, "unverified", reason] += requests
        return [
            {"principal": principal, "why": why, "reason": reason, "requests": requests}
            for (principal, why, reason), requests in told.most_common()
        ]

    def lines(self) -> list[str]:
        """What was set aside, one line a principal and reason."""
        told = self.reasons()
        lines = [
            f"set aside: {each['requests']} of {each['principal']}: {each['why']}: {each['reason']}"
            for each in told[:SHOWN_REASONS]
        ]
        rest = sum(each["requests"] for each in told[SHOWN_REASONS:])
        return lines + ([f"set aside: {rest} more, for other reasons"] if rest else [])

    def preview(self) -> dict[str, Any]:
        """Counts, reasons, and the first prompts of both kinds, for a person to look at."""
        sent = self.asked[: self.from_traffic][:SHOWN_PROMPTS]
        own = self.asked[self.from_traffic :][:SHOWN_PROMPTS]
        shown = {"as sent by clients": sent, "by the task's template": own}
        prompts = {name: [each.messages for each in some] for name, some in shown.items()}
        return {**self.to_json(), "reasons": self.reasons(), "prompts": prompts}


def collect_rows(service: Service, target: str, count: int) -> Collected:
    """``count`` prompts of the target: verified traffic first, the task's own rows after.

    The task's rows are taken in turn: each round on a target begins where the last one ended.
    When traffic came plays no part: equal traffic gives an equal round.
    """
    task = service.task(target)
    known = service.training_rows(target)
    earlier = sum(run.target == target for run in service.journal.runs())
    since = time.time() - service.settings.gateway.retention_days * 86_400
    intake = _intake(service, task, count, since, turn=str(earlier))
    live: dict[str, tuple[Asked, ExperienceRow]] = {}
    set_aside = list(intake.set_aside)
    for request in intake.train:
        sent = _as_sent(request, known)
        key = task.key(sent.row)
        if key in live:
            set_aside.append(SetAside(request, "duplicates", "another prompt asks the same row"))
        elif len(live) >= count:
            set_aside.append(SetAside(request, "no_room", f"the round's {count} rows are full"))
        else:
            live[key] = (sent, request)
    prompts = {key: live[key][0] for key in sorted(live)}
    used = tuple(live[key][1] for key in sorted(live))
    own = deque(known.items())
    own.rotate(-earlier * count)
    shots = service.shots(target)
    for key, row in own:
        if len(prompts) >= count:
            break
        asked = Asked(row, task.messages(row, shots(row)), sent=False)
        if key not in prompts and too_long(service, task, asked.messages) is None:
            prompts[key] = asked
    refused = service.experience.errors(target, since)
    return Collected(tuple(prompts.values()), used, tuple(set_aside), tuple(refused))


def evaluation_pool(service: Service, target: str) -> Sequence[Row]:
    """The rows that may judge the target, in all stages; a round never trains on them."""
    settings = service.settings
    return service.rows(target, "eval", (3 + settings.gate.extend) * settings.tasks.rows)


def mark_used(service: Service, round_id: str, collected: Collected) -> None:
    """Remember which rows a round learnt from, so that a deletion can name its rounds."""
    if collected.traffic:
        service.experience.use(round_id, "train", collected.traffic)


def admit(service: Service, task: Task, row: object) -> str | None:
    """Why a row that a client sends is not taken, or None; what is tried is quick."""
    if problem := form_problem(task, row):
        return problem
    return too_long(service, task, task.messages(cast(Row, row)))


def too_long(service: Service, task: Task, messages: Sequence[Message]) -> str | None:
    """Why a prompt leaves no room for its answer, or None. Tokens are counted a little high."""
    return _over(service, task, count_tokens(service.origin.directory, messages))


def count_tokens(model: Path, messages: Sequence[Message]) -> int:
    """Tokens of a chat in the model's tokenizer, its template's allowed for; 0 where it is not
    a ``tokenizer.json``: then the engine alone can tell.
    """
    path = model / "tokenizer.json"
    if not path.is_file():
        return 0
    encode = _tokenizer(path).encode
    return sum(MESSAGE_TOKENS + len(encode(str(m["content"])).ids) for m in messages)


@cache
def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer  # the light part of transformers, which takes seconds

    return Tokenizer.from_file(str(path))


def _over(service: Service, task: Task, tokens: int) -> str | None:
    room = service.settings.model.max_model_len - task.max_tokens
    if tokens <= room:
        return None
    return f"its prompt has {tokens} tokens; allowed: {room}, so that an answer fits"


def _intake(service: Service, task: Task, count: int, since: float, turn: str) -> Intake:
    """Verified traffic of the target within its days of retention, shared among principals."""
    rows = service.experience.rows(task.name, since)
    known = service.training_rows(task.name)
    held_out = frozenset(task.key(row) for row in evaluation_pool(service, task.name))

    @cache  # the same request often comes many times
    def judged(example: str | None, example_id: str | None, prompt: str | None) -> Told | None:
        return _refusal(service, task, known, held_out, (example, example_id, prompt))

    def refuse(row: ExperienceRow) -> Told | None:
        if told := judged(row.example, row.example_id, row.prompt):
            return told
        reason = _over(service, task, row.prompt_tokens)
        return ("not_as_sent", reason) if reason else None

    return collect(
        rows,
        Caps(count, service.settings.gateway.principal_cap),
        salt=service.salt,
        refuse=refuse,
        alone=len(_principals(service, rows)) <= 1,
        turn=turn,
    )


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
    held_out: frozenset[str],
    request: tuple[str | None, str | None, str | None],
) -> Told | None:
    """Why a stored request cannot be learnt from. Old homes hold rows that nobody checked."""
    example, example_id, prompt = request
    try:
        row = known.get(example_id or "") if example is None else json.loads(example)
    except (ValueError, RecursionError):
        return "refused", "its row is not JSON"
    if row is None:
        return "refused", "no training row has its example_id"
    problem = row_problem(task, row) if example is not None else form_problem(task, row)
    if problem is None and example is not None:
        problem = too_long(service, task, task.messages(row))
    if problem is not None:
        return "refused", problem
    if task.key(row) in held_out:
        return "overlapping", "the very row that judges"
    try:
        chat(prompt)
    except ValueError as error:
        return "not_as_sent", str(error)
    return None


def chat(prompt: str | None) -> list[Message]:
    """The messages of a captured request as an engine is asked them.

    A list of text parts is joined by line feeds, as vLLM's server does for a template that
    expects text.

    Raises:
        ValueError: It is none that a round can ask as it was sent, with the reason.
    """
    try:
        messages = json.loads(prompt or "null")
    except (ValueError, RecursionError):
        raise ValueError("its prompt is not JSON") from None
    if isinstance(messages, Mapping):
        raise ValueError("it came with tools, which a round does not offer")
    if not isinstance(messages, list) or not messages:
        raise ValueError("a plain prompt; rounds ask chats")
    made = list(map(_message, messages))
    if made[-1]["role"] == "assistant":
        raise ValueError("it ends with an answer")
    return made


def _message(message: Any) -> Message:
    """One turn with its content as text; other fields as they are."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError("a plain prompt; rounds ask chats")
    if message["role"] == "tool" or message.get("tool_calls"):
        raise ValueError("it came with tools, which a round does not offer")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text")) for part in content if isinstance(part, Mapping))
    if not isinstance(content, str):
        raise ValueError("a turn without text")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise ValueError("text that is not Unicode") from None
    return {**message, "content": content}


def _as_sent(request: ExperienceRow, known: Mapping[str, Row]) -> Asked:
    """The prompt and the row of a request that was not refused."""
    row = (
        known[request.example_id or ""] if request.example is None else json.loads(request.example)
    )
    return Asked(row, chat(request.prompt), sent=True)


def opened_prompts(
    service: Service, task: Task, entries: Sequence[Any]
) -> tuple[list[Asked], dict[int, str]]:
    """The prompts in the file of a round, and by place why some cannot be asked.

    A file of an older home holds rows alone, which nobody checked; the template asks them.
    """
    shots = service.shots(task.name)
    prompts: list[Asked] = []
    left_out: dict[int, str] = {}
    for place, entry in enumerate(entries):
        if isinstance(entry, Mapping) and entry.keys() == FIELDS:
            asked = Asked(entry["row"], entry["messages"], entry["sent"])
            problem = form_problem(task, asked.row)
        else:
            problem = form_problem(task, entry)
            asked = Asked(entry, [] if problem else task.messages(entry, shots(entry)), False)
        if problem := problem or too_long(service, task, asked.messages):
            left_out[place] = problem
        prompts.append(asked)
    return prompts, left_out


def judging(task: Task, asked: Asked) -> Task:
    """The task that judges an answer: the template's given first words are not a client's."""
    return replace(task, prefill=None) if asked.sent else task
