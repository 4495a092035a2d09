"""Input of the gate: samples, tables of three models, and checks of their completeness.

Step 1 of the gate is completeness: each expected (task, example) exactly once in every table,
rewards of 0 or 1 (in [0, 1] for graded tasks), one harness hash a task, one digest a table.
Defects are reported; nothing is repaired or dropped.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

COLUMNS = ("task", "example_id", "reward")
OPTIONAL = ("harness_hash", "digest", "cluster", "error")
SHOWN = 3  # examples a message names before it only counts


@dataclass(frozen=True, slots=True)
class Sample:
    """One verified answer. ``cluster`` groups rows made from one template; "" = none recorded."""

    task: str
    example_id: str
    reward: float
    harness_hash: str = ""
    digest: str = ""
    cluster: str = ""


def sample_from(row: Mapping[str, Any]) -> Sample:
    """A sample from a row of an evaluation; a reward beside an error, or no number, is NaN.

    Raises:
        ValueError: naming the columns that are not there.
    """
    lacking = [name for name in COLUMNS if name not in row]
    lacking += [name for name in COLUMNS[:2] if row.get(name, "") is None]
    if lacking:
        raise ValueError(f"no {', '.join(lacking)}; a row has {', '.join(COLUMNS)}")
    texts = {name: "" if row.get(name) is None else str(row[name]) for name in OPTIONAL}
    reward = math.nan if texts.pop("error") else _number(row["reward"])
    return Sample(str(row["task"]), str(row["example_id"]), reward, **texts)


def _number(reward: object) -> float:
    if not isinstance(reward, bool | int | float):
        return math.nan
    return float(reward) if abs(reward) < 2**53 else math.nan


@dataclass(frozen=True, slots=True)
class Tables:
    """Samples of the anchor, the champion and the candidate on the same rows.

    ``champion`` None: this stage does not compare with it (a sealed draw needs not).
    ``expected``: task -> example ids of the draw, where it is known: exactly these rows; where it
    is not (empty): every row that any of the tables holds. ``digests``: table name -> the digest
    recorded for it.
    """

    anchor: tuple[Sample, ...]
    champion: tuple[Sample, ...] | None
    candidate: tuple[Sample, ...]
    expected: Mapping[str, frozenset[str]] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    def named(self) -> tuple[tuple[str, tuple[Sample, ...]], ...]:
        """(name, samples) of the tables of this stage."""
        middle = () if self.champion is None else (("champion", self.champion),)
        return (("anchor", self.anchor), *middle, ("candidate", self.candidate))

    def tasks(self) -> tuple[str, ...]:
        """Every task that is expected or seen in any table, sorted."""
        seen = {sample.task for _, table in self.named() for sample in table}
        return tuple(sorted(seen | set(self.expected)))

    def examples(self, task: str) -> frozenset[str]:
        """Ids the task must have: the expected ones and every one that any table holds."""
        seen = {s.example_id for _, table in self.named() for s in table if s.task == task}
        return self.expected.get(task, frozenset()) | seen


@dataclass(frozen=True, slots=True)
class Defect:
    """One way in which the tables are not whole."""

    task: str  # "" when it concerns a whole table
    text: str


def defects(
    tables: Tables, required: Iterable[str] = (), graded: Collection[str] = ()
) -> tuple[Defect, ...]:
    """Everything that forbids a decision on these tables; () when they are whole.

    ``required``: tasks that must be there even if no table mentions them. ``graded``: tasks whose
    rewards may lie between 0 and 1.
    """
    problems = [*_missing(tables, required), *_duplicates(tables), *_rewards(tables, graded)]
    problems += [*_harness(tables), *_clusters(tables), *_digests(tables)]
    return tuple(sorted(problems, key=lambda defect: (defect.task, defect.text)))


def overlap(first: Tables, sealed: Tables) -> tuple[Defect, ...]:
    """Rows of a sealed draw that the first stage has already shown."""
    problems = []
    for task in sealed.tasks():
        seen = sealed.examples(task) & first.examples(task)
        if seen:
            text = f"sealed rows already used in the first stage: {_some(seen)}"
            problems.append(Defect(task, text))
    return tuple(problems)


def moved_digests(first: Tables, sealed: Tables) -> tuple[Defect, ...]:
    """Tables whose digest differs between the first stage and the confirmation."""
    problems = []
    before = {name: {s.digest for s in samples} for name, samples in first.named()}
    for name, samples in sealed.named():
        old, new = before.get(name, set()), {s.digest for s in samples}
        if old != new:
            text = f"{name}: digest changed before confirmation: {_pair(old, new)}"
            problems.append(Defect("", text))
    return tuple(problems)


def _missing(tables: Tables, required: Iterable[str]) -> Iterator[Defect]:
    for task in sorted({*tables.tasks(), *required}):
        wanted = tables.examples(task)
        for name, samples in tables.named():
            lacking = wanted - {s.example_id for s in samples if s.task == task}
            if not wanted or lacking == wanted:
                yield Defect(task, f"{name}: no rows of this task (n = 0)")
            elif lacking:
                text = f"{name}: {len(lacking)} of {len(wanted)} rows missing: {_some(lacking)}"
                yield Defect(task, text)
        undrawn = wanted - tables.expected.get(task, frozenset()) if tables.expected else ()
        if undrawn:
            yield Defect(task, f"rows that were not drawn: {_some(undrawn)}")


def _duplicates(tables: Tables) -> Iterator[Defect]:
    for name, samples in tables.named():
        counts = Counter((s.task, s.example_id) for s in samples)
        doubled = [key for key, count in counts.items() if count > 1]
        for task in sorted({task for task, _ in doubled}):
            ids = {example for of, example in doubled if of == task}
            yield Defect(task, f"{name}: rows more than once: {_some(ids)}")


def _rewards(tables: Tables, graded: Collection[str]) -> Iterator[Defect]:
    for name, samples in tables.named():
        odd = [s for s in samples if not _is_reward(s, s.task in graded)]
        for task in sorted({s.task for s in odd}):
            shown = {f"{s.example_id} = {s.reward:g}" for s in odd if s.task == task}
            allowed = "not in 0..1" if task in graded else "neither 0 nor 1"
            yield Defect(task, f"{name}: rewards {allowed}: {_some(shown)}")


def _is_reward(sample: Sample, graded: bool) -> bool:
    """NaN and infinities fail both comparisons."""
    return 0 <= sample.reward <= 1 if graded else sample.reward in (0.0, 1.0)


def _harness(tables: Tables) -> Iterator[Defect]:
    for task in tables.tasks():
        hashes = {s.harness_hash for _, table in tables.named() for s in table if s.task == task}
        if len(hashes) > 1:
            yield Defect(task, f"rows come from different harness hashes: {_some(hashes)}")


def _clusters(tables: Tables) -> Iterator[Defect]:
    """A row belongs to the same template in every table (or to none in all of them)."""
    for (one, left), (other, right) in combinations(tables.named(), 2):
        known = {(s.task, s.example_id): s.cluster for s in left}
        moved = [s for s in right if known.get((s.task, s.example_id), s.cluster) != s.cluster]
        for task in sorted({s.task for s in moved}):
            ids = {s.example_id for s in moved if s.task == task}
            yield Defect(task, f"{one} and {other} put rows into different clusters: {_some(ids)}")


def _digests(tables: Tables) -> Iterator[Defect]:
    for name, samples in tables.named():
        seen = {s.digest for s in samples}
        recorded = tables.digests.get(name)
        if len(seen) > 1:
            yield Defect("", f"{name}: rows come from several digests: {_some(seen)}")
        elif recorded is not None and seen - {recorded}:
            yield Defect("", f"{name}: digest changed: {_pair({recorded}, seen)}")


def _some(items: Iterable[str]) -> str:
    """The first few, sorted, cut to a readable length, and how many more."""
    names = sorted(_readable(item) for item in items)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _readable(item: str) -> str:
    """An id is data: control characters and great length stay out of a message."""
    return "".join(sign if sign.isprintable() else "?" for sign in item[:60]) or "(none)"


def _pair(recorded: Iterable[str], seen: Iterable[str]) -> str:
    return f"recorded {_some(recorded)}, now {_some(seen)}"
