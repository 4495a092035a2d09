"""A study: targets in turn, a kill anywhere, what was gained stays, the anchor stays the first."""

import json
from pathlib import Path

import pytest
import torch

from agent.errors import UserError
from agent.store.weights import Anchor
from flows.judge import gate_settings
from flows.progress import Advance, Silent
from flows.study import Plan, study, study_now


class Killed(BaseException):
    """As a signal is: nothing in between catches it."""


class Killer(Silent):
    """Kills what tells it about its ``moment``-th step."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def track(self, what: str, total: int) -> Advance:
        return lambda done: self._step()

    def _step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:.*(type hint|deprecat):UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_targets_in_turn_keep_what_earlier_ones_gained(planted, scale, tmp_path: Path) -> None:
    """Three planted rounds; in full, twenty on the embedded model with vLLM."""
    if scale(0, 1):
        plan = Plan(20, ("gsm8k", "proofwriter"), {})
        told = study_now(tmp_path / "real", None, plan, None, Silent())
    else:
        opened = planted(shown=True)
        told = study(opened, Plan(3, ("gsm8k", "countdown"), {}))
        service = opened.service
        later = [run for run in service.journal.runs() if run.target == "countdown"]
        assert gate_settings(service, later[-1]).retained == {"gsm8k"}
        judged = {r["step"]: r for r in reasons_of(service, told["rounds"][1]["digest"])}
        assert judged["retained"]["task"] == "gsm8k"
        assert (judged["retained"]["baseline"], judged["prior"]["baseline"]) == (
            "champion",
            "anchor",
        )
        assert {run.anchor_digest for run in service.journal.runs()} == {told["anchor"]}
        assert service.ledger.anchor() == told["anchor"]
        first, again = (rows_of(service, told["rounds"][place]["round"]) for place in (0, 2))
        assert len(first) == len(again) == 24
        assert not set(first) & set(again), "rounds on one target take its rows in turn"
        shown(service, told)
        opened.close()
    targets = [row["target"] for row in told["rounds"]]
    assert targets == (targets[:2] * len(targets))[: len(targets)]
    assert len(set(targets)) == 2
    assert told["promoted"] >= 2
    assert told["champion"] != told["anchor"]
    assert told["within"]
    assert told["final"]["gsm8k"]["difference"] > 0.1
    assert Path(told["plot"]).read_bytes().startswith(b"\x89PNG")


def shown(service, told):
    """What a reviewer finds in MLflow: a run a round, a version a candidate, aliases, weights."""
    import mlflow

    client = mlflow.MlflowClient(service.registry.uri)
    row = told["rounds"][1]
    experiment = client.get_experiment_by_name(service.settings.model.name)
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    run = runs[f"round {row['round']}"]
    params = service.journal.run(row["round"]).plan
    assert run.data.params["sigma"] == str(params["sigma"])
    assert run.data.params["parent"] == told["rounds"][0]["digest"]
    norms = [m.value for m in client.get_metric_history(run.info.run_id, "norm")]
    drift = [each.drift["norm"] for each in service.journal.generations(row["round"])]
    assert norms == pytest.approx(drift)
    assert run.data.metrics["accuracy.countdown.candidate"] == row["after"]
    files = {f.path for name in ("", "plots") for f in client.list_artifacts(run.info.run_id, name)}
    assert files >= {"report.md", "verdict.json", "plots/drift.png", "plots/accuracy.png"}
    report = client.download_artifacts(run.info.run_id, "report.md")
    assert "**Did it learn?** Yes. countdown" in Path(report).read_text()
    version = next(v for v in service.registry.versions() if v.digest == row["digest"])
    registered = client.get_model_version(service.registry.name, version.number)
    assert registered.tags["anchorage.parent"] == told["rounds"][0]["digest"]
    assert registered.tags["anchorage.verdict"] == "promote"
    assert registered.description.startswith(f"# Round {row['round']}: promote")
    aliases = service.registry.aliases()
    assert aliases["champion"] == told["champion"]
    assert aliases["anchor"] == told["anchor"]
    assert aliases["previous"] == service.ledger.previous()
    loaded = mlflow.transformers.load_model(f"models:/{service.registry.name}@champion")
    weights = dict(Anchor.open(service.directory(told["champion"])).tensors())
    held = loaded.model.state_dict()
    assert all(torch.equal(held[name].cpu(), weights[name]) for name in weights)


def rows_of(service, run_id):
    rows = json.loads((service.home.runs / run_id / "rows.json").read_text())
    return [row["question"] for row in rows]


def reasons_of(service, digest):
    (entry,) = [each for each in service.ledger.of(digest) if each.state == "PROMOTE"]
    return entry.statistics["reasons"]


def test_a_killed_study_goes_on_to_the_same_champion(planted) -> None:
    """Killed while it learns, while it asks, and between promotion and the next round."""
    plan = Plan(2, ("gsm8k", "countdown"), {})
    whole = planted("whole")
    wanted = study(whole, plan)
    whole.close()
    for moment in (3, 6, 9):
        opened = planted("killed", Killer(moment))
        with pytest.raises(Killed):
            study(opened, plan)
        opened.close()
    last = planted("killed")
    told = study(last, plan)
    asked_again = study(last, plan)
    last.close()
    for key in ("rounds", "final", "champion", "promoted"):
        assert told[key] == wanted[key]
        assert asked_again[key] == wanted[key]
    assert wanted["promoted"] == 2


def test_an_interrupted_swap_is_finished(planted) -> None:
    """The intent was written, the version was not: promoted again, not lost."""
    plan = Plan(1, ("gsm8k",), {})
    opened = planted()
    service = opened.service
    wanted = study(opened, plan)["champion"]
    service.record(wanted, "ROLLED_BACK", "a person went back")
    assert study(opened, plan)["champion"] == service.anchor.digest, "a person's word stays"
    service.record(wanted, "SWAP_INTENT", "as a kill leaves it")
    assert study(opened, plan)["champion"] == wanted
    opened.close()


@pytest.mark.parametrize("targets", [(), ("piqa",), ("unknown",)])
def test_targets_that_cannot_be_are_refused(planted, targets) -> None:
    opened = planted()
    with pytest.raises(UserError, match=r"target|task"):
        study(opened, Plan(1, targets, {}))
    opened.close()
