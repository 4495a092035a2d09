"""Betting: valid however often one looks, exact for templates, and able to find what is there."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.stats import (
    STAKES,
    Units,
    bounds,
    log_e,
    log_e_counts,
    log_e_levels,
    mean_interval,
    p_value,
    tango_p,
    units,
)

differences = st.lists(st.sampled_from([-1.0, 0.0, 0.0, 0.0, 1.0, 0.25]), min_size=1, max_size=60)


@settings(deadline=None)
@given(differences, st.sampled_from([-0.2, -0.05, 0.0, 0.1]))
def test_log_e_is_the_mean_wealth_of_the_stakes(d, null):
    wealth = [math.prod(1 + f * (x - null) / (1 + null) for x in d) for f in STAKES]
    assert math.exp(log_e(units(d), null)) == pytest.approx(sum(wealth) / len(wealth), rel=1e-9)


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 60))
def test_counts_say_the_same_as_rows(b, c, tied):
    d = [-1.0] * b + [1.0] * c + [0.0] * (tied + 1)
    assert float(log_e_counts(len(d), b, c, -0.05)) == pytest.approx(log_e(units(d), -0.05))


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any))
def test_counts_of_graded_differences_say_the_same_as_rows(counts):
    values = [-1.0, -0.3, 0.0, 0.2, 0.9]
    d = np.repeat(values, counts)
    assert float(log_e_levels(values, counts, -0.05)) == pytest.approx(log_e(units(d), -0.05))


SKEWED = {  # differences with the mean wanted: extremes, many small losses, few large ones
    "extremes": lambda mean: ([-1.0, 1.0], [(1 - mean) / 2, (1 + mean) / 2]),
    "many small losses": lambda mean: ([-0.1, 1.0], [(1 - mean) / 1.1, (mean + 0.1) / 1.1]),
    "few large losses": lambda mean: ([-1.0, 0.1], [(0.1 - mean) / 1.1, (mean + 1) / 1.1]),
}


@pytest.mark.parametrize("shape", SKEWED)
@pytest.mark.parametrize(("mean", "alpha"), [(-0.05, 0.025), (0.0, 0.01)])
def test_graded_error_rates_hold_at_the_margin_and_at_no_gain(shape, mean, alpha, scale):
    """H0 holds exactly; the distributions are those on which symmetric tests and z-tests err."""
    draws, rng = scale(4000, 40000), np.random.default_rng(15)
    values, chances = SKEWED[shape](mean)
    assert np.dot(values, chances) == pytest.approx(mean)
    for n in (20, 200):
        counts = rng.multinomial(n, chances, size=draws)
        wrong = (log_e_levels(values, counts, mean) > -math.log(alpha)).mean()
        assert wrong <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / draws)


def test_a_sign_flip_test_of_graded_rewards_would_err():
    """The reason for betting: at mean 0, few large gains beside many small losses and few rows."""
    rng, flips = np.random.default_rng(16), np.random.default_rng(17)
    d = rng.choice([-1.0, 0.1], p=[0.1 / 1.1, 1 / 1.1], size=(400, 20))
    signs = flips.choice([-1.0, 1.0], size=(400, 20))
    p = [(signs @ row >= row.sum() - 1e-9).mean() for row in d]
    assert np.mean(np.array(p) < 0.01) > 0.05
    assert np.mean([p_value(units(row), 0.0) < 0.01 for row in d]) <= 0.01


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
@settings(max_examples=40, deadline=None)
def test_the_interval_of_a_mean_reward_holds_it(rewards):
    low, high = mean_interval(rewards)
    assert 0 <= low <= np.mean(rewards) + 1e-9
    assert np.mean(rewards) - 1e-9 <= high <= 1
    turned = mean_interval([1 - r for r in rewards])
    assert turned == pytest.approx((1 - high, 1 - low), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(differences, st.randoms(use_true_random=False), st.integers(0, 5))
def test_one_more_loss_never_helps(d, random, groups):
    clusters = [random.randint(0, groups) for _ in d]
    row = random.randrange(len(d))
    worse = [*d[:row], max(-1.0, d[row] - 1.0), *d[row + 1 :]]
    before, after = units(d, clusters), units(worse, clusters)
    assert log_e(after, -0.05) <= log_e(before, -0.05) + 1e-12
    assert bounds(after, 0.025)[0] <= bounds(before, 0.025)[0] + 1e-9


@settings(max_examples=40, deadline=None)
@given(differences)
def test_bounds_hold_what_the_gambler_could_not_refute(d):
    data = units(d)
    low, high = bounds(data, 0.025)
    assert -1 <= low <= np.mean(d) + 1e-9
    assert np.mean(d) - 1e-9 <= high <= 1
    if low > -1:
        assert p_value(data, low) == pytest.approx(0.025, rel=1e-3)
        assert p_value(data, (low - 1) / 2) < 0.025
    assert bounds(units([-x for x in d]), 0.025) == pytest.approx((-high, -low))


def test_looking_after_every_row_keeps_the_error(scale):
    """Type-I error under optional stopping: the null holds exactly, one stops at the best look."""
    draws, n, alpha, margin = scale(2000, 20000), 400, 0.05, 0.05
    rng = np.random.default_rng(11)
    rows = rng.choice([-1, 0, 1], p=[0.10, 0.85, 0.05], size=(draws, n))  # mean -0.05
    b, c = (rows < 0).cumsum(1), (rows > 0).cumsum(1)
    looks = np.arange(10, n + 1, 10)
    best = log_e_counts(looks, b[:, looks - 1], c[:, looks - 1], -margin).max(1)
    wrong = (best >= -math.log(alpha)).mean()
    assert wrong <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / draws)
    assert wrong > 0  # a test that can never err has no power either


def test_a_fixed_sample_test_would_not_survive_the_same_looks():
    """The reason for betting: Tango's test looked at as often errs far above its level."""
    rng = np.random.default_rng(12)
    rows = rng.choice([-1, 0, 1], p=[0.10, 0.85, 0.05], size=(1000, 400))
    b, c = (rows < 0).cumsum(1), (rows > 0).cumsum(1)
    looks = np.arange(50, 401, 10)
    p = tango_p(looks, b[:, looks - 1], c[:, looks - 1], 0.05).min(1)
    assert (p < 0.05).mean() > 0.10


def test_rows_of_one_template_count_as_one_piece_of_evidence(scale):
    """Whole templates break together: the clustered test keeps its level, single rows do not."""
    draws, groups, size, margin = scale(1000, 10000), 150, 5, 0.05
    rng = np.random.default_rng(13)
    broken = rng.random((draws, groups)) < margin  # mean difference -0.05: the null holds
    clusters = np.repeat(np.arange(groups), size).tolist()
    clustered = single = 0
    for template in broken:
        d = np.repeat(-template.astype(float), size)
        clustered += p_value(units(d, clusters), -margin) < 0.025
        single += tango_p(d.size, -d.sum(), 0, margin) < 0.025
    assert clustered / draws <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / draws)
    assert single / draws > 0.1


def test_it_finds_what_is_there():
    unchanged = units(np.zeros(500))
    assert p_value(unchanged, -0.05) < 1e-8
    rng = np.random.default_rng(14)
    better = rng.choice([-1, 0, 1], p=[0.03, 0.82, 0.15], size=(200, 400))
    found = [p_value(units(rows), 0.0) < 0.01 for rows in better]
    assert np.mean(found) > 0.9


@pytest.mark.parametrize(
    "call",
    [
        lambda: units([]),
        lambda: units([0.0, math.nan]),
        lambda: units([1.5]),
        lambda: units([0.0, 1.0], ["one"]),
        lambda: Units(np.array([2.0]), np.array([1.0])),
        lambda: log_e(units([0.0]), -1.0),
        lambda: bounds(units([0.0]), 0.0),
    ],
)
def test_what_is_undefined_is_refused(call):
    with pytest.raises(ValueError, match=r"differences|clusters|units|null|alpha"):
        call()
