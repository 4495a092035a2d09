"""Statistics of paired right/wrong answers: what a difference is, and how sure one can be of it.

Words: n pairs of one question asked to a baseline and to a candidate; b the pairs where only the
baseline is right (lost), c where only the candidate is right (won); difference = (c - b) / n, a
share (0.01 is one point). Everything undefined (no pairs, counts that cannot be, NaN) raises
ValueError: no number is made up.

Sources: T. Tango, Statistics in Medicine 17 (1998) 891-908, equations 24-26 (score test and
interval); Q. McNemar (1947), exact form; E. B. Wilson (1927).

Graded rewards, rows of one template, and tests that are looked at again are judged by betting
(``Units``), which is valid however often it is evaluated. For graded rewards r in [0, 1] the two
questions of the gate are about the mean difference D = E[r(candidate) - r(baseline)]:

    non-inferiority with margin m    H0: D <= -m      the same test at null = -m
    superiority                      H0: D <= 0       the same test at null = 0

It assumes that units are independent and rewards lie in [0, 1], and nothing about their
distribution: no normality, no symmetry of differences (as a sign-flip test would), no minimal n.
For 0/1 rewards it refutes fewer false nulls than the exact tests, never more than alpha true ones.

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
from scipy.stats import binom, binomtest, bootstrap, norm

Floats = NDArray[np.float64]
EDGE = 1e-12  # how near to a difference of -1 or +1 the search for a bound begins


@dataclass(frozen=True, slots=True)
class Paired:
    """Counts of n pairs: ``b`` lost (only the baseline right), ``c`` won (only the candidate)."""

    n: int
    b: int
    c: int

    def __post_init__(self) -> None:
        if self.n < 1 or min(self.b, self.c) < 0 or self.b + self.c > self.n:
            raise ValueError(
                f"paired counts n={self.n}, b={self.b}, c={self.c}: n >= 1 and 0 <= b + c <= n"
            )

    @property
    def difference(self) -> float:
        """(c - b) / n: the candidate's accuracy less the baseline's, as a share."""
        return (self.c - self.b) / self.n


def paired(baseline: ArrayLike, candidate: ArrayLike) -> Paired:
    """Count the pairs of two equally ordered vectors of 0/1 rewards.

    Raises:
        ValueError: no rows, unequal lengths, or a reward that is neither 0 nor 1 (NaN included).
    """
    before, after = np.asarray(baseline, float), np.asarray(candidate, float)
    if before.ndim != 1 or before.shape != after.shape:
        raise ValueError(f"rewards of shape {before.shape} and {after.shape}: two equal vectors")
    both = np.concatenate([before, after])
    odd = both[~np.isin(both, (0.0, 1.0))]
    if odd.size:
        raise ValueError(f"reward {odd[0]:g}: 0 or 1")
    return Paired(before.size, int((before > after).sum()), int((after > before).sum()))


def tango_z(n: ArrayLike, b: ArrayLike, c: ArrayLike, null: ArrayLike) -> Floats:
    """Tango's score statistic for H0: p_c - p_b = D, with D = ``null`` (arrays broadcast).

        B = b + c + D (c - b - 2n)
        q = max((B + sqrt(max(B^2 + 8 n b D (1 - D), 0))) / (4n), 0, -D)
        z = ((c - b)/n - D) / sqrt((2q + D - D^2) / n)

    q is the likeliest p_b under H0 and 2q + D - D^2 the variance of one pair's difference there.
    z falls as D grows. Non-inferiority with margin m is shown at level alpha when
    ``tango_z(n, b, c, -m) > z_(1 - alpha)``. Where nothing is discordant and D = 0, z is 0.
    """
    n, b, c, D = (np.asarray(x, float) for x in (n, b, c, null))
    if not (np.all(n >= 1) and np.all(b >= 0) and np.all(c >= 0) and np.all(b + c <= n)):
        raise ValueError(f"paired counts n={n}, b={b}, c={c}: n >= 1 and 0 <= b + c <= n")
    if not np.all(np.abs(D) < 1):
        raise ValueError(f"null difference {D}: inside (-1, 1)")
    return _score(n, b, c, D)


def _score(n: Floats, b: Floats, c: Floats, D: Floats) -> Floats:
    """The three lines of :func:`tango_z` on counts already checked."""
    B = b + c + D * (c - b - 2 * n)
    root = np.sqrt(np.maximum(B * B + 8 * n * b * D * (1 - D), 0.0))
    q = np.maximum(np.maximum((B + root) / (4 * n), 0.0), -D)
    variance = np.maximum(2 * q + D - D * D, 0.0) / n
    gap = (c - b) / n - D
    spread = np.sqrt(variance)
    z = np.divide(gap, spread, out=np.zeros_like(gap + spread), where=spread > 0)
    return np.asarray(z, float)


def tango_p(n: ArrayLike, b: ArrayLike, c: ArrayLike, margin: ArrayLike) -> Floats:
    """One-sided p of H0: the candidate is worse by ``margin`` or more (a share, below 1)."""
    return np.asarray(norm.sf(tango_z(n, b, c, -np.asarray(margin, float))), float)


def tango_interval(pairs: Paired, alpha: float) -> tuple[float, float]:
    """The differences D with |tango_z(D)| <= z_(1 - alpha): level 1 - 2 alpha, inside [-1, 1].

    Each end is found by bracketing on its side of the observed difference.
    """
    critical = float(norm.isf(level(alpha)))
    observed = pairs.difference
    n, b, c = (np.asarray(x, float) for x in (pairs.n, pairs.b, pairs.c))

    def excess(D: float, sign: float) -> float:
        if observed == D:  # the numerator is 0 there, even where the variance is 0 too
            return -critical
        return sign * float(_score(n, b, c, np.asarray(D))) - critical

    low = high = observed
    if observed > -1:
        start = -1 + EDGE
        low = brentq(excess, start, observed, args=(1.0,), xtol=1e-12)
    if observed < 1:
        end = 1 - EDGE
        high = brentq(excess, observed, end, args=(-1.0,), xtol=1e-12)
    return float(low), float(high)


def mcnemar_exact(b: ArrayLike, c: ArrayLike) -> Floats:
    """Exact one-sided McNemar: P(X >= c), X ~ Binomial(b + c, 1/2); small when c is too many.

    With nothing discordant the sum is over everything: 1.
    """
    b, c = np.asarray(b), np.asarray(c)
    if not (np.all(b >= 0) and np.all(c >= 0)):
        raise ValueError(f"discordant counts b={b}, c={c}: >= 0")
    return np.asarray(binom.sf(c - 1, b + c, 0.5), float)


def wilson(right: int, n: int, alpha: float = 0.025) -> tuple[float, float]:
    """Wilson's score interval of one accuracy right/n, level 1 - 2 alpha."""
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"accuracy {right}/{n}: n >= 1 and 0 <= right <= n")
    bounds = binomtest(right, n).proportion_ci(1 - 2 * level(alpha), method="wilson")
    return float(bounds.low), float(bounds.high)


def weighted_mean_interval(
    totals: Sequence[float],
    weights: Sequence[float],
    *,
    seed: int,
    draws: int = 2000,
    alpha: float = 0.025,
) -> tuple[float, float, float]:
    """Mean = sum(totals) / sum(weights), with a percentile bootstrap over the rows.

    Args:
        totals: one sum a row, e.g. the KL of all its tokens (nats).
        weights: what that sum runs over, e.g. the row's tokens; > 0.
        seed: of the resampling; the same seed gives the same interval.
        draws: resamples.
        alpha: mass outside on each side.

    Returns:
        (mean, low, high), in units of totals / weights.
    """
    x, w = np.asarray(totals, float), np.asarray(weights, float)
    if x.ndim != 1 or x.shape != w.shape or x.size < 2:
        raise ValueError(f"rows {x.shape} with weights {w.shape}: two equal vectors, >= 2 rows")
    if not (np.isfinite(x).all() and np.isfinite(w).all() and (w > 0).all()):
        raise ValueError("totals and weights: finite, weights > 0")

    def ratio(a: Floats, b: Floats, axis: int = -1) -> Floats:
        return np.asarray(a.sum(axis=axis) / b.sum(axis=axis), float)

    # Rows are resampled as pairs of total and weight: tokens of one row are not independent.
    resampled = bootstrap(
        (x, w),
        ratio,
        paired=True,
        n_resamples=draws,
        confidence_level=1 - 2 * level(alpha),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(ratio(x, w)), float(resampled.low), float(resampled.high)


def level(alpha: float) -> float:
    """``alpha`` itself when it can be a one-sided level; ValueError otherwise."""
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha {alpha}: between 0 and 0.5")
    return alpha


STAKES: Floats = np.geomspace(0.05, 0.99, 10)  # shares f of the wealth put on each unit
BETTING_EDGE = 1e-9  # how near to a mean of -1 or +1 the search for a bound begins


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


def log_e_levels(values: ArrayLike, counts: ArrayLike, null: float) -> Floats:
    """:func:`log_e` of single rows of which ``counts`` (..., V) have the difference ``values``."""
    s = (np.asarray(values, float) - null) / (1 + null)
    log_wealth = np.asarray(counts, float) @ np.log1p(np.outer(s, STAKES))
    return np.asarray(np.logaddexp.reduce(log_wealth, axis=-1) - np.log(STAKES.size), float)


def log_e_counts(n: ArrayLike, b: ArrayLike, c: ArrayLike, null: float) -> Floats:
    """:func:`log_e` of single rows straight from paired counts; arrays broadcast."""
    n, b, c = np.broadcast_arrays(*(np.asarray(x, float) for x in (n, b, c)))
    return log_e_levels((-1.0, 0.0, 1.0), np.stack([b, n - b - c, c], axis=-1), null)


def p_value(data: Units, null: float) -> float:
    """min(1, 1/E): below alpha with probability <= alpha under H0, at any stopping time."""
    return float(np.exp(min(0.0, -log_e(data, null))))


def bounds(data: Units, alpha: float) -> tuple[float, float]:
    """(low, high): the means D that neither gambler has refuted at level ``alpha`` each."""
    mirrored = Units(-data.total, data.size)
    return _lower(data, alpha), -_lower(mirrored, alpha)


def mean_interval(rewards: ArrayLike, alpha: float = 0.025) -> tuple[float, float]:
    """Interval of the mean of rewards in [0, 1], level 1 - 2 alpha, for any number of rows.

    d_i = 2 r_i - 1 in [-1, 1],    (low, high) = (1 + bounds(d)) / 2
    """
    low, high = bounds(units(2 * np.asarray(rewards, float) - 1), alpha)
    return (1 + low) / 2, (1 + high) / 2


def _lower(data: Units, alpha: float) -> float:
    """The D where log E = log(1/alpha); E falls in D and is at most 1 at the observed mean."""
    needed = -np.log(level(alpha))
    observed = float(data.total.sum() / data.size.sum())
    start, end = -1 + BETTING_EDGE, min(observed, 1 - BETTING_EDGE)
    if observed <= start or log_e(data, start) < needed:
        return -1.0
    return float(brentq(lambda D: log_e(data, D) - needed, start, end, xtol=1e-12))
