"""A principal is forgotten: no file of the home has its text, and its rounds can be made again."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from replaying import replay_without

from agent.config import load
from agent.errors import UserError
from agent.gateway.errors import ApiError
from agent.gateway.keys import KeyStore
from agent.home import Home
from agent.learner import es
from agent.learner.drift import Prediction, measure
from agent.learner.penalty import Penalty
from agent.store.experience import Answer, Interaction, Judgement
from agent.store.replay import replay
from agent.store.weights import Parameters, export
from flows.commands.forget import forget_now
from flows.learn.collect import sweep
from flows.round_files import RoundFiles
from flows.service import Service
from flows.show.terminal import Silent

SECRET = "a sentence that only ann has written"
PLAN = {"mirrored": False, "shaping": "zscore"}


def ask(service: Service, number: int, principal: str, created: float) -> None:
    """One verified request whose example carries the principal's text."""
    row = Interaction(
        inference_id=f"i{number}", created=created, endpoint="chat.completions", model="m",
        version="v", principal=principal, status="ok", latency_s=0.1, prompt_tokens=1,
        completion_tokens=1, task="gsm8k", source="submitted", prompt=f'["{SECRET} {number}"]',
        example=json.dumps({"question": f"{SECRET} {number}", "answer": "#### 1"}),
        prompt_hash=f"p{number}", row_hash=f"r{number}", group_hash=f"g{number}",
        answers=(Answer(0, SECRET, "stop"),),
    )  # fmt: skip
    service.experience.record([row])
    service.experience.judge([Judgement(f"i{number}", 0, judged=1.0, reward=1.0, format=1.0)])


def learn(service: Service, run_id: str, parent: str, uses: bool) -> str:
    """A round of two generations on three rows, those of ann and bob first; its digest."""
    journal, anchor = service.journal, service.anchor
    journal.open_run(
        run_id, anchor_digest=anchor.digest, parent_digest=parent, target="gsm8k", run_seed=7,
        plan=PLAN, now=0.0,
    )  # fmt: skip
    if uses:
        used = service.experience.rows("gsm8k")
        service.experience.use(run_id, "train", used)
        rows = [*(json.loads(str(row.example)) for row in used), {"question": "ours"}]
        RoundFiles(service.home, run_id).write_rows(rows)
    parameters: Parameters = replay(journal, anchor, parent)
    draw = np.random.default_rng(3)
    predicted = Prediction(0.0, 0.0)
    for generation in range(2):
        rewards = draw.normal(size=(4, 3))
        step = es.step(
            rewards, es.members(4, False), run_seed=7, generation=generation, sigma=0.01,
            alpha=0.01, penalty=Penalty("l2", 1.0),
        )  # fmt: skip
        applied = parameters.apply(step)
        drift = measure(step, applied, rewards, predicted)
        journal.commit(run_id, step, rewards, applied.delta_hash, drift)
    digest = export(parameters, service.home.weights).name
    journal.finish(run_id, digest, "test", 1.0)
    service.record(digest, "PROPOSED", "test")
    return digest


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """Ann and bob have each a row in the first of two rounds."""
    made = Service(Home.at(tmp_path / "home"), load())
    ask(made, 0, "ann", time.time())
    ask(made, 1, "bob", time.time())
    first = learn(made, "0001-gsm8k", made.anchor.digest, uses=True)
    learn(made, "0002-gsm8k", first, uses=False)
    return made


def texts(service: Service, words: str) -> list[Path]:
    """Files of the home that hold these words."""
    files = (path for path in service.home.root.rglob("*") if path.is_file())
    return [path for path in files if words.encode() in path.read_bytes()]


def test_nothing_of_a_forgotten_principal_is_left_and_its_versions_are_named(
    service: Service,
) -> None:
    assert len(texts(service, f"{SECRET} 0")) >= 2  # the store's, the round's
    told = forget_now(service.home.root, "ann", False, Silent())
    assert (told["interactions"], told["rounds"]) == (1, {"0001-gsm8k": 1})
    digests = [run.digest for run in service.journal.runs()]
    assert told["versions"] == dict.fromkeys(digests, "PROPOSED")  # the second began on the first
    assert texts(service, f"{SECRET} 0") == []
    assert texts(service, f"{SECRET} 1") != []
    rows = json.loads((service.home.runs / "0001-gsm8k" / "rows.json").read_text())
    assert rows[0] is None
    assert rows[2] == {"question": "ours"}


def test_its_rounds_are_made_again_without_it_and_wait_for_the_gate(service: Service) -> None:
    told = forget_now(service.home.root, "ann", True, Silent())
    assert set(told["replayed"]) == {"0001-gsm8k", "0002-gsm8k"}
    again = told["replayed"]["0001-gsm8k"]
    by_definition = replay_without(
        service.journal, service.anchor, "0001-gsm8k", [0], mirrored=False, shaping="zscore"
    )
    assert again == by_definition.digest()
    for digest in told["replayed"].values():
        assert service.ledger.state(digest) == "PROPOSED"
        assert replay(service.journal, service.anchor, digest).digest() == digest
    assert service.journal.candidate(told["replayed"]["0002-gsm8k"]).parent_digest == again


def test_its_keys_end_and_the_endpoint_does_not_open_again(service: Service) -> None:
    store = service.experience
    keys = KeyStore(store)
    tokens = [keys.create_key("ann", {"infer"}).token for _ in range(2)]
    told = forget_now(service.home.root, "ann", False, Silent())
    assert told["keys"] == 2
    later = KeyStore(store, open_until_first=True)
    assert not later.open
    for token in tokens:
        with pytest.raises(ApiError, match="Incorrect API key"):
            asyncio.run(later.principal(f"Bearer {token}"))
    assert {key["owner"] for key in later.list_keys()} == {"(forgotten)"}
    assert store.key_owners() == set()
    with pytest.raises(UserError, match="owner"):
        later.create_key("(forgotten)", {"infer"})


def test_an_unknown_principal_is_told_and_nothing_is_done(service: Service) -> None:
    with pytest.raises(UserError, match="principal 'nobody': nothing of it is kept; principals: a"):
        forget_now(service.home.root, "nobody", True, Silent())
    assert len(service.experience.rows("gsm8k")) == 2


def test_the_command_says_so_and_ends_with_code_2(service: Service) -> None:
    command = [sys.executable, "-m", "flows.cli", "forget", "nobody"]
    command += ["--home", str(service.home.root)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == (
        "anchorage: principal 'nobody': nothing of it is kept; principals: ann, bob\n"
    )


def test_whoever_only_has_a_key_is_known(service: Service) -> None:
    KeyStore(service.experience).create_key("eve", {"infer"})
    told = forget_now(service.home.root, "eve", False, Silent())
    assert (told["keys"], told["interactions"]) == (1, 0)


def test_a_replay_may_come_after_the_deletion_and_is_made_once(service: Service) -> None:
    forget_now(service.home.root, "ann", False, Silent())
    first = forget_now(service.home.root, "ann", True, Silent())["replayed"]
    runs = len(service.journal.runs())
    assert first.keys() == {"0001-gsm8k", "0002-gsm8k"}
    assert forget_now(service.home.root, "ann", True, Silent())["replayed"] == first
    assert len(service.journal.runs()) == runs


def test_text_that_is_too_old_leaves_the_files_of_rounds_too(tmp_path: Path) -> None:
    made = Service(Home.at(tmp_path / "home"), load())
    ask(made, 0, "ann", time.time() - 40 * 86_400)
    ask(made, 1, "bob", time.time())
    learn(made, "0001-gsm8k", made.anchor.digest, uses=True)
    assert sweep(made) == 1
    assert texts(made, f"{SECRET} 0") == []
    assert texts(made, f"{SECRET} 1") != []


def test_an_open_round_that_lost_rows_is_not_taken_up(service: Service) -> None:
    journal, parent = service.journal, service.anchor.digest
    run = journal.open_run(
        "0003-gsm8k", anchor_digest=parent, parent_digest=parent, target="gsm8k", run_seed=1,
        plan=PLAN, now=0.0,
    )  # fmt: skip
    rows = service.home.run(run.run_id) / "rows.json"
    rows.parent.mkdir()
    rows.write_text(json.dumps([{"question": SECRET}, {"question": "ours"}]))
    service.experience.use(run.run_id, "train", service.experience.rows("gsm8k")[:1])
    assert not RoundFiles(service.home, run.run_id).given_up()
    told = forget_now(service.home.root, "ann", True, Silent())
    assert RoundFiles(service.home, run.run_id).given_up()
    assert run.run_id not in told["replayed"]  # it has made nothing
    assert json.loads(rows.read_text()) == [None, {"question": "ours"}]
