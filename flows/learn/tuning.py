"""What a round finds out by forward passes beside its members: sigma before, the candidate after.

``calibration`` tries members on a grid of sigmas. ``Selection`` measures theta on rows that neither
train nor judge while a round runs, ends it after its peak, and chooses the candidate.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import UserError
from agent.learner.calibrate import MEMBERS, Calibration, SigmaTrial, calibrate
from agent.learner.choose import Choice, Point, choose, stalled
from agent.learner.es import scaling
from agent.learner.noise import Address
from agent.population.pool import Population
from agent.population.schedule import Completion
from agent.sections import AUTO, LearnerSettings
from agent.store.journal import Chosen, DamagedError, Run
from agent.store.replay import lineage, reached, route, route_along, snapshot_path
from evaluators.task import Task
from flows.learn.prompts import Asked, opened_prompts, rewards_of, verdict_on
from flows.round_files import SELECTING, RoundFiles
from flows.service import Service
from flows.show.terminal import Reporter

TRIED_ROWS = 64  # of the round's, for sigma


def calibration(
    service: Service,
    population: Population,
    task: Task,
    learner: LearnerSettings,
    asked: Sequence[Asked],
    progress: Reporter,
) -> dict[str, Any] | None:
    """Sigma and alpha of a new round as its plan keeps them; None where both are given.

    Members are perturbations of the champion, where the round begins. Its own rows are asked.
    """
    if AUTO not in (learner.sigma, learner.alpha):
        return None
    if isinstance(learner.sigma, float):
        return Calibration(learner.sigma, learner.sigma, "sigma is given", ()).to_json()
    bring_to_champion(service, population)
    asked = asked[:TRIED_ROWS]
    chats = [each.prompt for each in asked]

    def mean(completions: Sequence[Completion]) -> float:
        return _mean_reward(task, asked, completions)

    parent = mean(population.generate(chats, task.max_tokens))
    trials = calibrate()
    sigma = next(trials)
    advance = progress.track("sigma is tried", 1)
    try:
        while True:
            jobs = [(n, Address(0, 0, n), sigma) for n in range(MEMBERS)]
            results = population.members(jobs, chats, task.max_tokens, learner.noise)
            trial = SigmaTrial(sigma, parent, tuple(mean(each.values) for each in results))
            progress.say(
                f"sigma {sigma:g}: members lose {trial.fall:.3f}, spread {trial.spread:.3f}"
            )
            sigma = trials.send(trial)
    except StopIteration as end:
        made: Calibration = end.value
    advance(1)
    progress.say(f"sigma = alpha = {made.sigma:g}: {made.reason}")
    return made.to_json()


def bring_to_champion(service: Service, population: Population) -> None:
    """Every engine at the theta of the version that is served."""
    anchor = service.anchor
    population.open(anchor.directory, anchor.digest)
    champion = service.champion()
    way = route(service.journal, anchor, champion, service.home.snapshots)
    population.restore(way.snapshot, [each.step for each in way.generations])


def _mean_reward(task: Task, asked: Sequence[Asked], answers: Sequence[Completion]) -> float:
    return float(np.mean(rewards_of(task, asked, answers)))


class Selection:
    """The selection rows of one round; without any, its last generation is the candidate."""

    def __init__(
        self,
        service: Service,
        population: Population,
        task: Task,
        learner: LearnerSettings,
        run: Run,
    ) -> None:
        self._service, self._population, self._task = service, population, task
        self._learner, self._run = learner, run
        self._anchor = service.open_anchor(run.anchor_digest)
        self._files = RoundFiles(service.home, run.run_id)
        self._rows = self._opened() if learner.selection else []

    def _opened(self) -> list[Asked]:
        """The selection rows that the round was opened with; of an older round the task's own."""
        service, task = self._service, self._task
        entries: Sequence[Any] = service.selection_rows(task.name)
        if sha256 := self._run.plan.get("selection_sha256"):
            entries = self._files.original_rows(sha256, SELECTING)
        prompts, left_out = opened_prompts(service, task, entries)
        return [prompt for place, prompt in enumerate(prompts) if place not in left_out]

    def measure(self, generation: int, last: bool = False) -> str | None:
        """Measure theta as it is after so many generations, where that is due.

        Returns:
            Why the round ends: its peak is past. None while it may go on.
        """
        if not self._rows or not generation:
            return None
        due = last or generation % self._learner.selection_every == 0
        if due and generation not in self._files.selection():
            self._files.add_to_selection(generation, list(self._rewards()))
        means = [float(np.mean(row)) for _, row in sorted(self._files.selection().items())]
        return None if last else stalled(means, self._learner.patience)

    def choose(self, ended: str, progress: Reporter) -> None:
        """Choose the candidate of a round that ended so; delta is then the chosen one.

        Nothing to do for a round without selection rows or without any step.
        """
        journal, run_id = self._service.journal, self._run.run_id
        generations = journal.generations(run_id)
        moved = any(not each.step.no_op for each in generations)
        if not self._rows or not moved:
            return
        measured = {g: np.array(row) for g, row in self._files.selection().items()}
        norms = [float(each.drift["norm"]) for each in generations]
        points = choose(norms, measured)
        try:
            point = next(points)
            while True:
                self._bring(point)
                point = points.send(self._rewards())
        except StopIteration as end:
            choice: Choice = end.value
        delta_hash = self._bring(choice.point)
        means = {f"{p.generation}, t {p.t:g}": mean for p, mean in sorted(choice.means.items())}
        evidence = {"ended": ended, "rows": len(self._rows), "means": means}
        chosen = choice.point
        journal.choose(run_id, Chosen(chosen.generation, chosen.t, delta_hash, evidence))
        progress.say(
            f"round {run_id}: the candidate is generation {chosen.generation} of {len(norms)}, "
            f"t = {chosen.t:g} on the line from the anchor: {choice.means[chosen]:.1%} of "
            f"{len(self._rows)} selection rows"
        )

    def _bring(self, point: Point) -> str:
        """Every engine at a point; the hash of its delta."""
        service, run_id = self._service, self._run.run_id
        steps = lineage(service.journal, self._anchor, run_id)
        before = len(steps) - service.journal.next_generation(run_id)
        kept = steps[: before + point.generation]
        way = route_along(self._anchor, kept, service.home.snapshots)
        wanted = kept[-1].delta_hash
        delta_hash = self._population.restore(way.snapshot, [each.step for each in way.generations])
        if not reached(self._anchor, way, wanted, delta_hash, service.home.importance):
            raise DamagedError(run_id, point.generation - 1, "delta_hash")
        if point.t == 1.0:
            return delta_hash
        # Kept, so that the other points of this line begin here.
        if not snapshot_path(service.home.snapshots, wanted).exists():
            self._population.save(snapshot_path(service.home.snapshots, wanted))
        return self._population.apply(scaling(kept[-1].step, point.t)).delta_hash

    def _rewards(self) -> NDArray[np.float64]:
        """(P,) rewards of theta on the selection rows, without the weight of the format."""
        chats = [each.prompt for each in self._rows]
        answers = self._population.generate(chats, self._task.max_tokens)
        if len(answers) != len(self._rows):
            raise UserError(f"selection: {len(answers)} answers, allowed: {len(self._rows)}")
        pairs = zip(self._rows, answers, strict=True)
        return np.array([verdict_on(self._task, *each).reward for each in pairs])
