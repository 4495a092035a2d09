"""API keys and quotas: who asks, what the key allows, and how much its owner may ask for.

A key has scopes and belongs to a principal; only its hash is kept, compared in constant time.
Requests are limited by rate and tokens by quota, both by principal, with the `limits` library.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from limits import RateLimitItem, parse_many
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from limits.storage import storage_from_string
from sqlalchemy import select

from agent.errors import UserError
from agent.gateway.errors import ApiError
from agent.store.experience import ExperienceStore
from agent.store.experience_db import SEAL, is_away, keys
from agent.store.seals import insert_sealed, is_whole, update_sealed

SCOPES = frozenset({"infer", "submit_task", "feedback", "review", "admin"})
TOKEN = re.compile(r"ank-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")
OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,127}")
NO_KEY_HASH = hashlib.sha256(b"").hexdigest()  # compared with when the key id is unknown
FRESH_S = 1.0  # a revoked key, or the first key of all, is noticed within this time
AWAY_S = 0.5  # longest wait for keys to be read again where some were read before
AGAIN_S = 0.1  # a token that is refused was compared with keys no older than this


@dataclass(frozen=True, slots=True)
class Principal:
    """The owner of a key, and what the key allows."""

    owner: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        """``admin`` includes every other scope."""
        return scope in self.scopes or "admin" in self.scopes


LOCAL = Principal("local", SCOPES)  # all requests from this machine, where no keys are used


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key at the only moment its token is known."""

    key_id: str
    token: str


class _Known(NamedTuple):
    owner: str
    scopes: str
    token_hash: str
    expires: float | None


class KeyStore:
    """Keys in the experience store's database, read again while the gateway runs.

    open_until_first: until a first key is made all requests are ``LOCAL``; for a gateway that only
    this machine reaches. From then on a key is needed, also when all were revoked.
    """

    def __init__(
        self, store: ExperienceStore, fresh_s: float = FRESH_S, *, open_until_first: bool = False
    ) -> None:
        self._engine = store.engine
        self._store = store
        self._fresh_s = fresh_s
        self._known: dict[str, _Known] = {}
        self._open = open_until_first and not self.list_keys()
        self._read_at = float("-inf")
        self._was_read = False
        self._reading = asyncio.Lock()
        self._read_now: asyncio.Task[tuple[dict[str, _Known], int]] | None = None

    def create_key(
        self, owner: str, scopes: Collection[str], *, expires: float | None = None
    ) -> NewKey:
        """A new key of 256 random bits; UserError for an unknown scope or a strange owner."""
        if unknown := set(scopes) - SCOPES or (not scopes and {"none"}):
            raise UserError(
                f"scope: {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(SCOPES))}"
            )
        if not OWNER.fullmatch(owner) or owner == LOCAL.owner:
            raise UserError(f"owner: {owner!r}; allowed: letters, digits and _.@-, but not 'local'")
        key_id = secrets.token_hex(8)
        token = f"ank-{key_id}-{secrets.token_urlsafe(32)}"
        values = {
            "key_id": key_id,
            "owner": owner,
            "scopes": " ".join(sorted(set(scopes))),
            "token_hash": hash_of(token),
            "created": time.time(),
            "expires": expires,
        }
        with self._store.writing() as connection:
            insert_sealed(connection, keys, [values])
        return NewKey(key_id, token)

    def revoke(self, key_id: str) -> None:
        """End a key; UserError if there is none of this id."""
        with self._store.writing() as connection:
            mine = (keys.c.key_id == key_id) & keys.c.revoked.is_(None)
            ended = update_sealed(connection, keys, mine, revoked=time.time())
        if ended == 0:
            raise UserError(f"key: {key_id!r}; allowed: the id of a key that is not revoked")

    def list_keys(self) -> list[dict[str, object]]:
        """Every key less its hash, oldest first."""
        columns = [column for column in keys.c if column.name not in ("token_hash", SEAL)]
        with self._engine.connect() as connection:
            rows = connection.execute(select(*columns).order_by(keys.c.created)).all()
        return [dict(row._mapping) for row in rows]

    @property
    def open(self) -> bool:
        """Whether no key is needed yet."""
        return self._open

    async def until_closed(self) -> None:
        """Return once keys are needed."""
        while self._open:
            await self._refresh(self._fresh_s)
            await asyncio.sleep(self._fresh_s)

    async def principal(self, authorization: str | None) -> Principal:
        """The owner of the bearer token; ApiError 401 for none or a wrong one.

        Keys are made by another process (the CLI). An unknown token is looked up once more in keys
        no older than ``AGAIN_S``, so that a new key counts at once.
        """
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        await self._refresh(self._fresh_s)
        if self._open and TOKEN.fullmatch(token):  # a key was made elsewhere a moment ago
            await self._refresh(0.0)
        if self._open:
            return LOCAL
        row = self._owner(token)
        if row is None:
            await self._refresh(AGAIN_S)
            row = self._owner(token)
        if row is None:
            raise ApiError(
                401,
                "Incorrect API key provided.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return Principal(row.owner, frozenset(row.scopes.split()))

    def _owner(self, token: str) -> _Known | None:
        """The key of a token: the same work whether its id or its secret is wrong."""
        match = TOKEN.fullmatch(token)
        row = self._known.get(match[1]) if match else None
        if row and row.expires is not None and row.expires <= time.time():
            row = None
        right = hmac.compare_digest(hash_of(token), row.token_hash if row else NO_KEY_HASH)
        return row if right else None

    async def _refresh(self, age_s: float) -> None:
        """Read the keys again where they are older than this.

        The lock lets one request read while the others wait for its result; the second look at the
        age, inside it, is for those. While a database server is away the keys read last hold: no
        request waits for it longer than ``AWAY_S``, and only the first one does.
        """
        if time.monotonic() - self._read_at <= min(age_s, self._fresh_s):
            return
        async with self._reading:
            if time.monotonic() - self._read_at > min(age_s, self._fresh_s):
                began = time.monotonic()
                keys_read = await self._read_within()
                if keys_read is not None:
                    self._known, made = keys_read
                    self._open = self._open and made == 0
                self._read_at = began

    async def _read_within(self) -> tuple[dict[str, _Known], int] | None:
        """The keys now; None where they do not come and those of before hold."""
        pending = self._read_now is not None and not self._read_now.done()
        if not pending:
            self._read_now = asyncio.create_task(asyncio.to_thread(self._read))
        assert self._read_now is not None
        wait_s = 0.0 if pending else AWAY_S
        await asyncio.wait({self._read_now}, timeout=wait_s if self._was_read else None)
        if not self._read_now.done():
            return None
        read, self._read_now = self._read_now, None
        if (error := read.exception()) is not None and not (self._was_read and is_away(error)):
            raise error
        self._was_read = True
        return None if error else read.result()

    def _read(self) -> tuple[dict[str, _Known], int]:
        """Keys by id, without revoked and damaged ones, and how many were ever made."""
        with self._engine.connect() as connection:  # one statement: of two, a key may come between
            rows = connection.execute(select(keys)).mappings().all()
        whole = [row for row in rows if row["revoked"] is None and is_whole(keys, row)]
        known = {r["key_id"]: _Known(*(r[name] for name in _Known._fields)) for r in whole}
        return known, len(rows)


def hash_of(token: str) -> str:
    """SHA-256, without a slow hash: 256 random bits cannot be guessed."""
    return hashlib.sha256(token.encode()).hexdigest()


class Quota:
    """Limits of each principal, counted in memory.

    rate: requests, such as "600/minute", in a sliding window. tokens: such as "1000000/day", in
    fixed windows, because only those also count what goes beyond the limit: the length of an answer
    is known when it is over. Empty: no limit. UserError for other texts.
    """

    def __init__(self, rate: str, tokens: str) -> None:
        self._rate = _limits("rate", rate)
        self._tokens = _limits("token_quota", tokens)
        counts = storage_from_string("async+memory://")
        self._sliding = SlidingWindowCounterRateLimiter(counts)
        self._fixed = FixedWindowRateLimiter(counts)
        self._spending: set[asyncio.Task[bool]] = set()

    async def take(self, principal: str) -> None:
        """One request; ApiError 429 with Retry-After where a limit is reached."""
        for item in self._tokens:
            if not await self._fixed.test(item, "tokens", principal):
                stats = await self._fixed.get_window_stats(item, "tokens", principal)
                raise _too_many(f"token quota of {item} used up", stats.reset_time)
        for item in self._rate:
            if not await self._sliding.hit(item, "requests", principal):
                stats = await self._sliding.get_window_stats(item, "requests", principal)
                raise _too_many(f"rate limit of {item} reached", stats.reset_time)

    def spend(self, principal: str, tokens: int) -> None:
        """Count the tokens of an answer, after it."""
        for item in self._tokens:
            task = asyncio.ensure_future(
                self._fixed.hit(item, "tokens", principal, cost=max(tokens, 1))
            )
            self._spending.add(task)
            task.add_done_callback(self._spending.discard)


def _limits(name: str, text: str) -> list[RateLimitItem]:
    try:
        return parse_many(text) if text else []
    except ValueError as error:
        raise UserError(f"{name}: {text!r}; allowed: such as '600/minute'") from error


def _too_many(message: str, reset: float) -> ApiError:
    wait_s = max(1, round(reset - time.time()))
    return ApiError(
        429,
        message,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(wait_s)},
    )
