"""The study in MLflow: a parent run with figures and tables, a run a trial below it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.lab.paper.report import on_target, priors

EXPERIMENT = "anchorage-paper-study"
DIGEST = "anchorage.digest"  # the tag that holds which result a run shows


def track(results: Sequence[Mapping[str, Any]], folder: Path, uri: str) -> str:
    """Log results and the files of ``figures.draw``; the parent run's id.

    The parent run is the model's and is made once; a trial that has its run, with the same delta,
    is not logged again.

    Args:
        results: The trials, of one model.
        folder: What ``figures.draw`` wrote.
        uri: MLflow's tracking URI.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(EXPERIMENT)
    experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT)

    def run(name: str, tags: Mapping[str, str]) -> tuple[str, bool]:
        """The run with these tags, and whether it was made now."""
        named = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        if found := client.search_runs([experiment], named, max_results=1):
            return str(found[0].info.run_id), False
        made = client.create_run(experiment, run_name=name, tags=dict(tags))
        return str(made.info.run_id), True

    model = str(results[0]["trial"]["model"])
    parent, _ = run(f"study of {model}", {"anchorage.model": model, "anchorage.study": "paper"})
    for each in results:
        trial = each["trial"]
        name = f"{trial['target']} {trial['system']} {trial['seed']}"
        tags = {"mlflow.parentRunId": parent, "anchorage.trial": name, DIGEST: str(each["delta"])}
        child, fresh = run(name, tags)
        if fresh:
            for key, value in (*trial.items(), ("population", each["population"])):
                client.log_param(child, key, value)
            now_ms = int(time.time() * 1000)
            own = [Metric(key, value, now_ms, step) for key, value, step in points(each)]
            client.log_batch(child, metrics=own)
            client.set_terminated(child)
    client.log_artifacts(parent, str(folder))
    client.set_terminated(parent)
    return parent


def points(result: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """A trial's curves as (name, value, generation): accuracy and KL by task, tokens, norms."""
    curves: list[tuple[str, float, int]] = []
    for point in result["curve"]:
        values = {f"accuracy.{name}": value for name, value in point["accuracy"].items()}
        values |= {f"kl.{name}": value for name, value in point["kl"].items()}
        values |= {
            "accuracy.target": on_target(result, point),
            "accuracy.priors": priors(result, point),
            "tokens": float(point["tokens"]),
        }
        curves += [(name, value, point["generation"]) for name, value in values.items()]
    return curves + [("norm", row[1], row[0]) for row in result["norms"]]
