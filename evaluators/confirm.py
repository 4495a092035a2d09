"""Sealed draws: rows for confirming candidates that passed the first stage, and test levels.

Which rows confirm a candidate is a pure function of a secret salt, the round and the candidate's
digest, so nobody can know them before the digest is recorded, and anybody can check them after.
Rows never used before go first, so draws rotate through the pool round by round.
"""

import hashlib
import math
from collections.abc import Collection, Iterable

from evaluators.stats import level


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
