"""The ES step against its definition, its invariances, and that it climbs."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.learner.es import Member, Shaping, Step, member_rewards, members, shaped, step
from agent.learner.kernels_cpu import noise_into, update_inplace
from agent.learner.noise import Address, NoiseKind
from agent.learner.penalty import NO_PENALTY, Penalty

RUN = {"run_seed": 5, "generation": 2, "sigma": 0.1, "alpha": 0.5, "penalty": NO_PENALTY}
REWARDS = np.array([0.1, 0.9, 0.4, 0.4, 0.0, 0.7])


def taken(rewards: Sequence[float] | np.ndarray, mirrored: bool = False, **more: object) -> Step:
    array = np.asarray(rewards, dtype=np.float64)
    return step(array, members(len(array), mirrored), **(RUN | more))  # type: ignore[arg-type]


def test_coefficients_are_alpha_over_n_times_z() -> None:
    z = (REWARDS - REWARDS.mean()) / REWARDS.std()
    found = taken(REWARDS)
    assert found.pairs == (0, 1, 2, 3, 4, 5)
    assert found.coefficients == tuple((0.5 / 6 * z).astype(np.float32).tolist())


def test_a_mirrored_pair_gets_the_difference_of_its_members() -> None:
    z = (REWARDS - REWARDS.mean()) / REWARDS.std()
    found = taken(REWARDS, mirrored=True)
    assert found.pairs == (0, 1, 2)
    np.testing.assert_allclose(found.coefficients, 0.5 / 6 * (z[0::2] - z[1::2]), rtol=1e-6)


def test_ranks_are_centred_scaled_and_shared_by_ties() -> None:
    z = shaped(REWARDS, "ranks")
    ranks = np.array([2, 6, 3.5, 3.5, 1, 5])
    np.testing.assert_allclose(z, (ranks - 3.5) / np.std(ranks), rtol=1e-14)
    assert np.array_equal(z, shaped(np.exp(20 * REWARDS), "ranks"))  # only the order counts


@settings(deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=40).filter(lambda r: np.ptp(r) > 1e-6),
    st.sampled_from(["zscore", "ranks"]),
)
def test_shaped_rewards_have_mean_zero_and_variance_one(
    rewards: list[float], shaping: Shaping
) -> None:
    z = shaped(np.array(rewards), shaping)
    assert abs(z.mean()) < 1e-9
    assert np.mean(z**2) == pytest.approx(1, rel=1e-9)


@settings(deadline=None)
@given(st.permutations(range(6)), st.sampled_from(["zscore", "ranks"]), st.booleans())
def test_the_order_of_members_does_not_matter(
    order: list[int], shaping: Shaping, mirrored: bool
) -> None:
    crew = members(6, mirrored)
    mixed = step(REWARDS[order], [crew[n] for n in order], **(RUN | {"shaping": shaping}))
    assert mixed == taken(REWARDS, mirrored, shaping=shaping)


def test_the_reason_of_a_no_op_names_the_first_member_whatever_the_order() -> None:
    crew, rewards = members(4, False), np.array([0.5, np.nan, 0.1, np.inf])
    found = step(rewards[::-1], crew[::-1], **RUN)  # type: ignore[arg-type]
    assert found.no_op == "reward of member 1 is nan"


@settings(deadline=None)
@given(st.floats(0.1, 10), st.floats(-10, 10))
def test_scale_and_offset_of_rewards_do_not_matter(factor: float, offset: float) -> None:
    np.testing.assert_allclose(
        taken(REWARDS * factor + offset).coefficients, taken(REWARDS).coefficients, atol=1e-6
    )


def test_rewards_per_example_count_as_their_mean() -> None:
    table = np.random.default_rng(0).random((6, 11))
    assert taken(table) == taken(table.mean(axis=1))
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        member_rewards(np.empty(0))


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ([0.5, 0.5, 0.5], "zero spread: all 3 rewards are 0.5"),
        ([0.5], "zero spread: all 1 rewards are 0.5"),  # population 1
        ([0.1 + 0.2, 0.3, 0.3], "zero spread: all 3 rewards are 0.3"),  # differ by rounding only
        ([0.5, np.nan, 0.1], "reward of member 1 is nan"),
        ([0.5, 0.1, np.inf], "reward of member 2 is inf"),
        ([0.5, -np.inf, 0.1], "reward of member 1 is -inf"),
        ([0.5, 1e200, 0.1], r"reward of member 1 is 1e\+200"),  # its square overflows
    ],
)
def test_rewards_without_information_give_a_recorded_no_op(
    rewards: list[float], reason: str
) -> None:
    found = taken(rewards, penalty=Penalty("l2", 1.0))
    assert found.no_op is not None
    assert found.no_op.startswith(reason.replace("\\", ""))
    assert found.coefficients == ()
    delta = np.array([1.0, -0.0, 2.0], np.float32)
    before = delta.tobytes()
    squares = update_inplace(delta, "w", 0, found)
    assert delta.tobytes() == before  # not even decay
    assert squares == (5.0, 0.0)


def test_one_missing_example_makes_the_generation_a_no_op() -> None:
    table = np.random.default_rng(0).random((6, 11))
    table[3, 7] = np.nan
    assert taken(table).no_op == "reward of member 3 is nan"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma 0.0 must be finite and above 0"),
        ({"alpha": float("nan")}, "alpha nan must be finite and above 0"),
        ({"penalty": Penalty("l2", 2.0)}, r"alpha \* lambda = 0.5 \* 2.0 .* must be below 1"),
        ({"shaping": "softmax"}, "shaping 'softmax' must be one of zscore, ranks"),
        ({"noise": "uniform"}, "noise 'uniform' must be one of"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        taken(REWARDS, **change)


def test_impossible_members_are_refused() -> None:
    with pytest.raises(ValueError, match="population 7 with mirrored pairs must be even"):
        members(7, mirrored=True)
    with pytest.raises(ValueError, match="population 0"):
        members(0, mirrored=False)
    with pytest.raises(ValueError, match="6 rewards for 5 members"):
        step(REWARDS, members(5, False), **RUN)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"member indices \[0, 0\] must differ"):
        step(REWARDS[:2], [Member(0, 0, 1), Member(0, 1, 1)], **RUN)  # type: ignore[arg-type]


def test_mirrored_members_come_in_opposite_pairs() -> None:
    crew = members(6, mirrored=True)
    assert [(m.index, m.pair, m.sign) for m in crew] == [
        (0, 0, 1), (1, 0, -1), (2, 1, 1), (3, 1, -1), (4, 2, 1), (5, 2, -1)
    ]  # fmt: skip


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
def test_a_step_survives_json(noise: NoiseKind) -> None:
    for found in (taken(REWARDS, noise=noise, penalty=Penalty("l1", 0.1)), taken([0.5])):
        assert Step.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_step_that_was_tampered_with_is_refused() -> None:
    data = taken(REWARDS).to_json()
    with pytest.raises(ValueError, match=r"coefficient 0\.1 must be a finite float32"):
        Step.from_json(data | {"coefficients": [0.1] * 6})
    with pytest.raises(ValueError, match="6 pairs but 1 coefficients"):
        Step.from_json(data | {"coefficients": [0.5]})
    with pytest.raises(ValueError, match="step keys"):
        Step.from_json({key: data[key] for key in data if key != "no_op"})


Objective = Callable[[np.ndarray], float]


def climb(
    objective: Objective, theta: np.ndarray, generations: int, noise: NoiseKind, mirrored: bool
) -> list[float]:
    """ES by the book on one tensor; the objective after each generation."""
    delta, crew, seen = np.zeros_like(theta), members(24, mirrored), []
    eps = np.empty_like(theta)
    for generation in range(generations):
        rewards = []
        for member in crew:
            noise_into(eps, Address(1, generation, member.pair), "theta", 0, noise)
            rewards.append(objective(theta + delta + member.sign * np.float32(0.1) * eps))
        now = step(
            np.array(rewards), crew, run_seed=1, generation=generation, sigma=0.1, alpha=0.15,
            penalty=NO_PENALTY, noise=noise,
        )  # fmt: skip
        update_inplace(delta, "theta", 0, now)
        seen.append(objective(theta + delta))
    return seen


@pytest.mark.proof
@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_es_climbs_a_quadratic(noise: NoiseKind, mirrored: bool) -> None:
    target = np.linspace(-1, 1, 20, dtype=np.float32)
    seen = climb(
        lambda x: -float(np.sum((x - target) ** 2)), np.zeros(20, np.float32), 120, noise, mirrored
    )
    start = -float(np.sum(target**2))
    assert start < -7
    assert np.mean(seen[-20:]) > 0.05 * start


@pytest.mark.proof
def test_es_climbs_a_noisy_step_function() -> None:
    """A reward without a gradient: the share of 200 noisy yes / no questions that are passed."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((200, 20)) / np.sqrt(20)

    def share(x: np.ndarray) -> float:
        return float(np.mean(directions @ (x - 1.0) + 0.1 * rng.standard_normal(200) > -0.5))

    first = share(np.zeros(20))
    seen = climb(share, np.zeros(20, np.float32), 120, "normal", True)
    assert first < 0.75
    assert np.mean(seen[-20:]) > first + 0.2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(2, 12))
def test_pure_noise_has_a_step_of_the_expected_length(seed: int, population: int) -> None:
    """sum_p c_p^2 = alpha^2 / N exactly, hence E ||step||^2 = alpha^2 d / N."""
    rewards = np.random.default_rng(seed % 2**32).random(population)
    coefficients = taken(rewards).coefficients
    assert sum(c * c for c in coefficients) == pytest.approx(0.5**2 / population, rel=1e-6)
