"""One round of learning: the learner decides, engines evaluate, the journal remembers.

A round killed at any point goes on where it was: its rows lie beside it, finished generations and
members in the journal; nothing finished is evaluated again.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import UserError
from agent.learner.drift import Drift
from agent.learner.es import Applied, Step
from agent.learner.improve import Apply, Evaluate, Record, RoundOutcome, improve
from agent.learner.noise import Address
from agent.population.pool import Population
from agent.population.schedule import Completion
from agent.sections import LearnerSettings
from agent.store.journal import DamagedError, Run
from agent.store.replay import replay, route
from agent.store.weights import export
from evaluators.task import Task, judge, training_reward
from flows.learn.collect import Asked, collect_rows, judging, mark_used, opened_prompts
from flows.learn.curve import Curve, Pace, Point, points_of
from flows.learn.plan import chosen, plan_of, settled
from flows.learn.snapshots import NEWEST, given_up, keep_snapshots, sweep
from flows.service import Service
from flows.show import catch_up, mlflow
from flows.show.progress import Reporter

Rewards = NDArray[np.float64]
UNJUDGED = (None, "PROPOSED", "EVALUATED")  # states of a candidate without a verdict


@dataclass(frozen=True)
class Round:
    """A finished round: its run in the journal, its candidate and the measured curve."""

    run_id: str
    digest: str
    outcome: RoundOutcome
    curve: tuple[Point, ...]


def run_round(
    service: Service,
    population: Population,
    target: str,
    progress: Reporter,
    changes: Mapping[str, Any] | None = None,
) -> Round:
    """Open a round from the champion, or take up one that was interrupted, and finish it.

    Args:
        service: The parts of the home.
        population: Engines that evaluate members.
        target: The task to train on.
        progress: Who is told.
        changes: Learner settings of this round alone, such as {"generations": 6}.
    """
    task = service.target(target)
    learner = chosen(service.settings.learner, changes)
    run = _opened(service, task, learner, progress)
    return Driver(service, population, task, learner, run, progress).finish()


def unweighed(
    service: Service, target: str, changes: Mapping[str, Any] | None = None
) -> Round | None:
    """The round of this target and these settings that ended and was never judged, if any."""
    learner = chosen(service.settings.learner, changes)
    for run in _begun(service, service.target(target), learner.model_dump(mode="json")):
        if run.digest is not None and service.ledger.state(run.digest) in UNJUDGED:
            outcome = RoundOutcome(service.journal.next_generation(run.run_id), str(run.reason))
            return _proposed(service, run.run_id, run.digest, outcome)
    return None


def _opened(service: Service, task: Task, learner: LearnerSettings, progress: Reporter) -> Run:
    """The interrupted round of this target and these settings, or a new one."""
    plan = learner.model_dump(mode="json")
    for run in _begun(service, task, plan):
        if run.digest is None and not given_up(service, run):
            done = service.journal.next_generation(run.run_id)
            progress.say(f"round {run.run_id}: goes on at generation {done}")
            return run
    return _new(service, task, learner, plan, progress)


def _begun(service: Service, task: Task, plan: Mapping[str, Any]) -> list[Run]:
    """Rounds of this target and plan that began from what is champion and anchor now."""
    now = (task.name, service.champion(), service.anchor.digest)
    return [
        run
        for run in service.journal.runs()
        if (run.target, run.parent_digest, run.anchor_digest) == now
        and {key: run.plan.get(key) for key in plan} == plan
        and "replayed" not in run.plan
    ]


def _proposed(service: Service, run_id: str, digest: str, outcome: RoundOutcome) -> Round:
    """A round with its candidate, which the ledger knows from here on."""
    if service.ledger.state(digest) is None:
        service.record(digest, "PROPOSED", f"round {run_id} ended: {outcome.reason}")
    return Round(run_id, digest, outcome, points_of(service, run_id))


def _new(
    service: Service,
    task: Task,
    learner: LearnerSettings,
    plan: Mapping[str, Any],
    progress: Reporter,
) -> Run:
    """Check what was asked, collect rows, keep them beside the round, then open it."""
    made = settled(service, task.name, learner)
    run_id = f"{len(service.journal.runs()) + 1:04d}-{task.name}"
    sweep(service)
    collected = collect_rows(service, task.name, learner.prompts)
    for line in collected.lines():
        progress.say(line)
    text = json.dumps([asked.to_json() for asked in collected.asked], default=str)
    folder = service.home.run(run_id)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(text, encoding="utf-8")
    seed = hashlib.sha256(
        f"{service.anchor.digest} {run_id} {service.champion()}".encode()
    ).digest()
    run = service.journal.open_run(
        run_id,
        anchor_digest=service.anchor.digest,
        parent_digest=service.champion(),
        target=task.name,
        run_seed=int.from_bytes(seed[:8], "big") >> 1,
        plan={
            **plan,
            **made,
            "rows": collected.to_json(),
            "rows_sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
        now=time.time(),
    )
    mark_used(service, run_id, collected)
    return run


def _prompts(
    service: Service, task: Task, run: Run, progress: Reporter
) -> tuple[list[Asked], list[int]]:
    """The prompts that a round was opened with, and the places of those that can be asked.

    The others earn nothing from any member: a column of zeros keeps every row in its place in the
    journal, and moves no step, as members differ only in the other columns.

    Raises:
        UserError: They are gone, not those the journal tells of, or none can be asked.
    """
    path = service.home.run(run.run_id) / "rows.json"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if hashlib.sha256(text.encode()).hexdigest() != run.plan["rows_sha256"]:
        raise UserError(f"{path}: not the rows that round {run.run_id} was opened with")
    prompts, left_out = opened_prompts(service, task, text)
    owners = service.experience.principals(run.run_id) if left_out else {}
    for place, reason in left_out.items():
        owner = owners.get(place, "the data set")
        progress.say(f"round {run.run_id}: row {place} of {owner} is left out: {reason}")
    places = [place for place in range(len(prompts)) if place not in left_out]
    if not places:
        raise UserError(f"round {run.run_id}: none of its {len(prompts)} rows can be asked")
    return prompts, places


class Driver:
    """Answers the learner's decisions for one round."""

    def __init__(
        self,
        service: Service,
        population: Population,
        task: Task,
        learner: LearnerSettings,
        run: Run,
        progress: Reporter,
    ) -> None:
        self._service, self._population, self._task = service, population, task
        self._learner, self._run, self._progress = learner, run, progress
        self._anchor = service.open_anchor(run.anchor_digest)  # whatever is served meanwhile
        self._prompts, self._places = _prompts(service, task, run, progress)
        self._curve = Curve(service, task.name, run.run_id)
        self._pace = Pace(service, run.run_id, population)
        self._delta_hash = ""

    def finish(self) -> Round:
        """Drive the round to its end, render its candidate and propose it."""
        outcome = self._drive()
        service, run_id = self._service, self._run.run_id
        keep_snapshots(service, self._population, self._run, 1)
        parameters = replay(
            service.journal,
            self._anchor,
            run_id,
            service.home.snapshots,
            importance=service.home.importance,
        )
        digest = export(parameters, service.home.weights).name
        service.journal.finish(run_id, digest, outcome.reason, time.time())
        service.experience.name_candidate(run_id, digest)
        return _proposed(service, run_id, digest, outcome)

    def _drive(self) -> RoundOutcome:
        plan, past = plan_of(self._service, self._run, self._learner), self._past()
        self._prepare()
        advance = self._progress.track(f"round {self._run.run_id}", plan.generations)
        decisions = improve(plan, past)
        answer: Rewards | Applied | None = None
        try:
            while True:
                decision = decisions.send(answer)
                if isinstance(decision, Evaluate):
                    self._curve.measure(self._population, decision.generation)
                    answer = self._evaluate(decision)
                elif isinstance(decision, Apply):
                    answer = self._apply(decision.step)
                else:
                    self._record(decision)
                    answer = None
                    advance(decision.step.generation + 1)
        except StopIteration as end:
            outcome: RoundOutcome = end.value
        self._curve.measure(self._population, outcome.generations, last=True)
        return outcome

    def _past(self) -> list[Drift]:
        done = self._service.journal.generations(self._run.run_id)
        return [Drift.from_json(generation.drift) for generation in done]

    def _prepare(self) -> None:
        """Bring every engine to where the journal is."""
        service = self._service
        self._population.open(self._anchor.directory)
        way = route(service.journal, self._anchor, self._run.run_id, service.home.snapshots)
        steps = [each.step for each in way.generations]
        found = self._population.restore(way.snapshot, steps)
        if way.generations and found != way.generations[-1].delta_hash:
            raise DamagedError(self._run.run_id, way.generations[-1].generation, "delta_hash")

    def _evaluate(self, asked: Evaluate) -> Rewards:
        """(N, P) rewards of the members, those already in the journal not asked again."""
        self._pace.begin()
        journal, run_id = self._service.journal, self._run.run_id
        found = journal.members_done(run_id, asked.generation)
        jobs = [
            (
                member.index,
                Address(self._run.run_seed, asked.generation, member.pair),
                member.sign * self._learner.sigma,
            )
            for member in asked.members
            if member.index not in found
        ]
        longest, noise = self._task.max_tokens, self._learner.noise
        chats = [list(self._prompts[place].messages) for place in self._places]
        for result in self._population.members(jobs, chats, longest, noise):
            found[result.job] = self._rewards(result.job, result.completions)
            journal.record_member(run_id, asked.generation, result.job, found[result.job])
        return np.stack([found[member.index] for member in asked.members])

    def _rewards(self, member: int, completions: Sequence[Completion]) -> Rewards:
        """(P,) training rewards; a verifier that failed on a row rewarded nobody for it."""
        if len(completions) != len(self._places):
            raise UserError(
                f"member {member}: {len(completions)} answers, allowed: {len(self._places)}"
            )
        rewards = np.zeros(len(self._prompts))
        for place, completion in zip(self._places, completions, strict=True):
            asked = self._prompts[place]
            verdict = judge(judging(self._task, asked), completion.text, asked.row)
            rewards[place] = training_reward(self._task, verdict)
        return rewards

    def _apply(self, step: Step) -> Applied:
        """The same step on every engine."""
        applied = self._population.apply(step)
        self._delta_hash = applied.delta_hash
        return applied

    def _record(self, record: Record) -> None:
        service, run_id, generation = self._service, self._run.run_id, record.step.generation
        service.journal.commit(run_id, record.step, record.rewards, self._delta_hash, record.drift)
        pace = self._pace.end(generation)
        if (generation + 1) % self._learner.snapshot_every == 0:
            keep_snapshots(service, self._population, self._run, NEWEST)
        mlflow.attempt(
            f"generation {generation} of {run_id}",
            lambda: catch_up.show_run(service, run_id, pace),
        )
