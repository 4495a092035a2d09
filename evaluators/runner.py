"""Evaluations: rows become questions, questions become samples in a parquet file, restartable.

Questions are rows as chats, with a hash of everything that shapes an answer (``harness_hash``).
``evaluate`` sends them to ``generate`` in fixed batches, appends each finished batch to a part
file, and publishes the parquet file when every row is there. After an interruption the rows of the
part file are not generated again. evaluators/summary.py computes figures from the samples.

``export`` writes them in lm-evaluation-harness's sample format. For each task one
``samples_<task>_<digest>.jsonl`` with the fields of its ``--log_samples`` (doc_id, doc, target,
arguments, resps, filtered_resps, filter, metrics, hashes, and a column a metric) and one
``results_<digest>.json`` with ``<metric>,<filter>`` and standard errors. Accuracy is called
``exact_match`` there.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from agent.errors import UserError
from evaluators.summary import SampleRow, Summary, rescored, scored, summaries
from evaluators.task import Message, Row, Task


class ModelAnswer(Protocol):
    """What a model answered; ``finish`` is "stop", or "length" where max_tokens cut it."""

    @property
    def text(self) -> str:
        """The answer without the prompt."""

    @property
    def tokens(self) -> int | None:
        """Number of generated tokens, None if unknown."""

    @property
    def finish(self) -> str:
        """Why it ended."""


# (chats, longest answer of each in tokens) -> one completion each, in the same order
Generate = Callable[[list[list[Message]], list[int]], Sequence[ModelAnswer]]


@dataclass(frozen=True, slots=True)
class Question:
    """One row as a chat, with its identity."""

    task: Task
    row: Row
    example_id: str
    messages: list[Message]
    prompt_hash: str


def canonical_json(value: object) -> str:
    """One text for one value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def short_hash(value: object) -> str:
    """The first 16 hex characters of the sha256 of the value's canonical JSON."""
    return sha256(canonical_json(value).encode()).hexdigest()[:16]


def question(task: Task, row: Row, shots: Sequence[Row] = ()) -> Question:
    """The question for one row."""
    messages = task.messages(row, shots)
    return Question(task, row, task.key(row), messages, short_hash(messages))


def harness_hash(questions: Iterable[Question], settings: Mapping[str, Any]) -> str:
    """sha256 over everything that makes two evaluations comparable, as hex.

    Per question the task, its extraction's version, the longest answer, the example id and the
    prompt (template, prefill and worked examples included), in order; then the settings.
    """
    identities = [
        (q.task.name, q.task.version, q.task.max_tokens, q.example_id, q.prompt_hash)
        for q in questions
    ]
    whole = canonical_json({"questions": identities, "settings": dict(settings)})
    return sha256(whole.encode()).hexdigest()


BATCH_ROWS = 256

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("example_id", pa.string()),
        ("prompt_hash", pa.string()),
        ("completion", pa.string()),
        ("extracted", pa.string()),
        ("reward", pa.float64()),
        ("format", pa.float64()),
        ("tokens", pa.int64()),
        ("finish", pa.string()),
        ("error", pa.string()),
        ("harness_hash", pa.string()),
        ("digest", pa.string()),
        ("cluster", pa.string()),  # rows made from one template share it; "" = none recorded
        ("example", pa.string()),  # the row as JSON
        ("prompt", pa.string()),  # the messages as JSON
    ]
)

Shots = Callable[[Row], list[Row]]
Progress = Callable[[int, int], None]  # rows done, rows in all


def questions_of(
    tasks_rows: Sequence[tuple[Task, Sequence[Row]]], shots: Mapping[str, Shots] | None = None
) -> list[Question]:
    """The questions for all rows, in order; ``shots`` gives worked examples by task name."""
    shots_of = shots or {}
    return [
        question(task, row, shots_of[task.name](row) if task.name in shots_of else ())
        for task, rows in tasks_rows
        for row in rows
    ]


def harness_of(
    tasks_rows: Sequence[tuple[Task, Sequence[Row]]],
    settings: Mapping[str, Any],
    shots: Mapping[str, Shots] | None = None,
) -> str:
    """The harness hash of an evaluation before it is run."""
    return harness_hash(questions_of(tasks_rows, shots), settings)


def evaluate(
    tasks_rows: Sequence[tuple[Task, Sequence[Row]]],
    generate: Generate,
    *,
    digest: str,
    harness: str,
    out: Path,
    shots: Mapping[str, Shots] | None = None,
    batch_rows: int = BATCH_ROWS,
    progress: Progress | None = None,
) -> list[SampleRow]:
    """Generate the answers that an interrupted call has not, and publish ``out`` (parquet).

    A finished ``out`` of the same digest and harness is read and nothing is generated.

    Raises:
        UserError: rows that share a key, or a file of another digest or harness in the way.
    """
    questions = questions_of(tasks_rows, shots)
    _refuse_repeats(questions)
    head = {"digest": digest, "harness_hash": harness}
    if out.exists():
        return _finished(out, head, questions)
    part = out.with_name(out.name + ".part.jsonl")
    done = _resumed(part, head)
    for batch in _batches(questions, done, batch_rows):
        if progress:
            progress(len(done), len(questions))
        fresh = _asked(batch, generate, head)
        _append(part, [canonical_json(sample) for sample in fresh])
        done |= {_identity(sample): sample for sample in fresh}
    if progress:
        progress(len(questions), len(questions))
    # Order: the parquet file is published whole, then the part file goes; a kill in between leaves
    # both, and the next call reads the parquet file.
    samples = [done[q.task.name, q.example_id] for q in questions]
    write_samples(out, samples)
    part.unlink(missing_ok=True)
    return samples


def rescore(parquet: Path, tasks: Mapping[str, Task]) -> list[SampleRow]:
    """Score a finished evaluation with the tasks' current extraction; needs no model."""
    return rescored(read_samples(parquet), tasks)


def read_samples(path: Path) -> list[SampleRow]:
    """The samples of a published evaluation."""
    if not path.is_file():
        raise UserError(f"no evaluation {path}; wanted a parquet file written by evaluate")
    samples: list[SampleRow] = pq.read_table(path).to_pylist()
    return samples


def write_samples(path: Path, samples: Sequence[SampleRow]) -> None:
    """Publish samples as one parquet file: written whole beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.Table.from_pylist(list(samples), schema=SCHEMA), temporary)
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    temporary.replace(path)


def _refuse_repeats(questions: Sequence[Question]) -> None:
    seen: set[tuple[str, str]] = set()
    for q in questions:
        if (q.task.name, q.example_id) in seen:
            raise UserError(f"task {q.task.name}: example {q.example_id!r} twice; keys are unique")
        seen.add((q.task.name, q.example_id))


def _finished(out: Path, head: Mapping[str, str], questions: Sequence[Question]) -> list[SampleRow]:
    """The published samples, if they are those of this very evaluation."""
    samples = read_samples(out)
    for sample in samples:
        _refuse_another(out, head, sample)
    if [_identity(sample) for sample in samples] != [
        (q.task.name, q.example_id) for q in questions
    ]:
        raise UserError(
            f"{out}: holds other rows than those asked for; remove it or choose another"
        )
    return samples


def _refuse_another(path: Path, head: Mapping[str, str], record: Mapping[str, Any]) -> None:
    for name, wanted in head.items():
        if record.get(name) != wanted:
            raise UserError(
                f"{path}: {name} {str(record.get(name))[:12]!r}, this evaluation has "
                f"{wanted[:12]!r}; remove it or choose another file"
            )


def _resumed(part: Path, head: Mapping[str, str]) -> dict[tuple[str, str], SampleRow]:
    """Samples that an interrupted evaluation has written; an incomplete last line is cut off."""
    if not part.exists():
        _append(part, [canonical_json(dict(head))])
        return {}
    whole, newline, _torn = part.read_bytes().rpartition(b"\n")
    os.truncate(part, len(whole) + len(newline))
    lines = [json.loads(line) for line in whole.split(b"\n") if line]
    if not lines:
        _append(part, [canonical_json(dict(head))])
        return {}
    _refuse_another(part, head, lines[0])
    return {_identity(sample): sample for sample in lines[1:]}


def _append(part: Path, lines: Sequence[str]) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        file.write("".join(line + "\n" for line in lines).encode("ascii"))
        file.flush()
        os.fsync(file.fileno())


def _identity(sample: Mapping[str, Any]) -> tuple[str, str]:
    return sample["task"], sample["example_id"]


def _batches(
    questions: Sequence[Question], done: Mapping[tuple[str, str], SampleRow], rows: int
) -> Iterator[list[Question]]:
    """Batches of the remaining questions, with the boundaries of an uninterrupted evaluation."""
    for start in range(0, len(questions), rows):
        batch = questions[start : start + rows]
        if left := [q for q in batch if (q.task.name, q.example_id) not in done]:
            yield left


def _asked(batch: list[Question], generate: Generate, head: Mapping[str, str]) -> list[SampleRow]:
    completions = generate([q.messages for q in batch], [q.task.max_tokens for q in batch])
    if len(completions) != len(batch):
        raise UserError(f"{len(completions)} completions for {len(batch)} prompts; one each")
    return [_sample(q, answer, head) for q, answer in zip(batch, completions, strict=True)]


def _sample(q: Question, answer: ModelAnswer, head: Mapping[str, str]) -> SampleRow:
    """One row; text that is no Unicode (lone surrogates) is replaced before it is judged."""
    sample: SampleRow = {
        "task": q.task.name,
        "example_id": q.example_id,
        "prompt_hash": q.prompt_hash,
        "completion": answer.text.encode("utf-8", "replace").decode("utf-8"),
        "tokens": answer.tokens,
        "finish": answer.finish,
        **head,
        "cluster": str(q.row.get("cluster") or ""),
        "example": canonical_json(dict(q.row)),
        "prompt": canonical_json(q.messages),
    }
    return scored(sample, q.task, q.row)


METRICS = ("exact_match", "format")
FILTER = "none"


def export(samples: Sequence[SampleRow], tasks: Mapping[str, Task], folder: Path) -> list[Path]:
    """Write the files of every task among the samples; returns their paths, the results last."""
    folder.mkdir(parents=True, exist_ok=True)
    by_task = summaries(samples)
    stamp = samples[0]["digest"][:12] if samples else "empty"
    written = []
    for name in by_task:
        own = [sample for sample in samples if sample["task"] == name]
        lines = [json.dumps(record(i, sample, tasks[name])) for i, sample in enumerate(own)]
        written.append(_publish(folder / f"samples_{name}_{stamp}.jsonl", "\n".join(lines) + "\n"))
    whole = json.dumps(results(by_task, tasks), indent=2, sort_keys=True)
    return [*written, _publish(folder / f"results_{stamp}.json", whole + "\n")]


def record(doc_id: int, sample: SampleRow, task: Task) -> dict[str, Any]:
    """One sample as lm-evaluation-harness logs it; ``target`` is the gold answer, if known."""
    doc = json.loads(sample["example"])
    target = task.gold(doc) if task.gold else ""
    generation = {"until": [], "do_sample": False, "max_gen_toks": task.max_tokens}
    return {
        "doc_id": doc_id,
        "doc": doc,
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": [sample["prompt"]], "arg_1": generation}},
        "resps": [[sample["completion"]]],
        "filtered_resps": [sample["extracted"] or ""],
        "filter": FILTER,
        "metrics": list(METRICS),
        "doc_hash": _hash(sample["example"]),
        "prompt_hash": _hash(sample["prompt"]),
        "target_hash": _hash(target),
        "exact_match": sample["reward"],
        "format": sample["format"],
    }


def results(by_task: Mapping[str, Summary], tasks: Mapping[str, Task]) -> dict[str, Any]:
    """The aggregate file: metrics by task, and how many rows and worked examples they stand on."""
    return {
        "results": {name: _metrics(name, summary) for name, summary in by_task.items()},
        "n-shot": {name: tasks[name].shots for name in by_task},
        "n-samples": {name: {"original": s.n, "effective": s.n} for name, s in by_task.items()},
        "versions": {name: tasks[name].version for name in by_task},
        "higher_is_better": {name: dict.fromkeys(METRICS, True) for name in by_task},
    }


def _metrics(name: str, summary: Summary) -> dict[str, Any]:
    """Shares and their standard errors, sqrt(p (1 - p) / (n - 1)); "N/A" for a single row."""
    metrics: dict[str, Any] = {"alias": name}
    for metric, share in zip(METRICS, (summary.accuracy, summary.format_rate), strict=True):
        spread = share * (1 - share) / (summary.n - 1) if summary.n > 1 else None
        metrics[f"{metric},{FILTER}"] = share
        metrics[f"{metric}_stderr,{FILTER}"] = "N/A" if spread is None else spread**0.5
    return metrics


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _publish(path: Path, text: str) -> Path:
    """Written whole beside its place, then renamed."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
