"""The swap under load, on a real engine, gateway and watchdog: nobody notices, nothing is mixed.

Two versions whose words tell them apart: one can only say letters of even token ids, the other
only of odd ones. So an answer's text says which weights made each of its tokens.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from anchors import made_by_a_round
from spoilt import KINDS
from tiny import tiny_model

from agent.config import Settings, load
from agent.errors import UserError
from agent.home import Home
from agent.store.weights import Anchor, Parameters, export
from deploy import stack
from deploy.serving import swap
from deploy.serving.control import EngineControl, GatewayControl, UnixTransport, pinned
from deploy.serving.controller import Controller, Strategy, change
from deploy.serving.engines import SupervisedEngines, engines_of
from deploy.serving.intact import Probes, write_probes
from deploy.serving.lease import Leases
from deploy.serving.served import BLUE, GREEN, Served, read_served
from deploy.stack import Ports, services
from deploy.supervise import Program, survivors
from flows.serve.promote import promote
from flows.serve.reconcile import poll
from flows.service import Service
from flows.session import Session
from flows.show.terminal import Silent

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

TOKENS = 48
CLIENTS = 8
LEASE_S = 1.0
PATH = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "Say something."}]
FAULTS = ["other weights", "killed", "half loaded"]  # each is a cold start: one of them is enough
FAULTS = FAULTS if os.environ.get("ANCHORAGE_SOAK") == "1" else FAULTS[:1]
NAMED = (
    "truncated", "flipped bit", "flipped bit, rehashed", "missing tensor", "extra tensor",
    "transposed", "NaN", "infinite", "weights are a link", "pickle renamed", "a pickle beside",
    "another config", "auto_map", "auto_map of the tokenizer", "a stale shard", "a stale index",
    "code beside", "another tokenizer", "another template", "other weights",
)  # fmt: skip
ALIKE = {  # ways to spoil that change nothing here: the tiny model is float32 and untied
    "wrong dtype", "tied head stored", "no directory", "directory is a link", "transposed square",
    "folder of another digest",
}  # fmt: skip


@dataclass
class Running:
    """A stack that is up, its two versions, and the letters each can say."""

    home: Home
    anchor: Anchor
    endpoint: str
    even: Served
    odd: Served
    letters: dict[str, set[str]]  # by digest

    def change(self, target: Served, strategy: Strategy = "in_place") -> swap.SwapOutcome:
        return change(
            self.home,
            target.digest,
            Path(target.directory),
            anchor=self.anchor,
            record=lambda _event, _digest, _why: None,
            strategy=strategy,
        )

    def other(self) -> Served:
        return self.odd if read_served(self.home).digest == self.even.digest else self.even

    def mixed(self, text: str) -> bool:
        """Whether letters of both versions are in an answer."""
        return all(set(text) & letters for letters in self.letters.values())

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.endpoint}/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


@dataclass(frozen=True)
class Answer:
    """One streamed answer as a client saw it."""

    version: str
    text: str
    tokens: int
    whole: bool


def ask(client: httpx.Client, url: str = PATH, **more: Any) -> Answer:
    body = {
        "model": "anchorage", "messages": QUESTION, "max_tokens": TOKENS, "temperature": 1.0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    } | more  # fmt: skip
    text, tokens, done = "", 0, False
    with client.stream("POST", url, json=body) as reply:
        for line in reply.iter_lines():
            done = done or line == "data: [DONE]"
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for choice in event.get("choices", ()):
                text += choice["delta"].get("content") or ""
        version = reply.headers.get("x-model-version", "")
        return Answer(version, text, tokens, done and reply.status_code == 200)


def disjoint(folder: Path) -> tuple[Anchor, Path, dict[str, set[str]]]:
    """The even version as the anchor, the odd one exported from it, and the letters of each.

    The head's rows of forbidden ids are zero, those of allowed ids come in pairs w, -w: whatever
    the hidden state, some allowed id has a logit above 0, far above at temperature 1.
    """
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    directory = tiny_model(folder / "anchor", tied=False)
    vocab = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    printed = sorted(i for word, i in vocab.items() if word.isascii() and word.isalpha())
    by_parity = [[i for i in printed if i % 2 == parity][:20] for parity in (0, 1)]
    tensors = load_file(directory / "model.safetensors")
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(10, tensors["lm_head.weight"].shape[1])).astype(np.float32)
    heads = []
    for ids in by_parity:
        head = np.zeros(tuple(tensors["lm_head.weight"].shape), np.float32)
        head[ids[:10]], head[ids[10:]] = 20 * rows, -20 * rows
        heads.append(head)
    tensors["lm_head.weight"] = torch.from_numpy(heads[0])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    anchor = Anchor.open(directory)
    moved = Parameters.zeros(anchor)
    moved.delta["lm_head.weight"][:] = (heads[1] - heads[0]).reshape(-1)
    made = export(moved, folder / "home" / "weights")
    words = {i: word for word, i in vocab.items()}
    said = [{words[i] for i in ids} for ids in by_parity]
    return anchor, made, {anchor.digest: said[0], made.name: said[1]}


def record_cold(home: Home, digest: str) -> None:
    """Ask the engine, which was just started with this digest."""
    with EngineControl.at(home.engine_socket(BLUE)) as engine:
        ids = [engine.tokens(QUESTION)]
        expected = engine.top_logprobs("anchorage", ids, 5, 3)
    write_probes(home, digest, Probes.of([QUESTION], expected))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("s")
    anchor, made, letters = disjoint(folder)
    home = Home.at(folder / "home")
    even, odd = Served(anchor.digest, str(anchor.directory)), Served(made.name, str(made))
    path = {"path": str(anchor.directory), "max_model_len": 512, "dtype": "float32"}
    (folder / "letters.py").write_text(LETTERS)
    rows = ({"id": f"row {n}", "letters": "a"} for n in range(20))
    (folder / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = {"target": "letters", "files": [f"{folder / 'letters.py'}:TASK"], "priors": []}
    settings = load(
        model=path,
        engines={"max_num_seqs": 16, "swap": "canary"},
        tasks=tasks,
        review={"mode": "auto"},
        baking={"rows": TRIED, "window": 200},
    )

    def only(*names: str) -> Callable[[Home, Settings, Ports], list[Program]]:
        return lambda *given: [each for each in services(*given) if each.name in names]

    try:
        stack.up(home, settings, odd, make=only(BLUE), wait_for=[BLUE])
        record_cold(home, odd.digest)
        stack.down(home)
        status = stack.up(home, settings, even, make=only(BLUE, "gateway", "watchdog", GREEN))
        record_cold(home, even.digest)
        yield Running(home, anchor, status["endpoint"], even, odd, letters)
    finally:
        stack.down(home)
        assert survivors(home) == []


@contextlib.contextmanager
def streaming(
    running: Running, socket: Path | None = None, count: int = CLIENTS
) -> Iterator[list[Answer]]:
    """Clients that ask one stream after another until the block ends; all answers, in the end."""
    stop = threading.Event()
    answers: list[Answer] = []
    extra = {"cache_salt": "s"} if socket else {}

    def client() -> None:
        transport = UnixTransport(socket) if socket else None
        with httpx.Client(base_url=running.endpoint, transport=transport, timeout=60) as http:
            while not stop.is_set():
                answers.append(ask(http, **extra))

    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(client) for _ in range(count)]
        try:
            yield answers
        finally:
            stop.set()
            for each in asked:
                each.result()


def test_swaps_under_streams_fail_cut_and_mix_nothing(
    running: Running, scale: Callable[[int, int], int]
) -> None:
    swaps = scale(6, 200)
    with streaming(running) as answers:
        for _ in range(swaps):
            before = len(answers)
            outcome = running.change(running.other())
            assert outcome.swapped, outcome.reason
            while len(answers) < before + CLIENTS:  # each version answers somebody
                time.sleep(0.01)
    assert len(answers) >= swaps * CLIENTS
    for answer in answers:
        assert answer.whole
        assert (answer.tokens, len(answer.text)) == (TOKENS, TOKENS)
        assert not running.mixed(answer.text)
        right = next(d for d, letters in running.letters.items() if set(answer.text) <= letters)
        assert right.startswith(answer.version)
    assert {answer.version for answer in answers} == {d[:12] for d in running.letters}
    assert running.metric("anchorage_mixed_answers_total") == 0


def test_the_detector_finds_a_mix_when_running_answers_are_kept(running: Running) -> None:
    """Clients on the bare engine, weights changed in mode `keep`: what `wait` makes impossible."""
    with EngineControl.at(running.home.engine_socket(BLUE)) as engine:
        with streaming(running, running.home.engine_socket(BLUE)) as answers:
            for directory in (running.odd.directory, running.even.directory) * 3:
                time.sleep(0.1)
                engine._ask("POST", "/pause", query={"mode": "keep", "clear_cache": "false"})
                engine.load(directory, 30.0)
                engine.resume()
        served = read_served(running.home)
        engine.pause(5.0)
        engine.load(served.directory, 30.0)
        engine.resume()
    assert any(running.mixed(answer.text) for answer in answers)


def test_the_gateway_fails_a_mixed_answer_and_counts_it(running: Running) -> None:
    """A controller that does not wait for running answers is caught by the gateway itself."""

    class Keeping(EngineControl):
        def pause(self, max_wait_s: float) -> None:
            query = {"mode": "keep", "clear_cache": "true"}
            self._ask("POST", "/pause", query=query, timeout_s=max_wait_s)

    class Hasty(GatewayControl):
        def hold(self, max_wait_s: float, deadline_s: float, *, wait: bool = True) -> str:
            body = {"max_wait_s": max_wait_s, "deadline_s": deadline_s, "wait": False}
            return str(self._ask("POST", "/hold", body)["lease"])

    @contextlib.contextmanager
    def keeping(slot: str) -> Iterator[EngineControl]:
        with pinned(running.home.engine_socket(slot)) as path, Keeping.at(path) as control:
            yield control

    with streaming(running) as answers:
        for _ in range(4):
            time.sleep(0.15)
            with (
                Hasty.at(running.home.admin_socket) as gateway,
                Controller(
                    running.home, running.anchor, lambda *_: None, gateway=gateway,
                    engines=engines_of(running.home), connect=keeping,
                ) as controller,
            ):  # fmt: skip
                protocol = swap.in_place(read_served(running.home), running.other())
                assert swap.run(protocol, controller.perform).swapped
    assert running.metric("anchorage_mixed_answers_total") > 0
    assert any(not answer.whole for answer in answers)
    assert not any(running.mixed(answer.text) for answer in answers if answer.whole)


@pytest.mark.parametrize(
    ("clear", "salt", "same"),
    [("true", None, True), ("false", "new", True), ("false", None, False)],
    ids=["cleared", "salted", "neither"],
)
def test_a_long_prompt_asked_again_is_answered_as_by_a_cold_engine(
    running: Running, clear: str, salt: str | None, same: bool
) -> None:
    """Its prefix is cached from the other weights; the head is asked, so every layer counts."""
    prompt = list(range(1, 200))

    def asked(engine: EngineControl, salt: str | None) -> dict[str, float]:
        body = {
            "model": "anchorage", "prompt": prompt, "max_tokens": 1, "temperature": 0.0,
            "logprobs": 8, "return_tokens_as_token_ids": True,
        } | ({"cache_salt": salt} if salt else {})  # fmt: skip
        told = engine._ask("POST", "/v1/completions", body, timeout_s=30.0)
        top: dict[str, float] = told["choices"][0]["logprobs"]["top_logprobs"][0]
        return top

    served = Path(read_served(running.home).directory)
    twin = running.home.root / "twin"
    deeper(served, twin)
    with EngineControl.at(running.home.engine_socket(BLUE)) as engine:
        engine.pause(5.0)
        engine.load(str(twin), 30.0)
        engine.resume()
        cold = asked(engine, "cold")  # never asked before with this salt: nothing is cached
        engine.pause(5.0)
        engine.load(str(served), 30.0)
        engine.resume()
        asked(engine, None)  # the prefix of the served version is cached now
        engine._ask("POST", "/pause", query={"mode": "wait", "clear_cache": clear})
        engine.load(str(twin), 30.0)
        engine.resume()
        warm = asked(engine, salt)
        engine.pause(5.0)
        engine.load(str(served), 30.0)
        engine.resume()
    close = warm.keys() == cold.keys() and all(abs(warm[k] - cold[k]) < 1e-3 for k in cold)
    assert close == same


def deeper(source: Path, target: Path) -> None:
    """The same head over other layers: what a cached prefix would carry over."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for name, tensor in tensors.items():
        if "v_proj" in name or "k_proj" in name:
            tensor.mul_(-1.5)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def test_bad_checkpoints_are_refused_before_anybody_is_held(
    running: Running, tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    kinds = [*NAMED, *(kind for kind in KINDS if kind not in (*NAMED, *ALIKE))]
    holds = running.metric("anchorage_swap_pause_seconds_count")
    refused: list[str] = []
    with streaming(running, count=1) as answers:
        for kind in kinds:
            bad = tmp_path / str(len(refused)) / running.odd.digest
            shutil.copytree(running.odd.directory, bad)
            KINDS[kind][0](bad)
            with pytest.raises((UserError, OSError)):
                running.change(Served(running.odd.digest, str(bad)))
            refused.append(kind)
            if len(refused) == scale(24, len(kinds)):
                break
    assert len(refused) >= 24
    assert set(NAMED) <= set(refused)
    assert all(answer.whole for answer in answers)
    assert running.metric("anchorage_swap_pause_seconds_count") == holds


@pytest.mark.parametrize("fault", FAULTS)
def test_a_load_that_fails_ends_on_the_old_version(
    running: Running, fault: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Inside the load, past every check: the engine dies, stops half way, or gets what is wrong."""
    old = read_served(running.home)

    class Faulty(EngineControl):
        def load(self, directory: str, timeout_s: float) -> str:
            if fault == "killed":
                os.kill(SupervisedEngines(running.home).pid(BLUE) or 0, signal.SIGKILL)
                return super().load(directory, timeout_s)
            wrong = tmp_path / "wrong"
            deeper(Path(directory), wrong)
            found = super().load(str(wrong), timeout_s)
            if fault == "half loaded":
                raise RuntimeError(f"broke off at {found[:12]}")
            return running.other().digest  # only behaviour can tell

    @contextlib.contextmanager
    def faulty(slot: str) -> Iterator[EngineControl]:
        with pinned(running.home.engine_socket(slot)) as path, Faulty.at(path) as control:
            yield control

    began = time.monotonic()
    with (
        GatewayControl.at(running.home.admin_socket) as gateway,
        Controller(
            running.home, running.anchor, lambda *_: None, gateway=gateway,
            engines=engines_of(running.home), connect=faulty,
        ) as controller,
    ):  # fmt: skip
        protocol = swap.in_place(old, running.other())
        outcome = swap.run(protocol, controller.perform)
    record_property("seconds", round(time.monotonic() - began, 1))
    assert not outcome.swapped
    assert read_served(running.home) == old
    with httpx.Client(base_url=running.endpoint, timeout=60) as client:
        answer = ask(client)
    assert answer.whole
    assert old.digest.startswith(answer.version)
    assert set(answer.text) <= running.letters[old.digest]


LETTERS = """
from evaluators.task import Source, Task, Verdict

TASK = Task(
    name="letters",
    source=Source("", eval_split="train", file="letters.jsonl"),
    key=lambda row: row["id"],
    fields=lambda row: {"id": row["id"]},
    template="{id}",
    verify=lambda text, row: Verdict(float(set(text) <= set(row["letters"])), 0.0, text),
    gold=lambda row: row["letters"],
    wrong=lambda row: "?",
    target=True,
    max_tokens=8,
)
"""
TRIED = 250  # rewards of a candidate on trial


@dataclass(frozen=True)
class Asked:
    """One request of a session: when it began, who answered, whether it succeeded."""

    session: str
    at: float
    version: str
    ok: bool


@contextlib.contextmanager
def visiting(running: Running, letters: set[str]) -> Iterator[list[Asked]]:
    """Clients with sessions of two requests; an answer is right if it is in these letters."""
    stop, asked = threading.Event(), list[Asked]()
    row = json.dumps({"id": "visit", "letters": "".join(sorted(letters))})

    def visit(http: httpx.Client, session: str) -> None:
        about = {"task": "letters", "example": row, "session_id": session}
        body = {"model": "anchorage", "messages": QUESTION, "max_tokens": 4, "temperature": 1.0}
        for _ in range(2):
            began = time.time()
            reply = http.post(PATH, json=body | {"metadata": about, "ignore_eos": True})
            version = reply.headers.get("x-model-version", "")
            asked.append(Asked(session, began, version, reply.status_code == 200))

    def client(number: int) -> None:
        with httpx.Client(base_url=running.endpoint, timeout=60) as http:
            for count in range(1_000_000):
                if stop.is_set():
                    return
                visit(http, f"{number}-{count}-{len(letters)}")

    with ThreadPoolExecutor(CLIENTS) as pool:
        threads = [pool.submit(client, number) for number in range(CLIENTS)]
        try:
            yield asked
        finally:
            stop.set()
            for each in threads:
                each.result()


def tried(session: Session, digest: str) -> list[tuple[float, float]]:
    """Promote, and poll until the trial is over; when it was in force."""
    service = session.service
    outcome = promote(session, digest)
    assert outcome.state == "CANARY", outcome
    began = last = time.time()
    while service.ledger.state(digest) == "CANARY":
        assert time.time() - began < 420, service.ledger.of(digest)
        time.sleep(1.0)
        last = time.time()
        poll(session)
    return [(began, last)]


CONTROLLER = """
import os, sys, time
from pathlib import Path
from agent.home import Home
from deploy.serving.control import EngineControl, GatewayControl
from deploy.serving.lease import Leases
from deploy.serving.served import BLUE, read_served
home, lease_s = Home.at(Path(sys.argv[1])), float(sys.argv[2])
for line in sys.stdin:  # one controller for every line: a fork, which the test kills
    if os.fork():
        os.wait()
        continue
    served = read_served(home)
    Leases(home).begin(served, served, lease_s=lease_s, now=time.time())
    GatewayControl.at(home.admin_socket).hold(lease_s, 60.0)
    EngineControl.at(home.engine_socket(BLUE)).pause(5.0)
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_controllers_killed_in_the_pause_never_keep_it_past_the_lease(
    running: Running, scale: Callable[[int, int], int]
) -> None:
    """kill -9 between pause and resume; the service's own watchdog is all that is left."""
    argv = [sys.executable, "-c", CONTROLLER, str(running.home.root), str(LEASE_S)]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as child,
        EngineControl.at(running.home.engine_socket(BLUE)) as engine,
        httpx.Client(base_url=running.endpoint, timeout=60) as client,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        for _ in range(scale(3, 50)):
            child.stdin.write("die\n")
            child.stdin.flush()
            pid = int(child.stdout.readline())
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            assert engine.paused()
            while engine.paused():
                assert time.monotonic() - began < LEASE_S + 1.0
                time.sleep(0.01)
            assert ask(client).whole
            while Leases(running.home).current() is not None:
                time.sleep(0.01)
        child.stdin.close()


def test_blue_green_flips_between_two_warm_engines_under_streams(running: Running) -> None:
    """The first flip starts the second engine, every later one nothing; answers end at home."""
    seconds = []
    with streaming(running) as answers:
        for _ in range(4):  # an even number: the first engine serves in the end
            before, began = len(answers), time.monotonic()
            outcome = running.change(running.other(), "blue_green")
            seconds.append(time.monotonic() - began)
            assert outcome.swapped, outcome.reason
            while len(answers) < before + 2 * CLIENTS:
                time.sleep(0.01)
    assert read_served(running.home).slot == BLUE
    assert max(seconds[1:]) < seconds[0]
    for answer in answers:
        assert answer.whole
        assert answer.tokens == TOKENS
        right = next(d for d, letters in running.letters.items() if set(answer.text) <= letters)
        assert right.startswith(answer.version)
    assert {answer.version for answer in answers} == {d[:12] for d in running.letters}
    SupervisedEngines(running.home).stop(GREEN)


@pytest.fixture(scope="module")
def passed(running: Running) -> tuple[Service, str]:
    """The even version as champion, and the odd one as a candidate that passed the gate."""
    if read_served(running.home).digest != running.even.digest:
        running.change(running.even)
    (running.home.root / "salt").write_text("a salt of tests")  # who is on trial is then known
    service = Service.at(running.home.root)
    assert service.champion() == running.even.digest
    made_by_a_round(service, running.odd.digest, 1)
    for state in ("PROPOSED", "EVALUATED", "PASSED"):
        service.record(running.odd.digest, state, "a test")
    return service, running.odd.digest


def answers_of(running: Running, kind: str, status: str, digest: str) -> int:
    """What /metrics counts."""
    try:
        labels = f'{{kind="{kind}",status="{status}",version="{digest[:12]}"}}'
        return int(running.metric(f"anchorage_answers_total{labels}"))
    except StopIteration:
        return 0


def test_a_shadow_answers_for_the_record_and_no_client_sees_it(
    running: Running, passed: tuple[Service, str], scale: Callable[[int, int], int]
) -> None:
    """Eight clients, whose questions the candidate answers wrongly: withdrawn, unseen."""
    if scale(0, 1) == 0:
        pytest.skip("a trial of real engines: in the soak")
    service, new = passed
    old, settings = service.champion(), service.settings
    engines = settings.engines.model_copy(update={"swap": "shadow"})
    shadowing = Service(service.home, settings.model_copy(update={"engines": engines}))
    with visiting(running, running.letters[old]) as seen:
        while len(seen) < 300:
            time.sleep(0.1)
        [(began, ended)] = tried(Session(shadowing, Silent()), new)
        after = time.time()
        while not any(each.at > after for each in seen):
            time.sleep(0.1)
    shadows = answers_of(running, "shadow", "ok", new)
    meanwhile = sum(began < each.at < ended for each in seen)
    failed = sum(not each.ok for each in seen)
    by_candidate = sum(each.version != old[:12] for each in seen)
    sys.stdout.write(
        f"\nshadow: share asked {engines.canary_share:.3f}, seen {shadows / meanwhile:.3f} "
        f"({shadows} answers for the record beside {meanwhile}); answers of the candidate that a "
        f"client saw {by_candidate} of {len(seen)}; failed answers {failed}\n"
    )
    assert (failed, by_candidate) == (0, 0)
    assert shadows > 0
    assert answers_of(running, "shadow", "error", new) == 0
    assert answers_of(running, "trial", "ok", new) == 0
    assert service.ledger.state(new) == "ROLLED_BACK"
    assert "worse on trial: reward 1.000 -> 0.000" in service.ledger.of(new)[-1].why
    assert read_served(running.home).digest == service.champion() == old


def test_a_canary_takes_its_share_and_everything_or_nothing_follows(
    running: Running, passed: tuple[Service, str], scale: Callable[[int, int], int]
) -> None:
    """Eight clients; a bad candidate is withdrawn, a good one swapped in, nobody is failed."""
    if scale(0, 1) == 0:
        pytest.skip("two trials of real engines: in the soak")
    service, new = passed
    old, session = service.champion(), Session(service, Silent())
    with visiting(running, running.letters[old]) as bad:
        while len(bad) < 300:
            time.sleep(0.1)
        tried(session, new)
    assert service.ledger.state(new) == "ROLLED_BACK"
    assert "worse on trial: reward 1.000 -> 0.000" in service.ledger.of(new)[-1].why
    assert read_served(running.home).digest == service.champion() == old
    assert SupervisedEngines(running.home).pid(GREEN) is None
    with visiting(running, running.letters[old] | running.letters[new]) as good:
        while len(good) < 300:
            time.sleep(0.1)
        [(began, ended)] = tried(session, new)
        after = time.time()
        while not any(each.at > after for each in good):
            time.sleep(0.1)
    assert service.ledger.state(new) == "BAKING"
    assert read_served(running.home).digest == service.champion() == new
    by_session: dict[str, list[Asked]] = {}
    for each in good:
        if began < each.at < ended - 1.0:
            by_session.setdefault(each.session, []).append(each)
    whole = [two for two in by_session.values() if len(two) == 2]
    changed = sum(one.version != other.version for one, other in whole)
    share = sum(two[0].version == new[:12] for two in whole) / len(whole)
    failed = sum(not each.ok for each in (*bad, *good))
    asked = service.settings.engines.canary_share
    sys.stdout.write(
        f"\ncanary: share asked {asked:.3f}, seen {share:.3f} of {len(whole)} sessions; sessions "
        f"that changed sides {changed}; failed answers {failed} of {len(bad) + len(good)}\n"
    )
    assert (changed, failed) == (0, 0)
    assert abs(share - asked) <= 0.02
    assert {each.version for each in good if each.at > after} == {new[:12]}
    assert answers_of(running, "trial", "ok", new) > 0
    assert answers_of(running, "trial", "error", new) == 0
