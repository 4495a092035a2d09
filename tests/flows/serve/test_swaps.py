"""The promised way back: whatever makes a swap fail, the earlier version is served."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from anchors import candidate_of, made_by_a_round, tiny_anchor
from tokenizers import Tokenizer, models, pre_tokenizers

from agent.config import Settings, load
from agent.errors import UserError
from agent.home import Home
from agent.population.decoding import count_tokens
from agent.population.schedule import Completion
from agent.store.ledger import StaleEpoch
from deploy.serving.control import ControlError
from deploy.serving.lease import LeaseLostError
from deploy.serving.served import Served, read_served, write_served
from evaluators.examples import json_answer
from flows.learn.curve import Curve
from flows.learn.evaluate import pools
from flows.learn.improve import run_round
from flows.round_files import RoundFiles
from flows.serve import swaps
from flows.serve.promote import PASSED, promote
from flows.serve.swaps import probe_prompts
from flows.service import Service
from flows.session import Session
from flows.show.terminal import Silent


class Failing(Service):
    """A home whose next looks for weights fail with these errors, in order; None: as usual."""

    errors: list[Exception | None]

    def directory(self, digest: str) -> Path:
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return super().directory(digest)


class Overtaken(Service):
    """A controller that is held up where it looks for weights, while others act."""

    meanwhile: list[Callable[[], object]]

    def directory(self, digest: str) -> Path:
        while self.meanwhile:
            self.meanwhile.pop(0)()
        return super().directory(digest)


def passed(root: Path, kind: type[Service], *numbers: int) -> tuple[Any, list[str]]:
    """A home, its stack down, and candidates that passed."""
    anchor = tiny_anchor(root / "anchor")
    home = Home.at(root / "home")
    chosen = {"model": {"path": str(anchor.directory)}, "review": {"mode": "auto"}}
    service = kind(home, Settings.model_validate(chosen))
    write_served(home, Served(anchor.digest, str(anchor.directory)))
    service.champion()  # the ledger's first row
    digests = [candidate_of(anchor, number, home.weights) for number in numbers]
    for number, digest in zip(numbers, digests, strict=True):
        made_by_a_round(service, digest, number)
        for state in ("PROPOSED", "EVALUATED", "PASSED"):
            service.record(digest, state, "a test")
    return service, digests


@pytest.fixture
def promoted(tmp_path: Path) -> Session:
    """A home, its stack down, that serves its first candidate."""
    service, [digest] = passed(tmp_path, Failing, 1)
    service.errors = []
    session = Session(service, Silent())
    assert promote(session, digest).served == digest
    return session


def test_a_promotion_that_others_overtook_does_not_bring_an_older_version_back(
    tmp_path: Path,
) -> None:
    service, [first, second] = passed(tmp_path, Overtaken, 1, 2)
    other = Session(Service(service.home, service.settings), Silent())
    service.meanwhile = [lambda: promote(other, first), lambda: promote(other, second)]
    with pytest.raises(UserError, match="was PASSED and is CHAMPION: another controller acted"):
        promote(Session(service, Silent()), first)
    assert read_served(service.home).digest == service.champion() == second
    with pytest.raises(UserError, match="is CHAMPION"):
        promote(other, first, only=PASSED)
    assert promote(other, first).served == service.champion() == first  # asked for anew


@pytest.mark.parametrize(
    "error",
    [UserError("no probes"), ControlError("no answer"), RuntimeError("a bug"), OSError("no disk")],
    ids=lambda error: type(error).__name__,
)
def test_a_rollback_whose_swap_fails_in_any_way_starts_cold(
    promoted: Session, error: Exception
) -> None:
    service: Any = promoted.service
    bad, origin = service.champion(), service.origin.digest
    service.errors = [error]
    outcome = swaps.rollback(promoted, origin, "a test")
    assert service.errors == []
    assert (outcome.served, service.champion()) == (origin, origin)
    assert read_served(service.home).digest == origin
    assert service.ledger.state(bad) == "ROLLED_BACK"


def test_the_champion_is_served_by_a_cold_start_too(promoted: Session) -> None:
    service: Any = promoted.service
    write_served(service.home, Served(service.origin.digest, str(service.origin.directory)))
    service.errors = [None, RuntimeError("a bug")]  # they are kept, and then the swap fails
    swaps.serve_champion(promoted)
    assert read_served(service.home).digest == service.champion()


@pytest.mark.parametrize("error", [LeaseLostError("late"), StaleEpoch("taken over")])
def test_who_was_taken_over_does_not_start_anything(promoted: Session, error: Exception) -> None:
    service: Any = promoted.service
    champion = service.champion()
    service.errors = [error]
    with pytest.raises(type(error)):
        swaps.rollback(promoted, service.origin.digest, "a test")
    assert read_served(service.home).digest == service.champion() == champion


def test_a_cold_start_that_fails_as_well_is_told_and_changes_nothing(promoted: Session) -> None:
    service: Any = promoted.service
    champion = service.champion()
    service.errors = [RuntimeError("the first"), UserError("the second")]
    with pytest.raises(UserError, match="the second"):
        swaps.rollback(promoted, service.origin.digest, "a test")
    assert read_served(service.home).digest == service.champion() == champion


EXAMPLE = Path(json_answer.__file__)


def own_target(tmp_path: Path, **tasks: Any) -> Service:
    """A service on a directory, where every built-in data set but refusal's lies on a hub."""
    directory = tiny_anchor(tmp_path / "model").directory
    chosen = {"target": "json_answer", "files": [f"{EXAMPLE}:TASK"]} | tasks
    return Service(Home.at(tmp_path / "home"), load(model={"path": str(directory)}, tasks=chosen))


def test_probes_come_from_the_target_and_its_priors_alone(tmp_path: Path) -> None:
    service = own_target(tmp_path, priors=["refusal"])
    rows = [*service.rows("json_answer", "eval", 1), *service.rows("refusal", "eval", 1)]
    names = ("json_answer", "refusal")
    wanted = [service.task(name).messages(row) for name, row in zip(names, rows, strict=True)]
    assert probe_prompts(service) == wanted


def test_an_empty_list_of_priors_is_none_of_them(tmp_path: Path) -> None:
    assert own_target(tmp_path, priors=[]).priors("json_answer") == []
    assert len(probe_prompts(own_target(tmp_path / "again", priors=[]))) == 1
    assert "piqa" in own_target(tmp_path / "all").priors("json_answer")


def test_evaluation_rows_longer_than_the_model_takes_are_left_out_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = own_target(tmp_path, priors=["refusal"])
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(service.origin.directory / "tokenizer.json"))
    every = service.rows("refusal", "eval", 50)
    lengths = [
        count_tokens(service.origin.directory, service.task("refusal").messages(row))
        for row in every
    ]
    limit = sorted(lengths)[20]  # a prompt of that many tokens leaves no room for one more
    model = {"path": service.settings.model.path, "max_model_len": limit}
    tasks = service.settings.tasks.model_dump()
    short = Service(Home.at(tmp_path / "short"), load(model=model, tasks=tasks))
    left = [row for row, length in zip(every, lengths, strict=True) if length < limit]
    assert short.rows("refusal", "eval", 50) == short.rows("refusal", "eval", 50) == left
    assert all(row in left for pool in pools(short, "refusal") for row in pool if row in every)
    (line,) = [each.getMessage() for each in caplog.records if "left out" in each.getMessage()]
    assert line == (
        f"refusal: {len(every) - len(left)} of {len(every)} evaluation rows are left out: their"
        f" prompts have up to {max(lengths)} tokens; model.max_model_len allows {limit - 1}"
    )


def test_a_task_none_of_whose_rows_fits_ends_a_round_before_it_begins(tmp_path: Path) -> None:
    service = own_target(tmp_path, priors=["refusal"])
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(service.origin.directory / "tokenizer.json"))
    (row,) = service.rows("json_answer", "eval", 1)
    longest = count_tokens(service.origin.directory, service.task("json_answer").messages(row))
    model = {"path": service.settings.model.path, "max_model_len": longest + 1}
    tasks = service.settings.tasks.model_dump() | {
        "curve_every": 1,
        "prompts": {"refusal": "? " * 99 + "{request}"},
    }
    learner = {"budget_minutes": 0}
    short = Service(Home.at(tmp_path / "short"), load(model=model, tasks=tasks, learner=learner))
    assert len(probe_prompts(short)) == 1  # it is served all the same
    population: Any = SimpleNamespace(
        generate=lambda prompts, _: [Completion("", 0, "stop")] * len(prompts)
    )
    curve = Curve(short, "json_answer", "run")
    curve.measure(population, 0)
    assert {point["task"] for point in RoundFiles(short.home, "run").curve()} == {"json_answer"}
    with pytest.raises(UserError, match="refusal: no evaluation row is shorter than"):
        run_round(short, population, "json_answer", Silent())
    assert short.journal.runs() == []
