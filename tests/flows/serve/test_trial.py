"""A candidate on trial by its traffic: withdrawn, swapped in, or watched on."""

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from anchors import candidate_of, made_by_a_round, tiny_anchor

from agent.config import Settings
from agent.home import Home
from agent.sections import BakingSettings
from agent.store.experience import SHADOW, Answer, Interaction, Judgement
from agent.store.ledger import Entry
from deploy.serving.served import Served, write_served
from flows.serve.bake import _watches, records_of, watch
from flows.serve.promote import promote
from flows.serve.swaps import terms
from flows.serve.trial import decide
from flows.service import Service
from flows.session import Session
from flows.show.terminal import Silent

ROWS = 40
BAKING = BakingSettings(rows=ROWS, window=200)


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


def request(
    version: str, reward: float, at: float, principal: str = "ann", **columns: Any
) -> tuple[Interaction, Judgement]:
    """One verified request of a version."""
    name = f"{principal}-{version[:6]}-{at}"
    fields = {"endpoint": "chat.completions"} | columns
    row = Interaction(**{
        "inference_id": name, "created": at, "model": "m", "version": version,
        "principal": principal, "status": "ok", "latency_s": 0.1, "prompt_tokens": 1,
        "completion_tokens": 1, "task": "gsm8k", "source": "submitted", "example": "{}",
        "prompt": "[]", "prompt_hash": name, "row_hash": name, "group_hash": name,
        "answers": (Answer(0, "x", "stop"),), **fields,
    })  # type: ignore[arg-type]  # fmt: skip
    return row, Judgement(name, 0, judged=at, reward=reward)


def record(service: Service, requests: Iterable[tuple[Interaction, Judgement]]) -> None:
    """All in two transactions."""
    pairs = list(requests)
    service.experience.record(row for row, _ in pairs)
    service.experience.judge(verdict for _, verdict in pairs)


def answered(service: Service, version: str, reward: float, at: float, **columns: Any) -> None:
    record(service, [request(version, reward, at, **columns)])


def on_trial(service: Service) -> Entry:
    """The candidate of the home, on trial after 200 right answers of the version before."""
    now = time.time()
    champion = service.champion()
    record(service, (request(champion, 1.0, now - 10 + n / 100) for n in range(200)))
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


def send(service: Service, begun: Entry, rewards: dict[str, list[float]], **columns: Any) -> None:
    """Principal -> rewards on the candidate, one a second."""
    record(
        service,
        (
            request(
                begun.digest, reward, begun.time + 1 + n + place / 100, principal=who, **columns
            )
            for place, (who, earned) in enumerate(rewards.items())
            for n, reward in enumerate(earned)
        ),
    )


HONEST = {f"p{n}": [1.0, 1.0, 1.0, 0.0] for n in range(9)}


@pytest.fixture
def shared(service: Service) -> Entry:
    """A candidate on trial after a window in which ten principals were answered well."""
    now, champion = time.time(), service.champion()
    who = ["eve" if number % 10 == 0 else f"p{number % 9}" for number in range(200)]
    record(
        service,
        (
            request(champion, 1.0 if name == "eve" else 0.75, now - 10 + n / 100, principal=name)
            for n, name in enumerate(who)
        ),
    )
    return service.record(service.kept()[-1], "CANARY", "a test", epoch=service.take_over())


@pytest.mark.parametrize("count", [8, 400])
def test_one_principals_low_rewards_do_not_withdraw_a_candidate(
    service: Service, shared: Entry, count: int
) -> None:
    """It gives the gold answers it is judged by, after it has read the answers."""
    send(service, shared, {**HONEST, "eve": [0.0] * count})
    verdict, _, figures = decide(service, shared)
    assert verdict == "swap in"
    assert figures["reward"]["new"] < 0.7
    why = watch(service, shared).why
    assert ("reward is worse for 1 principals alone" in why) is (count == 400)


@pytest.mark.parametrize("columns", [{"status": "error"}, {"latency_s": 60.0}])
def test_one_principals_failures_and_long_answers_do_not_either(
    service: Service, shared: Entry, columns: dict[str, Any]
) -> None:
    send(service, shared, HONEST)
    send(service, shared, {"eve": [1.0] * 600}, **columns)
    assert any(each.worse(0.01) for each in _watches(*records_of(service, shared), BAKING))
    assert decide(service, shared)[0] == "swap in"


def test_what_most_principals_see_withdraws_a_candidate(service: Service, shared: Entry) -> None:
    send(service, shared, {name: [0.0] * 4 for name in HONEST} | {"eve": [1.0] * 4})
    assert decide(service, shared)[0] == "withdraw"


def test_with_one_other_who_asks_little_the_first_ones_rewards_count(
    service: Service, shared: Entry
) -> None:
    """Nobody could tell an attacker from a service's main client: the old version is safe."""
    send(service, shared, {"p1": [0.0] * 40, "p2": [1.0] * 3})
    assert decide(service, shared)[0] == "withdraw"


def test_one_principal_alone_does_not_end_the_watch(service: Service, shared: Entry) -> None:
    send(service, shared, {"eve": [1.0] * 400})
    assert decide(service, shared)[0] == "go on"


def test_a_flood_does_not_push_the_others_out_of_the_window(service: Service) -> None:
    """The old version's newest answers, by principal in turn."""
    now, champion = time.time(), service.champion()
    others = (request(champion, 1.0, now - 900 + n, principal=f"p{n % 4}") for n in range(40))
    flood = (request(champion, 0.0, now - 500 + n, principal="eve") for n in range(400))
    record(service, [*others, *flood])
    earned = service.experience.earned(service.champion(), newest=100)
    counted = Counter(each.principal for each in earned)
    assert counted == {"p0": 10, "p1": 10, "p2": 10, "p3": 10, "eve": 60}


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
