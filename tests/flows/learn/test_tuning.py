"""Sigma before a round and the candidate after it, by forward passes on rows that judge nothing."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.errors import UserError
from agent.learner.calibrate import GRID
from agent.learner.choose import T
from agent.population.pool import Population
from agent.store.experience import Answer, Interaction, Judgement
from agent.store.forget import rounds_of
from agent.store.intake import text_hash
from agent.store.journal import DamagedError
from agent.store.replay import batch_places, random_walk, replay, steps_without
from evaluators.task import Row
from flows.commands.forget import _without, forget_now
from flows.commands.measure import evaluate_model
from flows.learn.collect import collect_rows, evaluation_pool
from flows.learn.improve import Round, run_round
from flows.learn.tuning import Selection
from flows.round_files import SELECTING, RoundFiles
from flows.service import Service
from flows.session import _OPEN, Session
from flows.show.terminal import Silent

pytestmark = pytest.mark.proof

Opened = Callable[..., Session]

CHOICE: dict[str, Any] = {"selection": 24, "selection_every": 2, "patience": 0, "generations": 6}


def learn(session: Session, **changes: Any) -> Round:
    return run_round(session.service, session.population, "gsm8k", session.progress, changes)


def test_the_chosen_point_replays_bit_for_bit_and_its_rows_are_nobody_elses(
    planted: Opened,
) -> None:
    session = planted(learner=CHOICE)
    service = session.service
    made = learn(session)
    chosen = service.journal.chosen(made.run_id)
    assert chosen is not None
    assert chosen.t in T
    assert chosen.evidence["rows"] == 24
    means = chosen.evidence["means"]
    assert len(means) == 3 + len(T) - 1  # generations 2, 4, 6 and the line through the best
    assert means[f"{chosen.generations}, t {chosen.t:g}"] == max(means.values())
    assert service.journal.verify(made.run_id) == CHOICE["generations"]
    for snapshots in (service.home.snapshots, None):
        again = replay(service.journal, service.anchor, made.digest, snapshots)
        assert again.digest() == made.digest
        assert again.delta_hash() == chosen.delta_hash
    task = service.task("gsm8k")
    own = {task.key(row) for row in service.selection_rows("gsm8k")}
    assert len(own) == 24
    assert own.isdisjoint(service.training_rows("gsm8k"))
    assert own.isdisjoint(task.key(row) for row in evaluation_pool(service, "gsm8k"))


def sent(service: Service, rows: Sequence[Row]) -> None:
    """Three clients send these rows in turn, as the task's template asks them."""
    task = service.task("gsm8k")
    requests = []
    for number, row in enumerate(rows):
        text = json.dumps(dict(row))
        prompt = task.messages(row, service.shots("gsm8k")(row))
        values = {"created": time.time(), "endpoint": "chat.completions", "model": "anchorage"}
        values |= {"version": "a" * 64, "status": "ok", "latency_s": 0.1, "prompt_tokens": 3}
        values |= {"completion_tokens": 5, "task": "gsm8k", "source": "submitted"}
        values |= {"inference_id": f"i{number}", "principal": ("ann", "bob", "eve")[number % 3]}
        values |= {"example": text, "prompt": json.dumps(prompt), "row_hash": text_hash(text)}
        values |= {"prompt_hash": text_hash(json.dumps(prompt))}
        requests.append(Interaction(**values, answers=(Answer(0, "7", "stop"),)))
    service.experience.record(requests)
    judged = [Judgement(each.inference_id, 0, judged=1.0, reward=1.0) for each in requests]
    service.experience.judge(judged)


class Watched:
    """An engine that notes which prompts are asked of members and which of theta."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.members, self.theta = set[str](), set[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: Any, max_tokens: Any, member: Any = None, *more: Any) -> Any:
        (self.theta if member is None else self.members).update(map(json.dumps, prompts))
        return self._engine.generate(prompts, max_tokens, member, *more)


def test_clients_rows_choose_the_candidate_and_a_round_never_asks_one_that_judges(
    planted: Opened,
) -> None:
    """Every prompt of an evaluation row, in whatever stage, is poison here, also from a client."""
    session = planted(learner=CHOICE, gateway={"principal_cap": 0.0})
    service, task = session.service, session.service.task("gsm8k")
    shots = service.shots("gsm8k")

    def prompts(rows: Iterable[Row]) -> set[str]:
        return {json.dumps(task.messages(row, shots(row))) for row in rows}

    judging = evaluation_pool(service, "gsm8k")
    fresh = service.rows("gsm8k", "train", 240)[130:190]
    sent(service, [*fresh, *judging[:30], *judging[-30:]])
    watched = Watched(session.population._slots[0].engine)  # the planted one
    made = run_round(service, Population([lambda: watched]), "gsm8k", Silent(), {})  # type: ignore[arg-type, return-value]
    run, chosen = service.journal.run(made.run_id), service.journal.chosen(made.run_id)
    assert (watched.members | watched.theta).isdisjoint(prompts(judging))
    assert run.plan["rows"]["set_aside"]["overlapping"] == 60
    assert chosen is not None
    assert chosen.evidence["rows"] == run.plan["rows"]["selection_rows"] == 24
    choosing = prompts(fresh) & watched.theta
    assert len(choosing) == run.plan["rows"]["selection_from_traffic"] > 5
    assert len(watched.theta) == 24
    assert watched.members.isdisjoint(watched.theta)
    # A deletion takes their text from the round's file, too.
    files, principal = RoundFiles(service.home, made.run_id), "ann"
    places = {use.pool: use.positions for use in rounds_of(service.experience, principal)}
    forget_now(service.home.root, principal, False, Silent())
    gone = [place for place, row in enumerate(files.rows(SELECTING)) if row is None]
    assert gone == list(places["selection"])
    assert gone


def test_selection_rows_are_those_the_round_was_opened_with(planted: Opened) -> None:
    """Traffic that comes while a round is interrupted is the next round's."""
    session = planted(learner=CHOICE, gateway={"principal_cap": 0.0})
    service = session.service

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selection, "choose", killed)
        with pytest.raises(KeyboardInterrupt):
            learn(session)
    sent(service, service.rows("gsm8k", "train", 240)[130:190])
    made = learn(session)
    rows = service.journal.run(made.run_id).plan["rows"]
    assert (rows["selection_rows"], rows["selection_from_traffic"]) == (24, 0)
    assert collect_rows(service, "gsm8k", 24).to_json()["selection_from_traffic"] > 5


@pytest.mark.parametrize("where", ["choose", "finish"])
def test_a_round_killed_around_its_choice_ends_with_the_same_candidate(
    planted: Opened, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = learn(planted("whole", learner=CHOICE)).digest
    session = planted("cut", learner=CHOICE)
    place = Selection if where == "choose" else type(session.service.journal)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, where, killed)
        with pytest.raises(KeyboardInterrupt):
            learn(session)
    assert learn(session).digest == wanted
    assert len(session.service.journal.runs()) == 1


def test_nothing_follows_a_choice_and_a_changed_one_is_named(
    planted: Opened, tmp_path: Path
) -> None:
    session = planted(learner=CHOICE)
    journal, made = session.service.journal, learn(session)
    chosen = journal.chosen(made.run_id)
    assert chosen is not None
    with pytest.raises(UserError, match="its candidate is chosen"):
        journal.choose(made.run_id, chosen)
    journal.database.rows("DROP TRIGGER choices_UPDATE")
    journal.database.rows("UPDATE choices SET t = 0.3")
    with pytest.raises(DamagedError, match="generation choice: t is damaged"):
        journal.verify(made.run_id)


def test_a_round_ends_after_its_peak(planted: Opened) -> None:
    session = planted(learner={**CHOICE, "patience": 1, "selection_every": 1, "generations": 40})
    made = learn(session)
    assert "peak: 1 measurements" in made.outcome.reason
    assert made.outcome.generations < 40


def test_sigma_is_tried_once_and_stands_in_the_plan(planted: Opened) -> None:
    session = planted(learner={**CHOICE, "sigma": "auto", "alpha": "auto"})
    made = learn(session)
    run = session.service.journal.run(made.run_id)
    found = run.plan["calibration"]
    assert found["sigma"] in GRID
    assert found["sigma"] == found["alpha"]
    assert (run.plan["sigma"], run.plan["alpha"]) == ("auto", "auto")
    assert [each["sigma"] for each in found["trials"]] == list(GRID[: len(found["trials"])])
    steps = [each.step for each in session.service.journal.generations(made.run_id)]
    assert {(step.sigma, step.alpha) for step in steps} == {(found["sigma"], found["alpha"])}


def test_a_batch_asks_the_rows_of_a_round_in_turn(planted: Opened) -> None:
    session = planted(learner={"batch": 10, "selection": 0})
    made = learn(session)
    journal = session.service.journal
    plan, generations = journal.run(made.run_id).plan, journal.generations(made.run_id)
    assert [each.rewards.shape for each in generations] == [(8, 10)] * 3
    places = [batch_places(plan, each.generation, 10) for each in generations]
    assert [place for own in places for place in own] == [n % 24 for n in range(30)]
    # Row 12 was asked in the second generation only: without it the others' steps stay.
    again = steps_without(journal, made.run_id, [12], mirrored=False, shaping="zscore")
    widths = [rewards.shape[1] for _, rewards in again]
    assert widths == [10, 9, 10]
    assert not np.array_equal(generations[0].rewards, generations[1].rewards)
    assert RoundFiles(session.service.home, made.run_id).selection() == {}


def test_a_round_without_some_of_its_rows_takes_the_same_point_of_the_line(
    planted: Opened,
) -> None:
    session = planted(learner=CHOICE)
    service, made = session.service, learn(session)
    journal, old = service.journal, service.journal.run(made.run_id)
    digest = _without(service, old, old.parent_digest, (3, 5))
    again = journal.candidate(digest)
    before, after = journal.chosen(old.run_id), journal.chosen(again.run_id)
    assert before is not None
    assert after is not None
    assert (after.generations, after.t) == (before.generations, before.t)
    assert after.delta_hash != before.delta_hash
    assert replay(journal, service.anchor, digest).delta_hash() == after.delta_hash


def test_a_random_walk_is_as_long_as_the_candidate_and_asked_beside_it(
    planted: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = planted(learner={**CHOICE, "selection": 0})
    service, made = session.service, learn(session)
    run, anchor = service.journal.run(made.run_id), service.anchor
    walk, again = (random_walk(service.journal, anchor, made.digest) for _ in range(2))
    assert walk.delta_hash() == again.delta_hash()
    lengths = [
        sum(np.sum(each.astype(np.float64) ** 2) for each in parameters.delta.values()) ** 0.5
        for parameters in (walk, replay(service.journal, anchor, made.digest))
    ]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.05)
    monkeypatch.setitem(_OPEN, service.home.root.resolve(), session)
    root = service.home.root
    report = evaluate_model(root, made.digest, ["gsm8k"], 40, Silent(), control=0)
    control = report["control"]
    assert control["digest"] == walk.digest()
    assert control["digest"] not in service.kept()
    assert control["tasks"]["gsm8k"]["n"] == report["tasks"]["gsm8k"]["n"] == 40
    assert control["tasks"]["gsm8k"]["accuracy"] < report["tasks"]["gsm8k"]["accuracy"]
    with pytest.raises(UserError, match="no finished run made it"):
        evaluate_model(root, run.anchor_digest, ["gsm8k"], 40, Silent(), control=0)


def test_asking_the_parent_is_recorded_and_changes_no_step(planted: Opened) -> None:
    made = {}
    for how in ("ignore", "alarm"):
        session = planted(how, learner={**CHOICE, "too_large": how})
        made[how] = learn(session)
        journal = session.service.journal
        drift = [each.drift for each in journal.generations(made[how].run_id)]
        asked = [each["generation"] for each in drift if each["parent"] is not None]
        assert asked == ([0, 2, 4] if how == "alarm" else [])
    assert made["ignore"].digest == made["alarm"].digest
