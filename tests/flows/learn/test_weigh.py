"""The gate in the loop: more rows while a prior is undecided, each look on record."""

import pytest

from agent.config import load
from agent.errors import UserError
from evaluators.runner import read_samples
from flows.learn import loop
from flows.learn.collect import evaluation_pool
from flows.learn.weigh import weigh

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
    assert looks[0]["undecided"] == [reason["text"] for reason in held.decisive()]
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


def samples(path):
    return [row for row in read_samples(path) if row["task"] == "gsm8k"]


def test_a_fixed_test_is_never_looked_at_again():
    with pytest.raises(UserError, match="needs sequential"):
        load(None, gate={"extend": 2})
