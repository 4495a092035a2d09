"""What is taught is right, short, and leaves the choice of working it out open."""

import re
from random import Random

from deploy.embedded.drills import (
    DIRECT_SHARE,
    MIXTURE,
    answer,
    drill,
    expression,
    find_kind,
    total,
)
from deploy.embedded.rows import GENERATORS, KINDS, rows


def test_a_countdown_answer_uses_each_number_once_and_hits() -> None:
    for row in rows("countdown", "train", 300, seed=0):
        text = expression(row["nums"], row["target"])
        x, first, y, second, z = re.fullmatch(r"(\d+)([+*-])(\d+)([+-])(\d+)", text).groups()
        left = {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y)}[first]
        assert left + int(f"{second}{z}") == row["target"]
        assert sorted(map(int, (x, y, z))) == sorted(row["nums"])


def test_a_share_of_gsm8k_is_answered_at_once() -> None:
    (row,) = rows("gsm8k", "train", 1, seed=0)
    rng = Random(0)
    said = [answer("gsm8k", row, rng) for _ in range(2000)]
    direct = sum(text.startswith("#### ") for text in said) / len(said)
    assert abs(direct - DIRECT_SHARE) < 0.04
    assert set(said) == {row["answer"], row["answer"].split("\n")[-1]}


def test_every_task_has_an_answer_and_a_share() -> None:
    assert set(GENERATORS) < set(MIXTURE)
    assert abs(sum(MIXTURE.values()) - 1) < 1e-9
    for task in GENERATORS:
        for row in rows(task, "eval", 20, seed=0):
            assert 0 < len(answer(task, row, Random(0))) < 80


def test_drills_of_arithmetic_are_true() -> None:
    rng = Random(0)
    for asked, said in (turn for _ in range(200) for turn in total(rng)):
        x, sign, y = re.fullmatch(r"(\d+)([+*-])(\d+)", asked).groups()
        result = {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y)}[sign]
        assert said == f"<<{asked}={result}>>{result}"
        assert result >= 0


def test_lookups_name_the_line_that_answers_each_question() -> None:
    rng = Random(0)
    for turns in (find_kind(rng) for _ in range(100)):
        *shown, first = turns[0][0].split("\n")
        lines = dict(line.split(": ") for line in shown)
        questions = [(first, turns[0][1]), *turns[1:]]
        assert len(questions) == len(lines)
        for question, mark in questions:
            (name,) = re.fullmatch(r"an? (\w+)\?", question).groups()
            assert lines[mark] in KINDS[name]


def test_a_drill_is_a_conversation_of_turns() -> None:
    for chat in (drill(Random(seed)) for seed in range(100)):
        assert [m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert all(m["content"] for m in chat)
