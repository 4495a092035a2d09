"""Rows as clients send them: what does not fit its task is told and counted, and ends no round."""

import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from agent.config import load
from agent.gateway.verifier import RowRefusedError
from agent.home import Home
from agent.store.experience import Answer, Interaction, Judgement, Unjudged
from agent.store.experience_db import answers, interactions
from evaluators.held_out import HeldOut, row_text
from evaluators.loading import find_file
from evaluators.loading import rows as rows_of
from evaluators.task import Task, row_problem
from evaluators.tasks import TASKS
from flows.learn.collect import Collected, admit, collect_rows, evaluation_pool, held_out
from flows.learn.prompts import as_sent
from flows.serve.gateway_process import verify
from flows.service import Service

QUESTION = "Tom has 3 pens and buys 4. How many?"
SMALL: dict[str, Any] = {"model": {"max_model_len": 1024}, "tasks": {"rows": 40}}  # quickly indexed


@pytest.fixture
def service(tmp_path: Path) -> Service:
    home = Home.at(tmp_path)
    (home.root / "salt").write_text("a salt of tests")
    return Service(home, load(None, **SMALL))


def store(service: Service, task: str, requests: Mapping[str, Mapping[str, Any]]) -> None:
    """Verified requests as an older home holds them: nobody looked at their rows.

    ``requests``: id -> columns that differ from the usual ones.
    """
    rows = [
        Interaction(**{
            "inference_id": ident, "created": time.time() - 1, "endpoint": "chat.completions",
            "model": "m", "version": "v", "principal": "ann", "status": "ok", "latency_s": 0.1,
            "prompt_tokens": 5, "completion_tokens": 1, "task": task, "source": "submitted",
            "prompt": json.dumps([{"role": "user", "content": ident}]), "prompt_hash": ident,
            "row_hash": ident, "group_hash": ident, "answers": (Answer(0, "x", "stop"),),
            **columns,
        })
        for ident, columns in requests.items()
    ]  # fmt: skip
    service.experience.record(rows)
    service.experience.judge([Judgement(each, 0, judged=1.0, reward=1.0) for each in requests])


def answered(task: str, completion: str) -> Unjudged:
    return Unjudged("i", 0, task, None, None, completion, "v", "ann")


def why(collected: Collected) -> dict[str, tuple[str, str, str]]:
    """Inference id -> principal, kind of reason and reason."""
    return {
        each.row.inference_id: (each.row.principal, each.why, each.reason)
        for each in collected.set_aside
    }


BAD = [
    ("gsm8k", {"answer": "#### 7"}, "no field 'question'"),
    ("gsm8k", {"question": QUESTION}, "no field 'answer'"),
    ("gsm8k", {"question": 5, "answer": "#### 7"}, "question is int; text is wanted"),
    ("gsm8k", {"question": [QUESTION], "answer": "#### 7"}, "question is list; text is"),
    ("gsm8k", {"question": "word " * 3900, "answer": "#### 7"}, "tokens; allowed: 976"),
    ("gsm8k", {"question": QUESTION, "answer": "seven"}, "no wrong answer|has no verdict"),
    ("gsm8k", {"question": QUESTION, "answer": 7}, "no gold answer"),
    ("gsm8k", {"question": "a \ud800 b", "answer": "#### 7"}, "surrogates not allowed"),
    ("countdown", {"nums": [2, 3], "target": 7}, "no gold answer .* no solution"),
    ("countdown", {"nums": [97, 89, 83, 79, 73], "target": 10**12}, "no solution"),
    ("countdown", {"nums": [1] * 9, "target": 7}, "9 numbers; allowed: 1 to 5"),
    ("countdown", {"nums": ["1e999999999"], "target": 7}, "allowed: integers|invalid literal"),
    ("countdown", {"nums": 5, "target": 5}, "does not make a prompt"),
    ("proofwriter", {"theory": "A is b.", "question": "A is b.", "answer": "Maybe"}, "answer"),
    (
        "proofwriter",
        {"theory": None, "question": "A is b.", "answer": "True"},
        "theory is NoneType",
    ),
]


PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
ARC = {"id": "x", "question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
ARC |= {"answerKey": "A"}
HELLASWAG = {"ctx": "c", "endings": ["a", "b", "c", "d"], "label": "2"}
MMLU = {"question_id": 1, "question": "q", "options": ["a", "b"], "answer": "B", "category": "c"}
NO_OPTION = "answer is none of the"
BAD_CHOICES = [  # of tasks that are no targets
    *(("piqa", PIQA | {"label": label}, NO_OPTION) for label in (7, -1, "2", 2.5)),
    ("piqa", PIQA | {"label": None}, "no gold answer"),
    ("arc_challenge", ARC | {"choices": {"text": ["a"], "label": ["A", "B"]}}, "1 texts, 2 labels"),
    ("arc_challenge", ARC | {"choices": {"text": ["a", "b"], "label": []}}, "2 texts, 0 labels"),
    ("arc_challenge", ARC | {"choices": {"text": [], "label": []}}, NO_OPTION),
    ("arc_challenge", ARC | {"choices": ["a", "b"]}, "does not make a prompt"),
    *(("arc_challenge", ARC | {"answerKey": key}, NO_OPTION) for key in ("C", "3", "AB", "")),
    *(("hellaswag", HELLASWAG | {"label": label}, NO_OPTION) for label in (4, "9", -1)),
    ("hellaswag", HELLASWAG | {"endings": ["a", "b"]}, NO_OPTION),
    ("hellaswag", HELLASWAG | {"label": ""}, "no gold answer"),
    *(("mmlu_pro", MMLU | {"answer": answer}, NO_OPTION) for answer in ("C", "Z", "", "AB")),
]


@pytest.mark.parametrize(("task", "row", "reason"), BAD)
def test_a_row_that_does_not_fit_is_refused_with_the_reason_and_ends_no_round(
    service: Service, task: str, row: Mapping[str, Any], reason: str
) -> None:
    store(service, task, {"bad": {"example": json.dumps(row), "principal": "eve"}})
    collected = collect_rows(service, task, 4)
    principal, kind, told = why(collected)["bad"]
    assert (principal, kind) == ("eve", "refused")
    assert len(collected.asked) == 4

    assert re.search(reason, told), told


@pytest.mark.parametrize("text", ["{", "5", "null", '"text"', "[" * 100_000, '["a"]'])
def test_what_is_no_object_is_refused(service: Service, text: str) -> None:
    store(service, "gsm8k", {"bad": {"example": text}})
    assert why(collect_rows(service, "gsm8k", 4))["bad"][1] == "refused"


def test_a_known_row_that_is_gone_is_refused(service: Service) -> None:
    store(service, "gsm8k", {"bad": {"source": "known", "example_id": "gone"}})
    assert why(collect_rows(service, "gsm8k", 4))["bad"][2] == "no training row has its example_id"


def test_every_row_of_every_data_set_is_admitted(service: Service, real_rows: Path | None) -> None:
    """The embedded model's, and real ones where this machine has some."""
    for name, task in service.tasks.items():
        split = "train" if task.source.train_split else "eval"
        found = service.rows(name, split, 40)
        if real_rows is not None and find_file(real_rows / name, ["test", "validation"]):
            found += rows_of(TASKS[name], "eval", data_dir=real_rows, limit=40)
        assert [row_problem(task, row) for row in found] == [None] * len(found), name


ODD = (
    None, True, 0, -1, 1e308, float("nan"), 10**400, "", " ", "\ud800", "\x00", "\u202e\u200b",
    "9" * 5000, "{question}", "x" * 50_000, [], {}, [[]], {"": {}}, ["a", 1, None], "1e999999999",
)  # fmt: skip


def hostile(task: Task, row: Mapping[str, Any], draw: random.Random) -> Iterator[str]:
    """Rows made from a good one, as JSON: wrong types, missing, huge, nested, odd Unicode."""
    while True:
        spoilt = json.loads(json.dumps(row))
        field = draw.choice([*spoilt])
        way = draw.randrange(6)
        if way == 0:
            del spoilt[field]
        elif way == 1:
            spoilt[field] = draw.choice(ODD)
        elif way == 2:
            nested: Any = spoilt[field]
            for _ in range(draw.choice([1, 30, 400])):
                nested = [nested] if draw.random() < 0.5 else {"a": nested}
            spoilt[field] = nested
        elif way == 3:
            spoilt[field] = [spoilt[field]] * draw.choice([0, 2, 2000])
        elif way == 4:
            spoilt[field] = f"{draw.choice(ODD)}{spoilt[field]}{draw.choice(ODD)}"
        else:
            spoilt = draw.choice(ODD)
        yield json.dumps(spoilt)


def test_hostile_rows_of_any_kind_end_no_round_and_each_is_counted(
    service: Service, scale: Callable[[int, int], int]
) -> None:
    """Over the targets, stored as if nobody had looked: each is asked or set aside, with a name."""
    draw, count = random.Random(7), scale(60, 400)
    for target in ("gsm8k", "countdown", "proofwriter"):
        good = service.rows(target, "train", 5)
        made = {
            f"{target}-{n}": {
                "example": next(hostile(service.task(target), draw.choice(good), draw)),
                "principal": f"p{n % 7}",
            }
            for n in range(count)
        }
        store(service, target, made)
        collected = collect_rows(service, target, 50)
        told = why(collected)
        used = {each.inference_id for each in collected.traffic}
        assert len(collected.asked) == 50
        assert sorted([*told, *used]) == sorted(made)
        assert len(told) > count / 2
        for ident, (principal, _, reason) in told.items():
            assert principal == made[ident]["principal"]
            assert reason.isprintable()
            assert reason.isascii()
        assert sum(each["requests"] for each in collected.reasons()) == len(told)


def test_hostile_rows_of_any_task_are_told_at_once_without_an_exception(
    service: Service, scale: Callable[[int, int], int]
) -> None:
    draw = random.Random(8)
    for name, task in service.tasks.items():
        split = "train" if task.source.train_split else "eval"
        (good,) = service.rows(name, split, 1)
        rows = hostile(task, good, draw)
        problems = []
        for _ in range(scale(30, 400)):
            row = json.loads(next(rows))
            problem = admit(service, task, row)
            problems.append(problem or row_problem(task, row))
        assert sum(problem is not None for problem in problems) > len(problems) / 3, name


SPELT: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "trailing space": lambda text: text + "  \n",
    "case": str.upper,
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
    "curly quotes": lambda text: text.replace("'", "\u2019").replace('"', "\u201d"),
    "zero width": lambda text: text[:9] + "\u200b" + text[9:],
    "look-alike letters": lambda text: text.replace("a", "\u0430").replace("o", "\u03bf"),
    "an added clause": lambda text: f"Please help me with this. {text} Thank you.",
    "full width": lambda text: text.translate({n: n + 0xFEE0 for n in range(33, 127)}),
}


@pytest.mark.parametrize("spell", SPELT.values(), ids=SPELT)
def test_a_row_that_judges_is_recognised_however_it_is_spelt(
    service: Service, spell: Callable[[str], str]
) -> None:
    """Open, more and sealed ones, in the row a client sends or in the messages it sent; and the
    endpoint knows them as soon as it has read them.
    """
    pool = evaluation_pool(service, "gsm8k")
    rows = held_out(service, "gsm8k")
    requests, ready = {}, Future[HeldOut]()
    ready.set_result(rows)
    for place in (0, len(pool) // 2, len(pool) - 1):
        text = spell(pool[place]["question"])
        example = json.dumps({"question": text, "answer": "#### 7"})
        asked = json.dumps([TURNS[0], {"role": "user", "content": text}])
        requests[f"row {place}"] = {"example": example}
        requests[f"asked {place}"] = {"example": good_row(place), "prompt": asked}
        with pytest.raises(RowRefusedError, match="it holds a row that judges gsm8k") as refused:
            verify(service, answered("gsm8k", "#### 7"), json.loads(example), ready)
        assert refused.value.verdict is not None
        assert refused.value.verdict.reward == 1.0
        not_read_yet = verify(service, answered("gsm8k", "#### 7"), json.loads(example))
        assert not_read_yet.reward == 1.0
    store(service, "gsm8k", requests)
    collected = collect_rows(service, "gsm8k", 3)
    told = {("overlapping", "it holds a row that judges gsm8k")}
    assert {each[1:] for each in why(collected).values()} == told
    assert len(collected.set_aside) == 6
    assert collected.leaks == {}


def test_rows_that_judge_prior_tasks_are_recognised_too(service: Service) -> None:
    priors = [name for name in service.priors("gsm8k") if name != "countdown"]
    assert len(priors) == 6
    asked = {
        name: row_text(service.task(name), evaluation_pool(service, name)[7]) for name in priors
    }
    store(service, "gsm8k", {
        name: {
            "example": good_row(n),
            "prompt": json.dumps([{"role": "user", "content": f"Hello! {text.upper()}"}]),
        }
        for n, (name, text) in enumerate(asked.items())
    })  # fmt: skip
    told = {ident: each[2] for ident, each in why(collect_rows(service, "gsm8k", 3)).items()}
    assert told == {name: f"it holds a row that judges {name}" for name in priors}


def test_what_the_endpoint_refused_is_counted_with_principal_and_reason(service: Service) -> None:
    """Its reason is a verdict's error; a request whose row has not come is neither."""
    store(service, "gsm8k", {"ok": {"example": good_row(1)}})
    more = [
        {"inference_id": "bad", "example": good_row(2), "principal": "eve"},
        {"inference_id": "late", "source": None, "row_hash": None},
    ]
    for columns in more:
        store(service, "countdown", {str(columns["inference_id"]): {"task": "gsm8k", **columns}})
    with service.experience.writing() as connection:
        mine = interactions.c.inference_id.in_(["bad", "late"])
        ids = select(interactions.c.id).where(mine).scalar_subquery()
        connection.execute(
            update(answers)
            .where(answers.c.interaction_id.in_(ids))
            .values(reward=None, judged=None, seal=None)
        )
    service.experience.judge([Judgement("bad", 0, judged=1.0, error="row refused: no gold")])
    collected = collect_rows(service, "gsm8k", 3)
    (told,) = collected.reasons()
    assert told == {
        "principal": "eve", "why": "unverified", "reason": "row refused: no gold", "requests": 1
    }  # fmt: skip
    assert collected.to_json()["set_aside"] == {"unverified": 1}
    assert collected.to_json()["waiting_for_their_row"] == 1


def test_the_endpoint_refuses_a_row_at_once_or_by_its_verdict(service: Service) -> None:
    """The inputs of ``BAD``: each by one of the two, with the same reason as in collecting."""
    for task, good in (("piqa", PIQA), ("arc_challenge", ARC), ("hellaswag", HELLASWAG)):
        assert row_problem(service.task(task), good) is None
    assert row_problem(service.task("mmlu_pro"), MMLU) is None
    for task, row, reason in (*BAD, *BAD_CHOICES):
        problem = admit(service, service.task(task), row)
        if problem is None:
            with pytest.raises(RowRefusedError) as told:
                verify(service, answered(task, ""), row)
            problem = str(told.value)
        assert re.search(reason, problem)


TURNS = [
    {"role": "system", "content": "Answer in one word,  please.\n"},
    {"role": "user", "content": "2 pens?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And 5 more — how many “pens”?\u00a0"},
]


def good_row(number: int) -> str:
    return json.dumps({"question": f"{QUESTION} Shop {number}.", "answer": "#### 7"})


def test_a_request_is_asked_as_it_was_sent_byte_for_byte(service: Service) -> None:
    """System message and turns are kept; the template asks the data set's rows alone."""
    store(service, "gsm8k", {"one": {"example": good_row(1), "prompt": json.dumps(TURNS)}})
    collected = collect_rows(service, "gsm8k", 3)
    sent, *own = collected.asked
    assert (sent.messages, sent.sent) == (TURNS, True)
    task = service.task("gsm8k")
    assert [each.messages for each in own] == [task.messages(each.row) for each in own]
    assert collected.preview()["prompts"]["as sent by clients"] == [TURNS]
    assert "pens" not in json.dumps(collected.to_json())  # which the plan keeps for good


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("What is it?", "plain prompt"),
        ([1, 2, 3], "plain prompt"),
        ([], "plain prompt"),
        ([*TURNS, {"role": "assistant", "content": "7"}], "ends with an answer"),
        ({"messages": TURNS, "tools": [{"type": "function"}]}, "tools"),
        ([{"role": "tool", "tool_call_id": "1", "content": "7"}, TURNS[1]], "tools"),
        ([{"role": "user", "content": None}], "without text"),
        ([{"role": "user", "content": "\ud800"}], "not Unicode"),
    ],
)
def test_what_cannot_be_asked_as_it_was_sent_is_told(
    service: Service, prompt: Any, reason: str
) -> None:
    store(service, "gsm8k", {"one": {"example": good_row(1), "prompt": json.dumps(prompt)}})
    _, kind, told = why(collect_rows(service, "gsm8k", 3))["one"]
    assert kind == "not_as_sent"
    assert reason in told


def test_parts_of_text_are_joined_as_the_engines_server_joins_them() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    sent = as_sent(TASKS["gsm8k"], {}, json.dumps([{"role": "user", "content": parts}]))
    assert sent.messages == [{"role": "user", "content": "one\ntwo"}]


def test_a_sent_prompt_has_to_leave_room_for_an_answer(service: Service) -> None:
    store(
        service,
        "gsm8k",
        {
            "fits": {"example": good_row(1), "prompt_tokens": 976},
            "long": {"example": good_row(2), "prompt_tokens": 977},
        },
    )
    collected = collect_rows(service, "gsm8k", 3)
    assert [each.inference_id for each in collected.traffic] == ["fits"]
    assert why(collected)["long"][1] == "not_as_sent"


@pytest.mark.parametrize("principal", ["local", "ann"])
def test_thirty_rows_of_the_only_client_are_all_used(tmp_path: Path, principal: str) -> None:
    service = Service(Home.at(tmp_path), load(None, **SMALL, gateway={"principal_cap": 0.01}))
    rows = {f"i{n}": {"example": good_row(n), "principal": principal} for n in range(30)}
    store(service, "gsm8k", rows)
    collected = collect_rows(service, "gsm8k", 96)
    assert (collected.from_traffic, collected.counts()) == (30, {"unverified": 0})


def test_with_several_clients_the_cap_holds_and_is_said_aloud(tmp_path: Path) -> None:
    service = Service(Home.at(tmp_path), load(None, **SMALL, gateway={"principal_cap": 0.02}))
    rows = {f"i{n}": {"example": good_row(n), "principal": f"p{n % 2}"} for n in range(60)}
    store(service, "gsm8k", rows)
    collected = collect_rows(service, "gsm8k", 100)
    assert collected.from_traffic == 4
    assert collected.counts()["over_cap"] > 20
    assert any("over_cap: principal: at most 2 of 100 rows" in line for line in collected.lines())
