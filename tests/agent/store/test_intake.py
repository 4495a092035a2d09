"""Traffic to training rows: each row has one place, and it is the same place every time."""

from collections import Counter
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.store.experience import ExperienceRow
from agent.store.intake import (
    Caps,
    Intake,
    collect,
    fair_choice,
    keyed,
    pool_of,
    text_hash,
    unusual,
    weighted_median,
)

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
OFF = Caps(round_rows=1000, principal_share=0)
SALT = "a salt of tests"
TRAIN = {"train": 1.0}


def row(number: int, **options: Any) -> ExperienceRow:
    defaults: dict[str, Any] = {
        "inference_id": f"i{number}",
        "choice": 0,
        "created": float(number),
        "version": "a" * 64,
        "principal": "ann",
        "session_id": None,
        "task": "gsm8k",
        "source": "known",
        "example_id": str(number),
        "example": None,
        "prompt": "what is it?",
        "prompt_hash": f"p{number}",
        "row_hash": f"r{number}",
        "group_hash": f"g{number}",
        "reward": 1.0,
        "format": 1.0,
        "extracted": None,
        "error": None,
        "judged": 1.0,
    }
    return ExperienceRow(**(defaults | options))


def ids(rows: Any) -> list[str]:
    return sorted(r.inference_id for r in rows)


def aside(intake: Intake, *why: str) -> list[str]:
    return ids(each.row for each in intake.set_aside if each.why in why)


def test_one_of_equal_rows_stays() -> None:
    rows = [row(1), row(2, row_hash="r1"), row(3, prompt_hash="p1"), row(4)]
    intake = collect(rows, OFF, salt=SALT, shares=TRAIN)
    assert len(intake.train) + len(aside(intake, "duplicates")) == 4
    assert {r.row_hash for r in intake.train} >= {"r4"}
    marks = [mark for r in intake.train for mark in (r.row_hash, r.prompt_hash)]
    assert len(marks) == len(set(marks))


def test_a_refused_row_is_set_aside_with_the_reason_and_hides_no_equal_one() -> None:
    rows = [row(1, example="bad"), row(2, row_hash="r1"), row(3)]
    intake = collect(
        rows, OFF, salt=SALT, shares=TRAIN, refuse=lambda r: r.example and ("refused", "no key")
    )
    assert ids(intake.train) == ["i2", "i3"]
    assert [(s.row.inference_id, s.why, s.reason) for s in intake.set_aside] == [
        ("i1", "refused", "no key")
    ]


def test_equal_task_rows_share_a_pool_and_sessions_choose_none() -> None:
    rows = [row(i, row_hash=f"r{i % 40}", session_id=f"s{i}", group_hash="g") for i in range(400)]
    intake = collect(rows, Caps(0, 0.0, selection_rows=400), salt=SALT)
    train, selection = ({r.row_hash for r in chosen} for chosen in (intake.train, intake.selection))
    assert train
    assert selection
    assert len(train) + len(selection) == len(train | selection) == 40
    assert len(aside(intake, "duplicates")) == 360


def test_rows_that_choose_are_shared_among_principals_and_never_train() -> None:
    rows = [row(i, principal="ann" if i % 10 else "bob") for i in range(400)]
    kept = collect(rows, Caps(400, 0.0, selection_rows=8), salt=SALT)
    pool = {r.inference_id for r in rows if pool_of(SALT, r.row_hash) == "selection"}
    assert len(kept.selection) == 8
    assert Counter(r.principal for r in kept.selection)["bob"] == 4  # one in turn of each
    assert {r.inference_id for r in kept.selection} < pool
    assert pool.isdisjoint(ids(kept.train))
    capped = collect(rows, Caps(400, 0.25, selection_rows=8), salt=SALT)
    assert Counter(r.principal for r in capped.selection) == {"ann": 2, "bob": 2}
    off = collect(rows, Caps(400, 0.0), salt=SALT)
    assert off.selection == ()
    assert off.train == kept.train
    none = collect(rows, Caps(400, 0.01), salt=SALT)  # of no selection rows no cap is passed
    assert set(aside(none, "over_cap")).isdisjoint(pool)
    assert pool <= set(aside(none, "no_room"))


def test_shares_are_kept_on_average() -> None:
    counts = Counter(pool_of(SALT, f"row {i}") for i in range(10_000))
    assert counts["train"] == pytest.approx(8000, abs=200)  # 5 standard deviations
    assert counts["selection"] == pytest.approx(2000, abs=200)


def test_without_the_homes_secret_neither_pool_nor_order_can_be_foreseen() -> None:
    """Rows ground so that they come first, and into training, under one salt, under another."""
    candidates = [f"r{i}" for i in range(20_000)]
    mine = sorted((h for h in candidates if pool_of("guess", h) == "train"), key=key_of)[:1000]
    assert sum(pool_of(SALT, h) == "train" for h in mine) == pytest.approx(800, abs=65)
    places = sorted(range(20_000), key=lambda i: keyed(SALT, "", candidates[i], ""))
    rank = {candidates[i]: place for place, i in enumerate(places)}
    assert sum(rank[h] for h in mine) / 1000 == pytest.approx(10_000, abs=900)


def key_of(row_hash: str) -> str:
    return keyed("guess", "", row_hash, "")


@patient
@given(st.text(max_size=20), st.text(max_size=20))
def test_a_rows_pool_does_not_depend_on_the_others(one: str, other: str) -> None:
    rows = [row(1, row_hash=one), row(2, row_hash=other, principal="bob")]
    caps = Caps(0, 0.0, selection_rows=2)
    both, alone = (collect(some, caps, salt=SALT) for some in (rows, rows[:1]))
    if one != other:
        assert ("i1" in ids(both.selection)) == ("i1" in ids(alone.selection))
        assert ("i1" in ids(both.train)) == ("i1" in ids(alone.train))


def test_a_principal_has_one_per_cent_of_a_round_and_at_least_one_row() -> None:
    rows = [row(i, principal="ann" if i % 2 else "bob") for i in range(50)]
    kept, rest = fair_choice(rows, Caps(round_rows=200), SALT)
    assert Counter(r.principal for r in kept) == {"ann": 2, "bob": 2}
    assert {(why, reason) for _, why, reason in rest} == {
        ("over_cap", "principal: at most 2 of 200 rows")
    }
    assert len(fair_choice(rows, Caps(round_rows=30), SALT)[0]) == 2
    assert len(fair_choice(rows, OFF, SALT)[0]) == 50


def test_the_only_principal_is_neither_capped_nor_split_nor_called_unusual() -> None:
    rows = [row(i, prompt="x" * (10 + i**4)) for i in range(30)]
    intake = collect(rows, Caps(round_rows=200), salt=SALT, alone=True)
    assert len(intake.train) == 30
    assert intake.set_aside == ()


def test_a_source_can_be_capped_as_well() -> None:
    rows = [row(i, source="submitted" if i < 20 else "known") for i in range(40)]
    caps = Caps(round_rows=100, principal_share=0, source_share={"submitted": 0.05})
    kept = fair_choice(rows, caps, SALT)[0]
    assert Counter(r.source for r in kept) == {"submitted": 5, "known": 20}


def test_the_first_rows_of_all_come_before_the_second_of_any() -> None:
    rows = [row(i, principal="ann") for i in range(50)] + [row(99, principal="bob")]
    kept, _ = fair_choice(rows, OFF, SALT)
    assert "bob" in {r.principal for r in kept[:2]}


def test_whoever_finds_no_room_in_one_round_finds_it_in_another() -> None:
    rows = [row(i, principal=f"p{i}") for i in range(100)]
    firsts = {fair_choice(rows, OFF, SALT, str(turn))[0][0].principal for turn in range(30)}
    assert len(firsts) > 15


def test_a_principal_that_copies_others_takes_no_more_than_its_share_of_their_rows() -> None:
    honest = [row(i, principal=f"p{i % 45}") for i in range(450)]
    copies = [
        row(1000 + i, principal=f"bad{i % 5}", row_hash=f"other{i}", prompt_hash=f"p{i}")
        for i in range(450)
    ]
    kept, _ = fair_choice([*copies, *honest], Caps(round_rows=200), SALT)
    assert Counter(r.principal[:3] == "bad" for r in kept) == {True: 10, False: 90}


def test_ten_per_cent_of_malicious_principals_get_no_more_than_their_share() -> None:
    good = [row(i, principal=f"good{i % 90}") for i in range(900)]
    bad = [row(1000 + i, principal=f"bad{i % 10}", reward=1.0) for i in range(5000)]
    intake = collect([*bad, *good], Caps(round_rows=200), salt=SALT, shares=TRAIN)
    share = sum(r.principal.startswith("bad") for r in intake.train) / len(intake.train)
    assert share <= 0.11


def test_rows_of_absurd_length_are_set_aside() -> None:
    rows = [row(i, prompt="x" * (90 + i), principal=f"p{i % 5}") for i in range(20)]
    intake = collect([*rows, row(99, prompt="x" * 100_000)], OFF, salt=SALT, shares=TRAIN)
    assert aside(intake, "quarantined") == ["i99"]


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_thousand_unusual_rows_of_one_do_not_make_everybody_elses_unusual(length: int) -> None:
    rows = [row(i, prompt="x" * (90 + i % 40), principal=f"p{i % 40}") for i in range(400)]
    flood = [row(1000 + i, prompt="x" * length, principal="eve") for i in range(1000)]
    assert set(unusual([*rows, *flood])) == {r.inference_id for r in flood}


def test_between_two_principals_neither_is_the_unusual_one() -> None:
    rows = [row(i, prompt="x" * (90 + i)) for i in range(40)]
    flood = [row(1000 + i, prompt="x" * 100_000, principal="eve") for i in range(1000)]
    assert unusual([*rows, *flood]) == {}


@patient
@given(
    st.lists(st.tuples(st.integers(-50, 50), st.integers(1, 4)), min_size=1, max_size=30),
)
def test_the_weighted_median_is_the_median_of_repeated_values(pairs: list[Any]) -> None:
    values = [float(value) for value, times in pairs for _ in range(times)]
    assert weighted_median([(float(v), n / 3) for v, n in pairs]) == median(values)


def test_principals_whose_rewards_are_unlike_all_others_are_set_aside() -> None:
    rows = [
        row(100 * p + i, principal=f"p{p}", reward=float(i % 2) if p else 1.0)
        for p in range(12)
        for i in range(10)
    ]
    assert set(unusual(rows)) == {f"i{i}" for i in range(10)}


def test_too_few_rows_say_nothing_about_what_is_ordinary() -> None:
    assert unusual([row(1), row(2, prompt="x" * 10_000)]) == {}


@patient
@given(
    st.lists(
        st.builds(
            lambda n, p, r, g, w: replace(
                row(n), principal=p, row_hash=r, group_hash=g, reward=float(w)
            ),
            st.integers(0, 10**6),
            st.sampled_from("abcd"),
            st.sampled_from([f"r{i}" for i in range(30)]),
            st.sampled_from([f"g{i}" for i in range(10)]),
            st.booleans(),
        ),
        max_size=40,
        unique_by=lambda r: r.inference_id,
    )
)
def test_every_row_has_exactly_one_place(rows: list[ExperienceRow]) -> None:
    intake = collect(rows, Caps(round_rows=100), salt=SALT, refuse=refuse)
    assert ids([*intake.train, *(each.row for each in intake.set_aside)]) == ids(rows)
    backward = collect(rows[::-1], Caps(round_rows=100), salt=SALT, refuse=refuse)
    assert intake.train == backward.train


def refuse(r: ExperienceRow) -> Any:
    return ("refused", "a test") if r.row_hash == "r1" else None


def test_the_same_words_are_the_same_row_however_they_are_set() -> None:
    assert text_hash("How  MANY\n apples?") == text_hash("how many apples? ")
    assert text_hash("ｆｕｌｌ") == text_hash("full")
    assert text_hash("e\u0301") == text_hash("\u00e9")
    assert text_hash("1 + 2") != text_hash("1 + 3")
