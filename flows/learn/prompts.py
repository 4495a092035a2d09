"""What a round asks: the messages of each prompt, as a client sent them or by the task's template.

How long they are, how the file of a round keeps them, and how their answers are judged. Of a task
that judges conversations a client's session is one prompt: it is asked again turn by turn, with
what the client and its tools said after each answer.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from agent.errors import UserError
from agent.population.conversation import Conversation, said
from agent.population.decoding import count_tokens
from agent.population.schedule import Completion, Prompt
from agent.store.experience import ExperienceRow, Turn
from agent.store.intake import SetAside
from evaluators.task import (
    Message,
    Row,
    Task,
    Verdict,
    form_problem,
    judge,
    judge_conversation,
    training_reward,
)
from flows.service import Service

FIELDS = frozenset({"row", "messages", "sent"})  # of an entry in a round's file
TALK = frozenset({"follow", "tools"})  # further ones of a conversation


@dataclass(frozen=True)
class Asked:
    """One prompt of a round and the row that judges its answers.

    ``sent``: the messages are those a client sent, with no template of the task around them.
    ``follow``: of a conversation, the messages between one answer and the next; they and the
    opening ``messages`` are judged as a whole. None where an answer is judged alone.
    """

    row: Row
    messages: Sequence[Message]
    sent: bool
    follow: Sequence[Sequence[Message]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None

    @property
    def prompt(self) -> Prompt | Conversation:
        """As a population is asked it."""
        if self.follow is None:
            return list(self.messages)
        return Conversation(self.messages, tuple(self.follow), self.tools)

    @property
    def text(self) -> str:
        """Everything that was said to the model, and what it said in between."""
        turns = [self.messages, *(self.follow or ())]
        return "\n".join(each.get("content") or "" for turn in turns for each in turn)

    def to_json(self) -> dict[str, Any]:
        """As the file of a round keeps it."""
        kept = {"row": self.row, "messages": self.messages, "sent": self.sent}
        talk = {"follow": self.follow, "tools": self.tools}
        return kept if self.follow is None else kept | talk


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
        if isinstance(entry, Mapping) and FIELDS <= entry.keys() <= FIELDS | TALK:
            asked = Asked(**entry)
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


def verdict_on(task: Task, asked: Asked, answer: Completion) -> Verdict:
    """The verdict on an answer, or on the conversation that it ends."""
    if asked.follow is None:
        return judge(judging(task, asked), answer.text, asked.row)
    return judge_conversation(task, answer.conversation, asked.row)


def rewards_of(task: Task, prompts: Sequence[Asked], answers: Sequence[Completion]) -> list[float]:
    """The training reward of one answer to each prompt; 0 where the verifier failed."""
    if len(answers) != len(prompts):
        raise UserError(f"an engine gave {len(answers)} answers, allowed: {len(prompts)}")
    return [
        training_reward(task, verdict_on(task, asked, answer))
        for asked, answer in zip(prompts, answers, strict=True)
    ]


def worked(task: Task, asked: Asked) -> str | None:
    """The task's worked answer to a prompt; None where its verifier does not take it for right,
    and for a conversation, which has none.
    """
    with suppress(Exception):  # a client's row may lack what an own task's answer is made of
        answer = task.worked(asked.row)
        right = judge(judging(task, asked), answer, asked.row).reward >= 1
        return answer if right and asked.follow is None else None
    return None


def as_sent(task: Task, row: Row, prompt: str | None) -> Asked:
    """A captured request as an engine is asked it again.

    A list of text parts is joined by line feeds, as vLLM's server does for a template that
    expects text.

    Raises:
        ValueError: It is none that a round can ask as it was sent, with the reason.
    """
    try:
        sent = json.loads(prompt or "null")
    except (ValueError, RecursionError):
        raise ValueError("its prompt is not JSON") from None
    talks = task.converse is not None
    if isinstance(sent, Mapping) and not talks:
        raise ValueError("it came with tools, which a round offers in conversations only")
    parts = sent if isinstance(sent, Mapping) else {"messages": sent}
    messages, follow = parts.get("messages"), parts.get("follow") or []
    if not isinstance(messages, list) or not messages:
        raise ValueError("a plain prompt; rounds ask chats")
    turns = [[_message(each, talks) for each in turn] for turn in (messages, *follow)]
    if any(turn[-1]["role"] == "assistant" for turn in turns):
        raise ValueError("it ends with an answer")
    return Asked(row, turns[0], True, turns[1:] if talks else None, parts.get("tools"))


def sessions(
    rows: Iterable[ExperienceRow], turns: Iterable[Turn]
) -> tuple[list[ExperienceRow], list[SetAside]]:
    """Rewards of whole sessions: one row for each, its prompt {"messages", "follow", "tools"}.

    Of the requests of one principal and session the judged one with the most messages (of equal
    ones the last) is the conversation. Its answers are generated anew where the session has a
    request that ends before them; others, such as a client's own examples, stay as they are.
    Judged requests that the conversation goes on from are part of it; others are set aside.
    """
    asked: dict[tuple[str, str], set[str]] = defaultdict(set)
    for turn in turns:
        asked[turn.principal, turn.session_id].add(_key(_parts(turn.prompt)[0]))
    judged: dict[tuple[str, str], list[ExperienceRow]] = defaultdict(list)
    for row in rows:
        judged[row.principal, row.session_id or f"\0{row.inference_id}"].append(row)
    kept, aside = list[ExperienceRow](), list[SetAside]()
    for owner, mine in judged.items():
        row, parts = _conversation(mine, asked[owner])
        kept.append(row)
        aside += [
            SetAside(each, "duplicates", "its session is asked from another request")
            for each in mine
            if _key(_parts(each.prompt)[0]) not in parts
        ]
    return kept, aside


def _conversation(
    judged: Sequence[ExperienceRow], asked: Collection[str]
) -> tuple[ExperienceRow, set[str]]:
    """The request that is a session's example, and the beginnings of it that were requests, too.

    ``asked``: messages of all requests of the session, as keys.
    """
    last = max(judged, key=lambda r: (len(_parts(r.prompt)[0]), r.created, r.inference_id))
    messages, tools = _parts(last.prompt)
    answers = [at for at, message in enumerate(messages) if _role(message) == "assistant"]
    cuts = [at for at in answers if _key(messages[:at]) in asked]
    if cuts:
        ends = [*cuts[1:], len(messages)]
        follow = [messages[at + 1 : end] for at, end in zip(cuts, ends, strict=True)]
        talk = {"messages": messages[: cuts[0]], "follow": follow, "tools": tools}
        last = replace(last, prompt=json.dumps(talk))
    return last, {_key(messages[:at]) for at in [*cuts, len(messages)]}


def whole(prompt: str | None, completion: str, tool_calls: str | None) -> list[Message] | None:
    """A captured request's messages with its answer; None for a plain prompt."""
    messages, _ = _parts(prompt)
    calls = json.loads(tool_calls) if tool_calls else ()
    answer = Completion(completion, 0, "stop", tuple(calls))
    return [*messages, said(answer, ())] if messages else None


def _parts(prompt: str | None) -> tuple[list[Any], Any]:
    """Messages and tools of a captured chat; no messages where it is none."""
    try:
        sent = json.loads(prompt or "null")
    except (ValueError, RecursionError):
        return [], None
    messages = sent.get("messages") if isinstance(sent, Mapping) else sent
    tools = sent.get("tools") if isinstance(sent, Mapping) else None
    return (messages, tools) if isinstance(messages, list) else ([], tools)


def _key(messages: Sequence[Any]) -> str:
    return json.dumps(messages, sort_keys=True)


def _role(message: Any) -> object:
    return message.get("role") if isinstance(message, Mapping) else None


def _message(message: Any, talks: bool) -> Message:
    """One turn with its content as text; other fields as they are.

    ``talks``: calls of tools and their results are turns, too.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError("a plain prompt; rounds ask chats")
    calls = bool(message.get("tool_calls"))
    if not talks and (message["role"] == "tool" or calls):
        raise ValueError("it came with tools, which a round offers in conversations only")
    content = message.get("content")
    if content is None and calls:
        return dict(message)
    if isinstance(content, list):
        content = "\n".join(str(part.get("text")) for part in content if isinstance(part, Mapping))
    if not isinstance(content, str):
        raise ValueError("a turn without text")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise ValueError("text that is not Unicode") from None
    return {**message, "content": content}


def too_long(service: Service, task: Task, messages: Sequence[Message]) -> str | None:
    """Why a prompt leaves no room for its answer, or None. Tokens are counted a little high."""
    return over(service, task, count_tokens(service.origin.directory, messages))


def askable(service: Service, task: Task, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows whose prompts, worked examples included, leave room for an answer."""
    shots = service.shots(task.name)
    return (row for row in rows if too_long(service, task, task.messages(row, shots(row))) is None)


def nothing_to_ask(service: Service, task: Task) -> str:
    """What a round is told that has no row to ask."""
    return (
        f"{task.name}: no training row leaves room for an answer of {task.max_tokens} tokens "
        f"(tasks.max_tokens) in model.max_model_len = {service.settings.model.max_model_len}; "
        "allowed: a greater length, or shorter answers"
    )


def over(service: Service, task: Task, tokens: int) -> str | None:
    """Why a prompt of so many tokens leaves no room for the task's longest answer, or None."""
    room = service.settings.model.max_model_len - task.max_tokens
    if tokens <= room:
        return None
    return f"its prompt has {tokens} tokens; allowed: {room}, so that an answer fits"
