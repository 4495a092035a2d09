"""Comparing models by what they say."""

import math

import numpy as np

from agent.population.decoding import kl_per_token, largest_difference


def test_largest_difference_is_over_common_tokens() -> None:
    one = [[{1: -0.1, 2: -2.0}], [{5: -0.5, 6: -1.0}]]
    other = [[{1: -0.1, 3: -2.0}], [{5: -0.75, 6: -1.0}]]
    assert largest_difference(one, one) == 0.0
    assert largest_difference(one, other) == 0.25
    assert largest_difference(other, one) == 0.25


def test_nothing_in_common_is_infinitely_far() -> None:
    assert largest_difference([[{1: -0.1, 2: -1.0}]], [[{3: -0.1, 4: -1.0}]]) == math.inf
    many = [dict.fromkeys(range(8), -1.0)]
    assert largest_difference([many], [[{0: -1.0, 1: -1.0}]]) == math.inf
    assert largest_difference([many], [[many[0]] * 2]) == math.inf
    assert largest_difference([], []) == math.inf  # no evidence is no agreement


def test_kl_estimate_meets_the_exact_value() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    drawn = rng.choice(6, size=(400, 50), p=p)
    estimate = kl_per_token(np.log(p)[drawn].tolist(), np.log(q)[drawn].tolist())
    exact = float(np.sum(p * np.log(p / q)))
    spread = float(np.std(np.log(p / q)[drawn])) / math.sqrt(drawn.size)
    assert abs(estimate - exact) < 4 * spread
    assert exact > 10 * spread  # the bound above can fail


def test_kl_of_no_tokens_is_undefined() -> None:
    assert math.isnan(kl_per_token([[]], [[]]))


def test_kl_of_two_tokens_is_the_closed_form() -> None:
    """On continuations that hold each token in its own proportion the estimate is exact."""
    for p, q in ((0.8, 0.5), (0.5, 0.5), (0.2, 0.9)):
        drawn = [[0, 0, 1, 0, 1], [1, 0, 1, 1, 0]] if p == 0.5 else [[0] * 4 + [1], [1] + [0] * 4]
        drawn = [[1 - token for token in row] for row in drawn] if p == 0.2 else drawn
        on_p, on_q = (
            [[math.log((share, 1 - share)[token]) for token in row] for row in drawn]
            for share in (p, q)
        )
        exact = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        assert math.isclose(kl_per_token(on_p, on_q), exact, abs_tol=1e-12)
