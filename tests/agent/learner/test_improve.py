"""The round as a generator: its conversation, resuming, early stop, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from agent.learner.drift import Drift
from agent.learner.es import Applied, step
from agent.learner.improve import Apply, Evaluate, Plan, Record, RoundOutcome, improve
from agent.learner.penalty import Penalty

PLAN = Plan(
    run_seed=9, generations=6, population=4, mirrored=True, sigma=0.1, alpha=0.2,
    shaping="zscore", penalty=Penalty("l2", 0.5), noise="normal", early_stop=False, parameters=100,
)  # fmt: skip

Rewarder = Callable[[int], np.ndarray]


def rewards_of(generation: int) -> np.ndarray:
    return np.random.default_rng(generation).random((4, 5))


def drive(
    plan: Plan,
    rewarder: Rewarder = rewards_of,
    past: tuple[Drift, ...] = (),
    norm: Callable[[int], float] = float,
) -> tuple[list[Record], RoundOutcome]:
    """A driver without engines: answers every decision and keeps the records."""
    round_, records = improve(plan, past), []
    answer: np.ndarray | Applied | None = None
    while True:
        try:
            decision = round_.send(answer)
        except StopIteration as end:
            return records, end.value
        if isinstance(decision, Evaluate):
            assert decision.generation == plan.start_generation + len(records)
            answer = rewarder(decision.generation)
            assert len(decision.jobs(plan.run_seed)) == plan.population + decision.parent
            if decision.parent:
                answer = np.vstack([answer, answer[:1] * 0 + 1.0])  # theta earns 1 of every row
        elif isinstance(decision, Apply):
            moved = 0.0 if decision.step.no_op else 0.1
            answer = Applied("h", norm(decision.step.generation), moved, {})
        else:
            records.append(decision)
            answer = None


def test_each_generation_is_evaluated_applied_and_recorded_in_that_order() -> None:
    round_ = improve(PLAN)
    for generation in range(2):
        ask = next(round_) if generation == 0 else round_.send(None)
        assert isinstance(ask, Evaluate)
        assert [m.sign for m in ask.members] == [1, -1, 1, -1]
        apply = round_.send(rewards_of(generation))
        assert isinstance(apply, Apply)
        record = round_.send(Applied("h", 1.0, 0.1, {"w": 1.0}))
        assert isinstance(record, Record)
        assert record.step is apply.step
        assert record.drift.norm == 1.0
        assert np.array_equal(record.rewards, rewards_of(generation))


def test_the_steps_are_those_of_es() -> None:
    records, outcome = drive(PLAN)
    assert outcome == RoundOutcome(6, "completed")
    for generation, record in enumerate(records):
        assert record.step == step(
            rewards_of(generation), next(improve(PLAN)).members, run_seed=9, generation=generation,
            sigma=0.1, alpha=0.2, penalty=Penalty("l2", 0.5),
        )  # fmt: skip


@pytest.mark.parametrize("done", range(7))
def test_a_resumed_round_makes_the_same_records(done: int) -> None:
    whole, outcome = drive(PLAN)
    past = tuple(record.drift for record in whole[:done])
    rest, resumed = drive(replace(PLAN, start_generation=done), past=past)
    assert [*whole[:done], *rest] == whole
    assert resumed == outcome


def test_resuming_without_readings_uses_the_closed_form() -> None:
    plan = replace(PLAN, mirrored=False)
    whole, _ = drive(plan)
    rest, _ = drive(replace(plan, start_generation=4))
    assert [r.step for r in rest] == [r.step for r in whole[4:]]
    assert rest[-1].drift.predicted_norm == pytest.approx(whole[-1].drift.predicted_norm, rel=1e-6)
    assert rest[-1].drift.predicted_norm_l2 == pytest.approx(
        whole[-1].drift.predicted_norm_l2, rel=1e-6
    )


def test_the_prediction_starts_from_the_champions_norm() -> None:
    records, _ = drive(replace(PLAN, start_norm=40.0))
    drift, rho = records[0].drift, 1 - 0.2 * 0.5
    v = 100 * sum(c * c for c in records[0].step.coefficients)
    assert drift.predicted_norm == pytest.approx(np.sqrt(1600 + v))
    assert drift.predicted_norm_l2 == pytest.approx(rho * np.sqrt(1600 + v))


def test_early_stop_ends_at_the_alarm_wherever_the_round_is_resumed() -> None:
    plan = replace(PLAN, generations=60, early_stop=True)

    def flat_later(generation: int) -> np.ndarray:
        return rewards_of(generation) + min(generation, 10)

    whole, outcome = drive(plan, flat_later, norm=lambda g: 1.0 + g)
    assert 20 <= outcome.generations < 60
    assert outcome.reason.startswith("norm grows, reward flat")
    for done in (outcome.generations - 1, outcome.generations):
        past = tuple(record.drift for record in whole[:done])
        resumed = replace(plan, start_generation=done)
        assert drive(resumed, flat_later, past, lambda g: 1.0 + g)[1] == outcome
    patient = replace(plan, early_stop=False)
    assert drive(patient, flat_later, norm=lambda g: 1.0 + g)[1] == RoundOutcome(60, "completed")


def test_a_generation_without_information_is_recorded_as_a_no_op() -> None:
    records, outcome = drive(PLAN, lambda g: np.ones((4, 5)) if g == 2 else rewards_of(g))
    assert [record.step.no_op is not None for record in records] == [False] * 2 + [True] + [
        False
    ] * 3
    assert records[2].drift.predicted_norm == records[1].drift.predicted_norm
    assert outcome.reason == "completed"


def test_three_generations_without_spread_end_a_round_wherever_it_is_resumed() -> None:
    def stuck_later(generation: int) -> np.ndarray:
        return np.ones((4, 5)) if generation >= 2 else rewards_of(generation)

    whole, outcome = drive(PLAN, stuck_later)
    assert outcome.generations == len(whole) == 5
    assert outcome.reason.startswith("no learning in 3 generations: every answer")
    for done in (4, 5):
        past = tuple(record.drift for record in whole[:done])
        assert drive(replace(PLAN, start_generation=done), stuck_later, past)[1] == outcome


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"population": 5}, "population 5 with mirrored pairs must be even"),
        ({"penalty": Penalty("l2", 5.0)}, r"alpha \* lambda = 0.2 \* 5.0"),
        ({"start_generation": 7}, r"start_generation 7 must lie in 0 \.\. 6"),
        ({"parameters": 0}, "parameters 0"),
    ],
)
def test_an_impossible_plan_is_refused_before_anything_is_evaluated(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **change)  # type: ignore[arg-type]


def test_past_readings_must_fit_the_plan() -> None:
    with pytest.raises(ValueError, match="1 past readings, start_generation 0"):
        next(improve(PLAN, [Drift(0, 1.0, 1.0, {}, 1.0, None, None, None, None)]))


@pytest.mark.parametrize("halve", [True, False])
def test_an_alarm_halves_sigma_of_the_steps_after_it_where_the_plan_says_so(halve: bool) -> None:
    """Rewards of about 0.5 beside a parent that always earns 1; it is asked in 0, 2 and 4."""
    plan = replace(PLAN, generations=9, parent_every=2, halve=halve)
    whole, _ = drive(plan)
    asked = [record.drift.parent for record in whole]
    assert asked == [1.0, None] * 4 + [1.0]
    assert [n for n, record in enumerate(whole) if record.alarm] == [2, 6]
    halves = [0, 0, 0, 1, 1, 1, 1, 2, 2] if halve else [0] * 9
    assert [record.step.sigma for record in whole] == [0.1 / 2**n for n in halves]
    assert {record.step.alpha for record in whole} == {0.2}
    for done in range(1, 9):  # a resumed round finds them in its readings
        past = tuple(Drift.from_json(record.drift.to_json()) for record in whole[:done])
        rest, _ = drive(replace(plan, start_generation=done), past=past)
        assert [*whole[:done], *rest] == whole


def test_theta_is_asked_as_a_member_without_noise_behind_the_others() -> None:
    first = next(improve(replace(PLAN, parent_every=3)))
    assert isinstance(first, Evaluate)
    jobs = first.jobs(9)
    assert [place for place, _, _ in jobs] == [0, 1, 2, 3, 4]
    assert [scale for _, _, scale in jobs] == [0.1, -0.1, 0.1, -0.1, 0.0]
    assert not next(improve(PLAN)).parent
