"""The study in MLflow: read back with MLflow's own client."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.lab.paper.tracking import EXPERIMENT, points, track
from tests.flows.lab.paper.test_report import planted


def test_a_trial_has_a_point_for_every_measurement_and_generation() -> None:
    found = points(planted("es", 1, (0.4, 0.7), (0.9, 0.8)))
    assert [each[1:] for each in found if each[0] == "accuracy.target"] == [(0.4, 0), (0.7, 10)]
    assert [each[1:] for each in found if each[0] == "accuracy.priors"] == [(0.9, 0), (0.8, 10)]
    assert [each[2] for each in found if each[0] == "norm"] == list(range(11))
    assert len(found) == 11 + 2 * (3 + 3 + 3)  # norms; accuracy and KL of three tasks, the means


@pytest.mark.integration
def test_a_parent_run_has_the_figures_and_a_run_a_trial(
    tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    if scale(0, 1) == 0:
        pytest.skip("MLflow's own pages of a study: in the soak")
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "study.md").write_text("## Claims\n")
    results = [planted("es", seed, (0.4, 0.7), (0.9, 0.8)) for seed in (1, 2)]
    for number, each in enumerate(results):
        each |= {"population": 16, "delta": f"hash {number}"}
    client = MlflowClient(tracking_uri=uri)
    client.create_experiment(EXPERIMENT, artifact_location=(tmp_path / "artifacts").as_uri())
    parent = track(results[:1], folder, uri)
    assert track(results, folder, uri) == parent
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"study of m", "t es 1", "t es 2"}
    assert runs["t es 2"].data.tags["mlflow.parentRunId"] == parent
    child = runs["t es 1"].info.run_id
    curve = client.get_metric_history(child, "accuracy.target")
    assert [(point.step, point.value) for point in curve] == [(0, 0.4), (10, 0.7)]
    assert len(client.get_metric_history(child, "norm")) == 11
    assert [file.path for file in client.list_artifacts(parent)] == ["study.md"]
