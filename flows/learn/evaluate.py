"""One model on every task: same rows, order and settings for anchor, champion and candidate.

A finished table is kept under its digest and harness hash; its rows are not evaluated again.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from agent.errors import UserError
from agent.home import is_as_signed, read_sealed, sign_file, write_sealed
from agent.population.certify import ProbeReply, allowed
from agent.population.decoding import decoding
from agent.population.pool import Population
from agent.population.schedule import Engine
from agent.store.weights import short
from evaluators.gate import draw
from evaluators.runner import (
    BATCH_ROWS,
    Question,
    Shots,
    evaluate,
    harness_of,
    questions_of,
    read_samples,
)
from evaluators.task import Row, Task
from flows.service import Service
from flows.show.terminal import Reporter

LOG = logging.getLogger("anchorage.evaluate")
Rows = Sequence[tuple[Task, Sequence[Row]]]


@dataclass(frozen=True)
class Questions:
    """Evaluation rows in order, and the hash of all that makes answers to them comparable."""

    name: str  # "first", "more-<look>", or "sealed-<round>"
    rows: Rows
    harness: str
    uses: int = 1  # how often its most used row is drawn, this time included


def pools(service: Service, name: str) -> tuple[list[Row], list[Row]]:
    """A task's evaluation rows: the open ones, and those that only a sealed draw may touch.

    Up to three times as many rows as the settings ask for, at most half of all open.

    Raises:
        UserError: There are none, so that nothing can be said about the task.
    """
    count = service.settings.tasks.rows
    rows = service.rows(name, "eval", 3 * count)
    if not rows:
        raise UserError(
            f"{name}: no evaluation row is shorter than model.max_model_len"
            f" ({service.settings.model.max_model_len} tokens); allowed: a greater length, or "
            "without this task (tasks.priors, --tasks)"
        )
    opened = open_count(len(rows), count)
    return rows[:opened], rows[opened:]


def open_count(total: int, count: int) -> int:
    """How many of ``total`` evaluation rows are open: ``count``, at most half (rounded up)."""
    return min(count, -(-total // 2))


def first_stage(service: Service, names: Sequence[str]) -> Questions:
    """The open evaluation rows of these tasks, in the order of their names."""
    rows = [(service.task(name), pools(service, name)[0]) for name in sorted(names)]
    return _questions(service, "first", rows)


def more_rows(service: Service, names: Sequence[str], look: int) -> Questions:
    """Open rows that no earlier look and no sealed draw has; none of a task that has no more."""
    count = service.settings.tasks.rows
    start, end = (2 + look) * count, (3 + look) * count
    rows = [(service.task(name), service.rows(name, "eval", end)[start:]) for name in sorted(names)]
    return _questions(service, f"more-{look}", [each for each in rows if each[1]])


def unsealed(service: Service, names: Sequence[str], limit: int | None) -> Questions:
    """Up to ``limit`` rows a task that no sealed draw touches; None: those of the first stage."""
    rows = [(service.task(name), _unsealed_rows(service, name, limit)) for name in sorted(names)]
    return _questions(service, "asked", rows)


def _unsealed_rows(service: Service, name: str, limit: int | None) -> list[Row]:
    """The open rows, then those behind the sealed ones."""
    opened, sealed = pools(service, name)
    if limit is None or limit <= len(opened):
        return opened[:limit]
    behind = len(opened) + len(sealed)
    return opened + service.rows(name, "eval", behind + limit - len(opened))[behind:]


def sealed_stage(service: Service, names: Sequence[str], round_id: str, digest: str) -> Questions:
    """The sealed draw of a round, chosen once the digest is recorded."""
    count = service.settings.tasks.rows
    round_number = 1 + [run.run_id for run in service.journal.runs()].index(round_id)
    before = _drawn_before(service, round_id)
    chosen: list[tuple[Task, list[Row]]] = []
    for name in sorted(names):
        task = service.task(name)
        beyond = {task.key(row): row for row in pools(service, name)[1]}
        ids = draw(
            beyond,
            round_number=round_number,
            digest=digest,
            count=min(count, len(beyond)),
            salt=service.salt,
            used=[example for task_name, example in before if task_name == name],
        )
        chosen.append((task, [beyond[each] for each in ids]))
    uses = [before[task.name, task.key(row)] for task, rows in chosen for row in rows]
    drawn = _questions(service, f"sealed-{round_id}", chosen)
    return replace(drawn, uses=1 + max(uses, default=0))


def table_path(service: Service, digest: str, questions: Questions) -> Path:
    """Where a digest's answers to these questions lie once they are given."""
    folder = service.home.evaluations / digest
    return folder / f"{questions.name}-{questions.harness[:12]}.parquet"


def table(
    service: Service,
    population: Population,
    digest: str,
    questions: Questions,
    progress: Reporter,
) -> Path:
    """The per-sample parquet of a digest on these questions, evaluated on first use."""
    out = table_path(service, digest, questions)
    total = sum(len(rows) for _, rows in questions.rows)
    # A damaged table would be judged as if a model had answered so.
    if out.exists() and not is_as_signed(out):
        LOG.warning("%s: is not what was written; evaluated again", out)
        out.unlink()
    if not out.exists():
        population.load(service.directory(digest), digest)
        advance = progress.track(f"evaluate {short(digest)} ({questions.name})", total)
        evaluate(
            questions.rows,
            population.generate,
            digest=digest,
            harness=questions.harness,
            out=out,
            shots=shots_of(service, questions.rows),
            progress=lambda done, _total: advance(done),
        )
        sign_file(out)
    return out


def _questions(service: Service, name: str, rows: Rows) -> Questions:
    return Questions(
        name, rows, harness_of(rows, engine_settings(service), shots_of(service, rows))
    )


def shots_of(service: Service, rows: Rows) -> dict[str, Shots]:
    """Worked examples by task name."""
    return {task.name: service.shots(task.name) for task, _ in rows}


def engine_settings(service: Service) -> dict[str, Any]:
    """The engine options that can change a greedy answer; part of the harness hash."""
    return {
        "dtype": service.settings.model.dtype,
        "max_model_len": service.settings.model.max_model_len,
        "max_num_seqs": service.settings.engines.max_num_seqs,
        "prefix_caching": service.settings.engines.prefix_caching,
        "tensor_parallel_size": service.settings.engines.population_ranks,
        "decoding": decoding(service.settings, service.origin.directory),
        "reads": "after </think>",  # of an answer, in judge
    }


def _drawn_before(service: Service, round_id: str) -> Counter[tuple[str, str]]:
    """How often each (task, example id) stood in the sealed draw of another round."""
    rounds: dict[str, set[tuple[str, str]]] = {}
    for path in service.home.evaluations.glob("*/sealed-*.parquet"):
        name = path.name.removeprefix("sealed-").rpartition("-")[0]
        if name != round_id:
            rows = {(str(row["task"]), str(row["example_id"])) for row in read_samples(path)}
            rounds.setdefault(name, set()).update(rows)
    return Counter(row for rows in rounds.values() for row in rows)


Who = Literal["anchor", "champion", "candidate"]


def tables(
    service: Service,
    population: Population,
    digests: Mapping[Who, str],
    questions: Questions,
    progress: Reporter,
) -> dict[Who, Path]:
    """One table for each of the models, the candidate first while its weights are the newest."""
    order: tuple[Who, ...] = ("candidate", "champion", "anchor")
    return {
        who: table(service, population, digests[who], questions, progress)
        for who in order
        if who in digests
    }


COLD_ROWS = 48  # rows of a table that a cold engine answers again
Cold = Callable[[str], AbstractContextManager[Engine]]  # an engine started on a digest


def against_cold(
    service: Service,
    population: Population,
    cold: Cold,
    digests: Mapping[Who, str],
    questions: Questions,
    paths: Mapping[Who, Path],
) -> list[str]:
    """What a cold engine of each model does not confirm; empty where it confirms all.

    A sample of the rows is asked of an engine started on the digest. The population's engine must
    give the same log-probabilities, within the spread of the cold engine's own under another order
    of the rows, and the table the same answers: else the gate compared weights that are not the
    digests'. The population is asked first of all: on a GPU it makes room for cold engines.

    In bfloat16 an answer may change with the rows it is batched with. So where too many of the
    sample's answers differ, the cold engine answers the table's first batch as it was asked, and
    that has to be the table's.
    """
    rows = questions_of(questions.rows, shots_of(service, questions.rows))
    sample = rows[:: -(-len(rows) // COLD_ROWS)]  # evenly over all tasks, which lie in order
    models: dict[str, Who] = {digest: who for who, digest in digests.items() if who in paths}
    warm: dict[str, ProbeReply] = {}
    for digest in models:
        population.load(service.directory(digest), digest)
        warm[digest] = population.ask(partial(_asked, sample))
    return [
        f"{who} {short(digest)}: {text}"
        for digest, who in models.items()
        for text in _unconfirmed(
            _cold_reply(cold, digest, sample, rows[:BATCH_ROWS], paths[who], questions),
            warm[digest],
            _answers(paths[who], sample),
            _answers(paths[who], rows[:BATCH_ROWS]),
        )
    ]


@dataclass(frozen=True)
class ColdReply:
    """A cold engine's reply, and how far its own reply to the rows in reverse order is from it."""

    reply: ProbeReply
    spread: float  # max |log p - log q|, nats
    unlike: int  # texts
    batch: tuple[str, ...] = ()  # answers to a table's first batch, where the sample's differed

    @property
    def most(self) -> int:
        """How many answers of a table may differ from the reply's."""
        return 1 + 2 * self.unlike


def _asked(sample: Sequence[Question], engine: Engine) -> ProbeReply:
    prompts, limits = [q.messages for q in sample], [q.task.max_tokens for q in sample]
    return ProbeReply.of(engine, None, prompts, limits, positions=1)


def _cold_reply(
    cold: Cold,
    digest: str,
    sample: Sequence[Question],
    first: Sequence[Question],
    path: Path,
    questions: Questions,
) -> ColdReply:
    """The reply kept beside the table, or that of an engine started now: a model is asked once."""
    kept = path.with_name(f"cold-{questions.harness[:12]}.json")
    if not kept.exists():
        with cold(digest) as engine:
            reply, again = _asked(sample, engine), _asked(sample[::-1], engine).reversed()
            made = ColdReply(reply, again.difference(reply), len(sample) - again.equal(reply))
            if _differing(_answers(path, sample), reply.texts) > made.most:
                limits = [q.task.max_tokens for q in first]
                answers = engine.generate([q.messages for q in first], limits)
                made = replace(made, batch=tuple(each.text for each in answers))
        write_sealed(kept, asdict(made))
    document = read_sealed(kept)
    return ColdReply(**(document | {"reply": ProbeReply.from_json(document["reply"])}))


def _answers(path: Path, sample: Sequence[Question]) -> list[str | None]:
    """What a table holds for the sample; None for a row it does not have."""
    table = {(row["task"], row["example_id"]): row["completion"] for row in read_samples(path)}
    return [table.get((q.task.name, q.example_id)) for q in sample]


def _differing(answers: Sequence[str | None], texts: Sequence[str]) -> int:
    return sum(one != other for one, other in zip(answers, texts, strict=True))


def _unconfirmed(
    cold: ColdReply,
    warm: ProbeReply,
    answers: Sequence[str | None],
    first: Sequence[str | None],
) -> Iterator[str]:
    """The findings on one model: its weights in the population, and its table."""
    bound, off = allowed(cold.spread), warm.difference(cold.reply)
    if not off <= bound:
        yield f"log p differs from a cold engine's by {off:.3g}, allowed: {bound:.3g}"
    of, wrong = len(answers), _differing(answers, cold.reply.texts)
    if wrong > cold.most and cold.batch:
        of, wrong = len(first), _differing(first, cold.batch)
    if wrong > cold.most:
        yield f"{wrong} of {of} answers are not a cold engine's, allowed: {cold.most}"
