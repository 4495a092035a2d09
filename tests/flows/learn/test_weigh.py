"""The gate in the loop: more rows while a prior is undecided, each look on record."""

import json
import re
import time
from dataclasses import replace
from functools import cached_property

import pytest

from agent.config import load
from agent.errors import UserError
from agent.population.pool import Population
from agent.population.schedule import Completion
from agent.store.anchor import Anchor
from agent.store.experience import Answer, Interaction, Judgement
from evaluators.runner import read_samples
from evaluators.task import Verdict
from flows.learn import loop
from flows.learn.collect import collect_rows, evaluation_pool
from flows.learn.weigh import weigh
from flows.serve.promote import act
from flows.session import Session
from flows.show.review import markdown
from flows.show.terminal import Silent
from tests.flows.conftest import Unshown

FEW = {"tasks": {"rows": 20}, "learner": {"generations": 3}}


def judged(planted, home, **gate):
    opened = planted(home, gate={"margins": {}, "confirm": False, **gate}, **FEW)
    learnt = loop.learn(opened, "gsm8k")
    report = weigh(opened, learnt.run_id).report
    opened.close()
    return opened.service, report


def test_rows_are_added_until_the_priors_are_decided(planted):
    _, held = judged(planted, "once", sequential=True)
    assert held.verdict == "hold"
    assert {r["step"] for r in held.decisive()} >= {"prior", "pooled"}
    service, decided = judged(planted, "more", sequential=True, extend=4)
    assert decided.verdict == "promote"
    (entry,) = [e for e in service.ledger.of(decided.digest) if e.state == "EVALUATED"]
    looks = entry.statistics["earlier_looks"]
    assert [look["rows"]["piqa"] for look in looks] == [20 * n for n in range(1, len(looks) + 1)]
    assert sorted(looks[0]["undecided"]) == sorted(each["text"] for each in held.decisive())
    assert f"rows added {len(looks)} times" in entry.why
    assert decided.tasks["piqa"]["n"] == 20 * (len(looks) + 1)
    assert decided.tasks["piqa"]["interval"]["candidate"][0] > 0
    moved = decided.shift["candidate"]
    assert moved["gsm8k"]["kl"] > max(moved["piqa"]["kl"], moved["countdown"]["kl"]) >= 0
    folder = service.home.evaluations / decided.digest
    asked = [row["example_id"] for path in folder.glob("*.parquet") for row in read_samples(path)]
    assert len(asked) == len(set(asked)), "no row is asked twice"
    held_out = {service.task("gsm8k").key(row) for row in evaluation_pool(service, "gsm8k")}
    assert {row["example_id"] for p in folder.glob("*.parquet") for row in samples(p)} <= held_out


def graded_kind(kind):
    """A home in which a right answer of gsm8k earns 0.8 and any other 0.3."""

    class Graded(kind):
        @cached_property
        def tasks(self):
            tasks = super().tasks

            def share(completion, row):
                right = tasks["gsm8k"].verify(completion, row).reward
                return Verdict(0.3 + 0.5 * right, 1.0, completion)

            return tasks | {"gsm8k": replace(tasks["gsm8k"], graded=True, verify=share)}

    return Graded


def test_a_graded_task_is_trained_judged_and_promoted(planted):
    opened = planted("home", kind=graded_kind(Unshown), gate={"confirm": False})
    learnt = loop.learn(opened, "gsm8k")
    report = weigh(opened, learnt.run_id).report
    opened.close()
    assert report.verdict == "promote", report.decisive()
    row = report.tasks["gsm8k"]
    assert 0.3 < row["champion"] < row["candidate"] <= 0.8
    (target,) = [r for r in report.reasons if r["step"] == "target"]
    assert target["method"] == "betting"
    low, high = row["interval"]["candidate"]
    assert low < row["candidate"] < high


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_a_capped_row_is_counted_in_collect_at_the_rounds_start_and_in_its_report(planted):
    heard = Heard()
    opened = planted("home", heard, gateway={"principal_cap": 0.01}, gate={"confirm": False})
    service, task = opened.service, opened.service.task("gsm8k")
    known = list(service.training_rows("gsm8k").items())[:20]
    now = time.time()
    for number, (key, row) in enumerate(known):
        asked = {"inference_id": f"i{number}", "created": now - 60, "endpoint": "chat.completions"}
        asked |= {"model": "m", "version": "v", "principal": f"p{number % 2}", "status": "ok"}
        asked |= {"latency_s": 0.1, "prompt_tokens": 5, "completion_tokens": 1, "task": "gsm8k"}
        asked |= {"source": "known", "example_id": key, "prompt": json.dumps(task.messages(row))}
        asked |= {"prompt_hash": key, "row_hash": key, "group_hash": key}
        service.experience.record([Interaction(**asked, answers=(Answer(0, "x", "stop"),))])
        service.experience.judge([Judgement(f"i{number}", 0, judged=now, reward=1.0)])
    collected = collect_rows(service, "gsm8k", 24)
    capped = collected.counts()["over_cap"]
    assert capped > 5
    assert collected.preview()["set_aside"]["over_cap"] == capped
    learnt = loop.learn(opened, "gsm8k", {"generations": 1})
    report = weigh(opened, learnt.run_id).report
    opened.close()
    said = [line for line in heard.lines if "over_cap: principal: at most 1 of 24 rows" in line]
    assert sum(int(line.split()[2]) for line in said) == capped
    assert report.rows["set_aside"]["over_cap"] == capped
    assert f"{capped} over_cap" in markdown(report, [], "")


def planted_kind(opened):
    return type(opened.population.first())


def belittling(kind):
    """An engine that answers the target wrong for the anchor; log p is its weights'."""

    class Belittling(kind):
        def generate(self, prompts, max_tokens, member=None, noise="normal"):
            answers = super().generate(prompts, max_tokens, member, noise)
            if self._loaded is None or self._loaded.digest != self._theta.anchor.digest:
                return answers
            rows = [self._answers[json.dumps(prompt)] for prompt in prompts]
            return [
                Completion(wrong, 3, "stop") if task == "gsm8k" else answer
                for (task, _, _, wrong), answer in zip(rows, answers, strict=True)
            ]

    return Belittling


def rounding(kind):
    """An engine whose answers change with the number of rows in a batch, as in bfloat16."""

    class Rounding(kind):
        def generate(self, prompts, max_tokens, member=None, noise="normal"):
            answers = super().generate(prompts, max_tokens, member, noise)
            few = len(prompts) < 64
            return [
                replace(answer, text=answer.text + " ") if few and at % 4 == 0 else answer
                for at, answer in enumerate(answers)
            ]

    return Rounding


def stale(kind):
    """An engine that keeps the weights it has when a directory is loaded."""

    class Stale(kind):
        def load(self, directory):
            return Anchor.open(directory).digest

    return Stale


def doubted(opened, population, cold):
    """The session of the same home with another population and other cold engines."""
    started = []

    def start(options):
        started.append(options.model)
        engine = cold(opened.service)
        engine.load(options.model)
        return engine

    engines = Population([lambda: population(opened.service)])
    return Session(opened.service, Silent(), engines, start), started


@pytest.mark.parametrize(
    ("population", "cold", "text"),
    [
        (lambda kind: kind, stale, r"candidate .*: log p differs from a cold engine's by"),
        (belittling, lambda kind: kind, r"anchor .* answers are not a cold engine's"),
    ],
)
def test_what_a_cold_engine_does_not_repeat_is_held(planted, population, cold, text):
    opened = planted("home", gate={"confirm": False})
    kind = planted_kind(opened)
    learnt = loop.learn(opened, "gsm8k")
    opened.close()
    session, _ = doubted(opened, population(kind), cold(kind))
    report = weigh(session, learnt.run_id).report
    session.close()
    assert report.verdict == "hold"
    assert {reason["step"] for reason in report.decisive()} == {"cold"}
    assert any(re.search(text, reason["text"]) for reason in report.decisive())
    assert opened.service.ledger.state(learnt.digest) == "HOLD"


def test_answers_that_change_with_their_batch_are_asked_again_in_it(planted):
    opened = planted("home", gate={"confirm": False})
    kind = planted_kind(opened)
    learnt = loop.learn(opened, "gsm8k")
    opened.close()
    session, _ = doubted(opened, rounding(kind), rounding(kind))
    assert weigh(session, learnt.run_id).report.verdict == "promote"
    session.close()


def test_a_model_is_asked_cold_once(planted):
    opened = planted("home", gate={"confirm": False})
    kind = planted_kind(opened)
    learnt = loop.learn(opened, "gsm8k")
    opened.close()
    for turn in range(2):
        session, started = doubted(opened, kind, kind)
        assert weigh(session, learnt.run_id).report.verdict == "promote"
        session.close()
        both = [opened.service.directory(learnt.digest), opened.service.anchor.directory]
        assert started == ([] if turn else both)


def samples(path):
    return [row for row in read_samples(path) if row["task"] == "gsm8k"]


def test_a_fixed_test_is_never_looked_at_again():
    with pytest.raises(UserError, match="needs sequential"):
        load(None, gate={"extend": 2})


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        ({"population": 1}, "set learner.population to 2 or more"),
        ({"sigma": 1e-12}, r"raise learner.sigma \(now 1e-12\)"),
        ({"sigma": 1e-12, "generations": 2}, "no learning in 2 generations: the members"),
        ({"alpha": 1e-45}, r"lost in rounding; raise learner.alpha \(now 1e-45\)"),
    ],
)
def test_a_round_that_learns_nothing_says_why_and_asks_no_model(planted, learner, message):
    opened = planted("home", tasks={"rows": 20})
    service = opened.service
    champion, states = service.champion(), service.ledger.states()
    learnt = loop.learn(opened, "gsm8k", {"generations": 5} | learner)
    judged = weigh(opened, learnt.run_id)
    assert (learnt.digest, judged.report.verdict, judged.tables) == (champion, "unchanged", {})
    [reason] = judged.report.to_json()["reasons"]
    assert re.search(message, reason)
    assert reason in markdown(judged.report, [], "")
    assert not service.home.evaluations.exists()
    weigh(opened, learnt.run_id)
    [row] = [each for each in service.ledger.history() if each.state == "UNCHANGED"]
    assert (row.why, row.statistics["round"]) == (reason, learnt.run_id)
    assert (service.champion(), service.ledger.states()) == (champion, states)
    assert not act(opened, champion)
    second = loop.learn(opened, "gsm8k", {"generations": 3})
    assert weigh(opened, second.run_id).report.verdict in ("promote", "hold")
    opened.close()
