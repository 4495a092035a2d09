"""A study: targets in turn, a kill anywhere, what was gained stays, the anchor stays the first."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from agent.errors import UserError
from agent.store.weights import Anchor
from flows.lab.study import StudyPlan, study, study_now
from flows.learn.weigh import gate_rules
from flows.service import Service
from flows.show.catch_up import catch_up
from flows.show.terminal import Advance, Silent

pytestmark = pytest.mark.proof

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = pytest.mark.filterwarnings(
    "ignore:.*(type hint|deprecat):UserWarning", "ignore::FutureWarning"
)


class Killed(BaseException):
    """As a signal is: nothing in between catches it."""


class Killer(Silent):
    """Kills what tells it about its ``moment``-th step."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def track(self, what: str, total: int) -> Advance:
        return lambda done, note="": self._step()

    def _step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


@dataclass(frozen=True)
class Studied:
    """A finished study, shown in MLflow."""

    told: dict[str, Any]
    service: Service


@pytest.fixture(scope="module")
def studied(planted_in, scale, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studied]:
    """Three planted rounds; in full, twenty on the embedded model with vLLM."""
    home = tmp_path_factory.mktemp("study") / "home"
    if scale(0, 1):
        plan = StudyPlan(20, ("gsm8k", "proofwriter"), {})
        yield Studied(study_now(home, None, plan, None, Silent()), Service.at(home))
    else:
        opened = planted_in(home, shown=True)
        told = study(opened, StudyPlan(3, ("gsm8k", "countdown"), {}))
        catch_up(opened.service)
        yield Studied(told, opened.service)
        opened.close()


@pytest.mark.integration
@QUIET
def test_every_prior_keeps_its_margin_against_the_anchor(studied: Studied) -> None:
    told = studied.told
    targets = [row["target"] for row in told["rounds"]]
    assert targets == (targets[:2] * len(targets))[: len(targets)]
    assert len(set(targets)) == 2
    assert told["promoted"] >= 2
    assert told["champion"] != told["anchor"]
    assert told["within"]
    assert told["final"]["gsm8k"]["difference"] > 0.1
    assert Path(told["plot"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.integration
def test_what_an_earlier_target_gained_is_kept_and_the_anchor_stays(studied: Studied) -> None:
    told, service = studied.told, studied.service
    runs = service.journal.runs()
    promoted = [row for row in told["rounds"] if row["promoted"]]
    later = next(row for row in promoted if row["target"] != promoted[0]["target"])
    reasons = reasons_of(service, later["digest"])
    kept = next(reason for reason in reasons if reason["step"] == "retained")
    assert (kept["task"], kept["baseline"]) == (promoted[0]["target"], "champion")
    assert {reason["baseline"] for reason in reasons if reason["step"] == "prior"} == {"anchor"}
    assert (
        promoted[0]["target"] in gate_rules(service, service.journal.run(later["round"])).retained
    )
    assert {run.anchor_digest for run in runs} == {told["anchor"]} == {service.anchor.digest}
    first, again = (rows_of(service, told["rounds"][place]["round"]) for place in (0, 2))
    assert len(first) == len(again) > 0
    assert not set(first) & set(again), "rounds on one target take its rows in turn"


@pytest.mark.integration
@QUIET
def test_mlflow_shows_a_run_a_round_and_a_version_a_candidate(studied: Studied) -> None:
    import mlflow

    told, service = studied.told, studied.service
    client = mlflow.MlflowClient(service.registry.uri)
    row = next(row for row in told["rounds"] if row["promoted"])
    experiment = client.get_experiment_by_name(service.settings.model.name)
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    run, planned = runs[f"round {row['round']}"], service.journal.run(row["round"])
    assert run.data.params["sigma"] == str(planned.plan["sigma"])
    assert run.data.params["parent"] == planned.parent_digest
    norms = [m.value for m in client.get_metric_history(run.info.run_id, "norm")]
    drift = [each.drift["norm"] for each in service.journal.generations(row["round"])]
    assert norms == pytest.approx(drift)
    assert run.data.metrics[f"accuracy.{row['target']}.candidate"] == row["after"]
    files = {f.path for name in ("", "plots") for f in client.list_artifacts(run.info.run_id, name)}
    assert files >= {"report.md", "verdict.json", "plots/drift.png", "plots/accuracy.png"}
    report = client.download_artifacts(run.info.run_id, "report.md")
    assert f"**Did it learn?** Yes. {row['target']}" in Path(report).read_text()
    version = next(v for v in service.registry.versions() if v.digest == row["digest"])
    registered = client.get_model_version(service.registry.name, version.number)
    assert registered.tags["anchorage.parent"] == planned.parent_digest
    assert registered.tags["anchorage.verdict"] == "promote"
    assert registered.description.startswith("## What to do")
    assert f"# Round {row['round']}: promote" in registered.description
    aliases = {alias: version.digest for alias, version in service.registry.aliases().items()}
    assert aliases["champion"] == told["champion"]
    assert aliases["anchor"] == told["anchor"]
    assert aliases["previous"] == service.ledger.previous()
    loaded = mlflow.transformers.load_model(f"models:/{service.registry.name}@champion")
    weights = dict(Anchor.open(service.directory(told["champion"])).tensors())
    held = loaded.model.state_dict()
    assert all(torch.equal(held[name].cpu(), weights[name]) for name in weights)


@pytest.mark.integration
def test_a_reviewer_finds_all_of_it_in_the_ui(studied: Studied, tmp_path: Path) -> None:
    """MLflow's pages in headless Chromium: version, tags, aliases, plots, the report."""
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip("no Chromium on this machine (.ci/run installs it)")
    told, service = studied.told, studied.service
    row = [row for row in told["rounds"] if row["promoted"]][-1]
    version = next(v for v in service.registry.versions() if v.digest == row["digest"])
    name = service.registry.name
    with served(service.home.mlflow) as url:
        models = look(f"{url}/#/models/{name}")
        for words in (row["digest"], "anchorage.verdict : promote", "@ champion", "@ anchor"):
            assert words in models
        page = look(f"{url}/#/models/{name}/versions/{version.number}")
        assert f"Version {version.number}" in page
        assert "What to do" in page
        assert "Fixed: " in page
        answers = look(f"{url}/#/experiments/1/evaluation-runs")
        assert f"{row['round']} candidate" in answers
        assert f"Round {row['round']}: promote Did it learn? Yes. {row['target']}" in page
        plots = f"runs/{version.run_id}/artifacts/plots/accuracy.png"
        picture = tmp_path / "run.png"
        run = look(f"{url}/#/experiments/1/{plots}", "--png", str(picture))
        for words in (f"round {row['round']}", "accuracy.png", "drift.png", "verdict.json"):
            assert words in run
        assert picture.read_bytes().startswith(b"\x89PNG")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """MLflow's server on a store, as the stack starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = (f"--backend-store-uri=sqlite:///{folder / 'mlflow.db'}", "--workers=1")
    command = [sys.executable, "-m", "mlflow", "server", f"--port={port}", *store]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | quiet, start_new_session=True
        )
    try:
        for _ in range(600):
            with suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def look(*arguments: str) -> str:
    """The words of a page, by the tool that a reader can run."""
    tool = Path(__file__).parents[2] / "tools" / "look.py"
    command = [sys.executable, str(tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def rows_of(service, run_id):
    rows = json.loads((service.home.run(run_id) / "rows.json").read_text())
    return [each["row"]["question"] for each in rows]


def reasons_of(service, digest):
    (entry,) = [each for each in service.ledger.of(digest) if each.state == "PASSED"]
    return entry.statistics["reasons"]


def test_a_killed_study_goes_on_to_the_same_champion(planted) -> None:
    """Killed while it learns, while it asks, and between promotion and the next round."""
    plan = StudyPlan(2, ("gsm8k", "countdown"), {})
    whole = planted("whole")
    wanted = study(whole, plan)
    whole.close()
    for moment in (20, 14, 9):
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
    plan = StudyPlan(1, ("gsm8k",), {})
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
        study(opened, StudyPlan(1, targets, {}))
    opened.close()
