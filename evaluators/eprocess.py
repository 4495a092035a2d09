"""Tests of paired differences by betting, valid however often they are evaluated.

Unit g (a row, or all rows of one template) has m_g paired differences d_i = candidate - baseline
in [-1, 1]; M is the largest m_g. Against H0: E[d] <= D, a gambler stakes the share f of the
wealth on every unit:

    W_f = prod_g (1 + f * s_g),    s_g = sum_(i in g) (d_i - D) / (M (1 + D))  >= -1
    E   = mean of W_f over a fixed grid of f in (0, 1)

Under H0 every factor has mean <= 1, so E is a non-negative supermartingale in the units, whatever
the dependence inside a unit, and P(E >= 1/alpha at any time) <= alpha (Ville). Hence rows may be
added after a look ("extend when inconclusive"), the test may stop early, and no sample is too
small for it. The stakes are fixed beforehand and each factor rises with d_i, so E depends on no
order and one more lost row never raises it. E falls as D grows; inverting it in D gives bounds.
Source: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting" (2024).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

from evaluators.stats import level

Floats = NDArray[np.float64]
STAKES: Floats = np.geomspace(0.05, 0.99, 10)  # shares f of the wealth put on each unit
EDGE = 1e-9  # how near to a mean of -1 or +1 the search for a bound begins


@dataclass(frozen=True, slots=True)
class Units:
    """Independent units: ``total`` (G,) sums of d, ``size`` (G,) rows; M = the largest size."""

    total: Floats
    size: Floats

    def __post_init__(self) -> None:
        if self.size.ndim != 1 or self.size.size == 0 or self.total.shape != self.size.shape:
            raise ValueError(f"units of shape {self.total.shape}: a vector of at least one")
        if not (self.size >= 1).all() or not (np.abs(self.total) <= self.size + 1e-9).all():
            raise ValueError("units: differences in [-1, 1] and at least one row each")


def units(differences: ArrayLike, clusters: Sequence[Hashable] | None = None) -> Units:
    """Group paired differences (n,) in [-1, 1] by cluster (a template); None: each row its own."""
    d = np.asarray(differences, float)
    if d.ndim != 1 or d.size == 0 or not (np.abs(d) <= 1).all():  # NaN fails the comparison
        raise ValueError("differences: a vector of at least one value in [-1, 1]")
    if clusters is None:
        return Units(d, np.ones_like(d))
    if len(clusters) != d.size:
        raise ValueError(f"{len(clusters)} clusters for {d.size} rows: one each")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([numbers[name] for name in clusters])
    total = np.asarray(np.bincount(index, weights=d), np.float64)
    return Units(total, np.bincount(index).astype(np.float64))


def log_e(data: Units, null: float) -> float:
    """log E against H0: E[d] <= ``null``; large when the candidate is better than that."""
    if not -1 < null < 1:
        raise ValueError(f"null difference {null}: inside (-1, 1)")
    s = (data.total - data.size * null) / (data.size.max() * (1 + null))
    log_wealth = np.log1p(np.outer(STAKES, s)).sum(axis=1)
    return float(np.logaddexp.reduce(log_wealth) - np.log(STAKES.size))


def log_e_counts(n: ArrayLike, b: ArrayLike, c: ArrayLike, null: float) -> Floats:
    """:func:`log_e` of single rows straight from paired counts; arrays broadcast."""
    n, b, c = (np.asarray(x, float)[..., None] for x in (n, b, c))
    lost, tied, won = (np.log1p(STAKES * (d - null) / (1 + null)) for d in (-1.0, 0.0, 1.0))
    log_wealth = b * lost + (n - b - c) * tied + c * won
    return np.asarray(np.logaddexp.reduce(log_wealth, axis=-1) - np.log(STAKES.size), float)


def p_value(data: Units, null: float) -> float:
    """min(1, 1/E): below alpha with probability <= alpha under H0, at any stopping time."""
    return float(np.exp(min(0.0, -log_e(data, null))))


def bounds(data: Units, alpha: float) -> tuple[float, float]:
    """(low, high): the means D that neither gambler has refuted at level ``alpha`` each."""
    mirrored = Units(-data.total, data.size)
    return _lower(data, alpha), -_lower(mirrored, alpha)


def _lower(data: Units, alpha: float) -> float:
    """The D where log E = log(1/alpha); E falls in D and is at most 1 at the observed mean."""
    needed = -np.log(level(alpha))
    observed = float(data.total.sum() / data.size.sum())
    start, end = -1 + EDGE, min(observed, 1 - EDGE)
    if observed <= start or log_e(data, start) < needed:
        return -1.0
    return float(brentq(lambda D: log_e(data, D) - needed, start, end, xtol=1e-12))
