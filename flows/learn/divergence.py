"""Distribution shift: how far a version's tokens have moved from the anchor's, task by task.

    KL(anchor || version) per token ~ sum_t (log p(x_t | x_<t) - log q(x_t | x_<t)) / T,   x ~ p

p is the anchor, q the version, nats a token. The continuations x are drawn from the anchor once, on
open evaluation rows, and kept with their log p under the anchor's digest; log q of the same tokens
is computed once for every version. The interval is a bootstrap over continuations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.home import read_sealed, write_sealed
from agent.population.decoding import kl_sums
from agent.population.pool import Population
from agent.store.weights import short
from evaluators.runner import Question, questions_of, short_hash
from evaluators.stats import weighted_mean_interval
from flows.learn.evaluate import engine_settings, pools, shots_of
from flows.service import Service
from flows.show.terminal import Reporter

TOKENS = 64  # of one continuation, at most
SEED = 0  # of the draw and of the bootstrap

Logprobs = Sequence[Sequence[float]]  # (continuation, token), nats
Shift = Mapping[str, Mapping[str, float]]  # task -> kl, low, high (nats a token), n, tokens


@dataclass(frozen=True)
class Continuations:
    """The anchor's continuations as token ids, and its log-probability of each token."""

    ids: Sequence[Sequence[int]]
    logprobs: Logprobs


def shift(
    service: Service,
    population: Population,
    tasks: Sequence[str],
    digest: str,
    progress: Reporter,
) -> Shift:
    """KL(anchor || digest) on each of these tasks; measured once, then read from its file.

    A task with fewer than two continuations is left out: it has no interval.
    """
    questions = _questions(service, tasks)
    name = f"{_harness(service, questions)}.json"
    path = service.home.evaluations / digest / f"shift-{name}"
    if not path.exists():
        progress.say(f"KL of {short(digest)} to the anchor, on {len(questions)} continuations")
        drawn = _drawn(service, population, questions, f"continuations-{name}")
        population.load(service.directory(digest), digest)
        on_version = _logprobs(population, questions, drawn.ids)
        tasks_of = [each.task.name for each in questions]
        _keep(path, estimates(tasks_of, drawn.logprobs, on_version))
    return read_sealed(path)


def estimates(tasks: Sequence[str], on_anchor: Logprobs, on_version: Logprobs) -> Shift:
    """Token-weighted mean of log p - log q with its interval, by task.

    Args:
        tasks: (continuation,) the task each belongs to.
        on_anchor: log p, as (continuation, token).
        on_version: log q of the same tokens.
    """
    sums, lengths = kl_sums(on_anchor, on_version), [len(row) for row in on_anchor]
    by_task = {}
    for task in dict.fromkeys(tasks):
        own = [row for row, name in enumerate(tasks) if name == task and lengths[row]]
        if len(own) < 2:
            continue
        totals, weights = [sums[row] for row in own], [lengths[row] for row in own]
        kl, low, high = weighted_mean_interval(totals, weights, seed=SEED)
        by_task[task] = {"kl": kl, "low": low, "high": high, "n": len(own), "tokens": sum(weights)}
    return by_task


def _questions(service: Service, tasks: Sequence[str]) -> list[Question]:
    """The first open rows of every task, in the order of the names."""
    count = service.settings.tasks.kl_rows
    rows = [(service.task(name), pools(service, name)[0][:count]) for name in sorted(tasks)]
    return questions_of(rows, shots_of(service, rows))


def _harness(service: Service, questions: Sequence[Question]) -> str:
    """The hash of all that two estimates must share to be compared."""
    rows = [(each.task.name, each.example_id, each.prompt_hash) for each in questions]
    return short_hash([rows, TOKENS, SEED, engine_settings(service)])


def _drawn(
    service: Service, population: Population, questions: Sequence[Question], name: str
) -> Continuations:
    """The anchor's continuations, drawn on first use."""
    path = service.home.evaluations / service.anchor.digest / name
    if not path.exists():
        population.load(service.anchor.directory, service.anchor.digest)
        prompts = [each.messages for each in questions]
        ids = population.ask(lambda engine: engine.sample(prompts, TOKENS, SEED))
        _keep(path, {"ids": ids, "logprobs": _logprobs(population, questions, ids)})
    return Continuations(**read_sealed(path))


def _logprobs(
    population: Population, questions: Sequence[Question], ids: Sequence[Sequence[int]]
) -> list[list[float]]:
    """(continuation, token) log-probabilities under the weights that the engines have loaded."""
    prompts = [each.messages for each in questions]
    return population.ask(lambda engine: engine.prompt_logprobs(prompts, ids))


def _keep(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, value)
