"""Sealed draws: fixed by the digest, rotating, and a level that is spent."""

import math

import pytest

from evaluators.gate import draw, spent_alpha

POOL = [f"row-{i}" for i in range(200)]


def one(rows=POOL, **change):
    return draw(rows, **{"round_number": 3, "digest": "abc", "count": 50, "salt": "s"} | change)


def test_a_draw_is_a_function_of_what_names_it():
    assert one() == one(rows=reversed(POOL))
    assert len(set(one())) == 50
    changed = [one(digest="abd"), one(round_number=4), one(salt="t")]
    assert len({one(), *changed}) == 4
    # a shifted border between the parts is another draw, not the same text
    assert one(salt="s3", round_number=3) != one(salt="s", round_number=33)


def test_draws_rotate_until_the_pool_is_used_up():
    used: set[str] = set()
    for number in range(4):
        rows = one(round_number=number, used=used)
        assert used.isdisjoint(rows)
        used |= set(rows)
    assert used == set(POOL)
    assert len(one(round_number=5, used=used)) == 50


def test_every_row_is_drawn_about_as_often():
    times = dict.fromkeys(POOL, 0)
    for number in range(400):
        for row in one(round_number=number):
            times[row] += 1
    spread = math.sqrt(400 * 0.25 * 0.75)
    assert all(abs(count - 100) < 5 * spread for count in times.values())


@pytest.mark.parametrize(
    "change",
    [{"rows": ["a", "a"]}, {"count": 0}, {"count": 201}, {"digest": ""}, {"salt": ""}],
)
def test_a_draw_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match=r"pool|count|digest"):
        one(**change)


def test_all_confirmations_together_spend_alpha():
    levels = [spent_alpha(0.025, k) for k in range(1, 20001)]
    assert levels == sorted(levels, reverse=True)
    assert 0.02499 < sum(levels) < 0.025
    with pytest.raises(ValueError, match="confirmation 0"):
        spent_alpha(0.025, 0)
