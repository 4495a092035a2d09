"""The gate: decides whether a candidate may be served, in six steps, with all figures.

1. Completeness: whole tables or hold (:mod:`evaluators.samples`).
2. Every prior task against the ANCHOR: no harm beyond its margin, alpha 0.025.
3. All prior tasks pooled, against the anchor, with a narrower margin.
4. The target against the champion: a gain with p < 0.01 and of at least 0.5 points.
5. Steps 2-3 again on a sealed draw (``draw``), at a level spent (``spent_alpha``).
6. The verdict: reject if a step shows harm, else hold if a step cannot tell, else promote.

Which rows confirm a candidate is a pure function of a secret salt, the round and the candidate's
digest, so nobody can know them before the digest is recorded, and anybody can check them after.
Rows never used before go first, so draws rotate through the pool round by round.

Outcomes of one comparison: :mod:`evaluators.comparison`. Fields are
shares (0.01 is one point).
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from evaluators.comparison import (
    Comparison,
    Evidence,
    Reason,
    Stage,
    Step,
    accuracy,
    evidence,
    pooled_margin,
    task_margin,
)
from evaluators.samples import Defect, Sample, Tables, defects, moved_digests, overlap
from evaluators.stats import level

__all__ = [
    "POOLED",
    "Decision",
    "GateRules",
    "Reason",
    "Sample",
    "Tables",
    "decide",
    "draw",
    "spent_alpha",
]

Verdict = Literal["promote", "hold", "reject"]
Baseline = Literal["anchor", "champion"]
POOLED = "all prior tasks"


class Levels(Protocol):
    """The settings that a gate takes its levels and margins from; their defaults stand there."""

    @property
    def alpha(self) -> float: ...

    @property
    def target_alpha(self) -> float: ...

    @property
    def min_gain(self) -> float: ...

    @property
    def margins(self) -> Mapping[str, float]: ...

    @property
    def sequential(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRules:
    """Levels, margins and special tasks of the gate."""

    alpha: float
    """One-sided level of every comparison with the anchor (steps 2, 3, 5)."""
    target_alpha: float
    """One-sided level of the target's gain (step 4)."""
    min_gain: float
    """Least gain on the target worth a swap, a share."""
    margins: Mapping[str, float]
    """Own margin of a task, a share, instead of the one its number of rows can carry."""
    pooled: float | None = None
    """Margin of step 3, a share, instead of the one the number of rows can carry."""
    zero_tolerance: frozenset[str] = frozenset()
    """Prior tasks where no row that the anchor answers right may be lost."""
    retained: frozenset[str] = frozenset()
    """Earlier targets: their gain is kept, so they are compared with the champion as well."""
    graded: frozenset[str] = frozenset()
    """Tasks whose rewards lie between 0 and 1 and not only at the ends; judged by betting."""
    sequential: bool
    """Judge by betting, so that after a hold rows may be added and looked at again."""
    confirmation: int = 1
    """Number of this confirmation among all on the same sealed pool; the first is 1."""

    @classmethod
    def of(cls, settings: Levels, **special: Any) -> "GateRules":
        """The rules with these settings; ``special`` gives the other fields."""
        return cls(
            alpha=settings.alpha,
            target_alpha=settings.target_alpha,
            min_gain=settings.min_gain,
            margins=settings.margins,
            sequential=settings.sequential,
            **special,
        )

    def __post_init__(self) -> None:
        level(self.alpha)
        level(self.target_alpha)
        spent_alpha(self.alpha, self.confirmation)
        shares = {"min_gain": self.min_gain, **self.margins}
        shares |= {} if self.pooled is None else {"pooled": self.pooled}
        for name, share in shares.items():
            if not 0 < share < 1:
                raise ValueError(f"{name} {share}: a share between 0 and 1 (0.01 is one point)")


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict, the findings of every step, and the figures of every task."""

    verdict: Verdict
    reasons: tuple[Reason, ...]
    tasks: Mapping[str, Mapping[str, Any]]

    def decisive(self) -> tuple[Reason, ...]:
        """The findings that made the verdict; for promote, all of them."""
        return tuple(r for r in self.reasons if self.verdict in (r.outcome, "promote"))

    def to_json(self) -> dict[str, Any]:
        """{"verdict", "reasons", "tasks"} of plain values."""
        reasons = [asdict(reason) for reason in self.reasons]
        return {"verdict": self.verdict, "reasons": reasons, "tasks": dict(self.tasks)}


def decide(
    tables: Tables,
    target: str,
    settings: GateRules,
    sealed: Tables | None = None,
) -> Decision:
    """Judge a candidate.

    Args:
        tables: samples of the first stage; every task in them but ``target`` is a prior task.
        target: the task that was trained.
        settings: levels, margins and special tasks.
        sealed: samples of the sealed draw, read only if the first stage passes; None decides on
            the first stage alone and says so.
    """
    priors = tuple(task for task in tables.tasks() if task != target)
    reasons = tuple(_incomplete(tables, target, priors, settings))
    if not reasons:
        reasons = tuple(_first_stage(tables, target, priors, settings))
        if _verdict(reasons) == "promote":
            reasons += tuple(_confirmation(tables, sealed, priors, settings))
    return Decision(_verdict(reasons), reasons, _figures(tables, target, reasons))


def withheld(decision: Decision, texts: Sequence[str]) -> Decision:
    """A decision that rests on answers which a fresh engine did not repeat: hold, and why."""
    if not texts:
        return decision
    reasons = tuple(Reason("cold", "first", "", "hold", text) for text in texts)
    return replace(decision, verdict="hold", reasons=(*decision.reasons, *reasons))


def _verdict(reasons: Sequence[Reason]) -> Verdict:
    outcomes = {reason.outcome for reason in reasons}
    if "reject" in outcomes:
        return "reject"
    return "hold" if "hold" in outcomes else "promote"


def _incomplete(
    tables: Tables, target: str, priors: Sequence[str], settings: GateRules
) -> Iterator[Reason]:
    yield from _held(defects(tables, [target], settings.graded), "first")
    if tables.champion is None:
        yield from _held([Defect(target, "champion: no table to compare the target with")], "first")
    if not priors:
        yield from _held([Defect("", "no prior task: forgetting cannot be ruled out")], "first")


def _held(problems: Sequence[Defect], stage: Stage) -> Iterator[Reason]:
    sealed = " (sealed draw)" if stage == "sealed" else ""
    for defect in problems:
        text = f"{defect.task or 'tables'}{sealed}: {defect.text}"
        yield Reason("completeness", stage, defect.task, "hold", text)


def _first_stage(
    tables: Tables, target: str, priors: Sequence[str], settings: GateRules
) -> Iterator[Reason]:
    yield from _no_harm(tables, priors, settings, "first", settings.alpha)
    target_evidence = _evidence(tables, "champion", [target], settings)
    low, high = target_evidence.interval(settings.alpha)
    gain = Comparison(
        "target",
        "first",
        target,
        "champion",
        target_evidence,
        settings.target_alpha,
        low,
        high,
        high,
    )
    yield gain.gain(settings.min_gain)


def _confirmation(
    first: Tables, sealed: Tables | None, priors: Sequence[str], settings: GateRules
) -> Iterator[Reason]:
    if sealed is None:
        text = "no sealed draw given: decided on the first stage alone"
        yield Reason("confirmation", "first", "", "note", text)
        return
    whole = defects(sealed, priors, settings.graded)
    broken = (*whole, *overlap(first, sealed), *moved_digests(first, sealed))
    if settings.retained.intersection(priors) and sealed.champion is None:
        broken += (Defect("", "champion: no table to compare retained tasks with"),)
    if broken:
        yield from _held(broken, "sealed")
        return
    alpha = spent_alpha(settings.alpha, settings.confirmation)
    yield from _no_harm(sealed, priors, settings, "sealed", alpha)


def _no_harm(
    tables: Tables, priors: Sequence[str], settings: GateRules, stage: Stage, alpha: float
) -> Iterator[Reason]:
    """Steps 2 and 3: each prior task, then all of them pooled."""
    retained = settings.retained.intersection(priors) - settings.zero_tolerance
    shared = alpha / (
        len(priors) + len(retained) + 1
    )  # the level of showing harm (evaluators.comparison)

    def compare(step: Step, name: str, baseline: Baseline, tasks: Sequence[str]) -> Comparison:
        stage_evidence = _evidence(tables, baseline, tasks, settings)
        ends = (*stage_evidence.interval(alpha), stage_evidence.interval(shared)[1])
        return Comparison(step, stage, name, baseline, stage_evidence, alpha, *ends)

    for task in priors:
        prior = compare("prior", task, "anchor", [task])
        if task in settings.zero_tolerance:
            yield prior.nothing_lost()
            continue
        margin = settings.margins.get(task, task_margin(prior.evidence.pairs.n))
        yield prior.harmless(margin)
        if task in retained:
            yield compare("retained", task, "champion", [task]).harmless(margin)
    pooled = compare("pooled", POOLED, "anchor", priors)
    yield pooled.harmless(settings.pooled or pooled_margin(pooled.evidence.pairs.n))


def _evidence(
    tables: Tables, baseline: Baseline, tasks: Sequence[str], settings: GateRules
) -> Evidence:
    """The candidate's rows of ``tasks`` against those of ``baseline``."""
    old = [s for s in dict(tables.named())[baseline] if s.task in tasks]
    new = [s for s in tables.candidate if s.task in tasks]
    graded = not settings.graded.isdisjoint(tasks)
    return evidence(old, new, betting=settings.sequential or graded)


def _figures(tables: Tables, target: str, reasons: Sequence[Reason]) -> dict[str, dict[str, Any]]:
    """Task -> n, role, the three accuracies, and what its own comparison of stage one found.

    A figure that the tables do not carry is None, never 0.
    """
    judged = {r.task: r for r in reasons if r.step in ("prior", "target") and r.stage == "first"}
    figures: dict[str, dict[str, Any]] = {}
    for task in sorted({*tables.tasks(), target}):
        row: dict[str, Any] = {
            "role": "target" if task == target else "prior",
            "n": len(tables.examples(task)),
            **dict.fromkeys(("anchor", "champion", "candidate")),
        }
        for name, samples in tables.named():
            row[name] = accuracy([s for s in samples if s.task == task])
        reason = judged.get(task)
        for name in ("baseline", "b", "c", "difference", "low", "high", "margin", "p", "outcome"):
            row[name] = getattr(reason, name, None)
        figures[task] = row
    return figures


def draw(
    rows: Iterable[str],
    *,
    round_number: int,
    digest: str,
    count: int,
    salt: str,
    used: Collection[str] = (),
) -> tuple[str, ...]:
    """``count`` of ``rows`` for this round's candidate, in the order of the draw.

        key(row) = (row in used, sha256(salt | round | digest | row)),  ascending

    Args:
        rows: ids of the pool, each once; their order does not matter.
        round_number: of the round that made the candidate.
        digest: of the candidate; record it before calling.
        count: rows wanted, 1..len(rows).
        salt: a secret of this installation.
        used: rows of earlier draws; taken again only when fresh ones run out.
    """
    pool = list(rows)
    if len(set(pool)) != len(pool):
        raise ValueError(f"pool of {len(pool)} rows with {len(set(pool))} ids: each once")
    if not digest or not salt:
        raise ValueError("digest and salt: not empty (record the digest before the draw)")
    if not 1 <= count <= len(pool):
        raise ValueError(f"count {count}: 1..{len(pool)} rows")
    # The digest enters the hash, so a candidate cannot be trained towards its own sealed rows.
    spent = frozenset(used)
    ranked = sorted(pool, key=lambda row: (row in spent, _rank(salt, round_number, digest, row)))
    return tuple(ranked[:count])


def _rank(salt: str, round_number: int, digest: str, row: str) -> bytes:
    parts = (salt, str(round_number), digest, row)
    framed = b"".join(len(b).to_bytes(8, "big") + b for b in (p.encode() for p in parts))
    return hashlib.sha256(framed).digest()


def spent_alpha(alpha: float, confirmation: int) -> float:
    """Level of the k-th confirmation on one sealed pool: alpha * 6 / (pi^2 k^2).

    The levels of all confirmations together sum to alpha, so a pool may serve any number of
    candidates: the chance that it ever passes a harmful one stays <= alpha. Rows that no
    candidate has touched are a fresh pool: there k = 1 again.
    """
    if confirmation < 1:
        raise ValueError(f"confirmation {confirmation}: 1, 2, ...")
    return level(alpha) * 6 / (math.pi * confirmation) ** 2
