"""One step of Evolution Strategies: rewards in, coefficients out.

Member n saw theta + s_n sigma eps_p(n) and earned r_n. With z the shaped rewards,

    theta <- theta + (alpha / N) sum_n z_n s_n eps_p(n)  =  theta + sum_p c_p eps_p
    c_p = (alpha / N) sum_{n in pair p} s_n z_n

so a generation is determined by its pairs and one number for each. Shaping, always with mean 0 and
population variance 1 (so that alpha means the same and E ||step||^2 = alpha^2 d / N holds):

    zscore   z_n = (r_n - mean r) / std r                 ddof 0
    ranks    the z-score of the ranks of r, ties sharing their average rank
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from agent.learner.noise import Address, NoiseKind
from agent.learner.penalty import Penalty, check

Shaping: TypeAlias = Literal["zscore", "ranks"]

_SAME_REWARD: Final = 1e-9  # relative; a smaller spread is the rounding of sums, not merit
_LARGEST_REWARD: Final = 1e100  # beyond it a square overflows


@dataclass(frozen=True, slots=True)
class Member:
    """One perturbation of a generation: theta + sign * sigma * eps(pair)."""

    index: int
    pair: int
    sign: int  # +1 or -1


@dataclass(frozen=True, slots=True)
class Step:
    """What every holder of (anchor, delta) needs to make the same update."""

    run_seed: int
    generation: int
    pairs: tuple[int, ...]
    coefficients: tuple[float, ...]  # c_p of each pair, alpha / N included, float32 values
    alpha: float
    sigma: float
    penalty: Penalty
    noise: NoiseKind
    no_op: str | None  # why nothing may change, or None

    def __post_init__(self) -> None:
        if len(self.pairs) != len(self.coefficients):
            raise ValueError(f"{len(self.pairs)} pairs but {len(self.coefficients)} coefficients")
        if self.noise not in get_args(NoiseKind):
            raise ValueError(f"noise {self.noise!r} must be one of {get_args(NoiseKind)}")
        for c in self.coefficients:
            if not isfinite(c) or float(np.float32(c)) != c:
                raise ValueError(f"coefficient {c!r} must be a finite float32 value")

    def addresses(self) -> tuple[Address, ...]:
        """The address of each pair's noise, in the order of the coefficients."""
        return tuple(Address(self.run_seed, self.generation, pair) for pair in self.pairs)

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` turns back into an equal step."""
        return {
            "run_seed": self.run_seed,
            "generation": self.generation,
            "pairs": list(self.pairs),
            "coefficients": list(self.coefficients),
            "alpha": self.alpha,
            "sigma": self.sigma,
            "penalty": self.penalty.to_json(),
            "noise": self.noise,
            "no_op": self.no_op,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Step":
        """The inverse of `to_json`; an unknown or missing key is an error."""
        if set(data) != set(Step.__dataclass_fields__):
            raise ValueError(
                f"step keys {sorted(data)}: {sorted(Step.__dataclass_fields__)} wanted"
            )
        return Step(
            run_seed=int(data["run_seed"]),
            generation=int(data["generation"]),
            pairs=tuple(int(pair) for pair in data["pairs"]),
            coefficients=tuple(float(c) for c in data["coefficients"]),
            alpha=float(data["alpha"]),
            sigma=float(data["sigma"]),
            penalty=Penalty.from_json(data["penalty"]),
            noise=data["noise"],
            no_op=None if data["no_op"] is None else str(data["no_op"]),
        )


@dataclass(frozen=True, slots=True)
class Applied:
    """What a holder of (anchor, delta) reports after an update."""

    delta_hash: str
    norm: float  # ||delta||
    step_norm: float  # ||delta after - delta before||
    layer_norms: dict[str, float]


def members(population: int, mirrored: bool) -> tuple[Member, ...]:
    """The members of a generation: N pairs of one, or N / 2 pairs of (+, -)."""
    if population < 1:
        raise ValueError(f"population {population} must be 1 or more")
    if not mirrored:
        return tuple(Member(n, n, 1) for n in range(population))
    if population % 2:
        raise ValueError(f"population {population} with mirrored pairs must be even")
    return tuple(Member(n, n // 2, 1 - 2 * (n % 2)) for n in range(population))


def scaling(step: Step, t: float) -> Step:
    """The step after ``step`` that makes delta t times delta: no pairs, l2 with alpha lambda 1 - t.

    In float32, delta - (1 - t) delta: the same bits on every machine, as of any other step.
    """
    return replace(
        step,
        generation=step.generation + 1,
        pairs=(),
        coefficients=(),
        alpha=1.0,
        penalty=Penalty("l2", 1.0 - t),
        no_op=None,
    )


def member_rewards(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, P) rewards per example, or (N,) already averaged -> (N,) mean reward of each member."""
    if rewards.ndim not in (1, 2) or rewards.size == 0:
        raise ValueError(f"rewards of shape {rewards.shape}: (N,) or (N, P) wanted, not empty")
    return rewards if rewards.ndim == 1 else rewards.mean(axis=1)


def shaped(rewards: NDArray[np.float64], shaping: Shaping) -> NDArray[np.float64]:
    """(N,) rewards with some spread -> (N,) z with mean 0 and population variance 1."""
    values = _ranks(rewards) if shaping == "ranks" else rewards
    centred = values - values.mean()
    z: NDArray[np.float64] = centred / np.sqrt(np.mean(centred**2))
    return z


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) values -> (N,) ranks 1 .. N, equal values sharing the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks: NDArray[np.float64] = (last - (count - 1) / 2)[place]
    return ranks


def step(
    rewards: NDArray[np.float64],
    members: Sequence[Member],
    *,
    run_seed: int,
    generation: int,
    sigma: float,
    alpha: float,
    shaping: Shaping = "zscore",
    penalty: Penalty,
    noise: NoiseKind = "normal",
) -> Step:
    """The step that (N,) rewards, or (N, P) per example, of these members ask for.

    Rewards that are not finite, or do not differ, give a no-op: a step that changes nothing and
    says why. The order in which members are given does not matter.
    """
    for name, value in (("sigma", sigma), ("alpha", alpha)):
        if not (isfinite(value) and value > 0):
            raise ValueError(f"{name} {value} must be finite and above 0")
    if shaping not in get_args(Shaping):
        raise ValueError(f"shaping {shaping!r} must be one of {', '.join(get_args(Shaping))}")
    check(penalty, alpha)
    ordered, r = _by_index(members, member_rewards(np.asarray(rewards, dtype=np.float64)))
    no_op = _why_not(ordered, r)
    by_pair = {} if no_op else _coefficients(ordered, shaped(r, shaping), alpha)
    return Step(
        run_seed, generation, tuple(by_pair), tuple(by_pair.values()),
        float(alpha), float(sigma), penalty, noise, no_op,
    )  # fmt: skip


def _by_index(
    members: Sequence[Member], rewards: NDArray[np.float64]
) -> tuple[list[Member], NDArray[np.float64]]:
    """Members and their rewards by index, so that no sum depends on the order of arrival."""
    if len(members) != len(rewards):
        raise ValueError(f"{len(rewards)} rewards for {len(members)} members")
    indices = [member.index for member in members]
    if len(set(indices)) != len(indices):
        raise ValueError(f"member indices {sorted(indices)} must differ")
    order = np.argsort(indices)
    return [members[n] for n in order], rewards[order]


def _why_not(members: Sequence[Member], rewards: NDArray[np.float64]) -> str | None:
    """The reason for a no-op, or None when the rewards carry information."""
    for member, reward in zip(members, rewards, strict=True):
        if not abs(reward) <= _LARGEST_REWARD:
            return f"reward of member {member.index} is {reward}"
    spread = float(rewards.max() - rewards.min())
    if spread <= _SAME_REWARD * max(1.0, float(np.abs(rewards).max())):
        return f"zero spread: all {len(rewards)} rewards are {rewards[0]:.6g}"
    return None


def _coefficients(
    members: Sequence[Member], z: NDArray[np.float64], alpha: float
) -> dict[int, float]:
    """{pair: c_p} by ascending pair, summed in float64 and rounded once to float32."""
    sums: dict[int, float] = {}
    for member, value in zip(members, z, strict=True):
        sums[member.pair] = sums.get(member.pair, 0.0) + member.sign * float(value)
    return {p: float(np.float32(alpha / len(members) * sums[p])) for p in sorted(sums)}
