"""Swaps under load through the admin socket, as a controller drives them."""

import threading
import time
from collections import Counter
from typing import Any

import pytest

A, B = "a" * 64, "b" * 64
HELLO = [{"role": "user", "content": "hello"}]


class Clients:
    """Streams from several threads; every answer with the version it claims."""

    def __init__(self, running: Any, count: int) -> None:
        self.running, self.stop = running, threading.Event()
        self.answers: list[tuple[str, str]] = []  # (text, version)
        self.failures: list[str] = []
        self.threads = [threading.Thread(target=self._ask) for _ in range(count)]

    def __enter__(self) -> "Clients":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _ask(self) -> None:
        with self.running.openai() as client:
            while not self.stop.is_set():
                try:
                    stream = client.chat.completions.create(
                        model="tiny", messages=HELLO, stream=True
                    )
                    chunks = list(stream)
                    text = "".join(c.choices[0].delta.content or "" for c in chunks)
                    (version,) = {c.system_fingerprint for c in chunks}
                    self.answers.append((text, version))
                except Exception as error:
                    self.failures.append(repr(error))

    def mixed(self) -> list[tuple[str, str]]:
        return [(t, v) for t, v in self.answers if t not in (5 * "A", 5 * "B")]

    def mislabelled(self) -> list[tuple[str, str]]:
        return [(t, v) for t, v in self.answers if t[0].lower() * 12 != v]


def test_swaps_under_load_fail_nobody_and_mix_nothing(running: Any, scale: Any) -> None:
    swaps = scale(6, 200)
    running.engine.delay_s = 0.002
    with Clients(running, 8) as clients, running.admin() as admin:
        for turn in range(swaps):
            held = admin.post("/hold", json={"max_wait_s": 10})
            assert held.status_code == 200
            assert held.json()["in_flight"] == 0
            assert running.engine.running == set()
            running.engine.weights, digest = ("B", B) if turn % 2 == 0 else ("A", A)
            answer = {"version": digest, "lease": held.json()["lease"]}
            assert admin.post("/release", json=answer).json()["version"] == digest
            enough = len(clients.answers) + 4
            while len(clients.answers) < enough:
                time.sleep(0.001)
    assert clients.failures == []
    assert clients.mixed() == []
    assert clients.mislabelled() == []
    assert len(Counter(version for _, version in clients.answers)) == 2
    with running.http() as client:
        assert f"anchorage_swap_pause_seconds_count {swaps}.0" in client.get("/metrics").text


def test_the_same_clients_see_the_mix_when_running_answers_are_kept(running: Any) -> None:
    running.engine.delay_s = 0.05
    with Clients(running, 4) as clients, running.admin() as admin:
        while running.app.state.parts.admission.in_flight < 4:
            time.sleep(0.001)
        held = admin.post("/hold", json={"max_wait_s": 0, "wait": False}).json()
        assert held["in_flight"] > 0
        running.engine.weights = "B"
        admin.post("/release", json={"version": B, "lease": held["lease"]})
    assert len(clients.failures) >= held["in_flight"]
    assert "weights changed" in clients.failures[0]
    assert clients.mixed() == []
    assert running.app.state.parts.metrics.mixed._value.get() == held["in_flight"]


def test_a_held_door_queues_and_then_says_when_to_come_back(start: Any) -> None:
    running = start(queue_timeout_s=0.1)
    with running.admin() as admin, running.http() as client:
        admin.post("/hold", json={"max_wait_s": 1})
        refused = client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "swapping"
        assert refused.headers["retry-after"] == "2"
        assert client.get("/healthz").json()["status"] == "held"
        state = admin.get("/state").json()
        assert (state["held"], state["in_flight"], state["version"]) == (True, 0, A)
        assert 0 < state["deadline_in_s"] <= 61


def test_a_lease_that_runs_out_opens_the_door(start: Any) -> None:
    running = start()
    with running.admin() as admin, running.openai() as client:
        lease = admin.post("/hold", json={"max_wait_s": 1, "deadline_s": 0.1}).json()["lease"]
        answer = client.chat.completions.create(model="tiny", messages=HELLO)
        assert answer.system_fingerprint == A[:12]
        late = admin.post("/release", json={"version": B, "lease": lease})
        assert late.status_code == 409
        assert admin.get("/state").json()["version"] == A


def test_a_swap_that_cannot_get_in_leaves_the_door_open(running: Any) -> None:
    running.engine.fault = "stuck"
    with running.http() as client, running.admin() as admin:
        body = {"model": "tiny", "messages": HELLO, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            pieces = answer.iter_raw()
            assert next(pieces)
            assert admin.get("/drain", params={"wait_s": 0.05}).json()["in_flight"] == 1
            assert admin.post("/hold", json={"max_wait_s": 0.05}).status_code == 409
            assert not admin.get("/state").json()["held"]
        assert admin.get("/drain", params={"wait_s": 5, "version": A}).json()["drained"]


def test_a_cache_is_never_shared_over_versions(running: Any) -> None:
    with running.openai() as client, running.admin() as admin:
        for digest in (A, B):
            admin.post("/hold", json={"max_wait_s": 1})
            admin.post("/release", json={"version": digest})
            client.chat.completions.create(model="tiny", messages=HELLO)
            client.chat.completions.create(model="tiny", messages=HELLO)
    salts = [body["cache_salt"] for _, body in running.engine.seen]
    assert salts[0] == salts[1]
    assert salts[2] == salts[3]
    assert salts[0] != salts[2]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/hold", {}),
        ("/hold", {"max_wait_s": -1}),
        ("/hold", {"max_wait_s": "1"}),
        ("/release", {"version": "not a digest"}),
        ("/flip", {"version": A}),
    ],
)
def test_a_controllers_mistake_is_told(running: Any, path: str, body: Any) -> None:
    with running.admin() as admin:
        assert admin.post(path, json=body).status_code == 400


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/renew"), ("POST", "/retire"), ("POST", "/drain"), ("GET", "/version")],
)
def test_no_other_path_exists(running: Any, method: str, path: str) -> None:
    with running.admin() as admin:
        assert admin.request(method, path, json={}).status_code in (404, 405)


def test_draining_ends_the_service_for_newcomers(running: Any) -> None:
    with running.admin() as admin, running.http() as client:
        running.call(running.app.state.parts.admission.drain)
        assert admin.get("/state").json()["draining"]
        refused = client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO})
        assert refused.status_code == 503
        assert client.get("/healthz").status_code == 503
