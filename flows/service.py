"""The parts of one home: databases, weights, tasks; each is opened at its first use."""

import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING

from agent.config import Settings, kept, load, unheeded
from agent.errors import UserError
from agent.home import Home, secret
from agent.registry import Registry
from agent.sections import EMBEDDED
from agent.store.database import BUSY_SECONDS
from agent.store.journal import Journal
from agent.store.ledger import Entry, Ledger, StaleEpoch
from agent.store.postgres import move_state
from agent.store.weights import Anchor, require, short
from deploy.consoles import credentials
from deploy.embedded.rows import up_to as embedded_rows
from deploy.model import original, record_of
from deploy.serving.intact import mend
from evaluators.loading import Split, examples, rows
from evaluators.plugins import all_tasks, pinned, tuned
from evaluators.task import Row, Task
from evaluators.tasks import TASKS

if TYPE_CHECKING:  # loading these at a rollback would cost it their libraries' imports
    from agent.store.experience import ExperienceStore
    from evaluators.runner import Shots

LOG = logging.getLogger("anchorage.service")


def _user() -> str:
    """The name of this process's user; its number where it has none, as in some containers."""
    try:
        return getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@cache
def _say_once(line: str) -> None:
    """What is left out of account, said once a process: on stderr, or in a service's log."""
    LOG.warning("%s", line)


class Service:
    """One home and its settings; everything else is opened on first use."""

    def __init__(self, home: Home, settings: Settings) -> None:
        self.home = home
        self.settings = settings
        self.actor = f"{_user()}@{socket.gethostname()}"  # as the ledger names who decided
        self._anchors: dict[str, Anchor] = {}
        self._training: dict[str, dict[str, Row]] = {}
        self._evaluation: dict[tuple[str, int], list[Row]] = {}
        self.wait_s = BUSY_SECONDS  # longest wait for a database server that does not answer

    @classmethod
    def at(cls, root: Path | None = None, config: Path | None = None) -> "Service":
        """The service of a home; a running one keeps the settings it was started with.

        Raises:
            UserError: Bad settings, or a settings file beside a home that has its own.
        """
        home = Home.at(root)
        if config is None and home.settings_json.is_file():
            settings = kept(home)
            for line in unheeded(home, settings):
                _say_once(f"settings: {line}")
            return cls(home, settings)
        return cls(home, load(config))

    # -- state --------------------------------------------------------------------------------

    def has_state(self) -> bool:
        """Whether there is a journal and a ledger to read; a server always is."""
        where = self.settings.state_at(self.home)
        return isinstance(where, str) or where.exists()

    @cached_property
    def origin(self) -> Anchor:
        """The model this service was started with, memory-mapped."""
        # Looking at a home that was never used makes nothing in it.
        return original(self.home, self.settings.model, keep=self.has_state())

    @property
    def anchor(self) -> Anchor:
        """The model the champion is tied to: the original one, or the one a person moved it to."""
        return self.open_anchor(self.anchor_of(self.champion()))

    def anchor_of(self, digest: str) -> str:
        """The digest a version is anchored to: its own where it is an anchor."""
        if digest == self.origin.digest or any(
            entry.state == "ANCHOR" for entry in self.ledger.of(digest)
        ):
            return digest
        return self.journal.candidate(digest).anchor_digest

    def open_anchor(self, digest: str) -> Anchor:
        """An anchor by its digest, memory-mapped once."""
        if digest not in self._anchors:
            here = digest == self.origin.digest
            self._anchors[digest] = self.origin if here else Anchor.open(self.directory(digest))
        return self._anchors[digest]

    @cached_property
    def _state(self) -> str | Path:
        """Where journal and ledger are; a file that the home had before is moved to the server."""
        return move_state(self.home.state_db, self.settings.state_at(self.home), self.wait_s)

    @cached_property
    def journal(self) -> Journal:
        """Every generation of every run."""
        return Journal(self._state, self.wait_s)

    @cached_property
    def ledger(self) -> Ledger:
        """Every decision; the first process that opens it writes the anchor as its first row."""
        ledger = Ledger(self._state, self.wait_s)
        while ledger.champion() is None:
            with suppress(StaleEpoch):
                ledger.append(
                    self.origin.digest,
                    "ANCHOR",
                    epoch=ledger.acquire(self._process, time.time()),
                    actor=self.actor,
                    why="the model this service was started with",
                    now=time.time(),
                )
        return ledger

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Wait for a database server as long as it takes, until the block ends."""
        before = self.wait_s
        try:
            self._wait(math.inf)
            yield
        finally:
            self._wait(before)

    def _wait(self, seconds: float) -> None:
        if seconds == self.wait_s:
            return
        self.wait_s = seconds
        for name in ("journal", "ledger"):
            if (opened := self.__dict__.get(name)) is not None:
                opened.database.wait(seconds)
        if (store := self.__dict__.pop("experience", None)) is not None:
            store.close()  # opens again with this wait

    def take_over(self) -> int:
        """Become the controller: a new epoch; the previous controller's writes are refused."""
        return self.ledger.acquire(self._process, time.time())

    @property
    def _process(self) -> str:
        """This process, as the owner of an epoch."""
        return f"{self.actor}:{os.getpid()}"

    @cached_property
    def experience(self) -> "ExperienceStore":
        """Captured requests, their rewards, feedback and keys."""
        from agent.store.experience import ExperienceStore

        return ExperienceStore.open(self.settings.experience_at(self.home), self.wait_s)

    @cached_property
    def registry(self) -> Registry:
        """MLflow: the server of the settings, else SQLite under the home."""
        plan, artifacts = self.settings.projection, self.home.mlflow_artifacts
        if plan.mlflow_url:
            os.environ.update(credentials(self.home, plan.consoles))  # none of ours goes there
            return Registry(plan.mlflow_url, self.settings.model.name, None)
        for folder in (self.home.mlflow, artifacts):  # the mode does not hold for parents
            folder.mkdir(mode=0o700, exist_ok=True)
        return Registry(f"sqlite:///{self.home.mlflow_db}", self.settings.model.name, artifacts)

    def record(
        self,
        digest: str,
        state: str,
        why: str,
        *,
        epoch: int | None = None,
        actor: str | None = None,
        **more: object,
    ) -> Entry:
        """Append one ledger row as this process, or as the person ``actor``.

        ``more`` as ``Ledger.append`` says.

        A controller gives its own epoch and is refused once it was taken over; what changes
        nothing that is served (a verdict, a review) is written under the epoch in force.
        """
        while True:
            try:
                return self.ledger.append(
                    digest,
                    state,
                    epoch=self.ledger.epoch() if epoch is None else epoch,
                    actor=actor or self.actor,
                    why=why,
                    now=time.time(),
                    **more,  # type: ignore[arg-type]
                )
            except StaleEpoch:
                if epoch is not None:
                    raise

    def close(self) -> None:
        """Close the databases that were opened; they open again when they are needed."""
        for name in ("journal", "ledger", "experience"):
            if (opened := self.__dict__.pop(name, None)) is not None:
                opened.close()

    # -- weights ------------------------------------------------------------------------------

    def champion(self) -> str:
        """Digest of the version to serve."""
        return self.ledger.champion() or self.origin.digest

    def directory(self, digest: str) -> Path:
        """The Hugging Face directory of a digest, rebuilt from the journal where it is damaged.

        Raises:
            UserError: A digest whose weights are not kept, or are damaged and cannot be rebuilt; an
                original model with other config or tokenizer files than it had.
        """
        if digest == self.origin.digest:
            if self.has_state():  # else nothing is recorded yet
                record_of(self.home, self.origin.directory).require()
            return self.origin.directory
        directory = self.home.weights / digest
        if not directory.is_dir():
            kept = ", ".join(short(each) for each in self.kept())
            raise UserError(f"digest {short(digest)}: no weights are kept; kept: {kept}")
        try:
            require(directory, digest)
        except UserError as damage:
            LOG.error("%s: rebuilt from the journal: %s", short(digest), damage)
            mend(self.home, digest, self.origin, self.settings.state_at(self.home))
        return directory

    def kept(self) -> list[str]:
        """Digests whose weights can be served now, the original model first."""
        folders = sorted(self.home.weights.glob("[0-9a-f]*")) if self.home.weights.is_dir() else []
        return [self.origin.digest, *(path.name for path in folders if len(path.name) == 64)]

    def find(self, prefix: str) -> str:
        """The kept digest a name means: a prefix, or anchor, champion, previous, origin.

        Raises:
            UserError: None or several digests begin so.
        """
        named = {
            "origin": self.origin.digest,
            "anchor": self.anchor.digest,
            "champion": self.champion(),
            "previous": self.ledger.previous() or self.anchor.digest,
        }
        if prefix in named:
            return named[prefix]
        known = sorted({*self.kept(), *(entry.digest for entry in self.ledger.history(10_000))})
        found = [digest for digest in known if prefix and digest.startswith(prefix)]
        if len(found) != 1:
            listed = ", ".join([*named, *map(short, known)])
            raise UserError(f"digest {prefix!r} names {len(found)} versions; allowed: {listed}")
        return found[0]

    # -- tasks --------------------------------------------------------------------------------

    @cached_property
    def tasks(self) -> Mapping[str, Task]:
        """The built-in tasks and the user's own, with the settings' prompts and lengths."""
        chosen = self.settings.tasks
        prompts = {
            name: {"template": words} if isinstance(words, str) else words.model_dump()
            for name, words in chosen.prompts.items()
        }
        known = pinned(all_tasks(chosen.files, hidden=[self.home.root]), chosen.revisions)
        _refuse_unknown(self.settings, known)
        return tuned(known, prompts=prompts, max_tokens=chosen.max_tokens)

    def task(self, name: str) -> Task:
        """A task by its name.

        Raises:
            UserError: An unknown one.
        """
        if name not in self.tasks:
            raise UserError(f"task {name!r} is not known; allowed: {', '.join(self.tasks)}")
        return self.tasks[name]

    def target(self, name: str | None = None) -> Task:
        """The task a round trains on."""
        task = self.task(name or self.settings.tasks.target)
        if not task.target:
            allowed = ", ".join(each.name for each in self.tasks.values() if each.target)
            raise UserError(f"target {task.name!r} is a prior task only; allowed: {allowed}")
        return task

    def priors(self, target: str) -> list[str]:
        """The prior tasks of a round on ``target``: those set, else every other known task."""
        chosen = self.settings.tasks.priors
        names = self.tasks if chosen is None else chosen
        return [name for name in names if name != self.task(target).name]

    def rows(self, task: str, split: Split, count: int) -> list[Row]:
        """Up to ``count`` rows of a split ("train", "eval"), the same rows at every call.

        Evaluation rows that the model cannot take are left out, and said so once; training rows
        are set aside with their reason where prompts are collected.
        """
        chosen = self.task(task)
        if self._made_here(chosen):
            return list(embedded_rows(task, split, count, seed=0))
        if split == "eval" and (task, count) in self._evaluation:
            return list(self._evaluation[task, count])
        found = rows(chosen, split, data_dir=self.settings.tasks.data_dir, limit=count)
        if split == "train":
            return found
        self._evaluation[task, count] = self._that_fit(chosen, found)
        return list(self._evaluation[task, count])

    def _that_fit(self, task: Task, found: list[Row]) -> list[Row]:
        """The rows whose prompts, worked examples included, are shorter than the model's length.

        An engine refuses a longer one: it would end a start at its probes, or a round when its
        candidate is judged, after all that was learnt.
        """
        from agent.population.decoding import count_tokens  # see the imports above

        limit, shots = self.settings.model.max_model_len, self.shots(task.name)
        chats = [task.messages(row, shots(row)) for row in found]
        lengths = [count_tokens(self.origin.directory, chat, limit) for chat in chats]
        longer = [length for length in lengths if length >= limit]
        if longer and all(name != task.name for name, _ in self._evaluation):
            _say_once(
                f"{task.name}: {len(longer)} of {len(found)} evaluation rows are left out: their"
                f" prompts have up to {max(longer)} tokens; model.max_model_len allows {limit - 1}"
            )
        return [row for row, length in zip(found, lengths, strict=True) if length < limit]

    def training_rows(self, task: str) -> Mapping[str, Row]:
        """The training rows that may be named by id, by id; read once."""
        if task not in self._training:
            rows = self._train_split(task)[1]
            self._training[task] = {self.task(task).key(row): row for row in rows}
        return self._training[task]

    def selection_rows(self, task: str) -> list[Row]:
        """Rows of the training split that choose a candidate and that no round trains on."""
        return self._train_split(task)[0]

    def _train_split(self, task: str) -> tuple[list[Row], list[Row]]:
        """Selection rows, at most a fifth of the split, and training rows: always the same ones."""
        learner = self.settings.learner
        rows = self.rows(task, "train", learner.selection + 4 * learner.prompts)
        apart = min(learner.selection, len(rows) // 5)
        return rows[:apart], rows[apart:]

    def shots(self, task: str) -> "Shots":
        """A function from a row of the task to its worked examples; none for most tasks."""
        chosen = self.task(task)
        if not chosen.shots or not self._made_here(chosen):
            return examples(chosen, data_dir=self.settings.tasks.data_dir)
        pool = embedded_rows(task, "validation", 40 * chosen.shots, seed=0)
        group = chosen.shot_group or (lambda row: "")

        def same_group(row: Row) -> list[Row]:
            mine: list[Row] = [shot for shot in pool if group(shot) == group(row)]
            return mine[: chosen.shots]

        return same_group

    def _made_here(self, task: Task) -> bool:
        """Whether the task's rows are the embedded model's synthetic ones."""
        local = self.settings.tasks.data_dir is not None or task.source.file is not None
        return self.settings.model.path == EMBEDDED and not local and task.name in TASKS

    # -- secrets ------------------------------------------------------------------------------

    @cached_property
    def salt(self) -> str:
        """This installation's secret, which decides sealed draws; made on first use, mode 0600."""
        return secret(self.home.salt)


def _refuse_unknown(settings: Settings, known: Mapping[str, Task]) -> None:
    """Refuse settings that name a task which does not exist, or one to train on that is no target.

    All of them in one line.
    """
    chosen = settings.tasks
    named = [("tasks.target", chosen.target)]
    named += [("tasks.priors", name) for name in chosen.priors or ()]
    named += [("gate.margins", name) for name in settings.gate.margins]
    unknown = [f"{key} names {name!r}" for key, name in named if name not in known]
    if unknown:
        allowed = ", ".join(sorted(known))
        raise UserError(f"settings: {'; '.join(unknown)}; allowed: {allowed}")
    if not known[chosen.target].target:
        allowed = ", ".join(sorted(name for name, task in known.items() if task.target))
        raise UserError(
            f"settings: tasks.target names {chosen.target!r}, a prior task only; allowed: {allowed}"
        )
