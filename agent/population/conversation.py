"""Recorded conversations asked again, turn by turn.

Every answer is generated anew. What the client or a tool said after it follows as it was recorded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agent.errors import UserError
from agent.learner.noise import Address, NoiseKind
from agent.population.schedule import UNASKED, Completion, Engine, Message, Messages, Prompt

Ask = Callable[[Sequence[Prompt], Sequence[int]], list[Completion]]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages before the first answer, and those between one answer and the next.

    A conversation of n answers has n - 1 entries in ``follow``. ``tools`` are those of the chat
    completions API.
    """

    opening: Messages
    follow: tuple[Messages, ...] = ()
    tools: Sequence[Mapping[str, Any]] | None = None


def replay(
    ask: Ask, prompts: Sequence[Prompt | Conversation], limits: Sequence[int]
) -> list[Completion]:
    """One completion a prompt: of a conversation the last answer, all messages and all tokens.

    Args:
        ask: Answers prompts, each within its limit (tokens).
        prompts: Prompts of one answer, and conversations.
        limits: Longest answer of each prompt, in every turn of it.

    All conversations are at the same turn, so that a turn is one batch. An answer that could not be
    asked for (``UNASKED``: too long by now, or refused by the chat template) ends its conversation.
    """
    talks = [_Talk(prompt) for prompt in prompts]
    waiting = list(range(len(talks)))
    while waiting:
        answers = ask([talks[at].request() for at in waiting], [limits[at] for at in waiting])
        if len(answers) != len(waiting):  # the caller says which member it was
            return answers
        for at, answer in zip(waiting, answers, strict=True):
            talks[at].take(answer)
        waiting = [at for at in waiting if talks[at].goes_on]
    return [talk.completion for talk in talks if talk.completion is not None]


@dataclass(slots=True)
class _Talk:
    """One prompt while it is answered."""

    prompt: Prompt | Conversation
    messages: list[Message] = field(default_factory=list)
    turn: int = 0
    completion: Completion | None = None
    goes_on: bool = True

    def request(self) -> Prompt:
        """What the engine is asked next."""
        if not isinstance(self.prompt, Conversation):
            return self.prompt
        self.messages = self.messages or [*self.prompt.opening]
        return {"messages": list(self.messages), "tools": self.prompt.tools}

    def take(self, answer: Completion) -> None:
        """Append an answer, and what was recorded after it."""
        before, self.completion, self.goes_on = self.completion, answer, False
        if not isinstance(self.prompt, Conversation):
            return
        after = self.prompt.follow[self.turn : self.turn + 1]
        if answer.finish != UNASKED:
            follow = after[0] if after else ()
            self.messages += [said(answer, follow), *follow]
            self.goes_on = bool(after)
        self.turn += 1
        tokens = answer.tokens + (before.tokens if before else 0)
        self.completion = replace(answer, tokens=tokens, conversation=tuple(self.messages))


def said(answer: Completion, follow: Messages) -> Message:
    """An answer as a message; its calls have the ids that the recorded results refer to."""
    if not answer.calls:
        return {"role": "assistant", "content": answer.text}
    ids = [str(each["tool_call_id"]) for each in follow if each.get("tool_call_id")]
    ids += [f"call-{place}" for place in range(len(ids), len(answer.calls))]
    calls = [
        {"id": call_id, "type": "function", "function": dict(call)}
        for call_id, call in zip(ids, answer.calls, strict=False)
    ]
    return {"role": "assistant", "content": answer.text or None, "tool_calls": calls}


def answers_of(
    prompts: Sequence[Prompt | Conversation],
    limits: Sequence[int],
    member: tuple[Address, float] | None,
    noise: NoiseKind,
    engine: Engine,
) -> list[Completion]:
    """One call of one engine, or one a turn of the conversations."""
    return replay(lambda asked, at: engine.generate(asked, at, member, noise), prompts, limits)


def each_limit(max_tokens: int | Sequence[int], count: int) -> list[int]:
    """One limit a prompt."""
    limits = [max_tokens] * count if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != count:
        raise UserError(f"max_tokens: {len(limits)} of them for {count} prompts")
    return limits
