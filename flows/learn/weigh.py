"""A candidate before the gate: evaluated beside anchor and champion, judged, written down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent.population.pool import Population
from agent.store.journal import Run
from evaluators.gate import Decision, GateRules, Sample, Tables, decide
from evaluators.runner import read_samples
from evaluators.summary import summaries
from flows.commands.gate_files import read_samples as gate_samples
from flows.learn.curve import Point, learner_share
from flows.learn.divergence import Shift, shift
from flows.learn.evaluate import Questions, Who, first_stage, more_rows, sealed_stage, tables
from flows.service import Service
from flows.show.progress import Reporter
from flows.show.report import RoundReport

STATES = {"promote": "PROMOTE", "hold": "HOLD", "reject": "REJECT"}


@dataclass(frozen=True)
class Judged:
    """The verdict on one round, and the per-sample tables of the open rows it rests on."""

    report: RoundReport
    tables: Mapping[Who, Sequence[Path]]


@dataclass(frozen=True)
class Open:
    """What was asked in the open so far, look by look, and the tables of the answers."""

    asked: tuple[Questions, ...]
    paths: tuple[Mapping[Who, Path], ...]

    def by_model(self) -> dict[Who, tuple[Path, ...]]:
        """Every model's tables, the first look first."""
        return {who: tuple(paths[who] for paths in self.paths) for who in self.paths[0]}

    def more(self, asked: Questions, paths: Mapping[Who, Path]) -> "Open":
        """One look more."""
        return Open((*self.asked, asked), (*self.paths, paths))


def judge(
    service: Service,
    population: Population,
    run_id: str,
    progress: Reporter,
    curve: tuple[Point, ...] = (),
    *,
    serve: bool = False,
) -> Judged:
    """Evaluate a finished round's candidate, pass the gate, write EVALUATED and the verdict.

    The sealed draw is asked only of a candidate that passed the first stage. ``serve``: the caller
    is about to serve one that passes; the verdict says so, for whoever finds it left behind.
    """
    run = service.journal.run(run_id)
    digest = str(run.digest)
    champion = run.parent_digest
    priors = service.priors(run.target)
    digests: dict[Who, str] = {
        "candidate": digest,
        "champion": champion,
        "anchor": run.anchor_digest,
    }
    names = [run.target, *priors]
    settings = gate_settings(service, run)
    first = first_stage(service, names)
    seen = Open((first,), (tables(service, population, digests, first, progress),))
    decision = decide(_tables(seen, digests), run.target, settings)
    looks: list[dict[str, Any]] = []
    while len(looks) < service.settings.gate.extend and _undecided(decision):
        more = more_rows(service, names, len(looks) + 1)
        if not more.rows:
            break
        looks.append(_look(decision))
        progress.say(f"look {len(looks)}: a prior task is undecided, more rows are asked")
        seen = seen.more(more, tables(service, population, digests, more, progress))
        decision = decide(_tables(seen, digests), run.target, settings)
    if decision.verdict == "promote" and service.settings.gate.confirm:
        sealed = sealed_stage(service, priors, run_id, digest)
        kept: dict[Who, str] = dict(digests)
        if not settings.retained:
            del kept["champion"]
        drawn = Open((sealed,), (tables(service, population, kept, sealed, progress),))
        decision = decide(
            _tables(seen, digests),
            run.target,
            replace(settings, confirmation=sealed.uses),
            _tables(drawn, kept),
        )
    moved = _shifts(service, population, names, digests, progress)
    report = _report(service, run, decision, seen.by_model(), curve, moved)
    _write(service, report, looks, serve)
    return Judged(report, seen.by_model())


def _undecided(decision: Decision) -> bool:
    """Held, and some prior task could be told apart by more rows."""
    steps = {reason.step for reason in decision.decisive()}
    return decision.verdict == "hold" and bool(steps & {"prior", "retained", "pooled"})


def _look(decision: Decision) -> dict[str, Any]:
    """What a look that was not the last one saw."""
    rows = {task: row["n"] for task, row in decision.tasks.items()}
    return {"rows": rows, "undecided": [reason.text for reason in decision.decisive()]}


def gate_settings(service: Service, run: Run) -> GateRules:
    """The gate's settings: levels from the settings, special tasks from what is known of them."""
    return GateRules.of(
        service.settings.gate,
        zero_tolerance=frozenset(t.name for t in service.tasks.values() if t.zero_tolerance),
        retained=frozenset(_earlier_targets(service) - {run.target}),
    )


def _shifts(
    service: Service,
    population: Population,
    tasks: Sequence[str],
    digests: Mapping[Who, str],
    progress: Reporter,
) -> dict[str, Shift]:
    """KL to the anchor of the candidate, and of the champion where it is not the anchor."""
    if not service.settings.tasks.kl_rows:
        return {}
    asked: list[Who] = ["candidate"]
    if digests["champion"] != service.anchor.digest:
        asked.append("champion")
    return {who: shift(service, population, tasks, digests[who], progress) for who in asked}


def _earlier_targets(service: Service) -> set[str]:
    """Targets of promoted rounds on the way to the champion: their gains are kept as well."""
    champion = service.champion()
    if champion == service.anchor.digest:
        return set()
    return {service.journal.run(each).target for each in service.journal.lineage(champion)}


def _tables(seen: Open, digests: Mapping[Who, str]) -> Tables:
    """The gate's input, with what each table must hold.

    Rows of all looks are one table of one harness, but for a row of another harness than asked.
    """
    whole = "+".join(asked.harness for asked in seen.asked)
    read: dict[str, tuple[Sample, ...]] = {}
    expected: dict[str, frozenset[str]] = {}
    for asked, paths in zip(seen.asked, seen.paths, strict=True):
        for task, rows in asked.rows:
            ids = frozenset(task.key(row) for row in rows)
            expected[task.name] = expected.get(task.name, frozenset()) | ids
        for who, path in paths.items():
            found = [
                replace(sample, harness_hash=whole)
                if sample.harness_hash == asked.harness
                else sample
                for sample in gate_samples(path)
            ]
            read[who] = (*read.get(who, ()), *found)
    return Tables(
        anchor=read["anchor"],
        champion=read.get("champion"),
        candidate=read["candidate"],
        expected=expected,
        digests={who: digest for who, digest in digests.items()},  # noqa: C416 wider key type
    )


def _report(
    service: Service,
    run: Run,
    decision: Decision,
    paths: Mapping[Who, Sequence[Path]],
    curve: tuple[Point, ...],
    moved: Mapping[str, Shift],
) -> RoundReport:
    told = decision.to_json()
    measured = {
        who: summaries(row for path in mine for row in read_samples(path))
        for who, mine in paths.items()
    }
    for task, row in told["tasks"].items():
        row["interval"] = {
            who: (found[task].low, found[task].high) for who, found in measured.items()
        }
    return RoundReport(
        round_id=run.run_id,
        target=run.target,
        generations=service.journal.next_generation(run.run_id),
        stopped=str(run.reason),
        digest=str(run.digest),
        verdict=decision.verdict,
        reasons=told["reasons"],
        tasks=told["tasks"],
        curve=curve,
        learner_share=learner_share(service, run.run_id),
        shift=moved,
        rows=run.plan.get("rows", {}),
    )


def _write(
    service: Service, report: RoundReport, looks: Sequence[Mapping[str, Any]], serve: bool
) -> None:
    """EVALUATED and the verdict, each once however often a round is judged."""
    figures = {
        task: {key: value for key, value in row.items() if key != "interval"}
        for task, row in report.tasks.items()
    }
    statistics: dict[str, Any] = {"round": report.round_id, "target": report.target}
    statistics |= {"tasks": figures, "earlier_looks": list(looks)}
    extended = f", rows added {len(looks)} times" if looks else ""
    state = STATES[report.verdict]
    if service.ledger.state(report.digest) in (state, "CHAMPION", "ANCHOR"):
        return
    asked = f"first stage{extended} and, if passed, sealed draw"
    service.record(report.digest, "EVALUATED", asked, statistics=statistics)
    why = "; ".join(str(reason["text"]) for reason in report.decisive())
    verdict = {"reasons": list(report.reasons), "serve": serve}
    service.record(report.digest, state, why, statistics=verdict)
