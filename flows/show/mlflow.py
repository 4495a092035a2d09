"""How a home is drawn in MLflow: runs, metrics, plots, versions and aliases.

Every function can be repeated: what is there already is left or corrected. Only
``flows.show.catch_up`` calls what writes; ``flows.serve.reconcile`` reads, with a bound on time.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from agent.home import locked, write_atomically
from agent.registry import Alias, AnswerTrace, Rows, Version
from flows.round_files import RoundFiles
from flows.service import Service

if TYPE_CHECKING:  # reading aliases does not wait for the plots' libraries
    from flows.learn.evaluate import Who
    from flows.show.report import RoundReport
    from flows.show.review import Moved

T = TypeVar("T")
LOCK_S = 20.0  # longest wait for another process that reads or sets aliases
WAITING = ("PASSED", "HOLD", "AWAIT_REVIEW", "APPROVED")
NUMBERS = ("norm", "step_norm", "predicted_norm", "predicted_norm_l2", "reward_mean", "reward_std")


def within(seconds: float, act: Callable[[], T]) -> T:
    """The result of a call to MLflow, waited for in a thread and only so long.

    A thread, since neither an HTTP server that answers a byte at a time nor a locked database obeys
    a time limit of ours. A late one is left to its own time-outs; its result is dropped.

    Raises:
        TimeoutError: There was no result by then. Whatever ``act`` raises is raised too.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(act())
        except Exception as error:
            errors.append(error)

    # A daemon, so that a process does not wait at its end for a call that is late.
    thread = threading.Thread(target=run, name="MLflow", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"MLflow: no answer within {seconds:g} s")
    return results[0]


def show_plan(service: Service, run_id: str) -> str:
    """The MLflow run of a round, with its parameters."""
    run = service.journal.run(run_id)
    params = {key: value for key, value in run.plan.items() if not isinstance(value, dict | list)}
    params |= {"target": run.target, "anchor": run.anchor_digest, "parent": run.parent_digest}
    return service.registry.start_round(run_id, params, rows_of(service, run_id))


def rows_of(service: Service, run_id: str) -> Rows | None:
    """Hashes and origin of a round's training rows; None for a round replayed from another."""
    plan = service.journal.run(run_id).plan
    rows = RoundFiles(service.home, run_id).rows()
    if not rows or "rows" not in plan:
        return None
    hashes = (hashlib.sha256(json.dumps(row).encode()).hexdigest() for row in rows)
    return Rows(plan["rows_sha256"], tuple(hashes), int(plan["rows"]["from_traffic"]))


def show_generation(
    service: Service, run_id: str, drift: Mapping[str, Any], pace: Mapping[str, float]
) -> None:
    """One generation: a point on every curve of its round, and a nested run.

    Args:
        service: The parts of the home.
        run_id: The round.
        drift: The generation's drift as the journal keeps it.
        pace: Its row of the round's pace; empty where it was not timed.
    """
    metrics = {name: drift[name] for name in (*NUMBERS, "agree") if drift.get(name) is not None}
    metrics |= {f"norm.{layer}": norm for layer, norm in drift["layer_norms"].items()}
    metrics |= {name: value for name, value in pace.items() if name != "generation"}
    mlflow_run = show_plan(service, run_id)
    generation = int(drift["generation"])
    service.registry.log_generation(mlflow_run, generation, metrics, {"anchorage.run": run_id})


def show_round(
    service: Service, report: "RoundReport", tables: Mapping["Who", Sequence[Path]]
) -> None:
    """A judged round: metrics, plots, per-sample tables, verdict, report, and its version.

    The version comes last: it names the report that a reviewer reads.

    Args:
        service: The parts of the home.
        report: The round with the gate's figures.
        tables: Per-sample parquet of "anchor", "champion" and "candidate".
    """
    from flows.show.review import examples, markdown

    mlflow_run, registry = show_plan(service, report.round_id), service.registry
    generations = service.journal.generations(report.round_id)
    drift = [each.drift | {"no_op": each.step.no_op} for each in generations]
    registry.log_metrics(mlflow_run, _accuracies(report) | _divergences(report))
    for path, figure in _plots(report, drift).items():
        registry.log_figure(mlflow_run, figure, path)
    for who, paths in tables.items():
        for table in paths:
            registry.log_file(mlflow_run, table, f"samples/{who}")
    target, priors = _moved(service, report, tables)
    show_answers(service, report, target)
    text = markdown(report, drift, examples(target, priors))
    registry.log_text(mlflow_run, text, "report.md")
    verdict: dict[str, Any] = {"verdict": report.verdict, "reasons": list(report.reasons)}
    verdict |= {"tasks": dict(report.tasks), "shift": dict(report.shift)}
    registry.log_text(mlflow_run, json.dumps(verdict, indent=1), "verdict.json")
    parent = service.journal.run(report.round_id).parent_digest
    if parent != report.digest:  # else its version is the champion's, whose tags stay
        # Last: a version is what makes the run visible to reviewers and may take an alias.
        registry.register(
            mlflow_run,
            service.directory(report.digest),
            digest=report.digest,
            parent=parent,
            verdict=report.verdict,
            description=text,
        )
    registry.end_round(mlflow_run)


def _moved(
    service: Service, report: "RoundReport", tables: Mapping["Who", Sequence[Path]]
) -> tuple[list["Moved"], list["Moved"]]:
    """Rows whose reward changed: of the target against the champion, of priors against the anchor.

    Traffic never judges: these are rows of data sets.
    """
    from flows.show.review import moved_rows

    def gold(sample: Mapping[str, Any]) -> str:
        task = service.tasks.get(sample["task"])
        known = task and task.gold
        return known(json.loads(sample["example"])) if known else ""

    def read(who: "Who", names: Sequence[str]) -> list[dict[str, Any]]:
        return [
            row for path in tables.get(who, ()) for name in names for row in samples(path, name)
        ]

    target, priors = [report.target], sorted(set(report.tasks) - {report.target})
    return (
        moved_rows(read("champion", target), read("candidate", target), gold),
        moved_rows(read("anchor", priors), read("candidate", priors), gold),
    )


def show_answers(service: Service, report: "RoundReport", moved: Sequence["Moved"]) -> None:
    """Rows of the target that were fixed and broken, as an evaluation run of each model."""
    from flows.show.review import TRACED

    rows = [
        row for fixed in (True, False) for row in [m for m in moved if m.fixed is fixed][:TRACED]
    ]
    for who in ("champion", "candidate"):
        answers = []
        for row in rows:
            sample = row.after if who == "candidate" else row.before
            name = f"{sample['task']} {sample['example_id']}"
            change, messages = "fixed" if row.fixed else "broken", json.loads(sample["prompt"])
            said = (sample["completion"] or "", row.gold, float(sample["reward"] or 0))
            answers.append(AnswerTrace(name, change, messages, *said, sample["extracted"]))
        service.registry.log_answers(report.round_id, who, answers)


def show_heads(service: Service, versions: Sequence[Version]) -> list[str]:
    """What to do, at the head of each version's page; the versions whose head changed."""
    from flows.show.review import Standing, what_to_do

    states, champion, changed = service.ledger.states(), service.champion(), []
    for version in versions:
        if version.digest not in states:
            continue  # a version of somebody else's
        standing = Standing(
            version.digest,
            states[version.digest],
            version.verdict,
            served=version.digest == champion,
            manual=service.settings.review.mode == "manual",
            home=str(service.home.root),
            signs="mlflow" in service.settings.projection.consoles,
        )
        if (head := what_to_do(standing)) != version.head:
            service.registry.advise(version, head)
            changed.append(f"version {version.number}: what to do")
    return changed


def _plots(report: "RoundReport", drift: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """matplotlib figures by their path among the run's artifacts."""
    from flows.show import plots

    figures = {"plots/drift.png": plots.drift(drift)}
    if any(row["n"] for row in report.tasks.values()):
        figures["plots/accuracy.png"] = plots.accuracies(report.tasks, "Accuracy by task")
    if report.curve:
        title = f"Round {report.round_id}: {report.target}"
        figures["plots/curve.png"] = plots.curve(report.curve, report.target, title)
    if report.shift:
        means = {
            who: {task: row["kl"] for task, row in tasks.items()}
            for who, tasks in report.shift.items()
        }
        figures["plots/shift.png"] = plots.heat_map(means, "KL(anchor || version), nats a token")
    return figures


def show_origin(service: Service) -> None:
    """The version of the original model, which every later one descends from."""
    service.registry.register(
        None,
        service.origin.directory,
        digest=service.origin.digest,
        parent="",
        verdict="anchor",
        description=f"The original model, {service.origin.parameters:,} parameters.",
    )


def show_aliases(service: Service, answered: str = "") -> None:
    """Set the aliases as the ledger says: champion, previous, anchor, and today's challenger.

    An alias whose digest has no version, or none at all, is taken away. A champion alias that a
    person moved is left alone until reconcile has acted on the move.

    Args:
        service: The parts of the home.
        answered: Number of the version that a person moved the alias to, once that is decided.
    """
    registry, path = service.registry, service.home.aliases_json
    with aliases_lock(service):
        versions = {version.digest for version in registry.versions()}
        champion, present = service.champion(), registry.aliases()
        digests: dict[Alias, str | None] = {
            "champion": champion,
            "previous": service.ledger.previous(),
            "anchor": service.anchor.digest,
            "challenger": challenger(service, versions),
        }
        standing, ours = present.get("champion"), (*set_by_us(service), champion)
        if standing and standing.digest not in ours and standing.number != answered:
            del digests["champion"]  # a person's move
        else:
            # Announced before it is set and confirmed after: after a crash in between, an alias at
            # either digest is known to be ours, and is not taken for a person's move.
            write_atomically(path, json.dumps(ours))
        for alias, digest in digests.items():
            if digest in versions and (alias not in present or present[alias].digest != digest):
                registry.set_alias(alias, str(digest))
            elif digest not in versions and alias in present:
                registry.drop_alias(alias)
        if "champion" in digests:
            write_atomically(path, json.dumps([champion]))


def challenger(service: Service, versions: Collection[str]) -> str | None:
    """The newest candidate, proposed after the champion was, whose verdict or review is open.

    None while it is not among the digests that have a version.
    """
    states = service.ledger.states()
    later = list(states)[1 + list(states).index(service.champion()) :]
    waiting = [digest for digest in later if states[digest] in WAITING]
    return waiting[-1] if waiting and waiting[-1] in versions else None


@dataclass(frozen=True)
class Wishes:
    """What people did in MLflow: where the champion alias is, and what reviewers tagged."""

    moved: Version | None  # None: the champion alias is where this service set it
    reviews: tuple[Version, ...]  # versions with a review tag, whatever it says


def read_wishes(service: Service) -> Wishes:
    """What MLflow says now. The lock keeps our own change of the alias out of the comparison."""
    with aliases_lock(service):
        alias, ours = service.registry.aliases().get("champion"), set_by_us(service)
    moved = None if alias is None or alias.digest in ours else alias
    versions = service.registry.versions()
    return Wishes(moved, tuple(each for each in versions if each.review is not None))


def set_by_us(service: Service) -> list[str]:
    """The digests that the champion alias may stand at because this service set it there."""
    path = service.home.aliases_json
    digests: list[str] = json.loads(path.read_text("utf-8")) if path.is_file() else []
    return digests


def aliases_lock(service: Service) -> AbstractContextManager[None]:
    """One process at a time sets aliases, or compares them with what was set."""
    taken = f"MLflow: another process has been setting aliases for {LOCK_S:.0f} s"
    return locked(service.home.aliases_lock, taken=taken, wait_s=LOCK_S)


def samples(table: Path, task: str) -> list[dict[str, Any]]:
    """The rows of one task in a per-sample parquet."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(table, filters=[("task", "=", task)]).to_pylist()
    return rows


def _accuracies(report: "RoundReport") -> dict[str, float]:
    """accuracy.<task>.<who> for every figure there is."""
    return {
        f"accuracy.{task}.{who}": row[who]
        for task, row in report.tasks.items()
        for who in ("anchor", "champion", "candidate")
        if row[who] is not None
    }


def _divergences(report: "RoundReport") -> dict[str, float]:
    """kl.<task> of the candidate and the ends of its interval, kl.<task>.low and .high."""
    rows = report.shift.get("candidate", {})
    means = {f"kl.{task}": row["kl"] for task, row in rows.items()}
    ends = {f"kl.{task}.{end}": row[end] for task, row in rows.items() for end in ("low", "high")}
    return means | ends
