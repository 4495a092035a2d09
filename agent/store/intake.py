"""Which verified traffic a round may learn from, and why other traffic may not.

Pure: rows in, rows out. Every row ends in exactly one list of ``Intake``, and neither the time nor
the order in which rows came plays a part. The rows of the selection pool never train: they choose
among the generations of a round. The gate judges by the tasks' own rows alone, so that no client
can move it.

One principal against the others: everything that rows compete for is shared among principals
first. A principal's rows are put in an order by a keyed hash, the first rows of all principals
come before the second of any, and what is a usual row is measured with one vote a principal. The
key is a secret of the home: whoever does not know it cannot make rows that come first or that fall
into a pool of choice.
"""

import hashlib
import hmac
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from agent.store.experience import ExperienceRow, Pool

SHARES: Mapping[Pool, float] = {"train": 0.8, "selection": 0.2}
OUTLIER_Z = 5.0  # modified z-score; 3.5 is the usual caution, 5 leaves ordinary tails alone
OUTLIER_MIN_ROWS = 8  # of fewer values none is called unusual
LENGTH_MIN_SPREAD = 0.2  # of log length: below 4.4 times the median no prompt is unusual
REWARD_MIN_SPREAD = 0.05  # of mean rewards

Why = Literal[
    "refused",  # admission: the row does not fit its task
    "not_as_sent",  # its prompt is one that a round cannot ask as it was sent
    "overlapping",  # with rows that judge
    "duplicates",
    "quarantined",  # unusual length or rewards
    "over_cap",  # of its principal or source
    "no_room",  # the round has enough rows
]


@dataclass(frozen=True, slots=True)
class SetAside:
    """A row that is not learnt from: the kind of reason, which holds no client's text, and it."""

    row: ExperienceRow
    why: Why
    reason: str


@dataclass(frozen=True, slots=True)
class Intake:
    """Rows to train on and rows that choose, each in the order in which to take them, and all
    others with their reasons."""

    train: tuple[ExperienceRow, ...]
    selection: tuple[ExperienceRow, ...]
    set_aside: tuple[SetAside, ...]


@dataclass(frozen=True, slots=True)
class Caps:
    """Largest share of a round's rows from one principal and from one source; 0 is off.

    Both kinds of rows, ``round_rows`` that train and ``selection_rows``, are shared so.
    """

    round_rows: int
    principal_share: float = 0.01
    source_share: Mapping[str, float] = field(default_factory=dict)
    selection_rows: int = 0


Refuse = Callable[[ExperienceRow], tuple[Why, str] | None]


def text_hash(text: str) -> str:
    """sha256 of the text without regard to case, width, accents' encoding, or white space."""
    plain = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()


def keyed(salt: str, *parts: str) -> str:
    """HMAC-SHA256 of the parts as hex: a number nobody without the salt can foresee."""
    return hmac.new(salt.encode(), "\0".join(parts).encode(), hashlib.sha256).hexdigest()


def pool_of(salt: str, row_hash: str, shares: Mapping[Pool, float] = SHARES) -> Pool:
    """The pool of a task row: its keyed hash in [0, 1) against the cumulated shares.

    Equal task rows share a pool, whoever sends them and in whatever session.
    """
    u = int(keyed(salt, "pool", row_hash)[:13], 16) / 16**13
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
    salt: str,
    refuse: Refuse = lambda row: None,
    shares: Mapping[Pool, float] = SHARES,
    alone: bool = False,
    turn: str = "",
) -> Intake:
    """Refuse, set unusual rows aside, split into pools, deduplicate and cap.

    Args:
        rows: Verified answers.
        caps: Shares of a round.
        salt: The home's secret.
        refuse: The kind of reason and the reason why a row cannot be used, or None.
        shares: Share of each pool.
        alone: All rows are one person's. There is nobody to protect from anybody: no cap, no
            quarantine, no pool but train.
        turn: Which round this is: where not every principal fits in, others do in the next one.
    """
    refused = {_id(row): refusal for row in rows if (refusal := refuse(row))}
    # Refused first: a row that does not count must neither hide an equal one nor move a median.
    fit = [row for row in rows if _id(row) not in refused]
    strange = {} if alone else unusual(fit)
    places: dict[tuple[str, int], tuple[Why, str]] = {**refused}
    pools: dict[Pool, list[ExperienceRow]] = {"train": [], "selection": []}
    for row in fit:
        if row.inference_id in strange:
            places[_id(row)] = ("quarantined", strange[row.inference_id])
        else:
            pools["train" if alone else pool_of(salt, row.row_hash, shares)].append(row)
    chosen = replace(caps, principal_share=0.0) if alone else caps
    train, more = fair_choice(pools["train"], chosen, salt, turn)
    # A share of no rows would set every one aside as over its cap, which it is not.
    apart = replace(chosen, round_rows=caps.selection_rows) if caps.selection_rows else Caps(0, 0.0)
    selection, rest = fair_choice(pools["selection"], apart, salt, turn)
    for row in selection[caps.selection_rows :]:
        rest.append((row, "no_room", f"the round's {caps.selection_rows} selection rows are full"))
    places |= {_id(row): (why, reason) for row, why, reason in (*more, *rest)}
    aside = tuple(SetAside(row, *places[_id(row)]) for row in rows if _id(row) in places)
    return Intake(train, selection[: caps.selection_rows], aside)


def fair_choice(
    rows: Iterable[ExperienceRow], caps: Caps, salt: str, turn: str = ""
) -> tuple[tuple[ExperienceRow, ...], list[tuple[ExperienceRow, Why, str]]]:
    """Rows in turn, one of each principal, without duplicates, up to the caps; and the others.

    A cap counts rows that are kept: where somebody else had a principal's row before, its next one
    takes the place. So a principal that copies others' rows takes at most its own share of them.
    """
    kept: list[ExperienceRow] = []
    rest: list[tuple[ExperienceRow, Why, str]] = []
    seen: set[str] = set()
    taken: Counter[tuple[str, str]] = Counter()
    for row in _in_turn(rows, salt, turn):  # in this order a cap cuts everybody's last rows
        limits = {
            ("principal", row.principal): caps.principal_share,
            ("source", row.source): caps.source_share.get(row.source, 0.0),
        }
        full = [
            f"{kind}: at most {_allowed(share, caps.round_rows):g} of {caps.round_rows} rows"
            for (kind, name), share in limits.items()
            if taken[kind, name] >= _allowed(share, caps.round_rows)
        ]
        marks = {row.row_hash, row.prompt_hash}
        if marks & seen:
            rest.append((row, "duplicates", "the same task row or prompt is there already"))
        elif full:
            rest.append((row, "over_cap", full[0]))
        else:
            kept.append(row)
            seen |= marks
            taken.update(limits.keys())
    return tuple(kept), rest


def _in_turn(rows: Iterable[ExperienceRow], salt: str, turn: str) -> list[ExperienceRow]:
    """The first row of each principal, then the second, all by keyed hashes.

    Inference ids are drawn at random when a request comes; they only settle draws between rows
    that are equal in all else.
    """
    by_principal: dict[str, list[ExperienceRow]] = defaultdict(list)
    for row in rows:
        by_principal[row.principal].append(row)

    def place(row: ExperienceRow) -> tuple[str, str, int]:
        return keyed(salt, turn, row.row_hash, row.prompt_hash), row.inference_id, row.choice

    ranked = [
        (rank, keyed(salt, turn, str(rank), owner), row)
        for owner, mine in by_principal.items()
        for rank, row in enumerate(sorted(mine, key=place))
    ]
    return [row for _, _, row in sorted(ranked, key=lambda each: each[:2])]


def unusual(rows: Sequence[ExperienceRow]) -> dict[str, str]:
    """Inference id -> reason, of rows of unusual length and of principals with unusual rewards.

    The median and the spread have one vote a principal, divided among its rows: thousands of long
    rows of one client do not make everybody else's unusual.
    """
    by_principal: dict[str, list[ExperienceRow]] = defaultdict(list)
    for row in rows:
        by_principal[row.principal].append(row)
    lengths = {
        row.inference_id: (math.log1p(len(row.prompt or "")), 1 / len(by_principal[row.principal]))
        for row in rows
    }
    means = {
        owner: (sum(row.reward or 0.0 for row in mine) / len(mine), 1.0)
        for owner, mine in by_principal.items()
        if len(mine) >= OUTLIER_MIN_ROWS
    }
    strange = dict.fromkeys(_far(lengths, LENGTH_MIN_SPREAD), "unusual length of its prompt")
    for owner in _far(means, REWARD_MIN_SPREAD):
        reason = "mean reward of its principal unlike all others'"
        strange |= {row.inference_id: reason for row in by_principal[owner]}
    return strange


def _far(values: Mapping[str, tuple[float, float]], least_spread: float) -> set[str]:
    """Keys of (value, weight) whose modified z-score, 0.6745 |x - median| / MAD, is too large."""
    if len(values) < OUTLIER_MIN_ROWS:
        return set()
    middle = weighted_median(values.values())
    off = {key: abs(x - middle) for key, (x, _) in values.items()}
    spread = weighted_median((off[key], weight) for key, (_, weight) in values.items())
    limit = OUTLIER_Z * max(spread, least_spread) / 0.6745
    return {key for key, distance in off.items() if distance > limit}


def weighted_median(values: Iterable[tuple[float, float]]) -> float:
    """The middle of (value, weight): half way where exactly half of the weight lies on each side.

    Two principals with rows of two lengths have their median between, and neither is far from it.
    """
    ordered = sorted(values)
    half = math.fsum(weight for _, weight in ordered) / 2
    below = 0.0
    for place, (value, weight) in enumerate(ordered):
        below += weight
        if math.isclose(below, half, rel_tol=1e-9):  # weights such as 1/3 do not add up exactly
            return (value + ordered[place + 1][0]) / 2
        if below > half:
            return value
    raise ValueError("weighted_median: no values")


def _allowed(share: float, round_rows: int) -> float:
    return math.inf if share == 0 else max(1, math.floor(share * round_rows))


def _id(row: ExperienceRow) -> tuple[str, int]:
    return row.inference_id, row.choice
