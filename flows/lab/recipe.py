"""The published recipe, literally: noise added to the weights in place, in the weights' own type.

    perturb   theta <- theta + sigma eps           eps by torch.randn, tensor after tensor
    restore   theta <- theta - sigma eps           the same eps drawn again
    update    theta <- theta + c_n eps_n           member after member
              theta <- theta - pull                pull = delta - P(delta), delta = theta - theta_0

It is what the exact learner is measured against: slower, because every member passes over the
weights three times, and inexact, because each line rounds to the weights' type. Written from the
equations of arXiv 2605.30148; (weights, anchor) are lists of tensors of equal shapes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from agent.learner.es import Step, members, step
from agent.learner.kernels_cpu import Render, render_many, update_inplace
from agent.learner.noise import Address
from agent.learner.penalty import NO_PENALTY, Penalty, prox

Weights = list[torch.Tensor]


def perturb(weights: Weights, seed: int, sigma: float) -> None:
    """theta + sigma eps, in place."""
    for weight, eps in zip(weights, _noise(weights, seed), strict=True):
        weight.add_(eps, alpha=sigma)


def restore(weights: Weights, seed: int, sigma: float) -> None:
    """theta - sigma eps, in place: the inverse of perturb up to rounding."""
    for weight, eps in zip(weights, _noise(weights, seed), strict=True):
        weight.sub_(eps, alpha=sigma)


def update(weights: Weights, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
    """theta + sum_n c_n eps_n, one member after another, in place."""
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        for weight, eps in zip(weights, _noise(weights, seed), strict=True):
            weight.add_(eps, alpha=coefficient)


def decay_l2(weights: Weights, anchor: Weights, shrink: float) -> None:
    """theta - alpha lambda (theta - theta_0), in place."""
    for weight, origin in zip(weights, anchor, strict=True):
        weight.sub_(weight - origin, alpha=shrink)


def decay(weight: torch.Tensor, anchor: torch.Tensor, penalty: Penalty, alpha: float) -> None:
    """theta - (delta - P(delta)) for any penalty; only the in-place operation rounds coarsely."""
    delta = (weight - anchor).float().numpy()
    pull = delta - prox(delta, penalty, alpha)
    weight.sub_(torch.from_numpy(pull).to(weight.dtype))


def differing_after_cycles(
    dtype: torch.dtype, *, parameters: int, cycles: int, sigma: float, seed: int
) -> int:
    """How many of `parameters` weights differ after `cycles` of perturb and restore in place."""
    anchor = _anchor(parameters, seed).to(dtype)
    weights = [anchor.clone()]
    for cycle in range(cycles):
        perturb(weights, seed + 1 + cycle, sigma)
        restore(weights, seed + 1 + cycle, sigma)
    return int((weights[0] != anchor).sum())


def differing_after_renders(*, parameters: int, cycles: int, sigma: float, seed: int) -> int:
    """The same for the exact learner; sum over float32 and bfloat16 weights."""
    delta, total = np.zeros(parameters, np.float32), 0
    origin = _anchor(parameters, seed)
    for anchor in (origin.numpy(), origin.bfloat16().view(torch.uint16).numpy()):
        part = Render("weights", anchor.copy(), anchor, delta)
        for cycle in range(cycles):
            render_many([part], Address(seed, cycle, 0), sigma, "normal")
            render_many([part], None, 0.0, "normal")
        total += int(np.count_nonzero(part.out != anchor))
    return total


def pure_noise_norms(
    penalties: Sequence[Penalty],
    dtypes: Sequence[torch.dtype],
    *,
    parameters: int,
    population: int,
    alpha: float,
    generations: int,
    seed: int,
) -> list[tuple[float, list[float]]]:
    """||delta_T|| under random rewards, per penalty: exact arithmetic, and in place in each dtype.

    All see the same steps; in place the summed step is rounded once, which favours the recipe.
    """
    steps = _noise_steps(population, alpha, generations, seed)
    origins = [_anchor(parameters, seed).to(dtype) for dtype in dtypes]
    exact = [np.zeros(parameters, np.float32) for _ in penalties]
    in_place = [[origin.clone() for origin in origins] for _ in penalties]
    # Both arithmetics take the same steps, so that their norms differ by rounding alone.
    for now in steps:
        summed = np.zeros(parameters, np.float32)
        update_inplace(summed, "weights", 0, now)
        for penalty, delta, weights in zip(penalties, exact, in_place, strict=True):
            update_inplace(delta, "weights", 0, replace(now, penalty=penalty))
            for weight, origin in zip(weights, origins, strict=True):
                weight.add_(torch.from_numpy(summed).to(weight.dtype))
                decay(weight, origin, penalty, alpha)
    return [
        (
            float(np.linalg.norm(delta.astype(np.float64))),
            [
                float((w.double() - o.double()).norm())
                for w, o in zip(weights, origins, strict=True)
            ],
        )
        for delta, weights in zip(exact, in_place, strict=True)
    ]


def _noise_steps(population: int, alpha: float, generations: int, seed: int) -> Iterator[Step]:
    """Steps without a penalty, from random rewards."""
    rng, crew = np.random.default_rng(seed), members(population, mirrored=False)
    for generation in range(generations):
        rewards = rng.standard_normal(population)
        yield step(
            rewards, crew, run_seed=seed, generation=generation, sigma=1.0, alpha=alpha,
            penalty=NO_PENALTY,
        )  # fmt: skip


def _noise(weights: Weights, seed: int) -> Iterator[torch.Tensor]:
    """torch.randn of each tensor's shape and type, from one seed."""
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        yield torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


def _anchor(parameters: int, seed: int) -> torch.Tensor:
    """Weights the size of a language model's: N(0, 0.02^2), float32."""
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(parameters, generator=generator)
