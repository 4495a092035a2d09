"""One comparison of the gate: the margin for its number of rows, and its outcome.

pass: harm beyond the margin m is refuted (p of H0: difference <= -m is below alpha; then the
interval's low end lies above -m). reject: not so, and a loss is shown (the high end at a level
shared by all comparisons of the stage lies below 0, so that a candidate that lost nothing is
rejected with a chance of at most alpha). hold: neither; more rows can tell.

All fields are shares (0.01 is one point); only texts speak in points.

Its evidence is the paired difference of two tables on the same rows, with p-values and interval.

Right/wrong rows that stand each for itself are judged by Tango's score test and exact McNemar.
Rows made from one template, graded rewards in [0, 1], and tests that will be looked at again when
rows are added are judged by betting (:mod:`evaluators.stats`), which is exact
for all three. In both, one more lost row never makes any p smaller.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evaluators import stats
from evaluators.samples import Sample
from evaluators.stats import Paired, mcnemar_exact, paired, tango_interval, tango_p


@dataclass(frozen=True, slots=True)
class Evidence:
    """Paired differences candidate - baseline; ``units`` is None where counts say everything."""

    pairs: Paired
    difference: float  # mean difference, a share
    units: stats.Units | None

    @property
    def method(self) -> str:
        """Which of the two judges."""
        return "score" if self.units is None else "betting"

    def p_harmless(self, margin: float) -> float:
        """p of H0: worse by ``margin`` or more; small = no harm beyond the margin is shown."""
        if self.units is None:
            return float(tango_p(self.pairs.n, self.pairs.b, self.pairs.c, margin))
        return stats.p_value(self.units, -margin)

    def p_better(self) -> float:
        """p of H0: not better."""
        if self.units is None:
            return float(mcnemar_exact(self.pairs.b, self.pairs.c))
        return stats.p_value(self.units, 0.0)

    def p_worse(self) -> float:
        """p of H0: not worse."""
        if self.units is None:
            return float(mcnemar_exact(self.pairs.c, self.pairs.b))
        return stats.p_value(stats.Units(-self.units.total, self.units.size), 0.0)

    def interval(self, alpha: float) -> tuple[float, float]:
        """(low, high) of the true difference, level 1 - 2 alpha."""
        if self.units is None:
            return tango_interval(self.pairs, alpha)
        return stats.bounds(self.units, alpha)


def evidence(
    baseline: Sequence[Sample], candidate: Sequence[Sample], *, betting: bool = False
) -> Evidence:
    """Compare two tables that hold the same rows, each once (see samples.defects).

    ``betting`` asks for it; where rows share a cluster it is taken anyway. What the candidate
    scored never chooses the method. Without betting a reward that is neither 0 nor 1 raises.
    """
    before, after = _by_key(baseline), _by_key(candidate)
    if not before or before.keys() != after.keys():
        raise ValueError(f"tables of {len(before)} and {len(after)} rows: the same, >= 1")
    keys = sorted(before)  # one order, so that sums do not depend on how the tables were sorted
    old = np.array([before[key].reward for key in keys])
    new = np.array([after[key].reward for key in keys])
    clusters = _clusters([before[key] for key in keys])
    if clusters is None and not betting:
        counts = paired(old, new)
        return Evidence(counts, counts.difference, None)
    counts = Paired(old.size, int((old > new).sum()), int((new > old).sum()))
    return Evidence(counts, float((new - old).mean()), stats.units(new - old, clusters))


def accuracy(samples: Sequence[Sample]) -> float | None:
    """Mean reward; None where there are no rows or a reward is not a number."""
    rewards = np.sort([s.reward for s in samples])  # sorted: the same sum for any order of rows
    return float(rewards.mean()) if rewards.size and np.isfinite(rewards).all() else None


def _by_key(samples: Sequence[Sample]) -> Mapping[tuple[str, str], Sample]:
    return {(s.task, s.example_id): s for s in samples}


def _clusters(samples: Sequence[Sample]) -> list[Hashable] | None:
    """A cluster name a row, or None when every row stands for itself."""
    names: list[Hashable] = [
        (s.task, "cluster", s.cluster) if s.cluster else (s.task, "row", s.example_id)
        for s in samples
    ]
    return names if len(set(names)) < len(names) else None


Outcome = Literal["pass", "hold", "reject", "note"]
Stage = Literal["first", "sealed"]
Step = Literal["completeness", "prior", "retained", "pooled", "target", "confirmation", "cold"]

DISCORDANT = 0.06  # share of rows on which an unchanged model may differ
WIDEST_MARGIN = 0.10  # below about 35 rows even an unchanged task cannot pass this
POOLED_MARGIN, POOLED_ROWS = 0.0125, 3000  # six prior tasks of 500 rows


def task_margin(n: int) -> float:
    """Margin of one task with n rows: 5 / 3.5 / 2.5 points at 500 / 1000 / 2000.

        m = (z_0.975 + z_0.99) * sqrt(0.06 / n), rounded up to half a point, at most 10 points

    so that a task with no true change and 6 % discordant rows passes in at least 99 % of cases.
    """
    if n < 1:
        raise ValueError(f"margin for {n} rows: n >= 1")
    exact = (1.959964 + 2.326348) * math.sqrt(DISCORDANT / n)
    return min(math.ceil(exact * 200) / 200, WIDEST_MARGIN)


def pooled_margin(n: int) -> float:
    """Margin of all prior tasks together with n rows: 1.25 points from 3,000 rows up.

        m = 0.0125 * sqrt(max(3000 / n, 1)), at most 10 points

    That is the same rule at 80 % instead of 99 %: (z_0.975 + z_0.8) sqrt(0.06 / 3000) = 0.0125.
    """
    if n < 1:
        raise ValueError(f"margin for {n} rows: n >= 1")
    return min(POOLED_MARGIN * math.sqrt(max(POOLED_ROWS / n, 1.0)), WIDEST_MARGIN)


@dataclass(frozen=True, slots=True)
class Reason:
    """One finding of the gate with its figures."""

    step: Step
    stage: Stage
    task: str
    outcome: Outcome
    text: str
    baseline: str | None = None
    n: int | None = None
    b: int | None = None  # lost: only the baseline right
    c: int | None = None  # won: only the candidate right
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float | None = None  # the end of the interval that decided
    margin: float | None = None  # for the target: the least gain wanted
    p: float | None = None
    alpha: float | None = None
    method: str | None = None  # score or betting


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared: the evidence, its name, the level of its test and its interval."""

    step: Step
    stage: Stage
    task: str
    baseline: str
    evidence: Evidence
    alpha: float  # one-sided level of the test
    low: float
    high: float
    ceiling: float  # high end at the level alpha / comparisons of the stage

    def harmless(self, margin: float) -> Reason:
        """Non-inferiority: the loss, if any, stays within ``margin``."""
        p = self.evidence.p_harmless(margin)
        if p < self.alpha:
            return self._end("pass", "no harm beyond the margin", self.low, margin, p)
        if self.ceiling < 0:
            return self._end("reject", "a loss is shown", self.ceiling, margin, p)
        return self._end("hold", "cannot tell, more rows needed", self.low, margin, p)

    def nothing_lost(self) -> Reason:
        """Zero tolerance: one row lost is never a pass, a loss that shows is a reject."""
        p, lost = self.evidence.p_worse(), self.evidence.pairs.b
        if lost == 0:
            return self._end("pass", "zero tolerance: nothing lost", self.low, 0.0, p)
        if self.ceiling < 0:
            return self._end("reject", "zero tolerance: a loss is shown", self.ceiling, 0.0, p)
        return self._end("hold", f"zero tolerance: {lost} lost", self.low, 0.0, p)

    def gain(self, least: float) -> Reason:
        """The target: better, surely and by at least ``least``.

        Rejected when a loss is shown, and when ``least`` is ruled out, since more rows would not
        change that; but where no row differs there is nothing to judge by: hold.
        """
        p, pairs = self.evidence.p_better(), self.evidence.pairs
        if pairs.b + pairs.c == 0:
            why = "no gain shown, no row differs (b + c = 0)"
            return self._end("hold", why, self.high, least, p)
        if p < self.alpha and self.evidence.difference >= least:
            return self._end("pass", "the gain is shown", self.low, least, p)
        if self.evidence.p_worse() < self.alpha:
            return self._end("reject", "a loss is shown", self.high, least, p)
        if self.high < least:
            return self._end("reject", "no gain worth a swap", self.high, least, p)
        return self._end("hold", "no gain shown, more rows needed", self.high, least, p)

    def _end(self, outcome: Outcome, why: str, bound: float, margin: float, p: float) -> Reason:
        evidence = self.evidence
        return Reason(
            self.step,
            self.stage,
            self.task,
            outcome,
            self._text(why, bound, margin, p),
            baseline=self.baseline,
            n=evidence.pairs.n,
            b=evidence.pairs.b,
            c=evidence.pairs.c,
            difference=evidence.difference,
            low=self.low,
            high=self.high,
            bound=bound,
            margin=margin,
            p=p,
            alpha=self.alpha,
            method=evidence.method,
        )

    def _text(self, why: str, bound: float, margin: float, p: float) -> str:
        pairs, difference = self.evidence.pairs, signed(self.evidence.difference)
        sealed = " (sealed draw)" if self.stage == "sealed" else ""
        wanted = "gain wanted" if self.step == "target" else "margin"
        return (
            f"{self.task}{sealed} against the {self.baseline}: {why}: "
            f"{difference} points ({pairs.b} lost, {pairs.c} won of {pairs.n}), "
            f"interval {signed(self.low)} to {signed(self.high)}, bound {signed(bound)}, "
            f"{wanted} {100 * margin:.2f}, p = {p:.3g}"
        )


def signed(share: float) -> str:
    """-0.0125 -> '-1.25'."""
    return f"{100 * share:+.2f}"
