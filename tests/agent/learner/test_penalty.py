"""Each penalty against its argmin, its limits, and what must be refused."""

from collections.abc import Callable
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from agent.learner.penalty import (
    PENALTIES,
    Penalty,
    PenaltyKind,
    check,
    check_weights,
    expected_norm,
    lambda_for_norm_ratio,
    next_lambda,
    prox,
)

Function = Callable[[float], float]


def kappa(s: float) -> float:
    return s / (1 - s)


def huber_function(x: float, tau: float) -> float:
    return x * x / 2 if abs(x) <= tau else tau * (abs(x) - tau / 2)


def regulariser(penalty: Penalty, s: float) -> Function:
    """R of the module's docstring, written out a second time."""
    a, tau = penalty.l1_share, penalty.threshold
    return {
        "none": lambda x: 0.0,
        "l2": lambda x: kappa(s) * x * x / 2,
        "l1": lambda x: s * abs(x),
        "huber": lambda x: kappa(s) * huber_function(x, (1 - s) * tau),
        "elastic_net": lambda x: s * a * abs(x) + kappa(s * (1 - a)) * x * x / 2,
    }[penalty.kind]


def argmin(objective: Function, d: float) -> float:
    """The minimiser between 0 and d, where the minimum of every convex even penalty lies."""
    low, high = min(0.0, d), max(0.0, d)
    found = float(minimize_scalar(objective, bounds=(low, high), options={"xatol": 1e-12}).x)
    return min((found, 0.0, d), key=objective)


@pytest.mark.parametrize("kind", PENALTIES)
@settings(max_examples=60, deadline=None)
@given(
    d=st.floats(-3, 3),
    s=st.floats(0.001, 0.9),
    w=st.floats(0.1, 1),
    tau=st.floats(0.1, 2),
    share=st.floats(0, 1),
)
def test_each_penalty_is_the_argmin_of_its_objective(
    kind: PenaltyKind, d: float, s: float, w: float, tau: float, share: float
) -> None:
    penalty = Penalty(kind, lam=s / 0.5, threshold=tau, l1_share=share)
    found = prox(np.array([d]), penalty, 0.5, weights=np.array([w]))[0]
    reg = regulariser(penalty, s * w)
    assert found == pytest.approx(argmin(lambda x: (x - d) ** 2 / 2 + reg(x), d), abs=2e-6)


GRID = np.linspace(-2, 2, 4001)


def test_huber_is_l2_inside_and_l1_outside() -> None:
    huber = prox(GRID, Penalty("huber", 0.4, threshold=0.7), 0.5)
    inside = np.abs(GRID) <= 0.7
    assert np.array_equal(huber[inside], prox(GRID, Penalty("l2", 0.4), 0.5)[inside])
    l1 = prox(GRID, Penalty("l1", 0.4 * 0.7), 0.5)
    np.testing.assert_allclose(huber[~inside], l1[~inside], rtol=1e-14)


def test_elastic_net_ends_in_l1_and_l2() -> None:
    l1 = prox(GRID, Penalty("elastic_net", 0.4, l1_share=1.0), 0.5)
    l2 = prox(GRID, Penalty("elastic_net", 0.4, l1_share=0.0), 0.5)
    assert np.array_equal(l1, prox(GRID, Penalty("l1", 0.4), 0.5))
    assert np.array_equal(l2, prox(GRID, Penalty("l2", 0.4), 0.5))


@pytest.mark.parametrize("kind", ["l1", "elastic_net"])
def test_soft_thresholds_set_exact_zeros(kind: PenaltyKind) -> None:
    small = prox(GRID, Penalty(kind, 0.4, l1_share=0.5), 0.5)
    threshold = 0.2 * (1.0 if kind == "l1" else 0.5)
    assert np.array_equal(small == 0, np.abs(GRID) <= threshold)
    assert not np.signbit(small[small == 0]).any()  # +0: one way to write "still the anchor"


@pytest.mark.parametrize("kind", PENALTIES)
def test_no_penalty_moves_zero_or_overshoots_it(kind: PenaltyKind) -> None:
    moved = prox(GRID, Penalty(kind, 0.9, threshold=0.3), 1.0)
    assert np.all(moved * GRID >= 0)
    assert np.all(np.abs(moved) <= np.abs(GRID))
    assert moved[GRID == 0] == 0


@pytest.mark.parametrize("kind", PENALTIES)
def test_weights_of_one_change_nothing_and_of_zero_free_a_parameter(kind: PenaltyKind) -> None:
    delta = GRID.astype(np.float32)
    penalty = Penalty(kind, 0.4, threshold=0.3)
    ones, zeros = np.ones(delta.size, np.float32), np.zeros(delta.size, np.float32)
    assert np.array_equal(prox(delta, penalty, 0.5, ones), prox(delta, penalty, 0.5))
    assert np.array_equal(prox(delta, penalty, 0.5, zeros), delta)
    assert prox(delta, penalty, 0.5).dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "l3"}, "penalty 'l3' must be one of none, l2, l1, huber, elastic_net"),
        ({"kind": "l1", "lam": -1.0}, "lambda -1.0 must be finite and 0 or more"),
        ({"lam": float("nan")}, "lambda nan"),
        ({"lam": float("inf")}, "lambda inf"),
        ({"threshold": 0.0}, "huber threshold 0.0"),
        ({"l1_share": 1.5}, "l1_share 1.5 must lie in 0 .. 1"),
    ],
)
def test_impossible_penalties_are_refused_in_one_line(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        Penalty(**({"kind": "l2"} | arguments))  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("penalty", "refused"),
    [
        (Penalty("l2", 2.0), True),
        (Penalty("l2", 1.99), False),
        (Penalty("huber", 2.0), True),
        (Penalty("elastic_net", 2.0, l1_share=0.0), True),
        (Penalty("elastic_net", 2.0, l1_share=0.1), False),
        (Penalty("l1", 1000.0), False),  # every element becomes 0: strong, but sound
        (Penalty("none", 1000.0), False),
    ],
)
def test_a_shrink_of_one_or_more_is_refused(penalty: Penalty, refused: bool) -> None:
    if not refused:
        check(penalty, 0.5)
        return
    with pytest.raises(ValueError, match=r"0.5 \* 2.0 gives a .* shrink of 1; it must be below 1"):
        check(penalty, 0.5)


def test_importance_weights_are_checked() -> None:
    with pytest.raises(ValueError, match="3 for 4 parameters"):
        check_weights(np.ones(3), 4)
    with pytest.raises(ValueError, match=r"span -1\.0 \.\. 1\.0"):
        check_weights(np.array([1.0, -1.0]), 2)
    with pytest.raises(ValueError, match="span nan"):
        check_weights(np.array([1.0, np.nan]), 2)
    with pytest.raises(ValueError, match=r"weight 4\.0 = 0\.5 \* 1\.0 gives a l2 shrink of 2"):
        prox(np.ones(2), Penalty("l2", 1.0), 0.5, np.array([1.0, 4.0]))
    assert check_weights(np.ones(0), 0) == 0.0


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_penalty_survives_json(kind: PenaltyKind) -> None:
    penalty = Penalty(kind, 0.1, 0.2, 0.3)
    assert Penalty.from_json(penalty.to_json()) == penalty
    with pytest.raises(ValueError, match="lambda_"):
        Penalty.from_json(penalty.to_json() | {"lambda_": 1})


def test_expected_norms_of_the_paper() -> None:
    """A 3B model: d = 3.086e9, T = 500, alpha = 0.0005; and the recursion, summed by hand."""
    d, alpha = 3_086_000_000, 0.0005
    for population, predicted in ((30, 113.4), (128, 54.9), (256, 38.8)):
        found = expected_norm(
            Penalty(), alpha=alpha, population=population, parameters=d, generations=500
        )
        assert found == pytest.approx(predicted, abs=0.05)
    squared, rho = 3.0**2, 1 - alpha * 10
    for _ in range(500):
        squared = rho**2 * (squared + alpha**2 * d / 30)
    found = expected_norm(
        Penalty("l2", 10.0), alpha=alpha, population=30, parameters=d, generations=500,
        start_norm=3.0,
    )  # fmt: skip
    assert found == pytest.approx(sqrt(squared), rel=1e-10)


def test_expected_norm_is_none_where_no_closed_form_exists() -> None:
    for kind in ("l1", "huber", "elastic_net"):
        assert (
            expected_norm(Penalty(kind, 1.0), alpha=0.1, population=4, parameters=9, generations=3)
            is None
        )


@settings(deadline=None)
@given(st.floats(0.02, 0.999), st.sampled_from([1e-4, 5e-4, 1e-2, 0.1]), st.integers(2, 2000))
def test_lambda_for_a_norm_ratio_gives_that_ratio(
    ratio: float, alpha: float, generations: int
) -> None:
    lam = lambda_for_norm_ratio(ratio, alpha=alpha, generations=generations)
    walk = {"alpha": alpha, "population": 8, "parameters": 1000, "generations": generations}
    with_l2, free = expected_norm(Penalty("l2", lam), **walk), expected_norm(Penalty(), **walk)
    assert with_l2 is not None
    assert free is not None
    assert with_l2 / free == pytest.approx(ratio, rel=1e-6)


def test_a_norm_ratio_of_one_asks_for_no_decay() -> None:
    assert lambda_for_norm_ratio(1.0, alpha=0.01, generations=50) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match=r"target_norm_ratio 1\.2"):
        lambda_for_norm_ratio(1.2, alpha=0.01, generations=50)


def test_lambda_falls_until_the_target_does_not_suffer() -> None:
    """A target that reaches its reference only below lambda 3: the rule stops at 2.5."""
    tried: list[tuple[float, float]] = []
    lam = 20.0
    for _ in range(8):
        tried.append((lam, 0.70 if lam < 3 else 0.70 - 0.02 * lam))
        lam = next_lambda(tried, reference=0.70, tolerance=0.005)
    assert [lam for lam, _ in tried] == [20, 10, 5, 2.5, 2.5, 2.5, 2.5, 2.5]


def test_next_lambda_refuses_a_score_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="target score nan"):
        next_lambda([(5.0, float("nan"))], reference=0.5, tolerance=0.01)
    with pytest.raises(ValueError, match="at least one round"):
        next_lambda([], reference=0.5, tolerance=0.01)
    with pytest.raises(ValueError, match="factor 2"):
        next_lambda([(5.0, 0.1)], reference=0.5, tolerance=0.01, factor=2)
