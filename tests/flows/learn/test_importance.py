"""Importance weights against closed forms on models small enough to have one."""

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch

from flows.learn.importance import Floats, fisher, members, path, scaled


def softmax_regression() -> tuple[torch.Tensor, torch.Tensor]:
    """(n, d) inputs and (k, d) weights of p(y | x) = softmax(W x)."""
    chance = torch.Generator().manual_seed(3)
    inputs = torch.randn(40, 3, generator=chance)
    return inputs, torch.randn(4, 3, generator=chance).requires_grad_()


def analytic(inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """F_kj = mean over x of p_k (1 - p_k) x_j^2, for d log p(y|x) / d W_kj = (1[y=k] - p_k) x_j."""
    p = torch.softmax(inputs @ weights.detach().T, dim=1)
    return (p * (1 - p)).T @ inputs.square() / len(inputs)


def test_fisher_of_a_softmax_regression_over_all_answers() -> None:
    inputs, weights = softmax_regression()

    def scores() -> Iterator[tuple[float, torch.Tensor]]:
        for x in inputs:
            log_p = torch.log_softmax(weights @ x, dim=0)
            for y in range(len(weights)):
                yield float(log_p[y].detach().exp()), torch.log_softmax(weights @ x, dim=0)[y]

    found = fisher(scores(), {"w": weights})["w"]
    np.testing.assert_allclose(found, analytic(inputs, weights).numpy(), rtol=0.01)


def test_fisher_from_drawn_answers_converges_to_it() -> None:
    inputs, weights = softmax_regression()
    chance = torch.Generator().manual_seed(5)
    p = torch.softmax(inputs @ weights.detach().T, dim=1)
    answers = p.multinomial(100, replacement=True, generator=chance)

    def scores() -> Iterator[tuple[float, torch.Tensor]]:
        for x, own in zip(inputs, answers, strict=True):
            for y in own:
                yield 1.0, torch.log_softmax(weights @ x, dim=0)[y]

    found = fisher(scores(), {"w": weights})["w"]
    expected = analytic(inputs, weights).numpy()
    assert np.abs(found - expected).sum() / expected.sum() < 0.05


def test_the_path_of_a_quadratic_loss_gives_half_its_curvature() -> None:
    curvature = np.array([0.0, 1.0, 4.0, 9.0], np.float32)

    def gradients(delta: Mapping[str, Floats]) -> dict[str, Floats]:
        return {"w": curvature * delta["w"]}

    chance = np.random.default_rng(1)
    steps = np.cumsum(chance.normal(0.1, 0.05, (6, 4)), axis=0).astype(np.float32)
    way = [{"w": each} for each in (np.zeros(4, np.float32), *steps)]
    found = path(gradients, way, damping=1e-12)["w"]
    np.testing.assert_allclose(found, curvature / 2, rtol=1e-4, atol=1e-6)


def test_members_of_a_quadratic_reward_give_a_tensors_mean_curvature() -> None:
    curvature = {"a": np.linspace(0.5, 1.5, 400), "b": np.full(100, 3.0)}
    sigma, chance = 0.1, np.random.default_rng(2)
    rewards = {
        name: [1 - 0.5 * np.sum(h * (sigma * chance.normal(size=h.size)) ** 2) for _ in range(300)]
        for name, h in curvature.items()
    }
    found = members(1.0, rewards, {name: h.size for name, h in curvature.items()}, sigma)
    assert found == pytest.approx({"a": 1.0, "b": 3.0}, rel=0.03)


def test_scaled_weights_have_mean_one_and_keep_their_order() -> None:
    weights = {"w": np.geomspace(1e-6, 1e3, 1000, dtype=np.float32)}
    found = scaled(weights, 10.0)["w"]
    assert found.mean() == pytest.approx(1.0, rel=1e-4)
    assert found.max() <= 10
    assert (np.diff(found) >= 0).all()
    free = found[found < 10]
    np.testing.assert_allclose(free / free[0], (weights["w"] / weights["w"][0])[: free.size], 1e-4)


def test_too_few_weights_above_zero_are_refused() -> None:
    few = np.zeros(100, np.float32)
    few[:5] = 1.0
    with pytest.raises(ValueError, match="5 of 100 weights are above 0"):
        scaled({"w": few}, 10.0)
