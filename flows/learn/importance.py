"""Importance weights for the penalty: how much each parameter matters to chosen tasks.

    fisher    F_i = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta_i)^2              diagonal Fisher
    path      Omega_i = max(0, sum_t g_i(t) d_i(t)) / (D_i^2 + xi)               Zenke et al. 2017
    members   w_b = 2 (r(theta) - E r(theta + sigma eps_b)) / (sigma^2 n_b)      forward only

x are prompts of the tasks, y answers that the model draws. On the path, g is the gradient of the
tasks' loss at theta, d the step taken there and D the whole way: the contribution of a parameter to
the loss that the way from the anchor costs, per square of its length (1/2 of the curvature, for a
quadratic loss). With members, eps_b perturbs one tensor b of n_b elements alone and r is the mean
reward: half the curvature's trace is the mean loss, the same weight for all elements of a tensor.

``scaled`` brings any of them to mean 1, so that lambda keeps its meaning, with a largest weight.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Named = Mapping[str, torch.Tensor]


def fisher(scores: Iterable[tuple[float, torch.Tensor]], parameters: Named) -> dict[str, Floats]:
    """The diagonal Fisher information, by parameter.

    Args:
        scores: (weight, log p(y|x)), each with its graph: of answers drawn from p, weight 1; of all
            answers y, weight p(y|x). Weights of one x sum to 1.
        parameters: What log p is differentiated by.

    Returns:
        sum of weight * gradient^2, over the sum of weights.
    """
    squares = {name: torch.zeros_like(each) for name, each in parameters.items()}
    total = 0.0
    for weight, score in scores:
        gradients = torch.autograd.grad(score, list(parameters.values()))
        for square, gradient in zip(squares.values(), gradients, strict=True):
            square.add_(gradient.square(), alpha=weight)
        total += weight
    if not total:
        raise ValueError("fisher: no answer has a score")
    return {name: (each / total).numpy() for name, each in squares.items()}


def path(
    gradients: Callable[[Mapping[str, Floats]], Mapping[str, Floats]],
    deltas: Iterable[Mapping[str, Floats]],
    damping: float = 1e-6,
) -> dict[str, Floats]:
    """Zenke's weights of the way that delta took; see the module.

    Args:
        gradients: delta -> the gradient of the tasks' loss at anchor + delta.
        deltas: Delta after each step, in order; the first is 0. Of a step the mean of the gradients
            at its ends counts, which makes the sum exact for a quadratic loss.
        damping: xi, in squares of a weight.
    """
    work: dict[str, NDArray[np.float64]] = {}
    before: Mapping[str, Floats] = {}
    slope: Mapping[str, Floats] = {}
    for delta in deltas:
        here = gradients(delta)
        for name, now in delta.items():
            if before:
                moved = now.astype(np.float64) - before[name]
                work[name] = work.get(name, np.zeros(now.shape)) + moved * (
                    0.5 * slope[name] + 0.5 * here[name]
                )
        before, slope = {name: each.copy() for name, each in delta.items()}, here
    if not work:
        raise ValueError("path: no step")
    return {
        name: (
            np.maximum(0.0, each) / (np.square(before[name], dtype=np.float64) + damping)
        ).astype(np.float32)
        for name, each in work.items()
    }


def members(
    base: float, rewards: Mapping[str, Sequence[float]], sizes: Mapping[str, int], sigma: float
) -> dict[str, float]:
    """The weight of each tensor from rewards of members that perturb it alone; see the module.

    Args:
        base: Mean reward of theta.
        rewards: Tensor -> mean reward of each of its members.
        sizes: Tensor -> its number of elements.
        sigma: Standard deviation of the perturbations.
    """
    return {
        name: max(0.0, 2 * (base - float(np.mean(earned))) / (sigma**2 * sizes[name]))
        for name, earned in rewards.items()
    }


def scaled(weights: Mapping[str, Floats], largest: float = 10.0) -> dict[str, Floats]:
    """min(c w, largest) with the c that makes the mean 1.

    Raises:
        ValueError: Too few weights are above 0 for a mean of 1 under this largest weight.
    """
    flat = np.concatenate([each.reshape(-1) for each in weights.values()]).astype(np.float64)
    if not np.count_nonzero(flat > 0) * largest > flat.size:
        raise ValueError(
            f"importance: {np.count_nonzero(flat > 0)} of {flat.size} weights are above 0; too few "
            f"for a mean of 1 with a largest weight of {largest:g}"
        )
    low, high = 0.0, 1.0
    while np.minimum(high * flat, largest).mean() < 1:
        high *= 2
    for _ in range(60):  # the mean rises with c: bisection to the last bit of float32
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.minimum(middle * flat, largest).mean() < 1 else (low, middle)
        )
    return {
        name: np.minimum(high * each.astype(np.float64), largest).astype(np.float32)
        for name, each in weights.items()
    }


def answer_scores(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Iterator[tuple[float, torch.Tensor]]:
    """(1, log p(answer | prompt)) of each pair under a causal language model, with its graph."""
    for prompt, answer in zip(prompts, answers, strict=True):
        if not answer:
            continue
        ids = torch.tensor([[*prompt, *answer]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        chosen = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[0, len(prompt) :, None])
        yield 1.0, chosen.sum()
