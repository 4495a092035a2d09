"""MLflow: where people look at rounds and name versions. It shows the ledger and never decides.

One run a round with its generations nested inside, one registered-model version a candidate. The
only module of this package that imports mlflow. MLflow has no exactly-once writes: versions and
runs are searched by tag before they are made, so that every call can be repeated.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent.review import REVIEW, review_word
from agent.store.migrations import ONE_AT_A_TIME

Alias = Literal["champion", "challenger", "previous", "anchor"]

DIGEST = "anchorage.digest"
PARENT = "anchorage.parent"
VERDICT = "anchorage.verdict"
_BREAK = "\n\n---\n\n"  # between the head of a description, which changes, and the rest
NOTE = "anchorage.note"
STATE = "anchorage.state"  # what the ledger says of a digest now
GENERATION = "anchorage.generation"
ANSWERS = "anchorage.answers"  # round and model of an evaluation run
ROUND = "anchorage.round"
# A server that accepts connections and never answers costs a call 2 * 10 s; MLflow's defaults
# (120 s, 7 retries with back-off) would keep it waiting for a quarter of an hour and more.
_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
# Named, since inferring them imports and runs the model for ten seconds.
_REQUIREMENTS = ["transformers", "torch", "safetensors"]


@dataclass(frozen=True, slots=True)
class Version:
    """One registered candidate."""

    number: str
    digest: str
    verdict: str
    review: str | None  # review_word of its review tag
    run_id: str | None
    state: str | None = None
    review_key: str = REVIEW  # the tag that holds the review
    description: str = ""

    @property
    def head(self) -> str:
        """The part of the description that says what to do; empty where there is none yet."""
        head, cut, _ = self.description.partition(_BREAK)
        return head if cut else ""


@dataclass(frozen=True, slots=True)
class AnswerTrace:
    """One row's answer, for MLflow's evaluation views."""

    row: str  # task and example id
    change: str  # fixed or broken
    messages: Sequence[Mapping[str, str]]
    completion: str
    gold: str  # "" where no right answer is known
    reward: float
    extracted: str | None


@dataclass(frozen=True, slots=True)
class Rows:
    """The training rows of a round: each row's hash in order, the first of them from traffic."""

    sha256: str  # of the file that holds them
    hashes: tuple[str, ...]
    from_traffic: int


class Registry:
    """One registered model and one experiment of the same name.

    Args:
        uri: MLflow's tracking URI (``sqlite:///...`` or a server's URL).
        name: Name of the experiment and of the registered model.
        artifacts: Folder for artifacts of a SQLite store; None leaves it to the server.
    """

    def __init__(self, uri: str, name: str, artifacts: Path | None) -> None:
        for key, value in _LIMITS.items():
            os.environ.setdefault(key, value)
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self.name, self.uri = name, uri
        mlflow.set_tracking_uri(uri)  # a process has one registry: logging a model reads globals
        mlflow.set_registry_uri(uri)
        # The first look at a SQLite store migrates it, by Alembic; a server may never answer.
        with ONE_AT_A_TIME if uri.startswith("sqlite") else nullcontext():
            self._client = mlflow.MlflowClient()
            self._experiment = self._ensure_experiment(artifacts)
        self._ensure_model()

    # -- rounds -----------------------------------------------------------------------------

    def start_round(
        self, round_id: str, params: Mapping[str, Any], rows: Rows | None = None
    ) -> str:
        """The MLflow run of a round, made on the first call and returned afterwards.

        ``rows`` become its training dataset: their hash, number and origin, never their text.
        """
        named, tags = f"tags.`{ROUND}` = '{round_id}'", {ROUND: round_id}
        if runs := self._client.search_runs([self._experiment], named, max_results=1):
            return str(runs[0].info.run_id)
        run = self._client.create_run(self._experiment, run_name=f"round {round_id}", tags=tags)
        for key, value in params.items():
            self._client.log_param(run.info.run_id, key, value)
        if rows is not None:
            self._client.log_inputs(run.info.run_id, datasets=[_dataset_input(round_id, rows)])
        return str(run.info.run_id)

    def log_generation(
        self, run_id: str, generation: int, metrics: Mapping[str, float], tags: Mapping[str, str]
    ) -> None:
        """One generation: a point on each of the round's curves and a nested run of its own.

        The nested run is made last: where it is there, the points of its generation are too.
        """
        tags = {"mlflow.parentRunId": run_id, GENERATION: str(generation), **tags}
        named = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        if self._client.search_runs([self._experiment], filter_string=named, max_results=1):
            return
        self.log_metrics(run_id, metrics, generation)
        name = f"generation {generation:03d}"
        child = self._client.create_run(self._experiment, run_name=name, tags=tags)
        self.log_metrics(child.info.run_id, metrics, generation)
        self._client.set_terminated(child.info.run_id)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log finite numbers; MLflow's SQLite store refuses the others."""
        import math
        import time

        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        points = [
            Metric(key, float(value), now_ms, step)
            for key, value in metrics.items()
            if math.isfinite(value)
        ]
        self._client.log_batch(run_id, metrics=points)

    def log_figure(self, run_id: str, figure: Any, path: str) -> None:
        """A matplotlib figure under ``path`` of the run's artifacts."""
        self._client.log_figure(run_id, figure, path)

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """A text file (a report, a verdict) under ``path`` of the run's artifacts."""
        self._client.log_text(run_id, text, path)

    def log_file(self, run_id: str, file: Path, folder: str) -> None:
        """A file, such as a per-sample table, under ``folder`` of the run's artifacts."""
        self._client.log_artifact(run_id, str(file), folder)

    def log_answers(self, round_id: str, who: str, answers: Sequence[AnswerTrace]) -> None:
        """Rows of a judged round as an evaluation run of one model, made on the first call.

        Each answer is a trace with its messages, the expected answer and its reward. The runs of
        two models hold the same rows, so that MLflow's view of evaluation runs compares them.
        """
        import mlflow
        from mlflow.entities import AssessmentSource as Source

        tags, name = {"mlflow.runType": "genai_evaluate"}, f"{round_id} {who}"
        named = f"tags.`{ANSWERS}` = '{name}'"
        if not answers or self._client.search_runs([self._experiment], named, max_results=1):
            return
        run = self._client.create_run(self._experiment, run_name=name, tags=tags)
        traces = [self._trace(run.info.run_id, answer) for answer in answers]
        # Traces are written by threads of MLflow's; an assessment needs its trace to be there.
        mlflow.flush_trace_async_logging()
        rows, verifier = (Source("CODE", name) for name in ("rows", "verifier"))
        for trace, each in zip(traces, answers, strict=True):
            gold = {"name": "expected_response", "value": each.gold, "source": rows}
            reward = {"name": "reward", "value": each.reward, "source": verifier}
            if each.gold:
                mlflow.log_expectation(trace_id=trace, **gold)
            why = f"extracted: {each.extracted}"
            mlflow.log_feedback(trace_id=trace, rationale=why, **reward)
        # Last: a run that was cut short has no such tag and is made again.
        self._client.set_tag(run.info.run_id, ANSWERS, name)
        self._client.set_terminated(run.info.run_id)

    def _trace(self, run_id: str, answer: AnswerTrace) -> str:
        import mlflow

        span = mlflow.start_span_no_context(
            answer.row,
            inputs={"messages": list(answer.messages)},
            tags={"row": answer.row, "change": answer.change},
            metadata={"mlflow.sourceRun": run_id},
            experiment_id=self._experiment,
        )
        span.set_outputs(answer.completion)
        span.end()
        return str(span.trace_id)

    def end_round(self, run_id: str) -> None:
        """Close the run."""
        self._client.set_terminated(run_id)

    # -- versions ---------------------------------------------------------------------------

    def register(
        self,
        run_id: str | None,
        directory: Path,
        *,
        digest: str,
        parent: str,
        verdict: str,
        description: str,
    ) -> Version:
        """The version of a digest, made on first call; ``mlflow.transformers.load_model`` reads it.

        MLflow copies the Hugging Face ``directory``. ``run_id`` is the round's that made it, None
        for the anchor; ``description`` is Markdown that needs nothing else to be read.
        """
        version = self.version(digest)
        if version is not None:  # shown before, and judged again since
            self.tag(digest, VERDICT, verdict)
            self._client.update_model_version(self.name, version.number, description)
            return version
        tags = {DIGEST: digest, PARENT: parent, VERDICT: verdict}
        with self._current(run_id):
            source, model_id = _log_model(directory, digest)
            made = self._client.create_model_version(
                self.name, source, run_id, tags, description=description, model_id=model_id
            )
        return Version(str(made.version), digest, verdict, None, run_id)

    def versions(self) -> list[Version]:
        """Every version, newest first."""
        versions = self._client.search_model_versions(f"name = '{self.name}'", max_results=1000)
        return sorted(map(_version, versions), key=lambda each: -int(each.number))

    def version(self, digest: str) -> Version | None:
        """The version of a digest, if there is one."""
        versions = self._client.search_model_versions(
            f"name = '{self.name}' and tags.`{DIGEST}` = '{digest}'", max_results=1
        )
        return _version(versions[0]) if versions else None

    def tag(self, digest: str, key: str, value: str) -> None:
        """Set a tag on the version of a digest; nothing without such a version."""
        version = self.version(digest)
        if version is not None:
            self._client.set_model_version_tag(self.name, version.number, key, value)

    def advise(self, version: Version, head: str) -> None:
        """Replace the head of a version's description; the rest stays."""
        _, cut, rest = version.description.partition(_BREAK)
        text = _BREAK.join((head, rest if cut else version.description))
        self._client.update_model_version(self.name, version.number, text)

    def note(self, number: str, text: str) -> None:
        """Set the note tag of a version, which may have been made by hand."""
        self._client.set_model_version_tag(self.name, number, NOTE, text)

    def refuse_review(self, number: str, text: str) -> None:
        """Remove a version's review tag, whoever made either, and leave a note that says why."""
        self.note(number, text)
        version = _version(self._client.get_model_version(self.name, number))
        self._client.delete_model_version_tag(self.name, number, version.review_key)

    def aliases(self) -> dict[str, Version]:
        """Version by alias, as MLflow has it now: a person may have moved one."""
        named = self._client.get_registered_model(self.name).aliases
        return {
            alias: _version(self._client.get_model_version(self.name, str(number)))
            for alias, number in named.items()
        }

    def set_alias(self, alias: Alias, digest: str) -> None:
        """Point an alias at the version of a digest, which must exist."""
        version = self.version(digest)
        if version is None:
            raise LookupError(f"alias {alias!r}: no version has digest {digest!r}")
        self._client.set_registered_model_alias(self.name, alias, version.number)

    def drop_alias(self, alias: Alias) -> None:
        """Remove an alias, if it is there."""
        if alias in self._client.get_registered_model(self.name).aliases:
            self._client.delete_registered_model_alias(self.name, alias)

    # -- making ------------------------------------------------------------------------------

    def _ensure_experiment(self, artifacts: Path | None) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(self.name)
        if experiment is None:
            location = artifacts.as_uri() if artifacts else None
            try:
                return str(self._client.create_experiment(self.name, artifact_location=location))
            except MlflowException:  # another process was first
                experiment = self._client.get_experiment_by_name(self.name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _ensure_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(
                self.name, description="Candidates of the learner; aliases follow the ledger."
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    @contextmanager
    def _current(self, run_id: str | None) -> Iterator[None]:
        """Make a run current, since a model is logged into that: the round's, or a new one for the
        anchor.
        """
        import mlflow

        if run_id is None:
            mlflow.set_experiment(experiment_id=self._experiment)
            with mlflow.start_run(run_name="anchor"):
                yield
        else:
            with mlflow.start_run(run_id=run_id):
                yield


def _version(version: Any) -> Version:
    tags = version.tags
    reviews = {key: word for key in tags if (word := review_word(key, tags[key])) is not None}
    key = REVIEW if REVIEW in reviews else min(reviews, default=REVIEW)
    return Version(
        str(version.version),
        tags.get(DIGEST, ""),
        tags.get(VERDICT, ""),
        reviews.get(key),
        version.run_id or None,
        tags.get(STATE),
        key,
        version.description or "",
    )


def _dataset_input(round_id: str, rows: Rows) -> Any:
    """The rows as a dataset version of hashes: a client's text is deleted on request, and MLflow
    would keep it.
    """
    import datasets
    import mlflow.data
    from mlflow.entities import DatasetInput, InputTag

    origin = ["traffic"] * rows.from_traffic
    origin += ["dataset"] * (len(rows.hashes) - rows.from_traffic)
    table = datasets.Dataset.from_dict({"sha256": list(rows.hashes), "origin": origin})
    version = mlflow.data.from_huggingface(
        table, name=f"rows of round {round_id}", digest=rows.sha256[:12]
    )
    tags = {
        "mlflow.data.context": "training",
        "anchorage.rows_sha256": rows.sha256,
        "anchorage.rows": str(len(rows.hashes)),
        "anchorage.from_traffic": str(rows.from_traffic),
    }
    entity = version._to_mlflow_entity()
    return DatasetInput(entity, [InputTag(key, value) for key, value in tags.items()])


def _log_model(directory: Path, digest: str) -> tuple[str, str]:
    """Copy a Hugging Face directory into the current run; returns its URI and id."""
    import mlflow.transformers

    info = mlflow.transformers.log_model(
        transformers_model=str(directory),
        name=f"candidate-{digest[:12]}",
        task="llm/v1/chat",
        pip_requirements=_REQUIREMENTS,
    )
    return str(info.model_uri), str(info.model_id)
