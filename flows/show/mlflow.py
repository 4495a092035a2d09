"""The journal, the ledger and the evaluations, shown in MLflow.

A projection can be made again at any time from what the home owns, so MLflow may be down, slow or
wiped without a round noticing; ``flows.show.catch_up`` brings it level.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.home import locked, write_atomically
from agent.registry import Alias, Rows
from flows.service import Service

if TYPE_CHECKING:  # a rollback shows aliases only, and does not wait for the plots' libraries
    from flows.learn.evaluate import Who
    from flows.show.report import RoundReport

LOG = logging.getLogger("anchorage.projection")
WAIT_S = 20.0  # for another process that looks at aliases
WAITING = ("PROMOTE", "HOLD", "AWAIT_REVIEW", "APPROVED")
NUMBERS = ("norm", "step_norm", "predicted_norm", "predicted_norm_l2", "reward_mean", "reward_std")


def attempt(what: str, act: Callable[[], object]) -> bool:
    """Do something to MLflow; a failure is logged and left to the catch-up, never raised."""
    try:
        act()
    except Exception as error:
        LOG.warning("MLflow: %s failed and will be made up for: %s", what, error)
        return False
    return True


def show_plan(service: Service, run_id: str) -> str:
    """The MLflow run of a round, with its parameters."""
    run = service.journal.run(run_id)
    params = {key: value for key, value in run.plan.items() if not isinstance(value, dict | list)}
    params |= {"target": run.target, "anchor": run.anchor_digest, "parent": run.parent_digest}
    return service.registry.start_round(run_id, params, rows_of(service, run_id))


def rows_of(service: Service, run_id: str) -> Rows | None:
    """What is told of a round's training rows; None for one that was replayed from another."""
    path = service.home.run(run_id) / "rows.json"
    plan = service.journal.run(run_id).plan
    if not path.is_file() or "rows" not in plan:
        return None
    rows = json.loads(path.read_text(encoding="utf-8"))
    hashes = (hashlib.sha256(json.dumps(row).encode()).hexdigest() for row in rows)
    return Rows(plan["rows_sha256"], tuple(hashes), int(plan["rows"]["from_traffic"]))


def show_generation(
    service: Service, run_id: str, drift: Mapping[str, Any], pace: Mapping[str, float]
) -> None:
    """One generation's point on every curve, and its nested run."""
    metrics = {name: drift[name] for name in (*NUMBERS, "agree") if drift.get(name) is not None}
    metrics |= {f"norm.{layer}": norm for layer, norm in drift["layer_norms"].items()}
    metrics |= pace
    mlflow_run = show_plan(service, run_id)
    generation = int(drift["generation"])
    service.registry.log_generation(mlflow_run, generation, metrics, {"anchorage.run": run_id})


def show_round(
    service: Service, told: "RoundReport", tables: Mapping["Who", Sequence[Path]]
) -> None:
    """A judged round: metrics, plots, per-sample tables, verdict, report, and its version.

    Args:
        service: The parts of the home.
        told: The round with the gate's figures.
        tables: Per-sample parquet of "anchor", "champion" and "candidate".
    """
    from flows.show import plots, report

    mlflow_run = show_plan(service, told.round_id)
    registry = service.registry
    generations = service.journal.generations(told.round_id)
    drift = [each.drift | {"no_op": each.step.no_op} for each in generations]
    registry.log_metrics(mlflow_run, _accuracies(told))
    registry.log_figure(mlflow_run, plots.drift(drift), "plots/drift.png")
    registry.log_figure(
        mlflow_run, plots.accuracies(told.tasks, "Accuracy by task"), "plots/accuracy.png"
    )
    if told.curve:
        figure = plots.curve(told.curve, told.target, f"Round {told.round_id}: {told.target}")
        registry.log_figure(mlflow_run, figure, "plots/curve.png")
    if told.shift:
        registry.log_metrics(mlflow_run, _divergences(told))
        values = {
            who: {task: row["kl"] for task, row in tasks.items()}
            for who, tasks in told.shift.items()
        }
        figure = plots.heat_map(values, "KL(anchor || version), nats a token")
        registry.log_figure(mlflow_run, figure, "plots/shift.png")
    for who, paths in tables.items():
        for path in paths:
            registry.log_file(mlflow_run, path, f"samples/{who}")
    before = [row for path in tables["champion"] for row in samples(path, told.target)]
    after = [row for path in tables["candidate"] for row in samples(path, told.target)]
    text = report.markdown(told, drift, report.examples(before, after))
    registry.log_text(mlflow_run, text, "report.md")
    verdict = {"verdict": told.verdict, "reasons": list(told.reasons), "tasks": dict(told.tasks)}
    verdict |= {"shift": dict(told.shift)}
    registry.log_text(mlflow_run, json.dumps(verdict, indent=1), "verdict.json")
    parent = service.journal.run(told.round_id).parent_digest
    registry.register(
        mlflow_run,
        service.directory(told.digest),
        digest=told.digest,
        parent=parent,
        verdict=told.verdict,
        description=text,
    )
    registry.end_round(mlflow_run)


def show_anchor(service: Service) -> None:
    """The original model's version, so that every later one has a beginning to be seen."""
    service.registry.register(
        None,
        service.origin.directory,
        digest=service.origin.digest,
        parent="",
        verdict="anchor",
        description=f"The original model, {service.origin.parameters:,} parameters.",
    )
    show_aliases(service)


def show_aliases(service: Service) -> None:
    """Aliases as the ledger says: champion, previous, anchor, and the challenger of now.

    One that names nobody any more, because its challenger was decided on, is taken away.
    The champion alias is announced in a file before it is set and confirmed after, so that a
    person's move can be told from our own, also after a crash between the two (``shown``).
    """
    with aliases_still(service):
        wanted: dict[Alias, str | None] = {
            "champion": service.champion(),
            "previous": service.ledger.previous(),
            "anchor": service.anchor.digest,
            "challenger": challenger(service),
        }
        path, champion = service.home.aliases_json, str(wanted["champion"])
        set_now = service.registry.aliases()
        write_atomically(path, json.dumps([*shown(service), champion]))
        for alias, digest in wanted.items():
            if digest is None and alias in set_now:
                service.registry.drop_alias(alias)
            elif digest is not None and (alias not in set_now or set_now[alias].digest != digest):
                service.registry.set_alias(alias, digest)
        write_atomically(path, json.dumps([champion]))


def challenger(service: Service) -> str | None:
    """The newest candidate, proposed after the champion was, whose verdict or review is open.

    None while its version is not shown yet.
    """
    states = service.ledger.states()
    later = list(states)[1 + list(states).index(service.champion()) :]
    waiting = [digest for digest in later if states[digest] in WAITING]
    return waiting[-1] if waiting and service.registry.version(waiting[-1]) else None


def shown(service: Service) -> list[str]:
    """The digests that this service itself may have pointed the champion alias at last."""
    path = service.home.aliases_json
    found: list[str] = json.loads(path.read_text("utf-8")) if path.is_file() else []
    return found


def aliases_still(service: Service) -> AbstractContextManager[None]:
    """Held by whoever sets aliases, or compares them with what was set: one at a time."""
    taken = f"MLflow: another process has been setting aliases for {WAIT_S:.0f} s"
    return locked(service.home.aliases_lock, taken=taken, wait_s=WAIT_S)


def samples(table: Path, task: str) -> list[dict[str, Any]]:
    """The rows of one task in a per-sample parquet."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(table, filters=[("task", "=", task)]).to_pylist()
    return rows


def _accuracies(told: "RoundReport") -> dict[str, float]:
    """accuracy.<task>.<who> for every figure there is."""
    return {
        f"accuracy.{task}.{who}": row[who]
        for task, row in told.tasks.items()
        for who in ("anchor", "champion", "candidate")
        if row[who] is not None
    }


def _divergences(told: "RoundReport") -> dict[str, float]:
    """kl.<task> of the candidate and the ends of its interval, kl.<task>.low and .high."""
    rows = told.shift.get("candidate", {})
    means = {f"kl.{task}": row["kl"] for task, row in rows.items()}
    ends = {f"kl.{task}.{end}": row[end] for task, row in rows.items() for end in ("low", "high")}
    return means | ends
