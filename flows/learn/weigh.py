"""A candidate's evaluation beside champion and anchor, the gate's decision, and the verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from agent.learner.drift import Drift, falls, idle
from agent.population.pool import Population
from agent.store.journal import Run
from agent.store.ledger import UNCHANGED
from evaluators.gate import Decision, GateRules, Sample, Tables, decide, withheld
from evaluators.runner import read_samples
from evaluators.summary import gain, summaries
from flows.commands.gate_files import read_samples as gate_samples
from flows.learn.curve import learner_share
from flows.learn.divergence import Shift, shift
from flows.learn.evaluate import (
    Questions,
    Who,
    against_cold,
    first_stage,
    more_rows,
    sealed_stage,
    tables,
)
from flows.round_files import RoundFiles
from flows.serve.swaps import cold_engine
from flows.service import Service
from flows.session import Session
from flows.show.report import RoundReport
from flows.show.terminal import Reporter

STATES = {"promote": "PASSED", "hold": "HOLD", "reject": "REJECT"}  # verdict -> ledger state


@dataclass(frozen=True)
class Judged:
    """The report of one round, and the per-sample tables of the open rows behind it."""

    report: RoundReport
    tables: Mapping[Who, Sequence[Path]]


@dataclass(frozen=True)
class Looks:
    """Open evaluation rows, look by look, with one table of answers a model and look."""

    questions: tuple[Questions, ...]
    paths: tuple[Mapping[Who, Path], ...]
    undecided: tuple[Mapping[str, Any], ...] = ()  # the open findings of each look but the last

    def by_model(self) -> dict[Who, tuple[Path, ...]]:
        """Every model's tables, the first look first."""
        return {who: tuple(paths[who] for paths in self.paths) for who in self.paths[0]}


def weigh(session: Session, run_id: str, *, serve: bool = False) -> Judged:
    """Evaluate the candidate of a finished round, pass it through the gate, record the verdict.

    Open rows come first; while a prior task is undecided, up to ``gate.extend`` further looks add
    rows. The sealed draw is evaluated only for a candidate that passed the open rows, and cold
    engines only where the verdict would be promote: answers that they do not repeat are a hold.

    Args:
        session: The parts of the home, and its engines.
        run_id: The round.
        serve: The caller serves a candidate that passes. The verdict says so, and reconcile
            carries it out if the caller ends first.
    """
    service, run = session.service, session.service.journal.run(run_id)
    if run.digest == run.parent_digest:
        return _unchanged(session, run)
    digests: dict[Who, str] = {
        "candidate": str(run.digest),
        "champion": run.parent_digest,
        "anchor": run.anchor_digest,
    }
    rules = gate_rules(service, run)
    looks, decision = _open_stage(session, run, digests, rules)
    if decision.verdict == "promote" and service.settings.gate.confirm:
        decision = _confirmed(session, run, digests, rules, looks)
    if decision.verdict == "promote":
        session.progress.say("a sample of the answers is asked again of cold engines")
        cold = partial(cold_engine, session)
        answers = looks.questions[0], looks.paths[0]
        findings = against_cold(service, session.population, cold, digests, *answers)
        decision = withheld(decision, findings)
    names = [run.target, *service.priors(run.target)]
    moved = _shifts(service, session.population, names, digests, session.progress)
    report = _report(service, run, decision, looks.by_model(), moved)
    # The report before the ledger: a verdict always has its report, whatever ends this process.
    RoundFiles(service.home, run_id).write_judged(
        asdict(report),
        {who: [str(path) for path in paths] for who, paths in looks.by_model().items()},
    )
    _record(service, report, looks, serve)
    return Judged(report, looks.by_model())


def _unchanged(session: Session, run: Run) -> Judged:
    """A round whose candidate is the version it began from: no evaluation, and why it is so."""
    service = session.service
    why = why_unchanged(service, run)
    session.progress.say(f"round {run.run_id}: {why}")
    row = dict.fromkeys(("anchor", "champion", "candidate", "difference", "low", "high", "p"))
    report = RoundReport(
        round_id=run.run_id,
        target=run.target,
        generations=service.journal.next_generation(run.run_id),
        stopped=str(run.reason),
        digest=str(run.digest),
        verdict="unchanged",
        reasons=[{"task": run.target, "outcome": "unchanged", "text": why}],
        tasks={run.target: {"role": "target", "n": 0, "outcome": None} | row},
        curve=RoundFiles(service.home, run.run_id).curve(),
        learner_share=learner_share(service, run.run_id),
        rows=run.plan.get("rows", {}),
    )
    RoundFiles(service.home, run.run_id).write_judged(asdict(report), {})
    remarks = [e for e in service.ledger.of(report.digest) if e.state == UNCHANGED]
    if run.run_id not in {each.statistics["round"] for each in remarks}:
        statistics = {"round": run.run_id, "target": run.target}
        service.record(report.digest, UNCHANGED, why, statistics=statistics)
    return Judged(report, {})


def why_unchanged(service: Service, run: Run) -> str:
    """Why a round ended with the weights it began from, and what to change."""
    generations = service.journal.generations(run.run_id)
    no_ops = [each.step.no_op for each in generations if each.step.no_op]
    if len(no_ops) < len(generations):
        alpha = generations[-1].step.alpha
        return f"its steps were lost in rounding; raise learner.alpha (now {alpha:g})"
    drift = [Drift.from_json(each.drift) for each in generations]
    sigma = generations[-1].step.sigma if generations else 0.0
    reason = idle(drift, run.plan["population"], sigma, len(drift))
    return reason or f"no learning: {no_ops[-1] if no_ops else run.reason}"


def gate_rules(service: Service, run: Run) -> GateRules:
    """The gate's rules for a round: levels and margins as set, and its retained tasks."""
    return GateRules.of(
        service.settings.gate,
        zero_tolerance=frozenset(t.name for t in service.tasks.values() if t.zero_tolerance),
        graded=frozenset(t.name for t in service.tasks.values() if t.graded),
        retained=frozenset(_earlier_targets(service) - {run.target}),
    )


def _earlier_targets(service: Service) -> set[str]:
    """Targets of the promoted rounds that led to the champion: what they gained is retained."""
    champion = service.champion()
    if champion == service.anchor.digest:
        return set()
    return {service.journal.run(each).target for each in service.journal.lineage(champion)}


def _open_stage(
    session: Session, run: Run, digests: Mapping[Who, str], rules: GateRules
) -> tuple[Looks, Decision]:
    """Answers to the open rows, and the gate's decision on all looks together."""
    service = session.service
    names = [run.target, *service.priors(run.target)]

    def answered(questions: Questions) -> Mapping[Who, Path]:
        return tables(service, session.population, digests, questions, session.progress)

    first = first_stage(service, names)
    looks = Looks((first,), (answered(first),))
    decision = decide(_gate_tables(looks, digests), run.target, rules)
    while len(looks.undecided) < service.settings.gate.extend and _undecided(decision):
        more = more_rows(service, names, len(looks.paths))
        if not more.rows:
            break
        count = len(looks.paths)
        session.progress.say(f"look {count}: a prior task is undecided, more rows are evaluated")
        looks = Looks(  # decided on all looks together: betting allows it after every one of them
            (*looks.questions, more),
            (*looks.paths, answered(more)),
            (*looks.undecided, _undecided_rows(decision)),
        )
        decision = decide(_gate_tables(looks, digests), run.target, rules)
    return looks, decision


def _undecided(decision: Decision) -> bool:
    """Whether the verdict is hold because of a prior task, which more rows could decide."""
    steps = {reason.step for reason in decision.decisive()}
    return decision.verdict == "hold" and bool(steps & {"prior", "retained", "pooled"})


def _undecided_rows(decision: Decision) -> dict[str, Any]:
    """Rows by task and the open findings of a look that another one followed."""
    rows = {task: row["n"] for task, row in decision.tasks.items()}
    return {"rows": rows, "undecided": [reason.text for reason in decision.decisive()]}


def _confirmed(
    session: Session, run: Run, digests: Mapping[Who, str], rules: GateRules, looks: Looks
) -> Decision:
    """The decision with the sealed draw; the champion answers it only for retained tasks."""
    service = session.service
    questions = sealed_stage(service, service.priors(run.target), run.run_id, str(run.digest))
    compared = {
        who: digest for who, digest in digests.items() if who != "champion" or rules.retained
    }
    paths = tables(service, session.population, compared, questions, session.progress)
    return decide(
        _gate_tables(looks, digests),
        run.target,
        replace(rules, confirmation=questions.uses),
        _gate_tables(Looks((questions,), (paths,)), compared),
    )


def _gate_tables(looks: Looks, digests: Mapping[Who, str]) -> Tables:
    """The gate's input, with the example ids that each table must hold.

    The rows of all looks count as one table with one harness hash. A row whose harness is not that
    of its look keeps its own, so that the gate finds it.
    """
    whole = "+".join(questions.harness for questions in looks.questions)
    read: dict[str, tuple[Sample, ...]] = {}
    expected: dict[str, frozenset[str]] = {}
    for questions, paths in zip(looks.questions, looks.paths, strict=True):
        for task, rows in questions.rows:
            ids = frozenset(task.key(row) for row in rows)
            expected[task.name] = expected.get(task.name, frozenset()) | ids
        for who, path in paths.items():
            own = [
                replace(sample, harness_hash=whole)
                if sample.harness_hash == questions.harness
                else sample
                for sample in gate_samples(path)
            ]
            read[who] = (*read.get(who, ()), *own)
    return Tables(
        anchor=read["anchor"],
        champion=read.get("champion"),
        candidate=read["candidate"],
        expected=expected,
        digests={who: digest for who, digest in digests.items()},  # noqa: C416 wider key type
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
    measured: list[Who] = ["candidate"]
    if digests["champion"] != service.anchor.digest:
        measured.append("champion")
    return {who: shift(service, population, tasks, digests[who], progress) for who in measured}


def _report(
    service: Service,
    run: Run,
    decision: Decision,
    paths: Mapping[Who, Sequence[Path]],
    moved: Mapping[str, Shift],
) -> RoundReport:
    """The round's report: the gate's figures, with each model's accuracy interval by task."""
    document = decision.to_json()
    # The gate compares models pairwise; the interval of each one alone is computed here.
    measured = {
        who: summaries(row for path in own for row in read_samples(path))
        for who, own in paths.items()
    }
    for task, row in document["tasks"].items():
        row["interval"] = {
            who: (summary[task].low, summary[task].high) for who, summary in measured.items()
        }
    return RoundReport(
        round_id=run.run_id,
        target=run.target,
        generations=service.journal.next_generation(run.run_id),
        stopped=str(run.reason),
        digest=str(run.digest),
        verdict=decision.verdict,
        reasons=document["reasons"],
        tasks=document["tasks"],
        curve=RoundFiles(service.home, run.run_id).curve(),
        learner_share=learner_share(service, run.run_id),
        shift=moved,
        rows=run.plan.get("rows", {}),
        gain=_gain(service, run, paths),
        alarms=_alarms(service, run),
    )


def _alarms(service: Service, run: Run) -> list[str]:
    """When members earned clearly less than their parent, read from the journal."""
    drift = [Drift.from_json(each.drift) for each in service.journal.generations(run.run_id)]
    alarms = falls(drift, run.plan["population"])
    return [f"generation {generation + 1}: {text}" for generation, text in alarms]


def _gain(service: Service, run: Run, paths: Mapping[Who, Sequence[Path]]) -> dict[str, Any]:
    """What the target gained over the champion, in its parts, and the tokens learning generated."""
    before, after = (
        [row for path in paths[who] for row in read_samples(path) if row["task"] == run.target]
        for who in ("champion" if "champion" in paths else "anchor", "candidate")
    )
    pace = RoundFiles(service.home, run.run_id).pace()
    spent = round(sum(row.get("tokens", 0.0) for row in pace))
    return asdict(gain(before, after)) | {"tokens_spent": spent}


def _record(service: Service, report: RoundReport, looks: Looks, serve: bool) -> None:
    """EVALUATED and the verdict; nothing where the ledger has this verdict or serves the digest."""
    state = STATES[report.verdict]
    if service.ledger.state(report.digest) in (state, "CHAMPION", "ANCHOR"):
        return
    figures = {
        task: {key: value for key, value in row.items() if key != "interval"}
        for task, row in report.tasks.items()
    }
    statistics: dict[str, Any] = {"round": report.round_id, "target": report.target}
    statistics |= {"tasks": figures, "earlier_looks": list(looks.undecided)}
    extended = f", rows added {len(looks.undecided)} times" if looks.undecided else ""
    stages = f"first stage{extended} and, if passed, sealed draw"
    service.record(report.digest, "EVALUATED", stages, statistics=statistics)
    why = "; ".join(str(reason["text"]) for reason in report.decisive())
    verdict = {"reasons": list(report.reasons), "serve": serve}
    service.record(report.digest, state, why, statistics=verdict)
