"""A round's cost is arithmetic on measured rates; what its gate cannot see is said before."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from agent.errors import UserError
from agent.population.decoding import count_tokens
from agent.population.pool import Population
from agent.sections import LearnerSettings
from evaluators.stats import mcnemar_exact
from flows.learn.forecast import LOST, Rates, TaskRate, forecast, measure_rates, smallest_gain
from flows.learn.improve import run_round
from flows.learn.weigh import weigh
from flows.round_files import RoundFiles
from flows.session import Session

RENDER_S, UPDATE_S, ANSWER_S, TOKENS = 0.5, 0.25, 0.01, 3  # of the planted engine

Opened = Callable[..., Session]


def learner_of(session: Session) -> LearnerSettings:
    return session.service.settings.learner


def measured(session: Session) -> Rates:
    return measure_rates(
        session.service, session.population, "gsm8k", learner_of(session), session.progress
    )


def test_rates_are_what_the_engines_spent(planted: Opened) -> None:
    rates = measured(planted())
    assert rates.render_s == pytest.approx(RENDER_S)
    assert rates.update_s == pytest.approx(UPDATE_S)
    for rate in rates.tasks:
        assert rate.seconds == pytest.approx(ANSWER_S)
        assert rate.tokens == TOKENS
    assert [rate.task for rate in rates.tasks] == ["gsm8k", "countdown", "piqa"]


def test_rows_that_a_round_would_set_aside_are_not_tried(
    planted: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = planted()
    service, task = session.service, session.service.task("gsm8k")
    rows = list(service.training_rows("gsm8k").values())
    lengths = [count_tokens(service.origin.directory, task.messages(row)) for row in rows]
    middle = sorted(lengths)[len(rows) // 2]
    asked: list[Any] = []
    members = session.population.members

    def watched(jobs: Any, prompts: Any, *rest: Any) -> Any:
        asked.extend(prompts)
        return members(jobs, prompts, *rest)

    def allow(tokens: int) -> None:
        model = service.settings.model.model_copy(
            update={"max_model_len": tokens + task.max_tokens}
        )
        monkeypatch.setattr(
            service, "settings", service.settings.model_copy(update={"model": model})
        )

    monkeypatch.setattr(session.population, "members", watched)
    allow(middle)
    measured(session)
    fitting = [task.messages(row) for row, n in zip(rows, lengths, strict=True) if n <= middle]
    assert asked == fitting[: len(asked)]
    assert len(fitting) < len(rows)
    allow(1)
    with pytest.raises(UserError, match="gsm8k: no training row leaves room for an answer"):
        measured(session)


def test_measuring_leaves_delta_at_zero(planted: Opened) -> None:
    session = planted()
    population: Population = session.population
    population.open(session.service.anchor.directory)
    before = population.restore(None, [])
    measured(session)
    assert population.restore(None, []) == before
    assert session.service.journal.runs() == []


def test_the_learning_part_is_generations_of_members_of_prompts(planted: Opened) -> None:
    session = planted()
    learner = learner_of(session)
    learning = forecast(session.service, "gsm8k", learner, measured(session)).costs[0]
    n, p, g = learner.population, learner.prompts, learner.generations
    rows = n * g + 1  # of the parent, before the first of three generations
    seconds = rows * (RENDER_S + p * ANSWER_S) + g * UPDATE_S
    assert learning.completions == rows * p
    assert learning.tokens == rows * p * TOKENS
    assert learning.minutes == pytest.approx(seconds / 60)


def test_two_engines_share_members_and_both_update(planted: Opened) -> None:
    session = planted()
    learner, rates = learner_of(session), measured(session)
    one = forecast(session.service, "gsm8k", learner, rates).costs[0].minutes
    two = forecast(session.service, "gsm8k", learner, replace(rates, engines=2)).costs[0].minutes
    update = learner.generations * UPDATE_S / 60
    assert two - update == pytest.approx((one - update) / 2)


def test_worked_answers_that_are_read_cost_what_reading_costs(planted: Opened) -> None:
    session = planted(learner={"fitness": "likelihood"})
    learner, rates = learner_of(session), measured(session)
    assert rates.row_s == pytest.approx(ANSWER_S / 2)
    read = forecast(session.service, "gsm8k", learner, rates).costs[0].minutes
    written = forecast(session.service, "gsm8k", learner, replace(rates, row_s=ANSWER_S)).costs[0]
    rows = (learner.generations * learner.population + 1) * learner.prompts
    assert written.minutes - read == pytest.approx(rows * ANSWER_S / 2 / 60)


def test_the_evaluation_asks_every_row_of_both_models(planted: Opened) -> None:
    session = planted()
    costs = forecast(session.service, "gsm8k", learner_of(session), measured(session)).costs
    evaluation = next(cost for cost in costs if cost.part == "evaluation")
    assert evaluation.completions == 3 * 60 * 2  # tasks, rows, anchor and candidate


def test_the_starts_are_the_rounds_own_and_a_cold_one_of_each_model(planted: Opened) -> None:
    session = planted()
    rates = replace(measured(session), start_s=9.0)
    costs = forecast(session.service, "gsm8k", learner_of(session), rates).costs
    starts = next(cost for cost in costs if cost.part == "engine starts")
    assert starts.minutes == pytest.approx((1 + 2) * 9.0 / 60)  # candidate and anchor


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"selection": 24, "selection_every": 2, "patience": 0, "generations": 7},
        {"fitness": "likelihood", "generations": 5, "batch": 6, "too_large": "ignore"},
    ],
)
def test_a_round_takes_what_was_planned(planted: Opened, changes: dict[str, Any]) -> None:
    """By what the engines spent on learning, choice, curve, evaluation and sealed draw."""
    tasks = {"curve_every": 2, "curve_rows": 10, "kl_rows": 0}
    session = planted(learner=changes, tasks=tasks)
    service, population = session.service, session.population
    planned = forecast(service, "gsm8k", learner_of(session), measured(session))
    before = sum(population.spent().values())
    made = run_round(service, population, "gsm8k", session.progress, {})
    report = weigh(session, made.run_id).report
    spent_s = sum(population.spent().values()) - before
    sealed = next(cost for cost in planned.costs if cost.part.startswith("sealed"))
    reached = report.verdict == "promote" or any(r["step"] == "sealed" for r in report.reasons)
    minutes = planned.minutes - (0.0 if reached else sealed.minutes)
    assert spent_s / 60 == pytest.approx(minutes, rel=0.1)


def test_tables_that_are_there_are_not_planned_again(planted: Opened) -> None:
    session = planted(tasks={"kl_rows": 0})
    made = run_round(session.service, session.population, "gsm8k", session.progress, {})
    weigh(session, made.run_id)
    costs = forecast(session.service, "gsm8k", learner_of(session), measured(session)).costs
    evaluation = next(cost for cost in costs if cost.part == "evaluation")
    assert evaluation.completions == 3 * 60  # the next candidate's; the anchor has answered


@pytest.mark.parametrize("rows", [30, 100, 400, 1000])
def test_the_smallest_gain_is_the_first_that_is_significant(rows: int) -> None:
    gain = smallest_gain(rows, 0.01)
    assert gain is not None
    lost = round(LOST * rows)
    won = round(gain * rows) + lost
    assert float(mcnemar_exact(lost, won)) < 0.01
    assert float(mcnemar_exact(lost, won - 1)) >= 0.01


def test_a_handful_of_rows_can_show_no_gain() -> None:
    assert smallest_gain(5, 0.01) is None


@pytest.mark.parametrize(
    ("target", "prior", "spread", "words"),
    [
        ((0, 24), (12, 24), 0.1, "none of 24 answers was right"),
        ((24, 24), (12, 24), 0.1, "no headroom"),
        ((12, 24), (0, 24), 0.1, "piqa: 0 of 24 right: at its floor"),
        ((12, 24), (12, 24), 0.0, "no spread"),
    ],
)
def test_what_can_teach_or_tell_nothing_is_a_warning(
    planted: Opened,
    target: tuple[int, int],
    prior: tuple[int, int],
    spread: float,
    words: str,
) -> None:
    session = planted(tasks={"priors": ("piqa",)})
    rates = Rates(
        RENDER_S,
        UPDATE_S,
        1,
        spread,
        (
            TaskRate("gsm8k", ANSWER_S, TOKENS, *target),
            TaskRate("piqa", ANSWER_S, TOKENS, *prior),
        ),
        ANSWER_S,
    )
    warnings = forecast(session.service, "gsm8k", learner_of(session), rates).warnings
    assert len(warnings) == 1
    assert words in warnings[0]


def test_a_sound_round_has_no_warning(planted: Opened) -> None:
    session = planted(tasks={"priors": ("piqa",)})
    rates = Rates(
        RENDER_S,
        UPDATE_S,
        1,
        0.02,
        (TaskRate("gsm8k", ANSWER_S, TOKENS, 11, 24), TaskRate("piqa", ANSWER_S, TOKENS, 15, 24)),
        ANSWER_S,
    )
    assert forecast(session.service, "gsm8k", learner_of(session), rates).warnings == ()


def round_of(session: Session, **changes: float) -> str:
    service = session.service
    return run_round(service, session.population, "gsm8k", session.progress, changes).run_id


def test_a_round_over_its_budget_is_refused_before_anything_is_written(planted: Opened) -> None:
    session = planted()
    with pytest.raises(UserError, match=r"budget_minutes = 0\.01: the round would take"):
        round_of(session, budget_minutes=0.01)
    assert session.service.journal.runs() == []
    assert not list(session.service.home.runs.glob("*"))


def test_a_round_that_meets_its_budget_stops_and_has_a_candidate(planted: Opened) -> None:
    session = planted()
    service = session.service
    # As if an earlier start of this round had taken all of the time.
    spent = {"generation": -1.0, "seconds.generation": 99 * 60.0}
    RoundFiles(service.home, "0001-gsm8k").add_to_pace(spent)
    run_id = round_of(session, generations=3, budget_minutes=99)
    assert service.journal.next_generation(run_id) == 1
    assert "of 99 minutes are used" in str(service.journal.run(run_id).reason)
    assert service.ledger.state(str(service.journal.run(run_id).digest)) == "PROPOSED"
