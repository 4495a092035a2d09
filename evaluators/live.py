"""Sequential tests of live traffic: is a new version worse in reward, errors or latency?

    reward    H0: E[old - new] <= 0, within each task; d_i = mean of old block i - new reward i
    errors    H0: E[x] <= old share + margin;          x_t = share of failed answers in slice t
    latency   H0: E[x] <= 1/2;                         x_t = share of slow answers in slice t

The old version's window is cut, in random order, into as many blocks as a watch may need, so that
every pair is independent. A slice is SLICE_S seconds: answers of one moment share one machine, and
a burst of trouble counts once. Slow is longer than ``factor`` times the old window's median.

Each watch bets against its H0 (evaluators.stats): P(E >= 3/alpha at any time | H0) <= alpha/3,
so that a version which is not worse is rolled back with probability <= alpha, however often one
looks. A watch without a window to compare with is undefined and says nothing; only failures need
none: a service that never failed before is held to the margin.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evaluators.stats import log_e, units

SLICE_S = 10.0  # three slices of nothing but failures refute; a restart is shorter
FEW = 20  # a median of fewer old answers is no yardstick
WATCHES = 3  # share alpha


@dataclass(frozen=True, slots=True)
class LiveAnswer:
    """One request: its time (s), whether it failed, its latency (s)."""

    at: float
    failed: bool
    latency_s: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Traffic of one version: rewards in [0, 1] by task, in random order, and its requests."""

    rewards: Mapping[str, Sequence[float]] = field(default_factory=dict)
    answers: Sequence[LiveAnswer] = ()

    @property
    def count(self) -> int:
        """Verified rewards."""
        return sum(map(len, self.rewards.values()))


@dataclass(frozen=True, slots=True)
class Watch:
    """One watch: the figures side by side, and the evidence (log E) that the new one is worse."""

    name: str
    old: float | None
    new: float | None
    n: int  # pairs or slices bet on
    log_e: float | None  # None: nothing to compare

    def worse(self, alpha: float) -> bool:
        """Whether the evidence suffices at this watch's share of alpha."""
        return self.log_e is not None and self.log_e >= math.log(WATCHES / alpha)

    def text(self) -> str:
        """'reward 0.900 -> 0.300 on 20 (E = 1e+04)'."""
        if self.old is None or self.new is None or self.log_e is None:
            return f"{self.name}: nothing to compare"
        evidence = math.exp(min(self.log_e, 700.0))
        return f"{self.name} {self.old:.3f} -> {self.new:.3f} on {self.n} (E = {evidence:.3g})"


def watches(
    new: Traffic, old: Traffic, *, rows: int, error_margin: float, latency_factor: float
) -> list[Watch]:
    """The three watches now. ``rows``: pairs the old window is cut for, per task."""
    return [
        _reward(new, old, rows),
        _errors(new.answers, old.answers, error_margin),
        _latency(new.answers, old.answers, latency_factor),
    ]


def _reward(new: Traffic, old: Traffic, rows: int) -> Watch:
    differences: list[float] = []
    for task, rewards in new.rewards.items():
        blocks = _blocks(old.rewards.get(task, ()), rows)
        differences += [before - now for before, now in zip(blocks, rewards, strict=False)]
    shared = [task for task in new.rewards if old.rewards.get(task)]
    return Watch(
        "reward",
        _mean([r for task in shared for r in old.rewards[task]]),
        _mean([r for task in shared for r in new.rewards[task]]),
        len(differences),
        log_e(units(np.clip(differences, -1, 1)), 0.0) if differences else None,
    )


def _blocks(old: Sequence[float], rows: int) -> list[float]:
    """Means of consecutive blocks of equal size, at least one value each, ``rows`` or more."""
    size = max(1, len(old) // rows)
    return [float(np.mean(old[i : i + size])) for i in range(0, len(old) - size + 1, size)]


def _errors(new: Sequence[LiveAnswer], old: Sequence[LiveAnswer], margin: float) -> Watch:
    before = _mean(_shares(old, [each.failed for each in old])) or 0.0
    now = _shares(new, [each.failed for each in new])
    evidence = _share_above(now, min(before + margin, 1 - margin))
    return Watch("errors", before, _mean(now), len(now), evidence)


def _latency(new: Sequence[LiveAnswer], old: Sequence[LiveAnswer], factor: float) -> Watch:
    """Failed requests are left out: their times are no latencies."""
    sound = [each for each in new if not each.failed]
    times = [each.latency_s for each in old if not each.failed]
    if len(times) < FEW or not sound:
        return Watch("latency", None, None, 0, None)
    median = float(np.median(times))
    slow = _shares(sound, [each.latency_s > factor * median for each in sound])
    now = float(np.median([each.latency_s for each in sound]))
    return Watch("latency", median, now, len(slow), _share_above(slow, 0.5))


def _share_above(shares: Sequence[float], null: float) -> float | None:
    """log E against H0: E[x] <= null for x in [0, 1], each factor 1 + f (x - null) / null."""
    return log_e(units(2 * np.asarray(shares) - 1), 2 * null - 1) if shares else None


def _shares(answers: Sequence[LiveAnswer], marks: Sequence[bool]) -> list[float]:
    """The share of marked answers in each slice of time."""
    slices: dict[int, list[bool]] = defaultdict(list)
    for answer, mark in zip(answers, marks, strict=True):
        slices[int(answer.at // SLICE_S)].append(mark)
    return [float(np.mean(each)) for _, each in sorted(slices.items())]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
