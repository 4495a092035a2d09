"""A candidate on trial by its traffic: withdrawn, swapped in, or watched on."""

import time
from pathlib import Path

import pytest
from anchors import candidate_of, made_by_a_round, tiny_anchor

from agent.config import Settings
from agent.home import Home
from agent.store.experience import SHADOW, Answer, Interaction, Judgement
from agent.store.ledger import Entry
from deploy.serving.served import Served, write_served
from flows.serve.promote import promote
from flows.serve.swaps import terms
from flows.serve.trial import decide
from flows.service import Service
from flows.session import Session
from flows.show.terminal import Silent

ROWS = 40


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """A home with a candidate that passed; its settings want a trial."""
    anchor = tiny_anchor(tmp_path / "anchor")
    chosen = {
        "model": {"path": str(anchor.directory)},
        "review": {"mode": "auto"},
        "engines": {"swap": "canary", "canary_share": 0.2},
        "baking": {"rows": ROWS, "window": 200},
    }
    made = Service(Home.at(tmp_path / "home"), Settings.model_validate(chosen))
    write_served(made.home, Served(anchor.digest, str(anchor.directory)))
    made.champion()
    digest = candidate_of(anchor, 1, made.home.weights)
    made_by_a_round(made, digest, 1)
    for state in ("PROPOSED", "EVALUATED", "PASSED"):
        made.record(digest, state, "a test")
    return made


def answered(
    service: Service, version: str, reward: float, at: float, status: str = "ok", **columns: str
) -> None:
    """One verified request of a version."""
    name = f"{version[:6]}-{at}"
    fields = {"endpoint": "chat.completions"} | columns
    service.experience.record([Interaction(**{
        "inference_id": name, "created": at, "model": "m", "version": version,
        "principal": "ann", "status": status, "latency_s": 0.1, "prompt_tokens": 1,
        "completion_tokens": 1, "task": "gsm8k", "source": "submitted", "example": "{}",
        "prompt": "[]", "prompt_hash": name, "row_hash": name, "group_hash": name,
        "answers": (Answer(0, "x", "stop"),), **fields,
    })])  # type: ignore[arg-type]  # fmt: skip
    service.experience.judge([Judgement(name, 0, judged=at, reward=reward)])


def on_trial(service: Service) -> Entry:
    """The candidate of the home, on trial after 200 right answers of the version before."""
    now = time.time()
    for number in range(200):
        answered(service, service.champion(), 1.0, now - 10 + number / 100)
    digest = service.kept()[-1]
    return service.record(digest, "CANARY", "a test", epoch=service.take_over())


@pytest.mark.parametrize("endpoint", ["chat.completions", SHADOW])
def test_a_bad_candidate_is_withdrawn(service: Service, endpoint: str) -> None:
    begun = on_trial(service)
    for number in range(ROWS // 2):
        answered(service, begun.digest, 0.0, begun.time + 1 + number, endpoint=endpoint)
    verdict, why, figures = decide(service, begun)
    assert verdict == "withdraw"
    assert why.startswith("worse on trial: reward 1.000 -> 0.000")
    assert figures["rewards"] == ROWS // 2


def test_a_candidate_that_fails_is_withdrawn(service: Service) -> None:
    begun = on_trial(service)
    for number in range(60):
        answered(service, begun.digest, 0.0, begun.time + 1 + number, status="error")
    assert decide(service, begun)[:2][0] == "withdraw"


def test_a_good_one_is_watched_and_then_swapped_in(service: Service) -> None:
    begun = on_trial(service)
    for number in range(ROWS - 1):
        answered(service, begun.digest, 1.0, begun.time + 1 + number)
    assert decide(service, begun)[0] == "go on"
    answered(service, begun.digest, 1.0, begun.time + 100)
    verdict, why, _ = decide(service, begun)
    assert verdict == "swap in"
    assert f"not worse on {ROWS} rewards" in why


def test_without_rewards_to_compare_with_nothing_is_swapped_in(service: Service) -> None:
    digest = service.kept()[-1]
    begun = service.record(digest, "CANARY", "a test", epoch=service.take_over())
    for number in range(2 * ROWS):
        answered(service, begun.digest, 1.0, begun.time + 1 + number)
    assert decide(service, begun)[0] == "go on"


def test_one_whose_champion_was_rolled_back_is_withdrawn(service: Service) -> None:
    begun = on_trial(service)
    other = Entry(**{name: getattr(begun, name) for name in Entry.__slots__} | {"before": "b" * 64})
    assert decide(service, other)[:2] == (
        "withdraw", "the version it was compared with is served no more"
    )  # fmt: skip


def test_a_trial_stays_unsettled_and_keeps_others_away(service: Service) -> None:
    begun = on_trial(service)
    unsettled = service.ledger.unsettled()
    assert unsettled is not None
    assert (unsettled.state, unsettled.after) == ("CANARY", service.origin.digest)
    assert service.ledger.open_intent() is None
    epoch = service.take_over()
    for state in ("SWAP_INTENT", "SWAPPED", "BAKING"):
        service.record(begun.digest, state, "a test", epoch=epoch)
    assert service.champion() == begun.digest


def test_while_the_stack_is_down_nothing_is_tried(service: Service) -> None:
    digest = service.kept()[-1]
    outcome = promote(Session(service, Silent()), digest)
    assert outcome.served == digest
    assert service.ledger.state(digest) == "BAKING"


def test_a_trial_lapses_after_some_polls(service: Service) -> None:
    chosen = terms(service)
    assert (chosen.share, chosen.shadow, chosen.deadline_s) == (0.2, False, 120.0)
    assert chosen.salt not in ("", service.salt)
