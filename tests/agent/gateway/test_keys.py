"""Keys: made once, kept as hashes, asked for by scope."""

import asyncio
import time
from typing import Any

import openai
import pytest
from sqlalchemy import select

from agent.errors import UserError
from agent.gateway.errors import ApiError
from agent.gateway.keys import AGAIN_S, FRESH_S, KeyStore, hash_of
from agent.store.experience_db import keys as key_table

HELLO = [{"role": "user", "content": "hello"}]
ASK = {"model": "tiny", "messages": HELLO}
TASK = ASK | {"metadata": {"task": "gsm8k", "example": '{"answer": "A"}'}}


def who(keys: KeyStore, token: str) -> Any:
    return asyncio.run(keys.principal(f"Bearer {token}"))


def test_a_key_is_known_by_its_token_and_kept_as_a_hash(store: Any) -> None:
    keys = KeyStore(store)
    made = keys.create_key("ann", {"infer", "feedback"})
    owner = who(keys, made.token)
    assert owner.owner == "ann"
    assert owner.may("infer")
    assert not owner.may("review")
    with store.engine.connect() as connection:
        row = connection.execute(select(key_table)).one()
    assert row.token_hash == hash_of(made.token)
    assert made.token[-20:] not in str(row)
    assert "token_hash" not in keys.list_keys()[0]


def test_keys_that_are_wrong_expired_or_revoked_are_refused(store: Any) -> None:
    keys = KeyStore(store, fresh_s=0)
    made = keys.create_key("ann", {"infer"})
    old = keys.create_key("ann", {"infer"}, expires=time.time() - 1)
    gone = keys.create_key("ann", {"infer"})
    assert who(keys, gone.token).owner == "ann"
    keys.revoke(gone.key_id)
    flipped = made.token[:-1] + ("A" if made.token[-1] != "A" else "B")
    for token in (flipped, old.token, gone.token, "", "ank-", made.token + "x", "sk-other"):
        with pytest.raises(ApiError) as caught:
            who(keys, token)
        assert caught.value.status == 401
    with pytest.raises(UserError, match="not revoked"):
        keys.revoke(gone.key_id)


@pytest.mark.parametrize(
    ("owner", "scopes", "says"),
    [
        ("ann", {"root"}, "root; allowed: admin, feedback, infer"),
        ("ann", set(), "allowed: admin"),
        ("local", {"infer"}, "not 'local'"),
        ("a b", {"infer"}, "'a b'"),
    ],
)
def test_a_key_nobody_could_mean_is_not_made(
    store: Any, owner: str, scopes: set[str], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        KeyStore(store).create_key(owner, scopes)


@pytest.fixture
def guarded(start: Any, store: Any) -> Any:
    """A gateway beyond loopback's trust, and a client for any set of scopes."""
    keys = KeyStore(store, fresh_s=0)
    keys.create_key("first", {"review"})
    running = start(keys=keys, host="0.0.0.0")

    def client(*scopes: str, owner: str = "ann") -> Any:
        token = keys.create_key(owner, scopes).token
        return running.http(authorization=f"Bearer {token}")

    running.client = client
    return running


@pytest.mark.parametrize(
    ("method", "path", "body", "scopes"),
    [
        ("POST", "/v1/chat/completions", ASK, {"infer"}),
        ("POST", "/v1/chat/completions", TASK, {"infer", "submit_task"}),
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "x"}, {"infer"}),
        ("GET", "/v1/models", None, {"infer"}),
        ("GET", "/v1/rewards", None, {"submit_task"}),
        ("GET", "/metrics", None, {"review"}),
    ],
)
def test_a_path_asks_for_its_scopes(
    guarded: Any, method: str, path: str, body: Any, scopes: set[str]
) -> None:
    with guarded.http() as keyless:
        assert keyless.request(method, path, json=body).status_code == 401
    with guarded.client(*scopes) as right, guarded.client("admin") as admin:
        assert right.request(method, path, json=body).status_code == 200
        assert admin.request(method, path, json=body).status_code == 200
    for missing in scopes:
        others = ({"infer", "submit_task", "feedback"} | scopes) - {missing}
        with guarded.client(*others) as lacking:
            answer = lacking.request(method, path, json=body)
        assert answer.status_code == 403
        assert missing in answer.json()["error"]["message"]


def test_healthz_needs_no_key(guarded: Any) -> None:
    with guarded.http() as keyless:
        assert keyless.get("/healthz").status_code == 200


def test_the_openai_client_raises_its_own_errors(guarded: Any) -> None:
    with guarded.openai(api_key="ank-0-0") as wrong, pytest.raises(openai.AuthenticationError):
        wrong.chat.completions.create(**ASK)
    key = guarded.client("feedback").headers["authorization"].removeprefix("Bearer ")
    with guarded.openai(api_key=key) as lacking, pytest.raises(openai.PermissionDeniedError):
        lacking.chat.completions.create(**ASK)


def test_what_belongs_to_one_principal_is_not_shown_to_another(guarded: Any) -> None:
    with guarded.client("infer", "submit_task", "feedback") as ann:
        answer = ann.post("/v1/chat/completions", json=TASK)
        guarded.settled()
        assert len(ann.get("/v1/rewards").json()["data"]) == 1
    opinion = {"inference_id": answer.headers["x-request-id"], "metric_name": "m", "value": 1}
    row = {"inference_id": opinion["inference_id"], "task": "gsm8k", "example": {"answer": "B"}}
    with guarded.client("infer", "feedback", owner="ann") as lacking:
        assert lacking.post("/v1/rewards", json=row).status_code == 403
    with guarded.client("submit_task", "feedback", owner="bob") as bob:
        assert bob.get("/v1/rewards").json()["data"] == []
        assert bob.post("/v1/feedback", json=opinion).status_code == 404
        assert bob.post("/v1/rewards", json=row).status_code == 404
    with guarded.client("review", "feedback", owner="eve") as reviewer:
        assert len(reviewer.get("/v1/rewards").json()["data"]) == 1
        assert reviewer.post("/v1/feedback", json=opinion).status_code == 201


def test_several_keys_of_one_owner_are_one_principal(guarded: Any) -> None:
    for _ in range(3):
        with guarded.client("infer", "submit_task") as ann:
            assert ann.post("/v1/chat/completions", json=TASK).status_code == 200
    guarded.settled()
    assert [row.principal for row in guarded.store.rows("gsm8k")] == ["ann"] * 3
    assert guarded.store.key_owners() == {"ann", "first"}


def test_rates_are_counted_by_principal(start: Any, store: Any) -> None:
    keys = KeyStore(store)
    running = start(keys=keys, rate="1/hour")
    tokens = {owner: keys.create_key(owner, {"infer"}).token for owner in ("ann", "bob")}
    statuses = []
    for owner in ("ann", "ann", "bob"):
        with running.http(authorization=f"Bearer {tokens[owner]}") as client:
            statuses.append(client.post("/v1/chat/completions", json=ASK).status_code)
    assert statuses == [200, 429, 200]


def test_caches_are_not_shared_between_principals(guarded: Any) -> None:
    for owner in ("ann", "bob"):
        with guarded.client("infer", owner=owner) as client:
            client.post("/v1/chat/completions", json=ASK)
    first, second = (body["cache_salt"] for _, body in guarded.engine.seen)
    assert first != second


def test_the_first_key_closes_a_running_gateway_and_every_later_one_counts_at_once(
    start: Any, store: Any
) -> None:
    running = start(keys=KeyStore(store, open_until_first=True))
    path = "/v1/chat/completions"
    with running.http() as keyless:
        assert keyless.post(path, json=ASK).status_code == 200
        assert keyless.get("/healthz", headers={"host": "proxy.example"}).status_code == 421
    elsewhere = KeyStore(store)  # the command line, in another process
    ann = elsewhere.create_key("ann", {"infer"})
    bob = elsewhere.create_key("bob", {"feedback"})
    with running.http(authorization=f"Bearer {ann.token}") as client:
        assert client.post(path, json=ASK).status_code == 200
    with running.http(authorization=f"Bearer {bob.token}") as client:
        assert client.post(path, json=ASK).status_code == 403
    with running.http() as keyless:
        assert keyless.post(path, json=ASK).status_code == 401
        assert keyless.get("/healthz", headers={"host": "proxy.example"}).status_code == 200
    late = elsewhere.create_key("late", {"infer"})
    time.sleep(2 * AGAIN_S)
    with running.http(authorization=f"Bearer {late.token}") as client:
        assert client.post(path, json=ASK).status_code == 200
    for key in (ann, bob, late):
        elsewhere.revoke(key.key_id)
    time.sleep(1.2 * FRESH_S)
    with running.http(authorization=f"Bearer {ann.token}") as client:
        assert client.post(path, json=ASK).status_code == 401  # and not open again


def test_a_wrong_id_and_a_wrong_secret_are_the_same_work(store: Any) -> None:
    """Every refusal compares two hashes, whatever is wrong with the token."""

    class Counting(KeyStore):
        compared = 0

        def _owner(self, token: str) -> Any:
            self.compared += 1
            return super()._owner(token)

    keys = Counting(store)
    made = keys.create_key("ann", {"infer"})
    counts = []
    for token in (made.token[:-1] + "-", f"ank-{'0' * 16}-{'A' * 43}", "sk-other", ""):
        keys.compared = 0
        with pytest.raises(ApiError):
            who(keys, token)
        counts.append(keys.compared)
    assert counts == [2, 2, 2, 2]
