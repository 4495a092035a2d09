"""Figures of an evaluation: what a gain consists of."""

from typing import Any

import pytest

from agent.errors import UserError
from evaluators.summary import gain


def answer(
    number: int, text: str, reward: float, form: float = 1.0, cut: bool = False
) -> dict[str, Any]:
    return {
        "example_id": str(number), "completion": text, "reward": reward, "format": form,
        "finish": "length" if cut else "stop", "tokens": len(text),
    }  # fmt: skip


def test_a_gain_by_another_form_of_answer_is_not_one_among_answers_alike() -> None:
    before = [answer(0, "one two three four", 0), answer(1, "5", 0), answer(2, "6", 1),
              answer(3, "long" * 9, 0, 0.0, True)]  # fmt: skip
    after = [answer(0, "4", 1), answer(1, "7", 0), answer(2, "6", 1), answer(3, "8", 1)]
    told = gain(before, after)
    assert (told.n, told.alike, told.fixed, told.broken) == (4, 2, 2, 0)
    assert told.accuracy == (0.25, 0.75)
    assert told.alike_accuracy == (0.5, 0.5)
    assert told.format == (0.75, 1.0)
    assert told.truncated == (0.25, 0.0)
    assert told.tokens == ((18 + 1 + 1 + 36) / 4, 1.0)
    with pytest.raises(UserError, match="no row stands in both"):
        gain(before, [answer(9, "x", 1)])
