"""What a round asks: the messages of each prompt, as a client sent them or by the task's template.

How long they are, and how the file of a round keeps them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from evaluators.task import Message, Row, Task, form_problem
from flows.service import Service

MESSAGE_TOKENS = 8  # a chat template's own, for each message; measured ones add 4 to 6
FIELDS = frozenset({"row", "messages", "sent"})  # of an entry in a round's file


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


def too_long(service: Service, task: Task, messages: Sequence[Message]) -> str | None:
    """Why a prompt leaves no room for its answer, or None. Tokens are counted a little high."""
    return over(service, task, count_tokens(service.origin.directory, messages))


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


def over(service: Service, task: Task, tokens: int) -> str | None:
    """Why a prompt of so many tokens leaves no room for the task's longest answer, or None."""
    room = service.settings.model.max_model_len - task.max_tokens
    if tokens <= room:
        return None
    return f"its prompt has {tokens} tokens; allowed: {room}, so that an answer fits"
