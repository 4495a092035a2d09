"""The endpoint while the database server of its traffic and keys is away: it answers on."""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres_server import PostgresProcess, needs_server

from agent.gateway.keys import AWAY_S, KeyStore
from agent.store.experience import ExperienceStore, Interaction
from agent.store.postgres import ServerAwayError

ASK = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "metadata": {"task": "gsm8k", "example": json.dumps({"answer": "A"})},
}


class LossyStore(ExperienceStore):
    """Writes the first batch, and loses the server's answer to it."""

    lost = False

    def record(self, batch: Iterable[Interaction]) -> None:
        super().record(batch)
        if not self.lost:
            self.lost = True
            raise ServerAwayError("no answer")


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ExperienceStore]:
    kind, url = getattr(request, "param", (LossyStore, None))
    opened = kind.open(request.getfixturevalue("url") if url else tmp_path / "e.db", 1.0)
    yield opened
    opened.close()


@pytest.fixture
def server() -> Iterator[PostgresProcess]:
    process = PostgresProcess()
    yield process
    process.remove()


@pytest.fixture
def url(server: PostgresProcess) -> str:
    return server.database("traffic")


def test_rows_whose_answer_was_lost_are_kept_once_and_judged(start: Any) -> None:
    running = start()
    with running.http() as client:
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
    running.settled()
    assert running.store.lost
    assert [row.reward for row in running.store.rows("gsm8k")] == [1.0]


@pytest.mark.integration
@needs_server
@pytest.mark.parametrize("store", [(ExperienceStore, True)], indirect=True)
def test_it_answers_who_has_a_key_and_writes_the_rows_later(
    server: PostgresProcess, start: Any
) -> None:
    running = start()
    keys = KeyStore(running.store)
    token = keys.create_key("ann", {"infer", "submit_task"}).token
    with running.http(authorization=f"Bearer {token}") as client:
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
        server.kill()
        for _ in range(3):
            assert client.post("/v1/chat/completions", json=ASK).status_code == 200
            time.sleep(AWAY_S)
        client.headers["authorization"] = f"Bearer {token[:-1]}-"
        assert client.post("/v1/chat/completions", json=ASK).status_code == 401
    server.start()
    running.settled()
    assert [row.reward for row in running.store.rows("gsm8k")] == [1.0] * 4
