"""Paired comparison of two tables on the same rows: difference, p-values and interval.

Right/wrong rows that stand each for itself are judged by Tango's score test and exact McNemar.
Rows made from one template, graded rewards in [0, 1], and tests that will be looked at again when
rows are added are judged by betting (:mod:`evaluators.eprocess`), which is exact
for all three. In both, one more lost row never makes any p smaller.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluators import eprocess
from evaluators.samples import Sample
from evaluators.stats import Paired, mcnemar_exact, paired, tango_interval, tango_p


@dataclass(frozen=True, slots=True)
class Evidence:
    """Paired differences candidate - baseline; ``units`` is None where counts say everything."""

    pairs: Paired
    difference: float  # mean difference, a share
    units: eprocess.Units | None

    @property
    def method(self) -> str:
        """Which of the two judges."""
        return "score" if self.units is None else "betting"

    def p_harmless(self, margin: float) -> float:
        """p of H0: worse by ``margin`` or more; small = no harm beyond the margin is shown."""
        if self.units is None:
            return float(tango_p(self.pairs.n, self.pairs.b, self.pairs.c, margin))
        return eprocess.p_value(self.units, -margin)

    def p_better(self) -> float:
        """p of H0: not better."""
        if self.units is None:
            return float(mcnemar_exact(self.pairs.b, self.pairs.c))
        return eprocess.p_value(self.units, 0.0)

    def p_worse(self) -> float:
        """p of H0: not worse."""
        if self.units is None:
            return float(mcnemar_exact(self.pairs.c, self.pairs.b))
        return eprocess.p_value(eprocess.Units(-self.units.total, self.units.size), 0.0)

    def interval(self, alpha: float) -> tuple[float, float]:
        """(low, high) of the true difference, level 1 - 2 alpha."""
        if self.units is None:
            return tango_interval(self.pairs, alpha)
        return eprocess.bounds(self.units, alpha)


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
    return Evidence(counts, float((new - old).mean()), eprocess.units(new - old, clusters))


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
