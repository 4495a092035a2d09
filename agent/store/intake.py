"""Traffic to training rows: which verified rows a round may learn from, and why others may not.

Pure: rows in, rows out, in a fixed order. Every row ends in exactly one list of ``Intake``. The
rows of its gate and sealed pools are kept from training for a person to look at; the gate itself
judges by the tasks' own rows alone, so that no client can move it.
"""

import hashlib
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from statistics import median

from agent.store.experience import ExperienceRow, Pool

SHARES: Mapping[Pool, float] = {"train": 0.8, "gate": 0.1, "sealed": 0.1}
OUTLIER_Z = 5.0  # modified z-score; 3.5 is the usual caution, 5 leaves ordinary tails alone
OUTLIER_MIN_ROWS = 8  # fewer values say nothing about what is ordinary
OUTLIER_MIN_SPREAD = 0.05  # a spread below five per cent is taken as five per cent


@dataclass(frozen=True, slots=True)
class Intake:
    """What a collection kept for each pool, and what it set aside for which reason."""

    train: tuple[ExperienceRow, ...]
    gate: tuple[ExperienceRow, ...]
    sealed: tuple[ExperienceRow, ...]
    duplicates: tuple[ExperienceRow, ...]
    overlapping: tuple[ExperienceRow, ...]
    quarantined: tuple[ExperienceRow, ...]
    over_cap: tuple[ExperienceRow, ...]


@dataclass(frozen=True, slots=True)
class Caps:
    """Largest share of a round's rows from one principal and from one source; 0 is off."""

    round_rows: int
    principal_share: float = 0.01
    source_share: Mapping[str, float] = field(default_factory=dict)


def text_hash(text: str) -> str:
    """sha256 of the text without regard to case, width, accents' encoding, or white space."""
    plain = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return hashlib.sha256(plain.encode()).hexdigest()


def pool_of(group_hash: str, shares: Mapping[Pool, float] = SHARES) -> Pool:
    """Where a conversation belongs: its hash as a number in [0, 1) against the cumulated shares."""
    u = int(hashlib.sha256(group_hash.encode()).hexdigest()[:13], 16) / 16**13
    edge = 0.0
    for pool, share in shares.items():
        edge += share
        if u < edge:
            return pool
    return "train"


def collect(
    rows: Sequence[ExperienceRow],
    caps: Caps,
    *,
    gate_hashes: AbstractSet[str] = frozenset(),
    shares: Mapping[Pool, float] = SHARES,
) -> Intake:
    """Deduplicate, refuse overlap with gate pools, quarantine, split by conversation, cap."""
    unique, duplicates = _first_of_each(rows)
    clean, overlapping = _partition(
        unique, lambda row: not {row.row_hash, row.prompt_hash} & gate_hashes
    )
    strange = outliers(clean)
    ordinary, quarantined = _partition(clean, lambda row: row.inference_id not in strange)
    pools: dict[Pool, list[ExperienceRow]] = {"train": [], "gate": [], "sealed": []}
    for row in ordinary:
        pools[pool_of(row.group_hash, shares)].append(row)
    kept = {pool: capped(members, caps) for pool, members in pools.items()}
    taken = {(row.inference_id, row.choice) for members in kept.values() for row in members}
    over = [row for row in ordinary if (row.inference_id, row.choice) not in taken]
    return Intake(
        train=kept["train"],
        gate=kept["gate"],
        sealed=kept["sealed"],
        duplicates=duplicates,
        overlapping=overlapping,
        quarantined=quarantined,
        over_cap=tuple(over),
    )


def capped(rows: Iterable[ExperienceRow], caps: Caps) -> tuple[ExperienceRow, ...]:
    """The first rows of each principal and source up to its share of the round, at least one."""
    taken: dict[tuple[str, str], int] = defaultdict(int)
    kept = []
    for row in rows:
        limits = {
            ("principal", row.principal): caps.principal_share,
            ("source", row.source): caps.source_share.get(row.source, 0.0),
        }
        if all(taken[key] < _allowed(share, caps.round_rows) for key, share in limits.items()):
            kept.append(row)
            for key in limits:
                taken[key] += 1
    return tuple(kept)


def outliers(rows: Sequence[ExperienceRow]) -> set[str]:
    """Ids of rows of unusual length, and of all rows of principals with an unusual mean reward."""
    lengths = {row.inference_id: math.log1p(len(row.prompt or "")) for row in rows}
    strange = _far(lengths)
    by_principal: dict[str, list[ExperienceRow]] = defaultdict(list)
    for row in rows:
        by_principal[row.principal].append(row)
    means = {
        owner: sum(row.reward or 0.0 for row in mine) / len(mine)
        for owner, mine in by_principal.items()
        if len(mine) >= OUTLIER_MIN_ROWS
    }
    return strange | {row.inference_id for owner in _far(means) for row in by_principal[owner]}


def _far(values: Mapping[str, float]) -> set[str]:
    """Keys whose modified z-score, 0.6745 |x - median| / MAD, exceeds OUTLIER_Z."""
    if len(values) < OUTLIER_MIN_ROWS:
        return set()
    middle = median(values.values())
    spread = median(abs(x - middle) for x in values.values())
    spread = max(spread, OUTLIER_MIN_SPREAD)
    return {key for key, x in values.items() if 0.6745 * abs(x - middle) / spread > OUTLIER_Z}


def _allowed(share: float, round_rows: int) -> float:
    return math.inf if share == 0 else max(1, math.floor(share * round_rows))


def _first_of_each(
    rows: Iterable[ExperienceRow],
) -> tuple[tuple[ExperienceRow, ...], tuple[ExperienceRow, ...]]:
    """The first row of each normalised task row and of each prompt; the rest are duplicates."""
    seen: set[str] = set()
    first: list[ExperienceRow] = []
    again: list[ExperienceRow] = []
    for row in rows:
        marks = {row.row_hash, row.prompt_hash}
        (again if marks & seen else first).append(row)
        seen |= marks
    return tuple(first), tuple(again)


def _partition(
    rows: Iterable[ExperienceRow], keep: Callable[[ExperienceRow], bool]
) -> tuple[tuple[ExperienceRow, ...], tuple[ExperienceRow, ...]]:
    kept: list[ExperienceRow] = []
    rest: list[ExperienceRow] = []
    for row in rows:
        (kept if keep(row) else rest).append(row)
    return tuple(kept), tuple(rest)
