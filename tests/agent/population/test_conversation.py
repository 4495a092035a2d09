"""Conversations asked again: the member's answers, the recorded turns between them."""

from collections.abc import Mapping, Sequence
from typing import Any

from agent.population.conversation import Conversation, replay, said
from agent.population.schedule import UNASKED, Completion, Prompt

USER, NEXT, LAST = ({"role": "user", "content": text} for text in ("one", "two", "three"))
THREE = Conversation([USER], ([NEXT], [LAST]), [{"type": "function"}])


class Counting:
    """Answers with the number of messages it got."""

    def __init__(self, *, refuse_at: int = 0) -> None:
        self.batches: list[int] = []
        self.limits: list[Sequence[int]] = []
        self._refuse_at = refuse_at

    def __call__(self, prompts: Sequence[Prompt], limits: Sequence[int]) -> list[Completion]:
        self.batches.append(len(prompts))
        self.limits.append(list(limits))
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> Completion:
        messages: Any = prompt["messages"] if isinstance(prompt, Mapping) else prompt
        if len(messages) == self._refuse_at:
            return Completion("", 0, UNASKED)
        return Completion(str(len(messages)), 2, "stop")


def test_each_turn_is_one_batch_and_follows_the_members_own_answers() -> None:
    ask = Counting()
    plain, short = [USER, NEXT], Conversation([USER], ([LAST],))
    answers = replay(ask, [THREE, plain, short], [5, 6, 7])
    assert ask.batches == [3, 2, 1]
    assert ask.limits == [[5, 6, 7], [5, 7], [5]]
    assert [each.text for each in answers] == ["5", "2", "3"]
    assert [each.tokens for each in answers] == [6, 2, 4]
    assert answers[1].conversation == ()
    assert [each["content"] for each in answers[0].conversation] == [
        "one",
        "1",
        "two",
        "3",
        "three",
        "5",
    ]


def test_a_turn_that_cannot_be_asked_ends_its_conversation() -> None:
    ask = Counting(refuse_at=3)
    [answer] = replay(ask, [THREE], [5])
    assert ask.batches == [1, 1]
    assert (answer.text, answer.tokens, answer.finish) == ("", 2, UNASKED)
    assert [each["content"] for each in answer.conversation] == ["one", "1", "two"]


def test_calls_have_the_ids_of_the_recorded_results() -> None:
    calls = tuple({"name": name, "arguments": "{}"} for name in "ab")
    results = [{"role": "tool", "tool_call_id": "x", "content": "4"}]
    message = said(Completion("", 3, "stop", calls), results)
    assert [each["id"] for each in message["tool_calls"]] == ["x", "call-1"]
    assert message["content"] is None
