"""Penalties: what pulls delta = theta - theta_0 back to zero after each step.

With s = alpha lambda w (w the importance of one parameter, 1 unless given) a step maps each
element d of delta to

    none         d
    l2           d - s d                                    = (1 - s) d
    l1           S(d, s) = sign(d) max(|d| - s, 0)
    huber        d - s clip(d, -tau, tau)                   l2 where |d| <= tau, l1 of s tau outside
    elastic_net  m - s (1 - a) m,  m = S(d, s a)            l1 at share a = 1, l2 at a = 0

Each is the minimiser over x of (x - d)^2 / 2 + R(x), with kappa(s) = s / (1 - s):
    l2           R = kappa(s) x^2 / 2
    l1           R = s |x|
    huber        R = kappa(s) H(x), H the Huber function with threshold (1 - s) tau
    elastic_net  R = s a |x| + kappa(s (1 - a)) x^2 / 2
so all need s < 1 wherever kappa is used (alpha lambda >= 1 is refused), and all keep x = 0 fixed.

Every operation is rounded by itself in delta's own type, in the order written in `prox`; the
kernels repeat that order in float32 and give the same bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite, sqrt
from re import fullmatch
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

PenaltyKind: TypeAlias = Literal["none", "l2", "l1", "huber", "elastic_net"]
PENALTIES: Final[tuple[PenaltyKind, ...]] = get_args(PenaltyKind)


@dataclass(frozen=True, slots=True)
class Penalty:
    """A penalty and its strength; `threshold` is Huber's tau, `l1_share` elastic net's a."""

    kind: PenaltyKind = "none"
    lam: float = 0.0  # lambda, ignored by "none"
    threshold: float = 0.01  # units of a weight
    l1_share: float = 0.5
    importance: str | None = None  # sha256 of the file of weights w; None: all 1

    def __post_init__(self) -> None:
        if self.kind not in PENALTIES:
            raise ValueError(f"penalty {self.kind!r} must be one of {', '.join(PENALTIES)}")
        # Below 0 l2 moves away from the anchor: a point of the line beyond delta (`es.scaling`).
        if not (isfinite(self.lam) and (self.lam >= 0 or self.kind == "l2")):
            raise ValueError(f"lambda {self.lam} must be finite and 0 or more")
        if not (isfinite(self.threshold) and self.threshold > 0):
            raise ValueError(f"huber threshold {self.threshold} must be finite and above 0")
        if not 0 <= self.l1_share <= 1:
            raise ValueError(f"elastic net l1_share {self.l1_share} must lie in 0 .. 1")
        if self.importance is not None and not fullmatch("[0-9a-f]{64}", self.importance):
            raise ValueError(f"importance {self.importance!r} must be a sha256 in hex")

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` turns back into the same penalty."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Penalty":
        """The inverse of `to_json`; an unknown or missing key is an error."""
        wanted = set(Penalty.__dataclass_fields__)
        if set(data) != wanted:
            raise ValueError(f"penalty keys {sorted(data)}: {', '.join(sorted(wanted))} wanted")
        numbers = {name: float(data[name]) for name in ("lam", "threshold", "l1_share")}
        return Penalty(kind=data["kind"], importance=data["importance"], **numbers)


NO_PENALTY: Final = Penalty()


def check(penalty: Penalty, alpha: float, largest_weight: float = 1.0) -> None:
    """Refuse a step size and penalty whose shrink is not below 1 (see the module's kappa)."""
    share = {"l2": 1.0, "huber": 1.0, "elastic_net": 1.0 - penalty.l1_share}.get(penalty.kind, 0.0)
    shrink = alpha * penalty.lam * share * largest_weight
    if not shrink < 1:
        weighted = f" * weight {largest_weight}" if largest_weight != 1 else ""
        raise ValueError(
            f"alpha * lambda{weighted} = {alpha} * {penalty.lam} gives a {penalty.kind} shrink of "
            f"{shrink:.6g}; it must be below 1"
        )


def check_weights(weights: NDArray[Any], size: int) -> float:
    """Refuse importance weights of the wrong size, negative or not finite; return the largest."""
    if weights.size != size:
        raise ValueError(f"importance weights: {weights.size} for {size} parameters")
    if size == 0:
        return 0.0
    low, high = float(weights.min()), float(weights.max())
    if not (low >= 0 and high < inf):
        raise ValueError(f"importance weights span {low} .. {high}; finite and 0 or more wanted")
    return high


def prox(
    delta: NDArray[Any], penalty: Penalty, alpha: float, weights: NDArray[Any] | None = None
) -> NDArray[Any]:
    """The penalty step on delta (any shape), literally, in delta's own float type; a new array."""
    check(penalty, alpha, 1.0 if weights is None else check_weights(weights, delta.size))
    real = delta.dtype.type
    one, a, tau = real(1), real(penalty.l1_share), real(penalty.threshold)
    w = one if weights is None else weights.astype(delta.dtype)
    s = real(alpha * penalty.lam) * w
    result: NDArray[Any] = delta.copy()
    if penalty.kind == "l2":
        result = delta - s * delta
    elif penalty.kind == "l1":
        result = _soft(delta, s)
    elif penalty.kind == "huber":
        result = delta - s * np.clip(delta, -tau, tau)
    elif penalty.kind == "elastic_net":
        m = _soft(delta, s * a)
        result = m - s * (one - a) * m
    return result


def _soft(delta: NDArray[Any], threshold: NDArray[Any]) -> NDArray[Any]:
    """S(d, t) = sign(d) max(|d| - t, 0): exact zeros inside the threshold."""
    m = np.abs(delta) - threshold
    soft: NDArray[Any] = np.where(m > 0, np.copysign(m, delta), delta.dtype.type(0))
    return soft


def expected_norm(
    penalty: Penalty,
    *,
    alpha: float,
    population: int,
    parameters: int,
    generations: int,
    start_norm: float = 0.0,
) -> float | None:
    """sqrt(E ||delta_T||^2) under rewards of pure noise; None where no closed form exists.

    With q_0 = start_norm^2, rho = 1 - alpha lambda (1 for "none"), v = alpha^2 d / N:
        E ||delta_T||^2 = rho^(2T) q_0 + v rho^2 (1 - rho^(2T)) / (1 - rho^2)
    which is q_0 + v T for rho = 1: the random walk (Eq. 2 of arXiv 2605.30148).
    """
    if penalty.kind not in ("none", "l2"):
        return None
    check(penalty, alpha)
    rho2 = (1 - alpha * penalty.lam) ** 2 if penalty.kind == "l2" else 1.0
    variance = alpha**2 * parameters / population
    return sqrt(rho2**generations * start_norm**2 + variance * _geometric(rho2, generations))


def _geometric(rho2: float, generations: int) -> float:
    """rho2 + rho2^2 + ... + rho2^T: how many free steps' variance is left after T of them."""
    if rho2 == 1.0:
        return float(generations)
    return rho2 * (1 - rho2**generations) / (1 - rho2)


def lambda_for_norm_ratio(ratio: float, *, alpha: float, generations: int) -> float:
    """The l2 lambda under which ||delta_T|| is `ratio` times its random walk (target_norm_ratio).

    Solves rho^2 (1 - rho^(2T)) / (1 - rho^2) = ratio^2 T for rho = 1 - alpha lambda. The left side
    rises from 0 to T with rho, so bisection on rho finds the one solution to the last bit.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"target_norm_ratio {ratio} must lie above 0 and up to 1")
    if not (isfinite(alpha) and alpha > 0 and generations >= 1):
        raise ValueError(f"alpha {alpha}, generations {generations}: both must be above 0")
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        below = _geometric(middle**2, generations) < ratio**2 * generations
        low, high = (middle, high) if below else (low, middle)
    return (1 - high) / alpha


def next_lambda(
    tried: Sequence[tuple[float, float]], reference: float, *, tolerance: float, factor: float = 0.5
) -> float:
    """The lambda of the next round: start high, lower it until the target does not suffer.

    `tried` holds (lambda, target score) of the rounds so far, oldest first; `reference` is the
    target score without a penalty, in the same units. The last lambda is kept when its score is
    within `tolerance` of the reference, otherwise it is multiplied by `factor` (paper, section 6).
    """
    if not tried:
        raise ValueError("next_lambda needs at least one round: (lambda, target score)")
    if not (0 < factor < 1 and tolerance >= 0):
        raise ValueError(f"factor {factor} must lie in 0 .. 1, tolerance {tolerance} be 0 or more")
    lam, score = tried[-1]
    if not (isfinite(score) and isfinite(reference)):
        raise ValueError(f"target score {score}, reference {reference}: both must be finite")
    return lam if score >= reference - tolerance else lam * factor
