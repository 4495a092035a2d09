"""What is measured along training: accuracy on every task, and KL to the anchor.

    KL(anchor || theta) per token ~ sum_t (log p(x_t | x_<t) - log q(x_t | x_<t)) / T,   x ~ p

on continuations that the anchor drew once. The rows are the same for all systems and seeds. A few
training rows that nobody trains on choose the generation at which early stopping would stop.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from agent.population.decoding import kl_per_token
from agent.population.pool import Population
from evaluators.runner import questions_of
from evaluators.task import Row, judge, training_reward
from flows.learn.evaluate import pools, shots_of
from flows.learn.prompts import askable
from flows.service import Service

TOKENS = 64  # of one continuation, at most
SEED = 0  # of their draw
SELECTION = 64  # training rows that choose the stop

Reading = dict[str, Any]  # accuracy and kl by task, selection: a share


class Meter:
    """Accuracy and KL of whatever the engines hold, on the rows of one target and its priors.

    ``training`` are the rows that every system trains on, ``prompts`` the same as chats.
    """

    def __init__(
        self, service: Service, population: Population, target: str, sizes: Mapping[str, int]
    ) -> None:
        """``sizes``: rows (a task, evaluation), kl_rows (a task) and prompts (training rows)."""
        self._population = population
        self.target, self.tasks = target, [target, *service.priors(target)]
        rows = [
            (service.task(name), pools(service, name)[0][: sizes["rows"]]) for name in self.tasks
        ]
        self._asked = questions_of(rows, shots_of(service, rows))
        few = [(task, own[: sizes["kl_rows"]]) for task, own in rows]
        self._probes = questions_of(few, shots_of(service, few))
        self._task = service.task(target)
        found = service.rows(target, "train", sizes["prompts"] + SELECTION)
        train = list(askable(service, self._task, found))
        self.max_tokens = self._task.max_tokens
        self.training: list[Row] = train[: sizes["prompts"]]
        apart = [(self._task, train[sizes["prompts"] :])]
        self._selection = questions_of(apart, shots_of(service, apart))
        used = [(self._task, self.training)]
        self.prompts = [each.messages for each in questions_of(used, shots_of(service, used))]
        self._anchor = service.anchor
        self._drawn: tuple[list[list[int]], list[list[float]]] | None = None
        self._base: Reading | None = None

    def rewards(self, texts: Sequence[str]) -> list[float]:
        """Training rewards of answers to ``prompts``, in order."""
        return [
            training_reward(self._task, judge(self._task, text, row))
            for text, row in zip(texts, self.training, strict=True)
        ]

    def base(self) -> Reading:
        """The reading of the anchor; opens it in every engine. Taken once."""
        self._population.open(self._anchor.directory, self._anchor.digest)
        if self._base is None:
            prompts = [each.messages for each in self._probes]
            ids = self._population.ask(lambda engine: engine.sample(prompts, TOKENS, SEED))
            self._drawn = ids, self._logprobs(ids)
            self._base = self.read()
        return self._base

    def read(self) -> Reading:
        """Accuracy and KL of what the engines hold now; ``base`` must have been taken."""
        assert self._drawn is not None
        every = [*self._asked, *self._selection]
        answers = self._population.generate(
            [each.messages for each in every], [each.task.max_tokens for each in every]
        )
        right = [
            judge(each.task, answer.text, each.row).reward
            for each, answer in zip(every, answers, strict=True)
        ]
        asked, apart = right[: len(self._asked)], right[len(self._asked) :]
        names = [each.task.name for each in self._asked]
        ids, before = self._drawn
        after = self._logprobs(ids)
        probed = [each.task.name for each in self._probes]
        return {
            "accuracy": {
                name: _mean([r for r, own in zip(asked, names, strict=True) if own == name])
                for name in self.tasks
            },
            "selection": _mean(apart) if apart else None,
            "kl": {
                name: kl_per_token(
                    [row for row, own in zip(before, probed, strict=True) if own == name],
                    [row for row, own in zip(after, probed, strict=True) if own == name],
                )
                for name in self.tasks
                if name in probed
            },
        }

    def _logprobs(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """(continuation, token) log p under what the engines hold."""
        prompts = [each.messages for each in self._probes]
        return self._population.ask(lambda engine: engine.prompt_logprobs(prompts, ids))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
