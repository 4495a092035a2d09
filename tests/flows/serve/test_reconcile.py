"""Reconciliation and review against a real MLflow registry on SQLite; the stack is down."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from anchors import candidate_of, made_by_a_round, tiny_anchor

from agent.config import Settings
from agent.errors import UserError
from agent.home import Home, write_sealed
from agent.registry import DIGEST, NOTE, REVIEW
from agent.store.ledger import STALLED
from deploy.consoles import sign
from deploy.serving.intact import Probes, write_probes
from deploy.serving.served import Served, read_served, write_served
from flows.serve import promote, swaps
from flows.serve.reconcile import disagreements, poll, repair, wishes
from flows.service import Service
from flows.session import Session
from flows.show import mlflow
from flows.show.catch_up import catch_up
from flows.show.terminal import Silent

pytestmark = pytest.mark.integration


class Desk:
    """A home with candidates at some state, its registry, and a person at MLflow's UI."""

    def __init__(self, root: Path, mode: str, candidates: int = 3) -> None:
        anchor = tiny_anchor(root / "anchor")
        self.home = Home.at(root / "home")
        settings = Settings.model_validate(
            {
                "model": {"path": str(anchor.directory)},
                "review": {"mode": mode, "allow_anchor_move": True},
                "baking": {"minutes": 0},
            }
        )
        self.home.settings_json.write_text(settings.model_dump_json())
        self.session = self.again()
        self.digests = [self.service.champion()]
        for number in range(1, candidates + 1):
            self.digests.append(candidate_of(anchor, number, self.home.weights))
            made_by_a_round(self.service, self.digests[-1], number)
        write_served(self.home, Served(self.digests[0], str(anchor.directory)))
        for digest in self.digests:
            write_probes(self.home, digest, Probes.of([({"role": "user"},)], [[{1: -1.0}]]))
            self.client.create_model_version(
                "anchorage", self.service.directory(digest).as_uri(), tags={DIGEST: digest}
            )
        mlflow.show_aliases(self.service)

    def again(self) -> Session:
        """The same home in a new process."""
        return Session(Service.at(self.home.root), Silent())

    @property
    def service(self) -> Service:
        return self.session.service

    @property
    def client(self) -> Any:
        return self.service.registry._client

    def judged(self, index: int, verdict: str) -> str:
        digest = self.digests[index]
        for state in ("PROPOSED", "EVALUATED", verdict):
            self.service.record(digest, state, "a test")
        return digest

    def number(self, digest: str) -> str:
        version = self.service.registry.version(digest)
        assert version is not None
        return version.number

    def move(self, digest: str, who: str | None = "ann") -> None:
        """A person who signed in, or nobody who did, moves the champion alias."""
        if who is not None:
            sign(self.home, f"{self.number(digest)} champion", who)
        self.client.set_registered_model_alias("anchorage", "champion", self.number(digest))

    def tag(self, digest: str, word: str, who: str | None = "ann") -> None:
        if who is not None:
            sign(self.home, f"{self.number(digest)} {word}", who)
        self.client.set_model_version_tag("anchorage", self.number(digest), REVIEW, word)

    def agree(self) -> str:
        """The digest that ledger, alias and choice agree on, once MLflow was shown the ledger."""
        catch_up(self.service)
        alias = self.service.registry.aliases()["champion"].digest
        champion = self.service.ledger.champion()
        assert champion == alias == read_served(self.home).digest
        assert disagreements(self.service) == wishes(self.service) == []
        return alias


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once and copied: making them takes seconds."""
    from agent.registry import Registry

    folder = tmp_path_factory.mktemp("mlflow")
    Registry(f"sqlite:///{folder / 'mlflow.db'}", "anchorage", None)
    return folder / "mlflow.db"


@pytest.fixture
def make_desk(store: Path, tmp_path: Path) -> Any:
    def make(mode: str = "auto") -> Desk:
        folder = Home.at(tmp_path / "home").mlflow
        folder.mkdir(mode=0o700)
        (folder / "mlflow.db").write_bytes(store.read_bytes())
        return Desk(tmp_path, mode)

    return make


def test_an_alias_moved_to_a_passed_version_is_carried_out(make_desk: Any) -> None:
    desk = make_desk()
    digest = desk.judged(1, "PASSED")
    desk.move(digest)
    assert "was moved" in repair(desk.session)[0]
    assert desk.agree() == digest
    desk.move(desk.digests[0])  # the original model
    poll(desk.session)
    assert desk.agree() == desk.digests[0]
    desk.move(digest, who=None)  # as a damaged database would: its signature was answered before
    assert "by nobody who signed in: put back" in repair(desk.session)[0]
    assert desk.agree() == desk.digests[0]


@pytest.mark.parametrize("verdict", ["REJECT", "HOLD", None])
def test_an_alias_moved_elsewhere_is_put_back_with_a_note(
    make_desk: Any, verdict: str | None
) -> None:
    desk = make_desk("manual")
    digest = desk.judged(1, verdict) if verdict else desk.digests[1]
    if verdict == "HOLD":
        promote.act(desk.session, digest)
        assert desk.service.ledger.state(digest) == "AWAIT_REVIEW"
    desk.move(digest)
    told = repair(desk.session)
    assert "put back" in told[0]
    assert desk.agree() == desk.digests[0]
    version = desk.client.get_model_version("anchorage", desk.number(digest))
    assert version.tags[NOTE] == told[0]


def test_a_version_of_a_stranger_is_put_back_and_told_so(make_desk: Any) -> None:
    desk = make_desk()
    made = desk.client.create_model_version("anchorage", "file:///tmp/elsewhere")
    sign(desk.home, f"{made.version} champion", "ann")
    desk.client.set_registered_model_alias("anchorage", "champion", made.version)
    assert f"version {made.version}" in repair(desk.session)[0]
    assert desk.agree() == desk.digests[0]
    assert NOTE in desk.client.get_model_version("anchorage", made.version).tags


def test_on_a_server_by_url_nobody_signs_and_an_old_signature_does_not_count(
    make_desk: Any,
) -> None:
    """Its versions have other numbers than those that were signed in the home's own MLflow."""
    desk = make_desk("manual")
    digest = desk.judged(1, "PASSED")
    promote.act(desk.session, digest)
    service, registry = desk.service, desk.service.registry
    plan = {"projection": {"mlflow_url": "http://127.0.0.1:9"}}
    service.settings = Settings.model_validate(service.settings.model_dump() | plan)
    service.__dict__["registry"] = registry  # of that server, as far as this test goes
    desk.tag(digest, "approve")
    desk.move(digest)
    done = repair(desk.session)
    assert all("by nobody who signed in" in each for each in done), done
    assert len(done) == 2
    assert service.ledger.state(digest) == "AWAIT_REVIEW"
    assert desk.agree() == desk.digests[0]


def test_an_alias_that_was_deleted_comes_back(make_desk: Any) -> None:
    desk = make_desk()
    desk.client.delete_registered_model_alias("anchorage", "champion")
    assert repair(desk.session) == []
    assert desk.agree() == desk.digests[0]


@pytest.mark.parametrize("moment", ["announced", "set"])
def test_our_own_alias_is_never_taken_for_a_persons_move(make_desk: Any, moment: str) -> None:
    """Ended while an alias was being set; then the ledger went on without MLflow.

    The alias at a version that may serve is the dangerous one: a move of it is carried out.
    """
    desk = make_desk()
    first, second = desk.judged(1, "PASSED"), desk.judged(2, "PASSED")
    promote.promote(desk.session, first)
    desk.service.record(first, "CHAMPION", "a test")
    assert desk.agree() == first
    registry, set_alias = desk.service.registry, desk.service.registry.set_alias

    def dies(alias: Any, digest: str) -> None:
        if moment == "set":
            set_alias(alias, digest)
        raise KeyboardInterrupt

    registry.set_alias = dies
    promote.promote(desk.session, second)
    with pytest.raises(KeyboardInterrupt):
        catch_up(desk.service)
    registry.set_alias = lambda *_: (_ for _ in ()).throw(ConnectionError("MLflow is away"))
    desk.service.record(second, "CHAMPION", "a test")
    swaps.rollback(desk.session, desk.digests[0], "without MLflow")
    desk.session = desk.again()
    assert repair(desk.session) == []
    assert desk.agree() == desk.digests[0]


def test_the_challenger_is_the_newest_undecided_candidate_or_nobody(make_desk: Any) -> None:
    desk = make_desk("manual")

    def challenger() -> str | None:
        catch_up(desk.service)
        alias = desk.service.registry.aliases().get("challenger")
        return alias and alias.digest

    old, new, last = (desk.judged(index, "PASSED") for index in (1, 2, 3))
    for digest in (old, new):
        promote.act(desk.session, digest)
    assert challenger() == last
    promote.act(desk.session, last)
    promote.review(desk.session, last, "reject", "no", "ann")
    assert challenger() == new
    promote.review(desk.session, new, "approve", "yes", "ann")
    assert desk.agree() == new
    assert challenger() is None  # the older one waits on, judged beside another champion
    assert desk.service.ledger.state(old) == "AWAIT_REVIEW"
    assert desk.service.registry.aliases()["previous"].digest == desk.digests[0]
    swaps.rollback(desk.session, desk.digests[0], "a test")
    catch_up(desk.service)
    assert set(desk.service.registry.aliases()) == {"champion", "anchor", "challenger"}
    assert challenger() == old


def test_approval_of_one_digest_never_promotes_another(make_desk: Any) -> None:
    """X waits, a person tags X; meanwhile Y has become the candidate that waits as well."""
    desk = make_desk("manual")
    x, y = desk.judged(1, "PASSED"), desk.judged(2, "PASSED")
    for digest in (x, y):
        assert not promote.act(desk.session, digest)
    catch_up(desk.service)
    assert desk.service.registry.aliases()["challenger"].digest == y  # what the UI shows first
    desk.tag(x, "approve")
    desk.session = desk.again()  # days later
    poll(desk.session)
    assert desk.agree() == x
    assert desk.service.ledger.state(y) == "AWAIT_REVIEW"
    assert [e.state for e in desk.service.ledger.of(y)][-1] == "AWAIT_REVIEW"


def test_an_approval_whose_digest_was_judged_again_is_not_carried_over(make_desk: Any) -> None:
    """An approval tag on a version whose candidate was rejected since does nothing."""
    desk = make_desk("manual")
    digest = desk.judged(1, "PASSED")
    promote.act(desk.session, digest)
    desk.service.record(digest, "AWAIT_REVIEW", "a test")
    promote.review(desk.session, digest, "reject", "looked at it", "ann")
    desk.tag(digest, "approve")
    poll(desk.session)
    assert desk.agree() == desk.digests[0]
    with pytest.raises(UserError, match="allowed: AWAIT_REVIEW"):
        promote.review(desk.session, digest, "approve", "second thoughts", "ann")


def test_an_engine_that_fails_to_start_is_remarked_once(make_desk: Any) -> None:
    desk = make_desk()
    write = partial(write_sealed, desk.home.starts_json("engine"))
    count = {"begun": 4, "since": 5.0, "pid": 1, "next_at": 9.0, "wrote": "no memory"}
    write(count | {"begun": 3})
    poll(desk.session)
    assert STALLED not in [row.state for row in desk.service.ledger.history()]
    for begun in (4, 5):
        write(count | {"begun": begun})
        poll(desk.session)
    [row] = [each for each in desk.service.ledger.history() if each.state == STALLED]
    assert row.digest == row.after == desk.service.champion()
    assert "engine: 3 starts ended before it answered" in row.why
    assert "no memory; `anchorage doctor` says what to do" in row.why
    write(count | {"since": 6.0})  # it answered in between
    poll(desk.session)
    assert [row.state for row in desk.service.ledger.history()].count(STALLED) == 2


def test_rejection_by_a_tag_ends_the_candidate(make_desk: Any) -> None:
    desk = make_desk("manual")
    digest = desk.judged(1, "PASSED")
    promote.act(desk.session, digest)
    desk.tag(digest, "reject")
    poll(desk.session)
    row = desk.service.ledger.of(digest)[-1]
    assert (row.state, row.actor) == ("REJECT", "ann")
    assert desk.agree() == desk.digests[0]


@pytest.mark.parametrize("act", ["approve", "reject", "champion"])
def test_what_nobody_signed_is_put_back_with_a_note(make_desk: Any, act: str) -> None:
    """A tag or an alias set by who can write the store, but did not sign in to MLflow."""
    desk = make_desk("manual")
    digest = desk.judged(1, "PASSED")
    promote.act(desk.session, digest)
    desk.move(digest, None) if act == "champion" else desk.tag(digest, act, None)
    assert "nobody who signed in: put back" in repair(desk.session)[0]
    assert desk.service.ledger.state(digest) == "AWAIT_REVIEW"
    assert desk.agree() == desk.digests[0]
    tags = desk.client.get_model_version("anchorage", desk.number(digest)).tags
    assert "nobody" in tags[NOTE]
    assert REVIEW not in tags


@pytest.mark.parametrize(("key", "value"), [(REVIEW, "Approved"), ("Approval_Check", "approved")])
def test_other_words_of_approval_count(make_desk: Any, key: str, value: str) -> None:
    """As people write it, and as the approval step of a Databricks deployment job does."""
    desk = make_desk("manual")
    digest = desk.judged(1, "HOLD")
    promote.act(desk.session, digest)
    sign(desk.home, f"{desk.number(digest)} approve", "ann")
    desk.client.set_model_version_tag("anchorage", desk.number(digest), key, value)
    poll(desk.session)
    assert desk.agree() == digest


@pytest.mark.parametrize(
    ("state", "word", "answer"),
    [
        ("PASSED", "aproved", "anchorage.review = 'aproved'; allowed: approve, reject"),
        ("REJECT", "approve", "it is REJECT; only AWAIT_REVIEW is reviewed"),
    ],
)
def test_a_tag_that_decides_nothing_is_answered_on_the_version(
    make_desk: Any, state: str, word: str, answer: str
) -> None:
    desk = make_desk("manual")
    digest = desk.judged(1, state)
    promote.act(desk.session, digest)
    desk.tag(digest, word)
    poll(desk.session)
    tags = desk.client.get_model_version("anchorage", desk.number(digest)).tags
    assert answer in tags[NOTE]
    assert REVIEW not in tags
    assert desk.agree() == desk.digests[0]


def test_a_held_version_is_not_approved_by_the_alias_and_its_page_says_how(make_desk: Any) -> None:
    desk = make_desk("manual")
    digest = desk.judged(1, "HOLD")
    promote.act(desk.session, digest)
    desk.move(digest)
    poll(desk.session)
    assert desk.agree() == desk.digests[0]
    version = desk.service.registry.version(digest)
    assert version is not None
    assert f"review approve {digest[:12]}" in version.head
    note = desk.client.get_model_version("anchorage", desk.number(digest)).tags[NOTE]
    assert f"put back; it waits for the tag {REVIEW}" in note


def test_what_to_do_follows_the_ledger_and_the_report_below_it_stays(make_desk: Any) -> None:
    desk = make_desk()
    digest = desk.judged(1, "PASSED")
    desk.client.update_model_version("anchorage", desk.number(digest), "# Round 1: a report")
    catch_up(desk.service)

    def page() -> str:
        return str(desk.client.get_model_version("anchorage", desk.number(digest)).description)

    assert "`anchorage promote" in page()
    promote.promote(desk.session, digest)
    catch_up(desk.service)
    assert "`anchorage rollback" in page()
    assert "`anchorage promote" not in page()
    assert page().count("# Round 1: a report") == page().count("## What to do") == 1
    assert catch_up(desk.service) == []


def test_an_approval_in_mlflow_is_in_history_under_the_users_name(make_desk: Any) -> None:
    desk = make_desk("manual")
    digest = desk.judged(1, "PASSED")
    promote.act(desk.session, digest)
    desk.tag(digest, "approve", "grace")
    poll(desk.session)
    assert desk.agree() == digest
    approved = [e for e in desk.service.ledger.of(digest) if e.state == "APPROVED"]
    assert [row.actor for row in approved] == ["grace"]


def test_an_approval_outlives_its_process(make_desk: Any) -> None:
    """Approved, and ended before the promotion began: whoever watches carries it out later."""
    desk = make_desk("manual")
    digest, fresh = desk.judged(1, "PASSED"), desk.judged(2, "PASSED")
    for each in (digest, fresh):
        promote.act(desk.session, each)
    desk.service.record(fresh, "APPROVED", "just now: it may be about to be promoted")
    assert disagreements(desk.service) == []
    ledger = desk.service.ledger
    ledger.append(digest, "APPROVED", epoch=ledger.epoch(), actor="ann", why="long ago", now=1.0)
    desk.session = desk.again()
    poll(desk.session)
    assert desk.agree() == digest


def test_states_are_shown_and_what_was_missed_is_made_up_for(make_desk: Any) -> None:
    """With MLflow away promotions go on; once it is back, one pass shows them."""
    desk = make_desk()
    digest = desk.judged(1, "PASSED")
    moved = desk.home.mlflow.rename(desk.home.root / "away")
    desk.home.mlflow.write_text("nobody home")
    desk.session = desk.again()
    assert promote.promote(desk.session, digest).served == digest
    poll(desk.session)
    assert desk.service.ledger.state(digest) == "CHAMPION"
    desk.home.mlflow.unlink()
    moved.rename(desk.home.mlflow)
    poll(desk.session)
    assert desk.agree() == digest
    version = desk.service.registry.version(digest)
    assert version is not None
    assert version.state == "CHAMPION"


def test_the_anchor_moves_to_a_settled_champion_only_and_by_a_person(make_desk: Any) -> None:
    desk = make_desk()
    digest, origin = desk.judged(1, "PASSED"), desk.digests[0]
    with pytest.raises(UserError, match="only the champion"):
        promote.move_anchor(desk.session, digest, "too early")
    promote.promote(desk.session, digest)
    with pytest.raises(UserError, match="is BAKING"):
        promote.move_anchor(desk.session, digest, "too early")
    poll(desk.session)
    promote.move_anchor(desk.session, digest, "everybody likes it")
    catch_up(desk.service)
    assert desk.service.anchor.digest == digest
    assert desk.service.find("anchor") == digest
    assert desk.service.registry.aliases()["anchor"].digest == digest
    row = desk.service.ledger.history(1)[0]
    assert (row.state, row.why, row.before, row.after) == (
        "ANCHOR", "everybody likes it", digest, digest,
    )  # fmt: skip
    assert row.statistics == {"anchor_before": origin, "anchor_after": digest}
    swaps.rollback(desk.session, desk.service.find("origin"), "back to the beginning")
    assert desk.agree() == origin
    assert desk.service.anchor.digest == origin  # what it is tied to itself
    desk.service.ledger.verify()


def test_the_anchor_does_not_move_by_default(make_desk: Any) -> None:
    desk = make_desk()
    closed = desk.service.settings.review.model_copy(update={"allow_anchor_move": False})
    desk.service.settings = desk.service.settings.model_copy(update={"review": closed})
    with pytest.raises(UserError, match="allow_anchor_move is false"):
        promote.move_anchor(desk.session, desk.digests[0], "no")
