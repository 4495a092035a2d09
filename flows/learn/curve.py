"""What is measured while a round runs: accuracy by generation, and where the time goes.

The curve is the accuracy of theta on a few evaluation rows of the target and its prior tasks, every
``tasks.curve_every`` generations. The pace is a generation's wall time by part, with

    share = (render + update) / generation

render and update are the seconds that an engine spends on writing members into itself and on
moving delta (mean over the engines); generation is the wall time from the first member asked to the
step applied. Restoring takes no time of its own: the next render overwrites a member.
"""

from collections.abc import Mapping
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from agent.population.pool import Population
from evaluators.task import judge
from flows.round_files import RoundFiles
from flows.service import Service


class Curve:
    """The accuracies of one round, each measured once however often the round is resumed."""

    def __init__(self, service: Service, target: str, run_id: str) -> None:
        self._files = RoundFiles(service.home, run_id)
        self._every = service.settings.tasks.curve_every
        count = service.settings.tasks.curve_rows
        names = [target, *service.priors(target)] if self._every else []
        self._questions = [
            (task, rows, [task.messages(row, shots(row)) for row in rows])
            for task in map(service.task, names)
            for rows in [service.rows(task.name, "eval", count)]
            if rows  # the first ones may all be too long for the model
            for shots in [service.shots(task.name)]
        ]

    def measure(self, population: Population, generation: int, last: bool = False) -> None:
        """Evaluate theta as it is before this generation, when a measurement is due."""
        due = self._every and (generation % self._every == 0 or last)
        if not due or any(point["generation"] == generation for point in self._files.curve()):
            return
        prompts = [prompt for _, _, own in self._questions for prompt in own]
        max_tokens = [task.max_tokens for task, rows, _ in self._questions for _ in rows]
        answers = iter(population.generate(prompts, max_tokens))
        points = []
        for task, rows, _ in self._questions:
            right = sum(judge(task, next(answers).text, row).reward for row in rows)
            point = {"generation": generation, "task": task.name}
            points.append(point | {"accuracy": right / len(rows), "n": len(rows)})
        self._files.add_to_curve(points)


def members_note(rewards: Mapping[int, NDArray[np.float64]], tokens: int, seconds: float) -> str:
    """'reward 0.431 +- 0.052, 1,234 tokens/s' of the members evaluated so far in a generation.

    Args:
        rewards: (P,) rewards of each of them.
        tokens: Of the answers that came since the generation began or was resumed.
        seconds: Since then.
    """
    means = np.array([each.mean() for each in rewards.values()])
    rate = f", {tokens / seconds:,.0f} tokens/s" if seconds > 0 else ""
    return f"reward {means.mean():.3f} +- {means.std():.3f}{rate}"


class Pace:
    """The clock of one round: a row a generation."""

    def __init__(self, service: Service, run_id: str, population: Population) -> None:
        self._files, self._population = RoundFiles(service.home, run_id), population
        self._begun_s, self._spent_s = 0.0, dict[str, float]()
        self._tokens = 0

    def begin(self) -> None:
        """A generation begins."""
        self._spent_s, self._begun_s = self._population.spent(), perf_counter()
        self._tokens = 0

    def answered(self, tokens: int) -> tuple[int, float]:
        """One member answered; tokens and seconds since the generation began or was resumed."""
        self._tokens += tokens
        return self._tokens, perf_counter() - self._begun_s

    def end(self, generation: int) -> None:
        """A generation's step is applied: keep its seconds by part and the learner's share."""
        wall, engines = perf_counter() - self._begun_s, self._population.engines()
        parts = {
            part: max(0.0, seconds - self._spent_s.get(part, 0.0)) / engines
            for part, seconds in self._population.spent().items()
        }  # max: an engine that was started again counts from zero
        share = (parts.get("render", 0.0) + parts.get("update", 0.0)) / wall
        row = {"generation": generation, "seconds.generation": wall, "share.learner": share}
        row["tokens"] = float(self._tokens)
        row |= {f"seconds.{part}": seconds for part, seconds in parts.items()}
        self._files.add_to_pace(row)


def learner_share(service: Service, run_id: str) -> float | None:
    """The median share of a round's generations; None where no generation was timed."""
    shares = [row["share.learner"] for row in RoundFiles(service.home, run_id).pace()]
    return median(shares) if shares else None
