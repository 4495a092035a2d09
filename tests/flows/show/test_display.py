"""MLflow is a subscriber: a round and a promotion never call it, and a hung one is made up for."""

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent.errors import UserError
from agent.registry import Registry
from flows.learn import loop
from flows.learn.weigh import weigh
from flows.serve.promote import act, promote
from flows.serve.reconcile import poll, repair, wishes
from flows.service import Service
from flows.session import Session
from flows.show.catch_up import Display, behind, catch_up, showing, shown_within
from flows.show.mlflow import within
from flows.show.terminal import Silent

pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]


class Watched(Service):
    """A home that writes down which threads want its MLflow, which is at ``uri``."""

    uri = ""
    callers: set[str]

    @property
    def registry(self) -> Registry:  # type: ignore[override]
        self.callers.add(threading.current_thread().name)
        return Registry(self.uri, self.settings.model.name, self.home.mlflow_artifacts)


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def watched(planted: Any, hung: str) -> Callable[..., Session]:
    """A session with planted engines whose MLflow hangs."""

    def make(**changes: Any) -> Session:
        session: Session = planted(kind=Watched, **changes)
        service: Any = session.service
        service.uri, service.callers = hung, set()
        return session

    return make


def learnt_and_promoted(session: Session) -> str:
    """A round, its verdict and its promotion; the digest."""
    made = loop.learn(session, "gsm8k")
    assert weigh(session, made.run_id, serve=True).report.verdict == "promote"
    assert act(session, made.digest)
    assert promote(session, made.digest).served == made.digest
    return made.digest


def test_a_round_and_a_promotion_make_no_call_to_mlflow(watched: Callable[..., Session]) -> None:
    session = watched()
    learnt_and_promoted(session)
    assert session.service.callers == set()  # type: ignore[attr-defined]


@pytest.mark.integration
def test_with_a_hung_mlflow_only_the_display_waits_and_all_is_shown_when_it_recovers(
    watched: Callable[..., Session],
) -> None:
    session = watched()
    service: Any = session.service
    service.home.mlflow_artifacts.mkdir(parents=True)
    display = Display(service, every_s=0.1)
    digest = learnt_and_promoted(session)
    assert service.callers <= {"display"}
    assert behind(service)
    assert not shown_within(service, 0.0)
    service.uri = f"sqlite:///{service.home.mlflow_db}"
    assert shown_within(service, 300.0), "a display that runs brings MLflow level by itself"
    assert display.finish(60.0) == ""
    registry = service.registry
    assert registry.aliases()["champion"].digest == digest
    version = registry.version(digest)
    assert version is not None
    assert version.state == service.ledger.state(digest)
    run = registry._client.get_run(version.run_id)
    assert run.data.metrics["accuracy.gsm8k.candidate"] > 0
    norms = registry._client.get_metric_history(version.run_id, "norm")
    shares = registry._client.get_metric_history(version.run_id, "share.learner")
    assert [point.step for point in norms] == [point.step for point in shares] == [0, 1, 2]
    assert catch_up(service) == []


def test_a_command_says_in_one_line_that_mlflow_is_behind(watched: Callable[..., Session]) -> None:
    session = watched()
    lines = Lines()
    with showing(session.service, lines, is_up=False):
        session.service.champion()
    [line] = lines.lines
    assert line.startswith("MLflow is behind")
    assert "\n" not in line
    with showing(session.service, lines, is_up=True):
        assert "display" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(UserError, match="refused"), showing(session.service, lines, is_up=False):
        raise UserError("refused")
    assert len(lines.lines) == 1


def test_reconcile_bakes_and_repairs_before_it_asks_a_hung_mlflow(
    watched: Callable[..., Session],
) -> None:
    session = watched(baking={"minutes": 0})
    digest = learnt_and_promoted(session)
    assert session.service.ledger.state(digest) == "BAKING"
    poll(session)
    assert session.service.ledger.state(digest) == "CHAMPION"
    assert repair(session) == []
    assert session.service.callers == {"MLflow"}  # type: ignore[attr-defined]
    with pytest.raises(Exception, match=r"Max retries|timed out|no answer"):
        wishes(session.service)


def test_what_is_waited_for_is_bounded_and_its_error_is_raised() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
        within(0.01, never.wait)
    never.set()
    with pytest.raises(ConnectionError, match="away"):
        within(60.0, lambda: (_ for _ in ()).throw(ConnectionError("away")))
    assert within(60.0, lambda: 7) == 7


@pytest.mark.integration
def test_a_round_that_cannot_be_shown_keeps_no_other_from_being_shown(planted: Any) -> None:
    opened = planted(shown=True)
    service = opened.service
    rounds = []
    for target in ("gsm8k", "countdown"):
        rounds.append(loop.learn(opened, target))
        weigh(opened, rounds[-1].run_id)
    shutil.rmtree(service.home.weights / rounds[0].digest)
    done = catch_up(service)
    assert f"round {rounds[1].run_id}" in done
    assert f"round {rounds[0].run_id}" not in done
    assert service.registry.version(rounds[1].digest) is not None
    assert set(service.registry.aliases()) == {"champion", "anchor", "challenger"}
    service.record(rounds[0].digest, "SWAP_INTENT", "a test")
    service.record(rounds[0].digest, "SWAPPED", "a test")
    catch_up(service)
    assert set(service.registry.aliases()) == {"previous", "anchor", "challenger"}
    assert behind(service), "it is tried again with every pass"


@pytest.mark.integration
def test_an_mlflow_that_was_wiped_is_shown_everything_again(planted: Any) -> None:
    """The cursors say that all is shown; the original model's version is missing all the same."""
    opened = planted(shown=True)
    learnt = loop.learn(opened, "gsm8k", {"generations": 1})
    weigh(opened, learnt.run_id)
    first = catch_up(opened.service)
    assert catch_up(opened.service) == []
    opened.service.registry._client.delete_registered_model("anchorage")
    again = Service.at(opened.service.home.root)
    assert catch_up(again) == first
