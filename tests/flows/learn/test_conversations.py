"""A session of tool call, result and answer is one example, asked again turn by turn."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import exchange
import pytest

from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
from agent.population.conversation import Conversation
from agent.population.pool import Population
from agent.population.schedule import Completion, Prompt
from agent.store.experience import ExperienceRow, Turn
from agent.store.weights import Anchor, Parameters
from evaluators.task import Row
from evaluators.tasks import TASKS
from flows.learn.collect import Collected, collect_rows
from flows.learn.improve import run_round
from flows.learn.prompts import as_sent, opened_prompts, sessions
from flows.service import Service
from flows.show.terminal import Silent

COUNT = 6


@pytest.fixture(scope="module")
def talked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Service, list[Row]]:
    """A home after six sessions through its endpoint."""
    rows = exchange.questions(60 + COUNT)
    service = exchange.desk(tmp_path_factory.mktemp("desk"), rows[COUNT:])  # others than are sent
    exchange.converse(service, rows[:COUNT])
    return service, rows


def collected(service: Service) -> Collected:
    return collect_rows(service, "desk", COUNT + 4)


def test_a_taskset_of_several_turns_is_asked_again_turn_by_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the real library: its rewards look at every turn of the session, in the sandbox."""
    pytest.importorskip("verifiers.v1")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = exchange.questions(60 + COUNT)
    service = exchange.taskset_desk(tmp_path, rows, COUNT)
    verdicts = service.experience.rows("agents")
    assert [each.reward for each in verdicts] == [0.0] * COUNT  # none of them an error
    round_rows = collect_rows(service, "agents", COUNT + 4)
    assert (round_rows.from_traffic, round_rows.counts()) == (COUNT, {"unverified": 0})
    for asked in round_rows.asked[:COUNT]:
        assert isinstance(asked.prompt, Conversation)
        [[result]] = asked.follow or []
        assert (result["role"], result["content"]) == (
            "tool",
            exchange.told(asked.row["data"]),
        )


def test_a_session_is_one_example_with_the_reward_of_its_end(
    talked: tuple[Service, list[Row]],
) -> None:
    service, rows = talked
    round_rows = collected(service)
    assert round_rows.from_traffic == COUNT
    assert round_rows.counts() == {"unverified": 0}
    assert round_rows.waiting == 0  # the first requests of sessions whose end has its row
    by_question = {each.row["question"]: each for each in round_rows.asked[:COUNT]}
    assert by_question.keys() == {row["question"] for row in rows[:COUNT]}
    for row in rows[:COUNT]:
        asked = by_question[row["question"]]
        assert asked.messages == [{"role": "user", "content": exchange.ASKED}]
        assert asked.tools == exchange.TOOLS
        [[result]] = asked.follow or []
        assert (result["role"], result["content"]) == ("tool", exchange.told(row))
        assert isinstance(asked.prompt, Conversation)
    verdicts = service.experience.rows("desk")
    assert [each.reward for each in verdicts] == [0.0] * COUNT  # of the last answers alone
    own = round_rows.asked[COUNT:]
    assert {each.follow for each in own} == {None}  # the template's rows have one answer


def test_the_file_of_a_round_keeps_conversations(talked: tuple[Service, list[Row]]) -> None:
    service, _ = talked
    asked = collected(service).asked
    entries = json.loads(json.dumps([each.to_json() for each in asked]))
    read, left_out = opened_prompts(service, service.task("desk"), entries)
    assert left_out == {}
    assert [each.to_json() for each in read] == entries


class Desk:
    """An engine that calls the tool, and answers right once its theta has moved enough."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._gold = {exchange.told(row): str(row["answer"]) for row in rows}
        self.calls: list[Sequence[Prompt]] = []
        self._theta: Parameters

    def open(self, anchor: Path) -> str:
        self._theta = Parameters.zeros(Anchor.open(anchor))
        return self._theta.anchor.digest

    def restore(self, snapshot: Path | None, steps: Sequence[Step]) -> str:
        return self._theta.delta_hash()

    def apply(self, step: Step) -> Applied:
        return self._theta.apply(step)

    def save(self, path: Path) -> str:
        self._theta.save(path)
        return self._theta.delta_hash()

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int | Sequence[int],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[Completion]:
        self.calls.append(prompts)
        return [self._answer(prompt, member) for prompt in prompts]

    def _answer(self, prompt: Prompt, member: tuple[Address, float] | None) -> Completion:
        if not isinstance(prompt, Mapping):
            return Completion("no idea", 2, "stop")
        last = prompt["messages"][-1]
        if last["role"] == "user":
            return Completion("", 3, "stop", ({"name": "next_question", "arguments": "{}"},))
        assert member is not None
        right = member[0].pair % 2 == 0
        return Completion(self._gold[last["content"]] if right else "#### 1000", 5, "stop")

    def spent(self) -> dict[str, float]:
        return {"render": 0.0, "update": 0.0, "generate": 0.0}

    def close(self) -> None:
        """It holds nothing."""


def test_a_round_asks_every_member_turn_by_turn_and_rewards_the_end(
    talked: tuple[Service, list[Row]],
) -> None:
    service, rows = talked
    engine = Desk(rows)
    population = Population([lambda: engine])  # type: ignore[list-item]
    changes = {"generations": 1, "population": 4, "prompts": COUNT, "selection": 0}
    learnt = run_round(service, population, "desk", Silent(), changes)
    population.close()
    first, second = engine.calls[0], engine.calls[1]
    assert [len(first), len(second)] == [COUNT, COUNT]
    for before, after in zip(first, second, strict=True):
        assert isinstance(before, Mapping)
        assert isinstance(after, Mapping)
        opening, call, result = after["messages"]
        assert [opening] == before["messages"]
        assert call["tool_calls"][0]["id"] == result["tool_call_id"]  # the member's own call
        assert after["tools"] == exchange.TOOLS
    assert len(engine.calls) == 2 * 4  # two turns of four members
    [generation] = service.journal.generations(learnt.run_id)
    assert generation.rewards.mean(axis=1) == pytest.approx([1.1, 0.1, 1.1, 0.1])
    assert generation.step.no_op is None


def row(number: int, prompt: Any, session: str | None = "s", owner: str = "ann") -> ExperienceRow:
    return ExperienceRow(
        f"i{number}", 0, float(number), "v", owner, session, "desk", "submitted", None, "{}",
        json.dumps(prompt), f"p{number}", f"r{number}", "g", 1.0, 1.0, "x", None, 1.0,
    )  # fmt: skip


def turn(prompt: Any, session: str = "s", owner: str = "ann") -> Turn:
    return Turn(owner, session, json.dumps(prompt))


USER, SAID, MORE = (
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
)


def test_only_answers_that_the_session_was_given_are_generated_anew() -> None:
    example = [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]
    whole = [*example, USER, SAID, MORE]
    kept, aside = sessions([row(2, whole)], [turn([*example, USER]), turn(whole)])
    asked = as_sent(replace(TASKS["gsm8k"], converse=lambda m, r: None), {}, kept[0].prompt)  # type: ignore[arg-type, return-value]
    assert (asked.messages, asked.follow) == ([*example, USER], [[MORE]])
    assert aside == []


def test_rewards_within_a_session_belong_to_its_one_example() -> None:
    whole = [USER, SAID, MORE]
    rows = [row(1, [USER]), row(2, whole), row(3, [MORE])]
    kept, aside = sessions(rows, [turn([USER]), turn(whole), turn([MORE])])
    assert [each.inference_id for each in kept] == ["i2"]
    assert [each.row.inference_id for each in aside] == ["i3"]  # said aloud, not lost


@pytest.mark.parametrize(("session", "owner"), [("s", "bob"), ("t", "ann"), (None, "ann")])
def test_sessions_are_those_of_one_principal(session: str | None, owner: str) -> None:
    whole = [USER, SAID, MORE]
    kept, aside = sessions([row(1, [USER], session, owner), row(2, whole)], [turn(whole)])
    assert (len(kept), aside) == (2, [])


def test_without_a_verifier_of_conversations_tools_are_set_aside() -> None:
    with pytest.raises(ValueError, match="it came with tools"):
        as_sent(TASKS["gsm8k"], {}, json.dumps({"messages": [USER], "tools": exchange.TOOLS}))
