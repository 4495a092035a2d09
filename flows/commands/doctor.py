"""Checks of the machine and of each file, database and process of a home.

One list of checks; each says in words what repairs it, and many can do it (`repair`). A check that
fails tells why instead of raising, so that the others go on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agent.config import Settings, kept, load
from agent.errors import UserError
from agent.home import Home
from agent.store.anchor import Anchor
from agent.store.companions import companions
from agent.store.replay import is_sound
from agent.store.seals import drop_damaged
from agent.store.weights import require, short
from deploy.model import record_of, resolve
from deploy.serving.control import ControlError, observe
from deploy.serving.intact import mend, read_probes, require_version
from deploy.serving.lease import Leases
from deploy.serving.served import SLOTS, Served, read_served, read_slot, write_served
from evaluators.sandbox import protections
from flows.commands import checks
from flows.commands.checks import MachineNeeds, visible, written_in
from flows.service import Service

SERVER_S = 2.0  # longest wait of a check for a database server that does not answer
CLOCK_S = 60.0  # a ledger row may be this far ahead of the clock


@dataclass(frozen=True)
class Check:
    """One check: what performs it, what repairs a fault, the function that does so, if any, and
    the kept files whose damage it finds.
    """

    name: str
    look: Callable[[], str]  # what is there; any exception is a fault
    repair: str
    mend: Callable[[], object] | None = None
    files: Sequence[Path] = ()


def examine(home: Path | None, limits: MachineNeeds = MachineNeeds()) -> list[dict[str, Any]]:  # noqa: B008
    """Every check: {"check", "ok", "found", "repair"}; the last is empty where nothing is wrong."""
    return [_result(check) for check in HomeChecks(Home.at(home), limits).checks()]


def kept_files(home: Path | None) -> dict[Path, str]:
    """Every kept file that is there -> the check that finds its damage."""
    checks = HomeChecks(Home.at(home)).checks()
    return {path: each.name for each in checks for path in each.files if path.is_file()}


def repair(home: Path | None) -> list[dict[str, Any]]:
    """Do what can be done of each failed check, in their order; what is left names its repair."""
    done = []
    for check in HomeChecks(Home.at(home)).checks():
        before = _result(check)
        if before["ok"]:
            continue
        text = "left to a person"
        if check.mend is not None:
            try:
                check.mend()
                text = "repaired" if _result(check)["ok"] else "tried in vain"
            except Exception as error:  # the others are repaired all the same
                text = f"tried in vain: {' '.join(str(error).split())}"
        done.append(before | {"done": text, "ok": text == "repaired"})
    return done


def _result(check: Check) -> dict[str, Any]:
    try:
        return {"check": check.name, "ok": True, "found": check.look(), "repair": ""}
    except Exception as error:  # the boundary of one check
        text = " ".join(str(error).split()) or type(error).__name__
        return {"check": check.name, "ok": False, "found": text, "repair": check.repair}


class HomeChecks:
    """The checks of one home; what a check needs is opened by it, and never made anew."""

    def __init__(self, home: Home, limits: MachineNeeds = MachineNeeds()) -> None:  # noqa: B008  frozen
        self.home, self._limits = home, limits
        parts = (home.serving_json, home.stack_json, home.weights, home.settings_json)
        self.used = any(part.exists() for part in parts)

    def checks(self) -> Iterator[Check]:
        """In the order in which a repair builds on the ones before."""
        home, limits = self.home, self._limits
        yield Check(
            "vLLM", lambda: checks.vllm(limits), "pip install 'anchorage[cpu]' or 'anchorage[cuda]'"
        )
        yield Check(
            "memory", lambda: checks.memory(limits), "end other programs, or choose a smaller model"
        )
        yield Check(
            "engines",
            lambda: checks.engines(home, self._kept_settings(), self._original()),
            "change the settings of [engines], or choose a smaller model",
        )
        yield Check(
            "disk",
            lambda: checks.disk(home.root, limits),
            "delete what is not needed, or move the home",
        )
        yield Check(
            "descriptors",
            lambda: checks.descriptors(limits),
            f"ulimit -Hn {limits.descriptors}, or more",
        )
        yield Check("clock", self._clock, "set the machine's clock")
        yield Check(
            "permissions",
            lambda: checks.permissions(home),
            "anchorage repair, or chmod go=",
            lambda: checks.make_private(home),
        )
        yield Check(
            "sandbox",
            lambda: checks.sandbox(protections(), self._own_tasks(), limits),
            "use task files that you trust, or a kernel with Landlock and seccomp",
        )
        for path, wayout, again in (
            (home.password, "anchorage repair makes a new one; then down and up", True),
            (home.mlflow / "pages", "anchorage repair, then down and up", True),
            (home.salt, "restore it from a copy; a new one has other sealed rows", False),
        ):
            yield Check(
                f"secret {path.name}",
                lambda path=path: checks.secret_file(path),  # type: ignore[misc]
                wayout,
                (lambda path=path: checks.new_secret(path)) if again else None,  # type: ignore[misc]
                (path,),
            )
        yield Check(
            "settings.json",
            self._settings,
            "anchorage up --config FILE writes it anew",
            files=(home.settings_json,),
        )
        yield from self._databases()
        yield Check(
            "traffic",
            self._traffic,
            "anchorage repair removes damaged rows and ends damaged keys; make new ones with "
            "anchorage keys create",
            lambda: drop_damaged(self.service.experience.engine),
        )
        complete = lambda: checks.complete_schema(home)  # noqa: E731
        yield Check("schema", lambda: checks.schema(home), "anchorage repair", complete)
        yield Check("ledger", self._ledger, "restore state.db from a copy; the row is named")
        yield Check("journal", self._journal, "restore state.db from a copy; the row is named")
        yield Check(
            "anchor files",
            self._beside_anchor,
            "anchorage repair puts back what was recorded",
            self._restore,
            self._recorded(),
        )
        yield Check(
            "anchor",
            self._anchor,
            "fetch or install the original model's files again",
            files=self._shards(),
        )
        weights = [path for folder in visible(home.weights) for path in sorted(folder.iterdir())]
        yield Check(
            "kept weights", self._kept, "anchorage repair rebuilds them", self._rebuild, weights
        )
        chosen = (home.serving_json, *(home.slot_json(slot) for slot in SLOTS))
        yield Check("serving.json", self._serving, "anchorage repair", self._choose, chosen)
        yield Check(
            "swap.json",
            lambda: checks.lease(home),
            "anchorage repair, or wait",
            lambda: checks.end_lease(home),
            (home.swap_json,),
        )
        yield Check(
            "documents",
            lambda: checks.documents(home),
            "delete the file; it is written anew (stack.json: anchorage down, then up)",
            files=checks.all_documents(home),
        )
        for name, sound in (
            ("probes", self._probe),
            ("snapshots", self._snapshot),
            ("evaluations", checks.table),
            ("importance", checks.importance),
        ):
            folder = getattr(home, name)
            yield Check(
                name,
                lambda folder=folder, sound=sound: checks.all_sound(folder, sound),  # type: ignore[misc]
                "anchorage repair deletes the damaged ones; they are made again when needed",
                None
                if name == "importance"
                else lambda f=folder, s=sound: checks.drop_unsound(f, s),  # type: ignore[misc]
                written_in(folder),
            )
        yield Check(
            "processes",
            lambda: checks.processes(home),
            "anchorage repair, or down and up",
            lambda: checks.revived(home),
        )
        yield Check(
            "engine starts",
            lambda: checks.engine_starts(home),
            "see logs/engine.log; free memory, or restore what it names; anchorage repair ends the "
            "wait and tries again now, anchorage rollback serves another version",
            lambda: checks.start_now(home),
            [path for slot in SLOTS if (path := home.starts_json(slot)).exists()],
        )
        yield Check("sockets", lambda: checks.sockets(home), "anchorage down, then up")
        yield Check(
            "ports",
            lambda: checks.ports(home),
            "see the service's log, then anchorage down and up; a server by URL is for its owner",
        )
        yield Check("served version", self._agree, "wait for the next look, or anchorage promote")

    # -- the home's files -----------------------------------------------------------------------

    @cached_property
    def service(self) -> Service:
        """The parts of the home; UserError where its settings are damaged."""
        service = Service(self.home, self._kept_settings())
        service.wait_s = SERVER_S
        return service

    def _kept_settings(self) -> Settings:
        return kept(self.home) if self.home.settings_json.exists() else load()

    def _need_state(self) -> None:
        """As ``_need``, of journal and ledger; a server's are never missing, it is away."""
        if self._has_files()[0]:
            self._need(self.home.state_db)

    def _has_state(self) -> bool:
        return not self._has_files()[0] or self.home.state_db.exists()

    def _need(self, path: Path) -> None:
        """What is opened would be made anew where it is missing: that is looked at before."""
        if self.used and not path.exists():
            raise RuntimeError(f"{path.name} is not there, although the home was in use")

    def _settings(self) -> str:
        self._need(self.home.settings_json)
        return f"model {self._kept_settings().model.path}"

    def _clock(self) -> str:
        newest = 0.0
        if self._has_state():
            newest = max((row.time for row in self.service.ledger.history(1)), default=0.0)
        if newest > time.time() + CLOCK_S:
            raise RuntimeError(f"{newest - time.time():.0f} s behind the newest row of the ledger")
        return time.strftime("%Y-%m-%d %H:%M:%S %Z")

    def _databases(self) -> Iterator[Check]:
        """Each database that must be there, because the process that keeps it has run."""
        home = self.home
        state, traffic = self._has_files()
        for path, wanted in (
            (home.state_db, state and self.used),
            (home.experience_db, traffic and home.log("gateway").exists()),
            (home.mlflow_db, home.log("mlflow").exists()),
            (home.mlflow_users, home.log("mlflow").exists()),
            (home.prefect / "prefect.db", home.log("prefect").exists()),
        ):
            yield Check(
                path.name,
                lambda path=path, wanted=wanted: checks.database(path, wanted),  # type: ignore[misc]
                "anchorage down, then anchorage repair, or restore it from a copy",
                lambda path=path: checks.mend_database(home, path, self._kept_settings),  # type: ignore[misc]
                checks.of_database(path)[:2],
            )

    def _has_files(self) -> tuple[bool, bool]:
        """Whether journal and ledger are in a file of the home, and whether traffic is."""
        try:
            settings = self._kept_settings()
        except UserError:
            return True, True
        state, traffic = settings.state_at(self.home), settings.experience_at(self.home)
        return isinstance(state, Path), isinstance(traffic, Path)

    # -- what the databases say -----------------------------------------------------------------

    def _traffic(self) -> str:
        if self._has_files()[1] and not self.home.experience_db.exists():
            return "none yet"
        return checks.traffic(self.service.experience)

    def _ledger(self) -> str:
        self._need_state()
        if not self._has_state():
            return "none yet"
        return f"{self.service.ledger.verify()} rows, chain sound"

    def _journal(self) -> str:
        self._need_state()
        if not self._has_state():
            return "none yet"
        runs = self.service.journal.runs()
        rows = sum(self.service.journal.verify(run.run_id) for run in runs)
        return f"{len(runs)} rounds, {rows} rows, chains sound"

    def _anchor(self) -> str:
        anchor = Anchor.open(self.service.origin.directory)
        if self._has_state():
            first = [row for row in self.service.ledger.history(1 << 30) if row.state == "ANCHOR"]
            known = {row.digest for row in first} or {anchor.digest}
            if anchor.digest not in known:
                said, now = ", ".join(map(short, sorted(known))), short(anchor.digest)
                raise RuntimeError(f"the weights are {now}, the ledger says {said}")
        return f"{anchor.parameters:,} parameters, digest {short(anchor.digest)}"

    def _kept(self) -> str:
        folders = [path for path in visible(self.home.weights) if len(path.name) == 64]
        for folder in folders:
            require(folder, folder.name)
        return f"{len(folders)} versions beside the original, each as its digest says"

    def _rebuild(self) -> None:
        state = self._kept_settings().state_at(self.home)
        for folder in (path for path in visible(self.home.weights) if len(path.name) == 64):
            try:
                require(folder, folder.name)
            except UserError:
                mend(self.home, folder.name, self.service.origin, state)

    def _serving(self) -> str:
        if not self.home.serving_json.exists():
            self._need(self.home.serving_json)
            return "no version was chosen yet"
        served = read_served(self.home)
        for slot in SLOTS:
            if self.home.slot_json(slot).exists():
                read_slot(self.home, slot)
        require_version(self.home, served)
        self._need_state()
        champion = self.service.champion()
        if served.digest != champion and Leases(self.home).current() is None:
            raise RuntimeError(f"names {short(served.digest)}, the champion is {short(champion)}")
        return short(served.digest)

    def _choose(self) -> None:
        champion = self.service.champion()
        write_served(self.home, Served(champion, str(self.service.directory(champion))))

    def _own_tasks(self) -> bool:
        try:
            return bool(self._kept_settings().tasks.files)
        except UserError:  # a check of its own says so
            return False

    # -- the original model ---------------------------------------------------------------------

    def _original(self) -> Path | None:
        """The directory of the original model, if the settings lead to one without a download."""
        if not visible(self.home.originals):
            return None
        try:
            return resolve(self._kept_settings().model, self.home.models)
        except UserError:
            return None

    def _beside_anchor(self) -> str:
        if (directory := self._original()) is None:
            return "none recorded yet"
        record = record_of(self.home, directory)
        record.require()
        return f"{len(companions(record.folder)) - 1} files, as when this home first opened them"

    def _restore(self) -> None:
        if (directory := self._original()) is not None:
            record_of(self.home, directory).restore()

    def _recorded(self) -> list[Path]:
        if (directory := self._original()) is None:
            return []
        copies = sorted(self.home.original(directory).glob("*"))
        return [*companions(directory).values(), *copies]

    def _shards(self) -> list[Path]:
        directory = self._original()
        return sorted(directory.glob("*.safetensors")) if directory else []

    def _probe(self, path: Path) -> None:
        read_probes(self.home, path.stem)

    def _snapshot(self, path: Path) -> None:
        self._need_state()  # it says what the champion is tied to
        if not is_sound(self.service.anchor, path, path.stem):
            raise RuntimeError(f"{path.name}: its delta has another hash")

    def _agree(self) -> str:
        if not checks.is_wanted(self.home):
            return "the service is down"
        self._need_state()
        champion = self.service.champion()
        try:
            others = observe(self.home).others(champion)
        except ControlError as error:
            raise RuntimeError(str(error)) from None
        if others and Leases(self.home).current() is None:
            raise RuntimeError(f"{', '.join(others)}: the champion is {short(champion)}")
        return f"{short(champion)}, as the ledger says"
