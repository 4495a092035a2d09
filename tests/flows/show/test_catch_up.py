"""What MLflow missed: learnt and judged without it, shown once it is back, and only once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.home import read_sealed, write_sealed
from agent.registry import ANSWERS
from flows.commands.runs import replay_now
from flows.learn import loop
from flows.learn.weigh import weigh
from flows.serve import swaps
from flows.serve.promote import move_anchor, promote
from flows.show.catch_up import behind, catch_up

pytestmark = pytest.mark.proof
ROOT = Path(__file__).parents[3]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")  # logging a model warns about its own signature
def test_a_round_without_mlflow_is_shown_when_it_is_back(planted: Any) -> None:
    away = planted()
    learnt = loop.learn(away, "gsm8k", {"generations": 2})
    weigh(away, learnt.run_id)
    back = planted(shown=True)
    catch_up(back.service)
    registry = back.service.registry
    run = registry._client.get_run(registry.start_round(learnt.run_id, {}))
    points = registry._client.get_metric_history(run.info.run_id, "norm")
    assert [point.step for point in points] == [0, 1]
    assert {"accuracy.gsm8k.candidate"} <= set(run.data.metrics)
    version = registry.version(learnt.digest)
    assert version is not None
    assert version.state == back.service.ledger.state(learnt.digest)
    assert registry.aliases()["champion"].digest == back.service.origin.digest
    assert version.head.startswith("## What to do")
    assert f"# Round {learnt.run_id}" in version.description
    for who in ("champion", "candidate"):  # fixed and broken rows as traces of an evaluation run
        named = f"tags.`{ANSWERS}` = '{learnt.run_id} {who}'"
        (answers,) = registry._client.search_runs([registry._experiment], named)
        traces = registry._client.search_traces(
            [registry._experiment], f"attributes.run_id = '{answers.info.run_id}'"
        )
        assert 0 < len(traces) <= 10
        found = {each.name: each.value for each in traces[0].info.assessments}
        fixed = traces[0].info.tags["change"] == "fixed"
        assert found["reward"] == float(fixed is (who == "candidate"))
        assert found["expected_response"]
    assert catch_up(back.service) == []
    (back.service.home.runs / learnt.run_id / "shown.json").unlink()  # as if it had died there
    assert len(catch_up(back.service)) == 3 + 1  # and the head of the page, written again
    assert len(registry._client.get_metric_history(run.info.run_id, "norm")) == 2
    assert len([each for each in registry.versions() if each.digest == learnt.digest]) == 1
    shown = back.service.home.shown_json  # as if the last pass had been into another MLflow
    write_sealed(shown, read_sealed(shown) | {"server": "http://another"})
    assert behind(back.service)
    assert f"round {learnt.run_id}" in catch_up(back.service)
    assert len(registry._client.get_metric_history(run.info.run_id, "norm")) == 2
    assert (catch_up(back.service), behind(back.service)) == ([], False)
    read = notebook(registry.uri)
    assert f"round {learnt.run_id} FINISHED" in read
    assert "verdict: promote" in read
    assert re.search(r"gsm8k: \d+ fixed, 0 broken of \d+", read)
    assert f"{learnt.digest[:12]} promote" in read
    assert "## What to do" in read


def notebook(uri: str) -> str:
    """What the cells of docs/round.ipynb print one after another, on this MLflow."""
    cells = json.loads((ROOT / "docs" / "round.ipynb").read_text("utf-8"))["cells"]
    code = "\n".join("".join(each["source"]) for each in cells if each["cell_type"] == "code")
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"MLFLOW_TRACKING_URI": uri},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-2000:]
    return told.stdout


def test_rounds_after_a_move_are_tied_to_the_new_anchor_and_all_replay(planted: Any) -> None:
    opened = planted(review={"allow_anchor_move": True})
    service = opened.service
    first = loop.learn(opened, "gsm8k")
    assert weigh(opened, first.run_id).report.verdict == "promote"
    promote(opened, first.digest)
    service.record(first.digest, "CHAMPION", "a test")
    move_anchor(opened, first.digest, "a test")
    second = loop.learn(opened, "countdown")
    judged = weigh(opened, second.run_id)
    assert service.journal.run(second.run_id).anchor_digest == first.digest
    assert judged.tables["anchor"][0].parent.name == first.digest
    for made in (first, second):
        assert replay_now(service.home.root, made.run_id, False)["digest"] == made.digest
    swaps.rollback(opened, service.find("origin"), "a test")
    third = loop.learn(opened, "gsm8k", {"generations": 1})
    assert service.journal.run(third.run_id).anchor_digest == service.origin.digest
    opened.close()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")  # logging a model warns about its own signature
def test_a_round_that_learnt_nothing_leaves_the_champions_version_as_it_was(planted: Any) -> None:
    opened = planted(shown=True)
    service, registry = opened.service, opened.service.registry
    catch_up(service)
    before, aliases = registry.versions(), registry.aliases()
    learnt = loop.learn(opened, "gsm8k", {"population": 1})
    weigh(opened, learnt.run_id)
    assert f"round {learnt.run_id}" in catch_up(service)
    assert (registry.versions(), registry.aliases()) == (before, aliases)
    run = registry.start_round(learnt.run_id, {})
    path = registry._client.download_artifacts(run, "report.md")
    assert "set learner.population to 2 or more" in Path(path).read_text()
    assert catch_up(service) == []
    opened.close()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_a_round_without_a_step_leaves_the_champions_version_as_it_was(planted: Any) -> None:
    opened = planted(shown=True)
    service = opened.service
    catch_up(service)

    def shown() -> Any:
        version = service.registry.version(service.champion())
        assert version is not None
        name, client = service.settings.model.name, service.registry._client
        model = client.get_model_version(name, version.number)
        return dict(model.tags), model.description, model.aliases

    before = shown()
    learnt = loop.learn(opened, "gsm8k", {"population": 1, "generations": 4})
    assert weigh(opened, learnt.run_id).report.verdict == "unchanged"
    assert f"round {learnt.run_id}" in catch_up(service)
    assert shown() == before
    opened.close()
