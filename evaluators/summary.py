"""Samples of an evaluation: scoring them again, and figures by task.

A sample is self-contained (its example and prompt travel with it), so that it can be scored again
without a model and without the data set.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent.errors import UserError
from evaluators.stats import mean_interval, wilson
from evaluators.task import Row, Task, judge

SampleRow = dict[str, Any]  # the columns of runner.SCHEMA


@dataclass(frozen=True, slots=True)
class Summary:
    """One task's result; shares are in [0, 1].

    ``accuracy`` is the mean reward. Its 95 % interval is Wilson's where all rewards are 0 or 1, and
    that of stats.mean_interval where one is not.
    """

    task: str
    n: int
    accuracy: float
    low: float
    high: float
    format_rate: float
    mean_tokens: float | None  # None where an endpoint counted none
    truncation_rate: float  # answers that ended at max_tokens
    errors: int  # rows on which the verifier failed; they count as wrong


@dataclass(frozen=True, slots=True)
class Discordance:
    """Two evaluations of one task on the same rows: b rows only the first is right on, c only the
    second; ``texts`` rows whose completions differ at all."""

    task: str
    n: int
    b: int
    c: int
    texts: int

    @property
    def rate(self) -> float:
        """(b + c) / n: the share of rows whose verdict differs."""
        return (self.b + self.c) / self.n


@dataclass(frozen=True, slots=True)
class Gain:
    """Two models on the same n rows of a task; pairs are (before, after), shares in [0, 1].

    A gain may be another form of answer rather than better ones. ``alike`` counts the rows on which
    both answers have the same format and lengths within a quarter of the longer; ``alike_accuracy``
    is the mean reward on them alone.
    """

    n: int
    accuracy: tuple[float, float]
    alike: int
    alike_accuracy: tuple[float, float] | None  # None without such a row
    format: tuple[float, float]
    truncated: tuple[float, float]  # answers that ended at max_tokens
    tokens: tuple[float, float] | None  # mean of an answer; None where none were counted
    fixed: int  # rows whose reward rose
    broken: int  # rows whose reward fell


def gain(before: Sequence[SampleRow], after: Sequence[SampleRow]) -> Gain:
    """What one task's answers gained, on the rows that both hold.

    Raises:
        UserError: No row in common.
    """
    old = {sample["example_id"]: sample for sample in before}
    pairs = [(old[new["example_id"]], new) for new in after if new["example_id"] in old]
    if not pairs:
        raise UserError("no row stands in both evaluations")
    alike = [pair for pair in pairs if _alike(*pair)]
    counted = all(sample["tokens"] is not None for pair in pairs for sample in pair)
    return Gain(
        n=len(pairs),
        accuracy=_means(pairs, "reward"),
        alike=len(alike),
        alike_accuracy=_means(alike, "reward") if alike else None,
        format=_means(pairs, "format"),
        truncated=_means(
            [
                ({"cut": a["finish"] == "length"}, {"cut": b["finish"] == "length"})
                for a, b in pairs
            ],
            "cut",
        ),
        tokens=_means(pairs, "tokens") if counted else None,
        fixed=sum(new["reward"] > old["reward"] for old, new in pairs),
        broken=sum(new["reward"] < old["reward"] for old, new in pairs),
    )


def _alike(old: SampleRow, new: SampleRow) -> bool:
    """Whether two answers have the same format and about the same length."""
    lengths = [len(each["completion"]) for each in (old, new)]
    return bool(
        old["format"] == new["format"] and 4 * (max(lengths) - min(lengths)) <= max(lengths)
    )


def _means(pairs: Sequence[tuple[SampleRow, SampleRow]], column: str) -> tuple[float, float]:
    before, after = (sum(float(pair[side][column]) for pair in pairs) for side in (0, 1))
    return before / len(pairs), after / len(pairs)


def scored(sample: SampleRow, task: Task, row: Row) -> SampleRow:
    """The sample with the task's current verdict on its completion."""
    verdict = judge(task, sample["completion"], row)
    return sample | {
        "extracted": verdict.extracted,
        "reward": float(verdict.reward),
        "format": float(verdict.format),
        "error": verdict.error,
    }


def rescored(samples: Iterable[SampleRow], tasks: Mapping[str, Task]) -> list[SampleRow]:
    """Every sample scored again with the tasks' current extraction; needs no model.

    Raises:
        UserError: a sample of a task that is not given.
    """
    results = []
    for sample in samples:
        if sample["task"] not in tasks:
            allowed = ", ".join(sorted(tasks))
            raise UserError(f"sample of task {sample['task']!r}; allowed: {allowed}")
        task = replace(tasks[sample["task"]], prefill=_prefill(sample))
        results.append(scored(sample, task, json.loads(sample["example"])))
    return results


def _prefill(sample: SampleRow) -> str | None:
    """The first words the assistant was given when this sample was asked."""
    last = json.loads(sample["prompt"])[-1]
    return last["content"] if last["role"] == "assistant" else None


def summaries(samples: Iterable[SampleRow]) -> dict[str, Summary]:
    """One summary a task, in the order in which the tasks first appear."""
    by_task: dict[str, list[SampleRow]] = {}
    for sample in samples:
        by_task.setdefault(sample["task"], []).append(sample)
    return {name: _summary(name, group) for name, group in by_task.items()}


def _summary(name: str, samples: Sequence[SampleRow]) -> Summary:
    n = len(samples)
    rewards = [float(sample["reward"]) for sample in samples]
    exact = all(reward in (0.0, 1.0) for reward in rewards)
    low, high = wilson(int(sum(rewards)), n) if exact else mean_interval(rewards)
    tokens = [sample["tokens"] for sample in samples if sample["tokens"] is not None]
    return Summary(
        task=name,
        n=n,
        accuracy=sum(rewards) / n,
        low=low,
        high=high,
        format_rate=sum(sample["format"] for sample in samples) / n,
        mean_tokens=sum(tokens) / len(tokens) if tokens else None,
        truncation_rate=sum(sample["finish"] == "length" for sample in samples) / n,
        errors=sum(sample["error"] is not None for sample in samples),
    )


def discordance(a: Iterable[SampleRow], b: Iterable[SampleRow]) -> dict[str, Discordance]:
    """How far two evaluations differ, task by task (A/A: the same weights asked twice).

    Raises:
        UserError: rows that only one holds, or prompts that differ.
    """
    first, second = _by_question(a), _by_question(b)
    if alone := first.keys() ^ second.keys():
        task, example_id, _ = min(alone)
        raise UserError(
            f"{len(alone)} rows stand in only one evaluation or with another prompt, "
            f"first {task} {example_id}; the same rows are wanted"
        )
    names = dict.fromkeys(task for task, _, _ in first)
    return {name: _compared(name, first, second) for name in names}


def _by_question(samples: Iterable[SampleRow]) -> dict[tuple[str, str, str], SampleRow]:
    return {(s["task"], s["example_id"], s["prompt_hash"]): s for s in samples}


def _compared(
    name: str,
    first: Mapping[tuple[str, str, str], SampleRow],
    second: Mapping[tuple[str, str, str], SampleRow],
) -> Discordance:
    pairs = [(first[key], second[key]) for key in first if key[0] == name]
    return Discordance(
        task=name,
        n=len(pairs),
        b=sum(x["reward"] > y["reward"] for x, y in pairs),
        c=sum(x["reward"] < y["reward"] for x, y in pairs),
        texts=sum(x["completion"] != y["completion"] for x, y in pairs),
    )
