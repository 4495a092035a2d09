"""One round of learning: the learner decides, engines evaluate, the journal records.

A round that was killed is resumed where it was: its rows lie beside it, finished generations and
members in the journal. Nothing that is recorded is evaluated again.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
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
from agent.sections import LearnerSettings
from agent.store.journal import DamagedError, Run
from agent.store.replay import batch_places, prune, reached, replay, route, snapshot_path
from agent.store.weights import export
from evaluators.task import Task
from flows.learn.collect import collect_rows, mark_used, sweep
from flows.learn.curve import Curve, Pace, members_note
from flows.learn.evaluate import pools
from flows.learn.forecast import within_budget
from flows.learn.plan import calibrated, chosen, plan_of, settled
from flows.learn.prompts import Asked, nothing_to_ask, opened_prompts, rewards_of, worked
from flows.learn.tuning import Selection, calibration
from flows.round_files import SELECTING, RoundFiles
from flows.service import Service
from flows.show.terminal import Advance, Reporter, Silent

Rewards = NDArray[np.float64]
NEWEST = 2  # snapshots of a round in progress: the newest may be cut short by a crash
NOT_WORKED = "the task's worked answer to it is not right, and learner.fitness is 'likelihood'"
UNJUDGED = (None, "PROPOSED", "EVALUATED")  # ledger states of a candidate without a verdict


@dataclass(frozen=True)
class Round:
    """A finished round: its run in the journal, its candidate, and how learning ended."""

    run_id: str
    digest: str
    outcome: RoundOutcome


def run_round(
    service: Service,
    population: Population,
    target: str,
    progress: Reporter,
    changes: Mapping[str, Any] | None = None,
) -> Round:
    """Open a round that begins from the champion, or resume an interrupted one, and finish it.

    Args:
        service: The parts of the home.
        population: Engines that evaluate members.
        target: The task to train on.
        progress: Receives messages and the number of finished generations.
        changes: Learner settings of this round alone, such as {"generations": 6}.
    """
    task = service.target(target)
    learner = chosen(service.settings.learner, changes)
    run = _opened(service, population, task, learner, progress)
    learner = calibrated(learner, run.plan)
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


def _opened(
    service: Service,
    population: Population,
    task: Task,
    learner: LearnerSettings,
    progress: Reporter,
) -> Run:
    """The interrupted round of this target and these settings, or a new one."""
    plan = learner.model_dump(mode="json")
    for run in _begun(service, task, plan):
        if run.digest is None and not RoundFiles(service.home, run.run_id).given_up():
            generation = service.journal.next_generation(run.run_id)
            progress.say(f"round {run.run_id}: resumed at generation {generation}")
            return run
    within_budget(service, population, task.name, learner, progress)
    return _new(service, population, task, learner, progress)


def _begun(service: Service, task: Task, plan: Mapping[str, Any]) -> list[Run]:
    """Rounds of this target and plan that began from today's champion and anchor."""
    now = (task.name, service.champion(), service.anchor.digest)
    before = LearnerSettings().model_dump(mode="json")  # of keys that an older home's plans lack
    return [
        run
        for run in service.journal.runs()
        if (run.target, run.parent_digest, run.anchor_digest) == now
        and {key: run.plan.get(key, before[key]) for key in plan} == plan
        and "replayed" not in run.plan
    ]


def _proposed(service: Service, run_id: str, digest: str, outcome: RoundOutcome) -> Round:
    """The finished round; its candidate is PROPOSED in the ledger if it is not there yet."""
    if service.ledger.state(digest) is None:
        service.record(digest, "PROPOSED", f"round {run_id} ended: {outcome.reason}")
    return Round(run_id, digest, outcome)


def _new(
    service: Service,
    population: Population,
    task: Task,
    learner: LearnerSettings,
    progress: Reporter,
) -> Run:
    """Collect the rows, find sigma, check the plan and keep the rows, then open the run.

    The rows come before the journal's row: a run that is in the journal has its rows.
    """
    run_id = f"{len(service.journal.runs()) + 1:04d}-{task.name}"
    sweep(service)
    for name in (task.name, *service.priors(task.name)):
        pools(service, name)  # a task that cannot be judged is an error now, not after the learning
    collected = collect_rows(service, task.name, learner.prompts, learner.seed)
    for line in collected.lines():
        progress.say(line)
    if not collected.asked:
        raise UserError(nothing_to_ask(service, task))
    if learner.fitness == "likelihood" and not any(worked(task, each) for each in collected.asked):
        raise UserError(
            f"learner.fitness: 'likelihood', allowed for {task.name}: 'reward' (its verifier takes "
            "none of its worked answers for right)"
        )
    made: dict[str, Any] = {
        "calibration": calibration(service, population, task, learner, collected.asked, progress)
    }
    made |= settled(service, task.name, calibrated(learner, made))
    files = RoundFiles(service.home, run_id)
    rows_sha256 = files.write_rows([prompt.to_json() for prompt in collected.asked])
    selecting = [prompt.to_json() for prompt in collected.choosing]
    made["selection_sha256"] = files.write_rows(selecting, SELECTING)
    champion = service.champion()
    words = f"{service.anchor.digest} {run_id} {champion}" + f" {learner.seed}" * bool(learner.seed)
    seed = hashlib.sha256(words.encode()).digest()
    run = service.journal.open_run(
        run_id,
        anchor_digest=service.anchor.digest,
        parent_digest=champion,
        target=task.name,
        run_seed=int.from_bytes(seed[:8], "big") >> 1,  # 63 bits: SQLite integers are signed
        plan={
            **learner.model_dump(mode="json"),
            **made,
            "rows": collected.to_json(),
            "rows_sha256": rows_sha256,
        },
        now=time.time(),
    )
    mark_used(service, run_id, collected)
    return run


def _prompts(
    service: Service, task: Task, learner: LearnerSettings, run: Run, progress: Reporter
) -> tuple[list[Asked], list[int]]:
    """The prompts that a round was opened with, and the places of those that can be asked.

    The others earn 0 from every member: a column of zeros keeps each row at its place in the
    journal and moves no step, since members differ only in the other columns.

    Raises:
        UserError: They are gone, are not those of the journal, or none can be asked.
    """
    rows = RoundFiles(service.home, run.run_id).original_rows(run.plan["rows_sha256"])
    prompts, left_out = opened_prompts(service, task, rows)
    if learner.fitness == "likelihood":
        lacking = [at for at in range(len(prompts)) if at not in left_out]
        left_out |= {at: NOT_WORKED for at in lacking if worked(task, prompts[at]) is None}
    owners = service.experience.principals(run.run_id) if left_out else {}
    for place, reason in left_out.items():
        owner = owners.get(place, "the data set")
        progress.say(f"round {run.run_id}: row {place} of {owner} is left out: {reason}")
    places = [place for place in range(len(prompts)) if place not in left_out]
    if not places:
        raise UserError(f"round {run.run_id}: none of its {len(prompts)} rows can be asked")
    return prompts, places


def keep_snapshots(service: Service, population: Population, run: Run, newest: int) -> None:
    """Save delta as it is now, and keep only this round's ``newest`` snapshots.

    Of other rounds one snapshot stays: the end of the round that this one began from. Later rounds
    may begin there too; every other ended round is kept as its weights.
    """
    journal, folder = service.journal, service.home.snapshots
    own = [each.delta_hash for each in journal.kept(run.run_id)]
    parent = journal.kept(run.parent_run)[-1:] if run.parent_run else []
    if own and not snapshot_path(folder, own[-1]).exists():
        population.save(snapshot_path(folder, own[-1]))
    saved = [each for each in dict.fromkeys(own) if snapshot_path(folder, each).exists()]
    prune(folder, [*saved[-newest:], *(each.delta_hash for each in parent)])


class Driver:
    """Carries out the learner's decisions for one round: evaluate, apply, record."""

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
        self._anchor = service.open_anchor(run.anchor_digest)  # another may be in force by now
        self._prompts, places = _prompts(service, task, learner, run, progress)
        self._places = frozenset(places)
        self._files = RoundFiles(service.home, run.run_id)
        self._curve = Curve(service, task.name, run.run_id)
        self._pace = Pace(service, run.run_id, population)
        self._selection = Selection(service, population, task, learner, run)
        self._delta_hash = ""
        self._advance: Advance = Silent().track("", 0)

    def finish(self) -> Round:
        """Drive the round to its end, render its candidate and propose it."""
        service, run_id = self._service, self._run.run_id
        if chosen := service.journal.chosen(run_id):  # interrupted between choice and candidate
            self._prepare()
            done = service.journal.next_generation(run_id)
            outcome = RoundOutcome(done, chosen.evidence["ended"])
        else:
            outcome = self._drive()
            self._selection.choose(outcome.reason, self._progress)
        keep_snapshots(service, self._population, self._run, 1)
        digest = self._candidate()
        service.journal.finish(run_id, digest, outcome.reason, time.time())
        service.experience.name_candidate(run_id, digest)
        return _proposed(service, run_id, digest, outcome)

    def _candidate(self) -> str:
        """Render the candidate; its digest. Without any step it is the version it began from."""
        service, run = self._service, self._run
        if all(each.step.no_op for each in service.journal.generations(run.run_id)):
            return run.parent_digest
        parameters = replay(
            service.journal,
            self._anchor,
            run.run_id,
            service.home.snapshots,
            importance=service.home.importance,
        )
        return export(parameters, service.home.weights).name

    def _drive(self) -> RoundOutcome:
        """Answer the learner's decisions until it ends the round.

        The curve is measured before a generation, and once more after the last.
        """
        plan, past = plan_of(self._service, self._run, self._learner), self._past()
        self._prepare()
        total = plan.generations * plan.population
        self._advance = self._progress.track(f"round {self._run.run_id}, members", total)
        self._advance(plan.start_generation * plan.population)
        decisions = improve(plan, past)  # a generator: this loop answers it
        answer: Rewards | Applied | None = None
        outcome: RoundOutcome
        try:
            while True:
                decision = decisions.send(answer)
                if isinstance(decision, Evaluate):
                    ends = self._selection.measure(decision.generation)
                    if ends := self._over_budget(decision.generation) or ends:
                        outcome = RoundOutcome(decision.generation, ends)
                        break
                    self._curve.measure(self._population, decision.generation)
                    answer = self._evaluate(decision)
                elif isinstance(decision, Apply):
                    answer = self._apply(decision.step)
                else:
                    self._record(decision)
                    answer = None
                    self._advance((decision.step.generation + 1) * plan.population)
        except StopIteration as end:
            outcome = end.value
        self._curve.measure(self._population, outcome.generations, last=True)
        self._selection.measure(outcome.generations, last=True)
        return outcome

    def _over_budget(self, generation: int) -> str | None:
        """Why learning ends here: its generations have taken the budget. None when they have not.

        Read from the files of the round, so that time before an interruption counts.
        """
        budget = self._learner.budget_minutes
        spent_s = sum(row["seconds.generation"] for row in self._files.pace())
        if not budget or not generation or spent_s < budget * 60:
            return None
        return f"budget: {spent_s / 60:.1f} of {budget:g} minutes are used"

    def _past(self) -> list[Drift]:
        """The drift of the generations that are in the journal, which the learner goes on from."""
        done = self._service.journal.generations(self._run.run_id)
        return [Drift.from_json(generation.drift) for generation in done]

    def _prepare(self) -> None:
        """Bring every engine to the delta after the journal's last generation.

        Raises:
            DamagedError: The engines' delta is not the one that the journal names.
        """
        service = self._service
        self._population.open(self._anchor.directory, self._run.anchor_digest)
        way = route(service.journal, self._anchor, self._run.run_id, service.home.snapshots)
        steps = [each.step for each in way.generations]
        delta_hash = self._population.restore(way.snapshot, steps)
        wanted = way.generations[-1].delta_hash if way.generations else delta_hash
        if not reached(self._anchor, way, wanted, delta_hash, service.home.importance):
            raise DamagedError(self._run.run_id, way.generations[-1].generation, "delta_hash")

    def _evaluate(self, decision: Evaluate) -> Rewards:
        """(N, P) rewards of the members; only those that the journal lacks are evaluated."""
        self._pace.begin()
        journal, run_id, generation = self._service.journal, self._run.run_id, decision.generation
        rewards = journal.members_done(run_id, generation)
        asked = batch_places(self._run.plan, generation, len(self._prompts))
        places = [place for place in asked if place in self._places]
        wanted = decision.jobs(self._run.run_seed)
        jobs = [job for job in wanted if job[0] not in rewards]
        before = generation * len(decision.members)
        for member, earned, tokens in self._earned(jobs, places):
            spent = self._pace.answered(tokens)
            by_place = dict(zip(places, earned, strict=True))
            rewards[member] = np.array([by_place.get(place, 0.0) for place in asked])
            journal.record_member(run_id, generation, member, rewards[member])
            if own := {n: rewards[n] for n in rewards if n < len(decision.members)}:
                note = members_note(own, *spent)
                self._advance(before + len(own), f"generation {generation + 1}, {note}")
        return np.stack([rewards[place] for place, _, _ in wanted])

    def _earned(
        self, jobs: Sequence[tuple[int, Address, float]], places: Sequence[int]
    ) -> Iterator[tuple[int, list[float], int]]:
        """Members as they come: what each prompt at these places earned, and answer tokens.

        By ``learner.fitness``, of the answer y a member gives to x, or of the worked answer y*:

            reward       training reward of y; 0 where the verifier failed
            likelihood   (1 / |y*|) sum_t log p(y*_t | x, y*_<t), nats a token
        """
        prompts, noise = [self._prompts[place] for place in places], self._learner.noise
        if self._learner.fitness == "likelihood":
            chats = [list(each.messages) for each in prompts]
            answers = [str(worked(self._task, each)) for each in prompts]  # others are left out
            for scored in self._population.likelihoods(jobs, chats, answers, noise):
                means = [float(np.mean(each)) for each in scored.values]
                yield scored.job, means, sum(map(len, scored.values))
            return
        asked, limit = [each.prompt for each in prompts], self._task.max_tokens
        for result in self._population.members(jobs, asked, limit, noise):
            earned = rewards_of(self._task, prompts, result.values)
            yield result.job, earned, sum(each.tokens for each in result.values)

    def _apply(self, step: Step) -> Applied:
        """Apply the step on every engine; the hash of delta that they agree on is kept."""
        applied = self._population.apply(step)
        self._delta_hash = applied.delta_hash
        return applied

    def _record(self, record: Record) -> None:
        """Commit one generation.

        Its pace comes before its journal row: whoever reads the row finds the pace beside it.
        """
        service, run_id, generation = self._service, self._run.run_id, record.step.generation
        self._pace.end(generation)
        service.journal.commit(run_id, record.step, record.rewards, self._delta_hash, record.drift)
        if record.alarm:
            halved = "; it is halved" if self._learner.too_large == "halve" else ""
            self._progress.say(f"generation {generation + 1}: {record.alarm}{halved}")
        if (generation + 1) % self._learner.snapshot_every == 0:
            keep_snapshots(service, self._population, self._run, NEWEST)
