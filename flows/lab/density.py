"""Expected norm of delta under pure noise for any penalty, computed numerically.

Under rewards of pure noise each coordinate follows x <- P(x + g xi), xi ~ N(0, 1), with
g = alpha / sqrt(N) and P the penalty step. The value before P, u = P(u') + g xi, has the density

    f_{t+1}(u) = integral f_t(v) phi_g(u - P(v)) dv,     f_1 = phi_g,   phi_g the density of g xi

solved on an even grid (spacing g / 4, out to 7 standard deviations of the free walk) by the
trapezoidal rule. Then E ||delta_T||^2 = d integral f_T(v) P(v)^2 dv. With penalty none and l2 the
result equals penalty.expected_norm to 1e-4.
"""

from math import pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.learner.penalty import Penalty, prox


def norm_by_density(
    penalty: Penalty, *, alpha: float, population: int, parameters: int, generations: int
) -> float:
    """sqrt(E ||delta_T||^2) from delta_0 = 0 after T generations of pure noise, numerically."""
    if generations < 1:
        return 0.0
    g = alpha / sqrt(population)
    half = int(np.ceil(4 * 7 * sqrt(generations)))
    grid = np.arange(-half, half + 1, dtype=np.float64) * (g / 4)
    moved = prox(grid, penalty, alpha)
    kernel = _gaussian(grid[:, None] - moved[None, :], g) * (g / 4)
    density = _gaussian(grid, g)
    for _ in range(generations - 1):
        density = kernel @ density
    return sqrt(parameters * float(np.sum(density * moved**2)) * (g / 4))


def _gaussian(x: NDArray[Any], deviation: float) -> NDArray[np.float64]:
    """The density of N(0, deviation^2) at x."""
    density: NDArray[np.float64] = np.exp(-((x / deviation) ** 2) / 2) / (deviation * sqrt(2 * pi))
    return density
