"""Measuring a model on tasks, with engines started here or over an OpenAI endpoint."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from agent.errors import UserError
from agent.home import Home, remove_tree, write_atomically
from agent.store.replay import random_walk
from agent.store.weights import digest_of
from agent.store.weights import export as export_weights
from evaluators.openai_client import openai_generate
from evaluators.runner import (
    Generate,
    ModelAnswer,
    evaluate,
    export,
    read_samples,
    rescore,
    write_samples,
)
from evaluators.summary import SampleRow, discordance, summaries
from evaluators.task import Message
from flows.learn.evaluate import Questions, shots_of, unsealed
from flows.service import Service
from flows.session import Session, session
from flows.show.terminal import Reporter

NO_KEY = "local"  # an endpoint without keys takes any


@dataclass(frozen=True)
class RemoteModel:
    """Options of a URL: the model's name there, and the environment variable with its key."""

    name: str | None = None  # None: the name of the settings
    key_env: str = "OPENAI_API_KEY"  # an environment variable, so that no key stands in a command


def evaluate_model(
    home: Path | None,
    model: str,
    tasks: Sequence[str],
    limit: int | None,
    progress: Reporter,
    *,
    endpoint: RemoteModel | None = None,
    twice: bool = False,
    into: Path | None = None,
    control: int | None = None,
) -> dict[str, Any]:
    """Accuracy of a model with intervals.

    Weights that have answered these questions are not asked again; behind a URL the model may have
    changed, so that only an interrupted evaluation of it goes on.

    Args:
        home: The service's folder.
        model: anchor, champion, previous, a digest's beginning, a directory, or a URL.
        tasks: Names; all known tasks if empty.
        limit: Rows of each task; the settings' if None.
        progress: Reports rows done.
        endpoint: Options where ``model`` is a URL.
        twice: Whether to ask again and keep the A/A discordance beside the table.
        into: Folder for the samples in lm-evaluation-harness's format.
        control: Seed of a random walk of the same step lengths (``random_walk``), asked beside it.
    """
    with session(Home.at(home).root, progress) as opened:
        service = opened.service
        questions = unsealed(service, tasks or list(service.tasks), limit)
        notes = shortfalls(questions, limit)
        for note in notes:
            progress.say(note)
        digest, generate = _model(opened, model, endpoint or RemoteModel())
        out = service.home.evaluations / digest / f"asked-{questions.harness[:12]}.parquet"
        if is_url(model):  # the model behind a URL may have changed since its last answers
            out.unlink(missing_ok=True)
        _ask(opened, questions, generate, digest, out)
        samples = read_samples(out)
        report: dict[str, Any] = {"model": model, "digest": digest, "table": str(out)}
        report |= {"notes": notes}
        report |= {"tasks": _summaries(samples)}
        if twice:
            report |= {"discordance": _asked_again(opened, questions, generate, digest, out)}
        if control is not None:
            report |= {"control": _control(opened, questions, model, control)}
        if into is not None:
            report |= {"exported": [str(path) for path in export(samples, service.tasks, into)]}
    return report


def _control(opened: Session, questions: Questions, model: str, seed: int) -> dict[str, Any]:
    """Accuracy of a version's random-walk control on the same questions; its weights go again.

    Raises:
        UserError: A model that no round made.
    """
    service = opened.service
    if is_url(model) or Path(model).is_dir():
        raise UserError(f"model {model!r}: a control needs the journal of the round that made it")
    digest = service.find(model)
    run = service.journal.candidate(digest)
    anchor = service.open_anchor(run.anchor_digest)
    walk = random_walk(service.journal, anchor, digest, service.home.importance, seed)
    with TemporaryDirectory(dir=service.home.root) as scratch:
        directory = export_weights(walk, Path(scratch))
        out = service.home.evaluations / directory.name / f"asked-{questions.harness[:12]}.parquet"
        generate = _of_weights(opened, directory, directory.name)
        _ask(opened, questions, generate, directory.name, out)
        remove_tree(directory)  # its folder is read-only: the scratch folder could not go
    name = f"random walk {seed}"
    return {
        "model": name,
        "digest": directory.name,
        "tasks": _summaries(read_samples(out)),
    }


def rescore_table(home: Path | None, table: Path, out: Path | None) -> dict[str, Any]:
    """Score a table of samples with the tasks' current extraction, without a model.

    Args:
        home: The service's folder, whose settings name own tasks.
        table: Parquet written by an evaluation.
        out: Where the rescored table is written; nowhere if None.
    """
    before = read_samples(table)
    after = rescore(table, Service.at(home).tasks)
    if out is not None:
        write_samples(out, after)
    changed = [_change(old, new) for old, new in zip(before, after, strict=True) if old != new]
    return {
        "table": str(table),
        "digest": before[0]["digest"] if before else "",
        "rows": len(before),
        "changed": changed,
        "tasks": _summaries(after),
        "written": None if out is None else str(out),
    }


def shortfalls(questions: Questions, limit: int | None) -> list[str]:
    """One line for each task that has fewer rows to ask than the limit."""
    return [
        f"{task.name}: {len(rows)} rows, {limit} asked for; there are no more that no sealed "
        "draw touches"
        for task, rows in questions.rows
        if limit is not None and len(rows) < limit
    ]


def is_url(model: str) -> bool:
    """Whether a model is named by its endpoint."""
    return model.startswith(("http://", "https://"))


def _change(old: SampleRow, new: SampleRow) -> dict[str, Any]:
    """What a row said before and says now."""
    said = ("extracted", "reward", "format", "error")
    return {
        "task": old["task"],
        "example_id": old["example_id"],
        "before": {key: old[key] for key in said},
        "after": {key: new[key] for key in said},
    }


def _summaries(samples: Sequence[SampleRow]) -> dict[str, dict[str, Any]]:
    return {name: asdict(summary) for name, summary in summaries(samples).items()}


def _asked_again(
    opened: Session, questions: Questions, generate: Generate, digest: str, out: Path
) -> Mapping[str, Any]:
    """The same weights once more: how many verdicts and texts differ, kept beside the table."""
    again = out.with_name(f"again-{out.name}")
    again.unlink(missing_ok=True)
    _ask(opened, questions, generate, digest, again)
    differences = discordance(read_samples(out), read_samples(again))
    rates = {name: asdict(each) | {"rate": each.rate} for name, each in differences.items()}
    write_atomically(out.with_name(f"{out.stem}.discordance.json"), json.dumps(rates, indent=1))
    return rates


def _model(opened: Session, model: str, endpoint: RemoteModel) -> tuple[str, Generate]:
    """The name under which results are kept, and how to ask."""
    if is_url(model):
        name = endpoint.name or opened.service.settings.model.name
        key = os.environ.get(endpoint.key_env, NO_KEY)
        folder = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{model}_{name}")
        return folder, openai_generate(model, key, name)
    path = Path(model)
    if path.is_dir():
        digest, directory = digest_of(path), path
    else:
        digest = opened.service.find(model)
        directory = opened.service.directory(digest)
    return digest, _of_weights(opened, directory, digest)


def _of_weights(opened: Session, directory: Path, digest: str) -> Generate:
    """Ask these weights; an engine is started only if there is something to ask."""
    load = cache(lambda: opened.population.load(directory, digest))

    def generate(chats: list[list[Message]], max_tokens: list[int]) -> Sequence[ModelAnswer]:
        load()
        return opened.population.generate(chats, max_tokens)

    return generate


def _ask(opened: Session, questions: Questions, generate: Generate, digest: str, out: Path) -> None:
    total = sum(len(rows) for _, rows in questions.rows)
    if not total:
        raise UserError("no rows to ask; choose other tasks or a larger --limit")
    advance = opened.progress.track(f"evaluate {digest[:12]}", total)
    evaluate(
        questions.rows,
        generate,
        digest=digest,
        harness=questions.harness,
        out=out,
        shots=shots_of(opened.service, questions.rows),
        progress=lambda done, _total: advance(done),
    )
