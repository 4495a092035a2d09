"""Tasks: rows in, chat messages out, and a verdict on each completion.

A task is data plus pure functions of a row (key and fields; gold and wrong, where answers are
known) and one pure function of (completion, row), the verifier. ``judge`` applies it to one
completion, ``score_lines`` to JSONL.
Nothing here reads a file, a clock or the environment.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from agent.errors import UserError

Row = Mapping[str, Any]
Message = dict[str, Any]  # {"role": ..., "content": ...}, of tools as the chat completions API

EXTRACTION_VERSION = "2"  # of the tasks here: raise it when any extraction changes
MAX_COMPLETION_CHARS = 1_000_000  # longest text a verifier gets: the end of the completion
MAX_SHOWN_CHARS = 1000  # of an extracted answer and of an error
MAX_SHOWN_ROW = 120  # of what is wrong with a row

_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Reward and format in [0, 1]; extracted is the answer that was read, None without one."""

    reward: float
    format: float
    extracted: str | None
    error: str | None = None  # why a verifier gave no verdict; the reward is then 0


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows of a task come from.

    ``train_split == eval_split`` says the data set has one split, which is divided by hash;
    ``train_split`` None says the rows are never trained on. ``file`` names rows that lie beside
    this package (or, for an own task, an absolute path) and makes ``hub_id`` unnecessary; with
    ``{split}`` in it each split has a file of its own.
    """

    hub_id: str
    config: str | None = None
    train_split: str | None = "train"
    eval_split: str | None = "test"
    revision: str = "main"
    shots_split: str | None = None
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One task; ``verify`` must be pure and bounded, and ``gold`` must score 1, ``wrong`` 0.

    Of a graded task ``gold`` must score more than ``wrong`` and than an empty answer. Without
    ``gold``, where a verifier judges by the row alone, these must score less than 1.
    """

    name: str
    source: Source
    key: Callable[[Row], str]
    fields: Callable[[Row], Mapping[str, str]]  # what the template may name
    template: str
    verify: Callable[[str, Row], Verdict]
    gold: Callable[[Row], str] | None = None  # an answer that is known to be right
    wrong: Callable[[Row], str] | None = None  # one that is known to be wrong
    target: bool = False  # can be trained on
    format_weight: float = 0.0
    max_tokens: int = 1024
    zero_tolerance: bool = False  # a prior task that may not lose a single row significantly
    graded: bool = False  # rewards between 0 and 1 count; otherwise they are 0 or 1
    shots: int = 0  # worked examples before the question
    shot_group: Callable[[Row], str] | None = None  # a row's examples come from its own group
    demonstrate: Callable[[Row], str] | None = None  # an example's answer; gold when None
    system: str | None = None  # a message before all others
    chat: Callable[[Row], Sequence[Message]] | None = None  # a row's own messages, for the template
    prefill: str | None = None  # the assistant's first words, given
    # Judges all messages of a client's session at its end, the last answer included; without it
    # every request is an example of its own. Pure and bounded, as ``verify``.
    converse: Callable[[Sequence[Message], Row], Verdict] | None = None
    version: str = EXTRACTION_VERSION  # of the extraction; part of the harness hash

    def worked(self, row: Row) -> str:
        """The answer to a row as a worked example shows it; it contains the gold answer.

        Raises:
            UserError: The task knows no answers.
        """
        known = self.demonstrate or self.gold
        if known is None:
            raise UserError(f"task {self.name!r}: worked examples need demonstrate or gold")
        return known(row)

    def messages(self, row: Row, shots: Sequence[Row] = ()) -> list[Message]:
        """The chat for one row: each example as a user and an assistant turn, then the question."""
        if self.chat is not None:
            prefill = [] if self.prefill is None else [self.prefill]
            given = [{"role": "assistant", "content": each} for each in prefill]
            return [*map(dict, self.chat(row)), *given]
        chat = [] if self.system is None else [{"role": "system", "content": self.system}]
        for shot in shots:
            chat.append({"role": "user", "content": render(self.template, self.fields(shot))})
            chat.append({"role": "assistant", "content": self.worked(shot)})
        chat.append({"role": "user", "content": render(self.template, self.fields(row))})
        if self.prefill is not None:
            chat.append({"role": "assistant", "content": self.prefill})
        return chat


def render(template: str, fields: Mapping[str, str]) -> str:
    """Replace ``{name}`` by its field and ``{{`` ``}}`` by braces; nothing else is looked at.

    Unlike ``str.format`` there are no attributes, indices or conversions to reach through, and
    braces inside a field stay as they are.
    """

    def value(match: re.Match[str]) -> str:
        token, name = match.group(), match.group(1)
        if token in ("{{", "}}"):
            return token[0]
        if name not in fields:
            allowed = ", ".join(sorted(fields))
            raise UserError(f"prompt template: unknown field {token!r}; allowed: {allowed}")
        return fields[name]

    return _FIELD.sub(value, template)


def with_prompt(
    task: Task,
    template: str | None = None,
    *,
    system: str | None = None,
    prefill: str | None = None,
    shots: int | None = None,
) -> Task:
    """The same task with another prompt; parts that are None stay.

    Raises:
        UserError: Another template, system message or examples for rows with their own messages.
    """
    if task.chat is not None and any(each is not None for each in (template, system, shots)):
        raise UserError(f"prompt of task {task.name!r}: its rows have messages; allowed: prefill")
    changes: dict[str, Any] = {
        "template": template,
        "system": system,
        "prefill": prefill,
        "shots": shots,
    }
    return replace(task, **{name: value for name, value in changes.items() if value is not None})


def training_reward(task: Task, verdict: Verdict) -> float:
    """The objective of training: reward + format_weight * format."""
    return verdict.reward + task.format_weight * verdict.format


def content_key(*parts: object) -> str:
    """16 hex characters that depend on the content alone, for rows whose data set has no id."""
    return sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def judge(task: Task, completion: str, row: Row) -> Verdict:
    """The verdict on one completion; a verifier that fails is an error on this row, not a reward.

    What is read is the given prefill followed by the completion, of it what follows the last
    ``</think>`` (all of it without one), and of that the last ``MAX_COMPLETION_CHARS`` characters.
    This is the one boundary where a verifier's exceptions are caught, so that the other rows of a
    round go on.
    """
    text = ((task.prefill or "") + completion).rpartition("</think>")[2][-MAX_COMPLETION_CHARS:]
    return _caught(lambda: task.verify(text, row))


def judge_conversation(task: Task, messages: Sequence[Message], row: Row) -> Verdict:
    """The verdict of a task's ``converse`` on a conversation; as ``judge`` in all else.

    Of an answer's text it reads what follows the last ``</think>``.
    """
    assert task.converse is not None  # callers look
    converse, read = task.converse, [_without_thinking(message) for message in messages]
    return _caught(lambda: converse(read, row))


def _without_thinking(message: Message) -> Message:
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, str):
        return message
    return message | {"content": content.rpartition("</think>")[2][-MAX_COMPLETION_CHARS:]}


def _caught(verdict: Callable[[], object]) -> Verdict:
    try:
        return checked(verdict())
    except Exception as error:
        return failed(f"{type(error).__name__}: {error}")


def failed(error: str) -> Verdict:
    """No verdict: reward 0 and the reason on one line."""
    return Verdict(0.0, 0.0, None, " ".join(error.split())[:MAX_SHOWN_CHARS])


def checked(verdict: object) -> Verdict:
    """The same verdict, its text cut, or an error where it is none: rewards lie in [0, 1]."""
    if not isinstance(verdict, Verdict):
        return failed(f"verify returned {type(verdict).__name__}; a Verdict is wanted")
    for name, value in (("reward", verdict.reward), ("format", verdict.format)):
        if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            return failed(f"{name} {value!r}; a number from 0 to 1 is wanted")
    if verdict.extracted is None:
        return verdict
    return replace(verdict, extracted=str(verdict.extracted)[:MAX_SHOWN_CHARS])


def form_problem(task: Task, row: object) -> str | None:
    """Why a row from outside cannot be asked at all, or None: its key and its prompt are tried.

    A task's functions may assume the rows of its data set; here whatever they raise on another
    row is the reason. A lone surrogate is refused because no tokenizer encodes it.
    """
    if not isinstance(row, Mapping):
        return f"the row is a {type(row).__name__}; an object is wanted"
    try:
        key = task.key(row)
        fields: Mapping[str, object] = task.fields(row)  # of a foreign row: anything
        for name, value in fields.items():
            if not isinstance(value, str):
                return f"the row's {name} is {type(value).__name__}; text is wanted"
        texts = [message["content"] for message in task.messages(row)]
        "".join([key, *texts]).encode()
    except Exception as error:
        return f"the row does not make a prompt ({_short(error)})"
    return None if key else "the row's key is empty"


def row_problem(task: Task, row: object) -> str | None:
    """Why a row from outside cannot be learnt from, or None.

    Beside its form: the verifier has to give its gold answer a higher reward than a wrong one; a
    task without gold has to give a wrong one (without ``wrong`` an empty one) less than 1.
    """
    if problem := form_problem(task, row):
        return problem
    assert isinstance(row, Mapping)
    known = [("gold", task.gold)] if task.gold else []
    rewards = []
    for name, make in (*known, ("wrong", task.wrong) if task.wrong else ("empty", _empty)):
        try:
            answer = make(row)
        except Exception as error:
            return f"the row gives no {name} answer ({_short(error)})"
        verdict = judge(replace(task, prefill=None), answer, row)
        if verdict.error:
            return f"the {name} answer has no verdict ({verdict.error[:MAX_SHOWN_ROW]})"
        rewards.append(verdict.reward)
    if task.gold and rewards[0] <= rewards[1]:
        return f"the gold answer scores {rewards[0]:g}, a wrong one {rewards[1]:g}"
    if rewards[-1] >= 1:
        return f"the {name} answer scores {rewards[-1]:g}; less than 1 is wanted"
    return None


def _empty(row: Row) -> str:
    return ""


def _short(error: Exception) -> str:
    """Type and message of an exception, on one line of ASCII, cut: it may quote the row."""
    kind = "no field" if isinstance(error, KeyError) else f"{type(error).__name__}:"
    line = " ".join(f"{kind} {error}".split())[:MAX_SHOWN_ROW]
    return line.encode("ascii", "backslashreplace").decode()


def score_lines(task: Task, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Each line ``{completion, example}`` becomes ``{reward, format, extracted}``.

    Blank lines are skipped.

    A row on which the verifier fails scores 0 and says why under ``error``.

    Raises:
        UserError: a line that is not such an object, by its number.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        completion, example = parse_line(line, number)
        verdict = judge(task, completion, example)
        scores: dict[str, Any] = {
            "reward": verdict.reward,
            "format": verdict.format,
            "extracted": verdict.extracted,
        }
        yield scores | ({"error": verdict.error} if verdict.error else {})


def parse_line(line: str, number: int) -> tuple[str, Row]:
    """The completion (a string) and the example (an object) of one line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"line {number}: not JSON ({error})") from None
    if not isinstance(value, Mapping):
        raise UserError(f"line {number}: {type(value).__name__}; an object is wanted")
    completion, example = value.get("completion"), value.get("example")
    if not isinstance(completion, str):
        raise UserError(f"line {number}: completion {_kind(completion)}; a string is wanted")
    if not isinstance(example, Mapping):
        raise UserError(f"line {number}: example {_kind(example)}; an object is wanted")
    return completion, example


def _kind(value: object) -> str:
    return "is missing" if value is None else f"is {type(value).__name__}"
