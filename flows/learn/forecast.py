"""What a round will cost and what its gate can decide, before it begins.

Rates are measured on a few members and rows of the very model, tasks and settings:

    seconds = generations * (N * (render + P * answer_target) + update)        the learning
            + sum over tasks and models of rows * answer_task                  the evaluation
            + (1 + models) * start                                             engine starts

with N members, P prompts, answer_x the seconds of one completion of task x, and as models the
candidate, the anchor and the champion, each of which a cold engine answers for before a promotion.
Rows are tried in batches as large as the round's, where that does not take long, and the update has
the round's number of members: both change the rate. Memory is that of delta in every engine, disk
that of one candidate. The gate's part says which prior tasks are at their floor or ceiling, and the
smallest gain on the target that its rows can show.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from agent.errors import UserError
from agent.learner.calibrate import GRID, MEMBERS
from agent.learner.choose import BEYOND, T
from agent.learner.es import members, step
from agent.learner.noise import Address
from agent.learner.penalty import Penalty
from agent.population.pool import Population
from agent.sections import AUTO, LearnerSettings
from evaluators.comparison import task_margin
from evaluators.stats import mcnemar_exact, wilson
from evaluators.task import Message, Row, Task, judge
from flows.learn.evaluate import first_stage, pools, table_path
from flows.learn.prompts import askable, nothing_to_ask
from flows.service import Service
from flows.show.terminal import Reporter

TRIED_MEMBERS = 2
TRIED_ROWS = 24  # of a task at first; a whole batch where these take no longer than QUICK_S
QUICK_S = 5.0
LOST = 0.03  # share of rows that learning may turn wrong, assumed for the smallest visible gain


@dataclass(frozen=True, slots=True)
class TaskRate:
    """One task as it was tried: seconds and tokens of a completion, right answers of rows."""

    task: str
    seconds: float
    tokens: float
    right: int
    rows: int


@dataclass(frozen=True, slots=True)
class Rates:
    """What engines of this home take: seconds a member's render, a generation's update."""

    render_s: float
    update_s: float
    engines: int
    spread: float  # standard deviation of the tried members' mean rewards
    tasks: tuple[TaskRate, ...]  # the target first
    row_s: float  # a member's row of a generation: its answer, or the worked one read
    start_s: float = 0.0  # until a new engine answers

    def of(self, task: str) -> TaskRate:
        """The rate of one task."""
        return next(rate for rate in self.tasks if rate.task == task)


@dataclass(frozen=True, slots=True)
class Cost:
    """One part of a round."""

    part: str
    completions: int
    tokens: int
    minutes: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """A round before it begins: its parts, what it needs, and what speaks against it."""

    target: str
    costs: tuple[Cost, ...]
    memory_gib: float  # delta in float32, once an engine; vLLM's own weights come on top
    disk_gib: float  # of one candidate and its snapshots
    smallest_gain: float | None  # a share; None: no number of right answers would be enough
    margins: Mapping[str, float]  # of the prior tasks, shares
    warnings: tuple[str, ...]

    @property
    def minutes(self) -> float:
        """All parts together."""
        return sum(cost.minutes for cost in self.costs)

    def to_json(self) -> dict[str, Any]:
        """Plain values with their totals."""
        totals = {
            name: sum(getattr(cost, name) for cost in self.costs)
            for name in ("completions", "tokens", "minutes")
        }
        return asdict(self) | totals


def measure_rates(
    service: Service,
    population: Population,
    target: str,
    learner: LearnerSettings,
    progress: Reporter,
) -> Rates:
    """Try two members on rows of the target, one update, and the anchor on rows of each prior.

    Delta of the engines is zero afterwards, as when a round opens them.
    """
    task, names = service.target(target), service.priors(target)
    advance = progress.track("measure rates", 1 + len(names))
    began = time.monotonic()
    population.open(service.anchor.directory, service.anchor.digest)
    start_s = time.monotonic() - began
    batch = min(learner.batch or learner.prompts, service.settings.engines.max_num_seqs)
    rows = list(islice(askable(service, task, service.training_rows(target).values()), batch))
    if not rows:
        raise UserError(nothing_to_ask(service, task))
    limit = task.max_tokens
    prompts = _prompts(service, task, rows)
    population.generate(prompts[:1], limit)  # the first call also pays what is paid once
    before = population.spent()
    jobs = [(pair, Address(0, 0, pair), _sigma(learner)) for pair in range(TRIED_MEMBERS)]
    results = list(population.members(jobs, prompts, limit, learner.noise))
    spent = _difference(before, population.spent())
    texts = [[answer.text for answer in each.values] for each in results]
    rewards = np.array([list(map(partial(_reward, task), each, rows)) for each in texts])
    completions, right = rewards.size, round(float(rewards.sum()) / len(results))
    tokens = sum(answer.tokens for each in results for answer in each.values)
    per_answer = (spent["generate"] / completions, tokens / completions)
    rates = [TaskRate(target, *per_answer, right, len(rows))]
    row_s = per_answer[0]
    if learner.fitness == "likelihood":
        answers = [task.worked(row) for row in rows]
        list(population.likelihoods(jobs[:1], prompts[:1], answers[:1]))  # what is paid once
        before = population.spent()
        list(population.likelihoods(jobs, prompts, answers, learner.noise))
        row_s = _difference(before, population.spent())["generate"] / completions
    advance(1)
    update_s = _update_s(population, learner)
    for done, name in enumerate(names, start=2):
        rates.append(_tried(service, population, name))
        advance(done)
    return Rates(
        spent["render"] / len(results),
        update_s,
        population.engines(),
        float(rewards.mean(axis=1).std(ddof=1)),
        tuple(rates),
        row_s,
        start_s,
    )


def _update_s(population: Population, learner: LearnerSettings) -> float:
    """Seconds of one update of the round's members; delta is zero again afterwards."""
    before = population.spent()
    population.apply(
        step(
            np.arange(learner.population, dtype=np.float64),
            members(learner.population, False),
            run_seed=0,
            generation=0,
            sigma=_sigma(learner),
            alpha=_sigma(learner),
            shaping="zscore",
            penalty=Penalty("none", 0.0),
            noise=learner.noise,
        )
    )
    spent = _difference(before, population.spent())["update"] / population.engines()
    population.restore(None, [])
    return spent


def _sigma(learner: LearnerSettings) -> float:
    """Sigma of the tried members: they cost the same whatever it is."""
    return GRID[2] if isinstance(learner.sigma, str) else learner.sigma


def _tried(service: Service, population: Population, name: str) -> TaskRate:
    """The anchor on open evaluation rows of a task: a batch, or a few where answers take long."""
    task, pool = service.task(name), pools(service, name)[0]
    for count in (TRIED_ROWS, service.settings.engines.max_num_seqs):
        rows, before = pool[:count], population.spent()
        answers = population.generate(_prompts(service, task, rows), task.max_tokens)
        seconds = _difference(before, population.spent())["generate"]
        if seconds > QUICK_S or len(rows) == len(pool):
            break
    right = round(sum(_reward(task, a.text, row) for a, row in zip(answers, rows, strict=True)))
    tokens = sum(answer.tokens for answer in answers)
    return TaskRate(name, seconds / len(rows), tokens / len(rows), right, len(rows))


def _reward(task: Task, text: str, row: Row) -> float:
    return judge(task, text, row).reward


def _prompts(service: Service, task: Task, rows: Sequence[Row]) -> list[list[Message]]:
    """The rows as the task's template asks them."""
    shots = service.shots(task.name)
    return [task.messages(row, shots(row)) for row in rows]


def _difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Seconds by part between two readings; an engine that never did a part has none of it."""
    parts = ("render", "update", "generate")
    return {part: after.get(part, 0.0) - before.get(part, 0.0) for part in parts}


def forecast(service: Service, target: str, learner: LearnerSettings, rates: Rates) -> Forecast:
    """Costs, needs and warnings of a round on ``target`` with these settings."""
    population, generations = learner.population, learner.generations
    batch = min(learner.batch or learner.prompts, learner.prompts)
    rate = rates.of(target)
    parents = 0 if learner.too_large == "ignore" else -(-generations // learner.selection_every)
    rendered = population * generations + parents
    # Members are shared among engines; every engine moves its own delta.
    learning_s = rendered * (rates.render_s + batch * rates.row_s) / rates.engines
    learning_s += generations * rates.update_s
    asked = rendered * batch
    judged = {name: len(pools(service, name)[0]) for name in [target, *service.priors(target)]}
    # The candidate, and anchor and champion where they have not answered these rows before.
    questions = first_stage(service, [target, *service.priors(target)])
    others = {service.anchor.digest, service.champion()}
    models = 1 + sum(not table_path(service, each, questions).exists() for each in others)
    first = {name: count * models for name, count in judged.items()}
    curve = _measured(service, generations)
    sealed = {
        name: 2 * len(pools(service, name)[1][:count])
        for name, count in judged.items()
        if name != target and service.settings.gate.confirm
    }
    costs = (
        Cost("learning", asked, round(asked * rate.tokens), learning_s / 60),
        _evaluation("sigma and choice", {target: _chosen_by(learner, batch)}, rates),
        *([_evaluation("curve", dict.fromkeys(judged, curve), rates)] if curve else []),
        _evaluation("evaluation", first, rates),
        _evaluation("sealed draw, if it gets there", sealed, rates),
        Cost("engine starts", 0, 0, (2 + len(others)) * rates.start_s / 60),
    )
    anchor = service.anchor
    return Forecast(
        target,
        costs,
        memory_gib=rates.engines * anchor.parameters * 4 / 2**30,
        disk_gib=anchor.parameters * (2 + 2 * 4) / 2**30,
        smallest_gain=smallest_gain(judged[target], service.settings.gate.target_alpha),
        margins={
            name: service.settings.gate.margins.get(name, task_margin(count))
            for name, count in judged.items()
            if name != target and count
        },
        warnings=tuple(_warnings(target, learner, rates)),
    )


def _measured(service: Service, generations: int) -> int:
    """Completions of each task for the curve: before every so many generations, and at the end."""
    tasks = service.settings.tasks
    if not tasks.curve_every:
        return 0
    return tasks.curve_rows * (-(-generations // tasks.curve_every) + 1)


def _chosen_by(learner: LearnerSettings, batch: int) -> int:
    """Completions that calibrate sigma, measure generations and choose the candidate, at most."""
    tried = len(GRID) * (MEMBERS + 1) * batch if AUTO in (learner.sigma, learner.alpha) else 0
    # Generations, the last one, and the line: its t = 1 is measured already.
    measured = (learner.generations - 1) // learner.selection_every + 1 + len(T) - 1 + len(BEYOND)
    return tried + learner.selection * measured


def within_budget(
    service: Service,
    population: Population,
    target: str,
    learner: LearnerSettings,
    progress: Reporter,
) -> None:
    """Refuse a round that would take longer than its budget, before anything of it is written.

    Raises:
        UserError: It would, with the minutes and what they are spent on.
    """
    if not learner.budget_minutes:
        return
    # Measured even where a glance would do: a guess here costs somebody hours or a refused round.
    planned = forecast(
        service, target, learner, measure_rates(service, population, target, learner, progress)
    )
    parts = ", ".join(f"{cost.part} {cost.minutes:.0f}" for cost in planned.costs)
    if planned.minutes > learner.budget_minutes:
        raise UserError(
            f"learner.budget_minutes = {learner.budget_minutes:g}: the round would take "
            f"{planned.minutes:.0f} minutes ({parts}); allowed: a larger budget, or fewer "
            "generations, members, prompts or rows (`anchorage plan`)"
        )
    progress.say(f"about {planned.minutes:.0f} minutes at most ({parts})")
    for warning in planned.warnings:
        progress.say(f"note: {warning}")


def _evaluation(part: str, rows: Mapping[str, int], rates: Rates) -> Cost:
    """The cost of asking so many completions of each task."""
    seconds = sum(count * rates.of(name).seconds for name, count in rows.items()) / rates.engines
    tokens = sum(count * rates.of(name).tokens for name, count in rows.items())
    return Cost(part, sum(rows.values()), round(tokens), seconds / 60)


def smallest_gain(rows: int, alpha: float) -> float | None:
    """The smallest net gain, a share of the rows, that exact McNemar shows at ``alpha``.

    ``LOST`` of the rows are taken to turn wrong, as they do when a model learns.
    """
    lost = round(LOST * rows)
    won = np.arange(rows - lost + 1)
    enough = won[np.asarray(mcnemar_exact(lost, won)) < alpha]
    return float(enough[0] - lost) / rows if enough.size else None


def _warnings(target: str, learner: LearnerSettings, rates: Rates) -> Sequence[str]:
    """What speaks against a round like this, each with its figures."""
    found = []
    tried = rates.of(target)
    if tried.right == 0:
        found.append(
            f"{target}: none of {tried.rows} answers was right: there is nothing to select"
        )
    if tried.right == tried.rows:
        found.append(f"{target}: all of {tried.rows} answers were right: no headroom")
    if rates.spread == 0:
        found.append(
            f"members: no spread of mean rewards at sigma {_sigma(learner):g}: a larger sigma, or "
            "more prompts than were tried"
        )
    for rate in rates.tasks[1:]:
        low, high = wilson(rate.right, rate.rows)
        if high < 0.15 or low > 0.99:
            place = "floor" if high < 0.15 else "ceiling"
            found.append(
                f"{rate.task}: {rate.right} of {rate.rows} right: at its {place}, a loss there "
                "could hardly be seen"
            )
    return found
