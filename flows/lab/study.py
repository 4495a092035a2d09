"""``anchorage study``: many rounds in one home with alternating targets, without a running service.

Every round starts from the champion and is trained, judged and, if it passed, promoted through the
ledger. Progress is stored in the home alone: the command continues an interrupted study, and adds
rounds to a finished one. Without traffic there is no baking: a promoted version becomes champion
at once.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.config import Settings, given, keep, load
from agent.errors import UserError
from agent.home import Home
from agent.sections import EMBEDDED, LearnerSettings
from agent.store.journal import Run
from deploy import stack
from deploy.serving.served import Served, write_served
from evaluators.comparison import Comparison, accuracy, evidence, task_margin
from evaluators.samples import Sample
from flows.commands.gate_files import read_samples
from flows.learn import loop
from flows.learn.evaluate import first_stage, table
from flows.learn.improve import UNJUDGED
from flows.learn.weigh import STATES, weigh
from flows.round_files import RoundFiles
from flows.serve import promote, swaps
from flows.service import Service
from flows.session import Session, session
from flows.show import plots
from flows.show.catch_up import showing
from flows.show.report import RoundReport
from flows.show.terminal import Reporter

# Twenty rounds of the embedded model in half an hour on two cores. ProofWriter is asked in words
# it was not taught, which leaves something to learn; Countdown it does no better in so few steps.
# A task that is right half of the time flips on one row in ten whatever is learnt: 8 points.
ASKED = "Facts: {theory}\nClaim: {question}\nIs the claim True, False or Unknown?"
SMALL: dict[str, dict[str, Any]] = {
    "learner": {"generations": 6, "prompts": 64, "alpha": 0.006, "lam": 5.0},
    "tasks": {"rows": 300, "curve_every": 0, "kl_rows": 0, "prompts": {"proofwriter": ASKED}},
    "gate": {"margins": dict.fromkeys(("gsm8k", "countdown", "proofwriter"), 0.08)},
}


@dataclass(frozen=True)
class StudyPlan:
    """Number of rounds, targets in turn, and learner settings that differ from the home's."""

    rounds: int
    targets: tuple[str, ...]
    changes: Mapping[str, Any]

    def target(self, done: int) -> str:
        """The target of the round after ``done`` finished ones."""
        return self.targets[done % len(self.targets)]


def study_now(
    home: Path | None,
    config: Path | None,
    plan: StudyPlan,
    picture: Path | None,
    progress: Reporter,
) -> dict[str, Any]:
    """Run a study, or continue the one in this home; see ``study``.

    Raises:
        UserError: The stack of this home is up, or a target or a setting is not allowed.
    """
    place = Home.at(home)
    if stack.status(place)["services"]:
        raise UserError(f"home {str(place.root)!r}: is up; take it down first (anchorage down)")
    _settle_settings(place, config)
    with session(place.root, progress) as opened, showing(opened.service, progress, is_up=False):
        return study(opened, plan, picture)


def study(opened: Session, plan: StudyPlan, picture: Path | None = None) -> dict[str, Any]:
    """Run the rounds of the plan that the home does not have yet, and compare with the anchor.

    Returns:
        rounds: [{round, target, verdict, promoted, before, after, difference, low, high, norm}]
        final: by task, the champion against the anchor: {n, anchor, champion, difference, low,
            high, margin, within}, shares; and within: every task keeps its margin.
    """
    began, service = time.monotonic(), opened.service
    if not plan.targets:
        raise UserError("targets: none; give at least one task")
    for name in plan.targets:
        service.target(name)
    # Mistakes in targets and settings show here, before hours of rounds.
    LearnerSettings.model_validate(service.settings.learner.model_dump() | dict(plan.changes))
    advance = opened.progress.track("study", plan.rounds)
    for done in _rounds(opened, plan):
        advance(done)
    finished = _finished(opened)[: plan.rounds]
    rounds = [_row(opened, run) for run in finished]
    final = against_anchor(opened, plan.targets)
    path = picture or service.home.picture("study")
    judged = [row for row in rounds if row["verdict"] != "unchanged"]
    plots.rounds(judged, "Accuracy of what is served, round by round").savefig(path)
    return {
        "anchor": service.anchor.digest,
        "champion": service.champion(),
        "promoted": sum(row["promoted"] for row in rounds),
        "rounds": [{key: row[key] for key in row if key != "tasks"} for row in rounds],
        "final": final,
        "within": all(row["within"] for row in final.values()),
        "plot": str(path),
        "home": str(service.home.root),
        "seconds": round(time.monotonic() - began, 1),
    }


def against_anchor(opened: Session, targets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The champion against the anchor on the targets and their priors, each with its margin.

    within: harm beyond the margin is refuted at the gate's level, as for a prior task.
    """
    service = opened.service
    names = sorted({*targets, *(prior for name in targets for prior in service.priors(name))})
    questions = first_stage(service, names)
    samples = {
        who: read_samples(table(service, opened.population, digest, questions, opened.progress))
        for who, digest in (("anchor", service.anchor.digest), ("champion", service.champion()))
    }
    return {
        name: _kept(
            service,
            name,
            *([s for s in samples[who] if s.task == name] for who in ("anchor", "champion")),
        )
        for name in names
    }


def _kept(
    service: Service, name: str, old: Sequence[Sample], new: Sequence[Sample]
) -> dict[str, Any]:
    """One task judged as the gate judges a prior task."""
    gate = service.settings.gate
    result = evidence(old, new, betting=service.task(name).graded)
    low, high = result.interval(gate.alpha)
    comparison = Comparison("prior", "first", name, "anchor", result, gate.alpha, low, high, high)
    strict = service.task(name).zero_tolerance
    margin = gate.margins.get(name, task_margin(len(old)))
    judged = comparison.nothing_lost() if strict else comparison.harmless(margin)
    return {
        "n": len(old),
        "anchor": accuracy(old),
        "champion": accuracy(new),
        "difference": result.difference,
        "low": low,
        "high": high,
        "margin": judged.margin,
        "within": judged.outcome == "pass",
    }


def _rounds(opened: Session, plan: StudyPlan) -> Iterator[int]:
    """Finish an interrupted round, then run the missing ones; yields the number done."""
    service = opened.service
    if not (service.home.serving_json).is_file():
        champion = service.champion()
        write_served(service.home, Served(champion, str(service.directory(champion))))
    finished = _finished(opened)
    if finished:
        _settle(opened, finished[-1])
    done = len(finished)
    yield done
    while done < plan.rounds:
        learnt = loop.learn(opened, plan.target(done), plan.changes)
        row = _settle(opened, service.journal.run(learnt.run_id))
        done += 1
        outcome = f"round {done} of {plan.rounds}, {row['target']}: {row['verdict']}"
        figures = f"{100 * row['before']:.1f} -> {100 * row['after']:.1f} %"
        opened.progress.say(f"{outcome}, {figures}")
        yield done


def _finished(opened: Session) -> list[Run]:
    """Rounds that have a candidate, oldest first."""
    return [run for run in opened.service.journal.runs() if run.digest is not None]


def _settle(opened: Session, run: Run) -> dict[str, Any]:
    """Judge a finished round and act on its verdict, also after an interruption."""
    service, digest = opened.service, str(run.digest)
    judged = RoundFiles(service.home, run.run_id).judged()
    if judged is None or service.ledger.state(digest) in UNJUDGED:
        weigh(opened, run.run_id)
    interrupted = service.ledger.open_intent()
    if interrupted is not None:
        swaps.finish(opened)
    has_verdict = service.ledger.state(digest) in STATES.values()
    if (has_verdict or interrupted is not None) and promote.act(opened, digest):
        promote.promote(opened, digest)
    fresh = service.ledger.unsettled()
    if fresh is not None:
        service.record(fresh.digest, "CHAMPION", "a study has no traffic: nothing bakes")
    return _row(opened, run)


def _row(opened: Session, run: Run) -> dict[str, Any]:
    """One round: figures of its report and the norm of its delta."""
    service = opened.service
    judged = RoundFiles(service.home, run.run_id).judged()
    assert judged is not None  # every finished round was weighed (_settle)
    report = RoundReport(**judged["report"]).to_json()
    tasks = report["tasks"]
    figures = tasks[run.target]
    last = service.journal.generations(run.run_id)[-1]
    states = {entry.state for entry in service.ledger.of(str(run.digest))}
    return {
        "round": run.run_id,
        "target": run.target,
        "verdict": report["verdict"],
        "reasons": report["reasons"] if report["verdict"] != "promote" else [],
        "promoted": "CHAMPION" in states and run.digest != run.parent_digest,
        "digest": run.digest,
        "before": figures["champion"],
        "after": figures["candidate"],
        **{key: figures[key] for key in ("difference", "low", "high")},
        "norm": last.drift["norm"],
        "tasks": tasks,
    }


def _settle_settings(place: Home, config: Path | None) -> None:
    """The home keeps the settings of its study: the given ones, else small ones."""
    if place.settings_json.is_file():
        if config is not None:
            raise UserError(f"--config {str(config)!r}: home {str(place.root)!r} has its settings")
        return
    # Who starts a study asks for its promotions, unless the settings say otherwise.
    auto = {} if "review.mode" in given(config) else {"review": {"mode": "auto"}}
    settings: Settings = load(config, **auto)
    if config is None and settings.model.path == EMBEDDED:
        settings = load(None, **SMALL)
    keep(place, settings)
