"""Checks of the machine and of each file, database and process of a home.

One list of checks; each says in words what repairs it, and many can do it (`repair`). A check that
fails tells why instead of raising, so that the others go on.
"""

import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agent.config import Settings, kept, load
from agent.errors import UserError
from agent.home import Home, read_sealed
from agent.store.anchor import Anchor
from agent.store.replay import is_sound
from agent.store.weights import require, short
from deploy import stack
from deploy.serving.control import ControlError, listener_of, observe
from deploy.serving.controller import settle_offline
from deploy.serving.intact import mend, read_probes
from deploy.serving.lease import Leases
from deploy.serving.served import SLOTS, Served, read_served, read_slot, write_served
from deploy.supervise import Probe, answers, revive, states, supervisor_of, survivors
from flows.commands.checks import (
    MachineNeeds,
    all_sound,
    database,
    descriptors,
    disk,
    drop_unsound,
    importance,
    memory,
    table,
    visible,
    vllm,
)
from flows.service import Service

CLOCK_S = 60.0  # a ledger row may be this far ahead of the clock
MAGIC = b"SQLite format 3\0"  # how every SQLite file begins


@dataclass(frozen=True)
class Check:
    """One check: what performs it, what repairs a fault, and the function that does so, if any."""

    name: str
    look: Callable[[], str]  # what is there; any exception is a fault
    repair: str
    mend: Callable[[], object] | None = None


def examine(home: Path | None, limits: MachineNeeds = MachineNeeds()) -> list[dict[str, Any]]:  # noqa: B008
    """Every check: {"check", "ok", "found", "repair"}; the last is empty where nothing is wrong."""
    return [_result(check) for check in HomeChecks(Home.at(home), limits).checks()]


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
            "vLLM", lambda: vllm(limits), "pip install 'anchorage[cpu]' or 'anchorage[cuda]'"
        )
        yield Check(
            "memory", lambda: memory(limits), "end other programs, or choose a smaller model"
        )
        yield Check(
            "disk", lambda: disk(home.root, limits), "delete what is not needed, or move the home"
        )
        yield Check(
            "descriptors",
            lambda: descriptors(limits),
            f"ulimit -Hn {limits.descriptors}, or more",
        )
        yield Check("clock", self._clock, "set the machine's clock")
        yield Check(
            "permissions", self._permissions, "anchorage repair, or chmod go=", self._make_private
        )
        yield Check("settings.json", self._settings, "anchorage up --config FILE writes it anew")
        yield from self._databases()
        yield Check("ledger", self._ledger, "restore state.db from a copy; the row is named")
        yield Check("journal", self._journal, "restore state.db from a copy; the row is named")
        yield Check("anchor", self._anchor, "fetch or install the original model's files again")
        yield Check("kept weights", self._kept, "anchorage repair rebuilds them", self._rebuild)
        yield Check("serving.json", self._serving, "anchorage repair", self._choose)
        yield Check("swap.json", self._lease, "anchorage repair, or wait", self._end_lease)
        yield Check("documents", self._documents, "delete the file; it is written anew")
        for name, sound in (
            ("probes", self._probe),
            ("snapshots", self._snapshot),
            ("evaluations", table),
            ("importance", importance),
        ):
            folder = getattr(home, name)
            yield Check(
                name,
                lambda folder=folder, sound=sound: all_sound(folder, sound),  # type: ignore[misc]
                "anchorage repair deletes the damaged ones; they are made again when needed",
                None if name == "importance" else lambda f=folder, s=sound: drop_unsound(f, s),  # type: ignore[misc]
            )
        yield Check("processes", self._processes, "anchorage repair, or down and up", self._revive)
        yield Check("sockets", self._sockets, "anchorage down, then up")
        yield Check("ports", self._ports, "see the service's log, then anchorage down and up")
        yield Check("served version", self._agree, "wait for the next look, or anchorage promote")

    # -- the home's files -----------------------------------------------------------------------

    @cached_property
    def service(self) -> Service:
        """The parts of the home; UserError where its settings are damaged."""
        return Service(self.home, self._kept_settings())

    def _kept_settings(self) -> Settings:
        return kept(self.home) if self.home.settings_json.exists() else load()

    def _need(self, path: Path) -> None:
        """What is opened would be made anew where it is missing: that is looked at before."""
        if self.used and not path.exists():
            raise RuntimeError(f"{path.name} is not there, although the home was in use")

    def _settings(self) -> str:
        self._need(self.home.settings_json)
        return f"model {self._kept_settings().model.path}"

    def _clock(self) -> str:
        newest = 0.0
        if self.home.state_db.exists():
            newest = max((row.time for row in self.service.ledger.history(1)), default=0.0)
        if newest > time.time() + CLOCK_S:
            raise RuntimeError(f"{newest - time.time():.0f} s behind the newest row of the ledger")
        return time.strftime("%Y-%m-%d %H:%M:%S %Z")

    def _private(self) -> list[Path]:
        home = self.home
        names = [home.root, home.sockets, home.mlflow, home.prefect, home.logs]
        names += [home.password, home.salt, home.state_db, home.experience_db]
        return [path for path in names if path.exists()]

    def _permissions(self) -> str:
        open_ones = [path for path in self._private() if path.stat().st_mode & 0o077]
        if open_ones:
            listed = ", ".join(f"{each.name} {each.stat().st_mode & 0o777:o}" for each in open_ones)
            raise RuntimeError(f"others may read: {listed}")
        return f"{len(self._private())} private files and folders"

    def _make_private(self) -> None:
        for path in self._private():
            path.chmod(path.stat().st_mode & 0o700)

    def _databases(self) -> Iterator[Check]:
        """Each database that must be there, because the process that keeps it has run."""
        home = self.home
        always = self.used
        url = self._experience_url()
        for path, wanted in (
            (home.state_db, always),
            (home.experience_db, url is None and home.log("gateway").exists()),
            (home.mlflow_db, home.log("mlflow").exists()),
            (home.mlflow_users, home.log("mlflow").exists()),
            (home.prefect / "prefect.db", home.log("prefect").exists()),
        ):
            yield Check(
                path.name,
                lambda path=path, wanted=wanted: database(path, wanted),  # type: ignore[misc]
                "anchorage down, then anchorage repair, or restore it from a copy",
                lambda path=path: self._mend_database(path),  # type: ignore[misc]
            )

    def _experience_url(self) -> str | None:
        try:
            return self._kept_settings().gateway.experience_url
        except UserError:
            return None

    def _mend_database(self, path: Path) -> None:
        """Give the file its first bytes again; where that is not it, start a new one beside it."""
        if survivors(self.home):
            raise UserError("the service runs; allowed: anchorage down first")
        if path.exists():
            aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
            shutil.copy2(path, aside)
            with path.open("r+b") as file:
                file.write(MAGIC)
            try:
                database(path, True)
                return
            except (sqlite3.Error, RuntimeError):
                for part in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
                    part.unlink(missing_ok=True)
        if path == self.home.state_db:  # a new ledger begins with the original model, which serves
            service = Service(self.home, self._kept_settings())
            champion = service.champion()
            write_served(self.home, Served(champion, str(service.directory(champion))))
        elif path == self.home.experience_db:
            service = Service(self.home, self._kept_settings())
            service.experience.close()
        else:  # MLflow and Prefect make theirs anew when they start, and are shown everything again
            with closing(sqlite3.connect(path)) as made:
                made.execute("VACUUM")

    # -- what the databases say -----------------------------------------------------------------

    def _ledger(self) -> str:
        self._need(self.home.state_db)
        if not self.home.state_db.exists():
            return "none yet"
        return f"{self.service.ledger.verify()} rows, chain sound"

    def _journal(self) -> str:
        self._need(self.home.state_db)
        if not self.home.state_db.exists():
            return "none yet"
        runs = self.service.journal.runs()
        rows = sum(self.service.journal.verify(run.run_id) for run in runs)
        return f"{len(runs)} rounds, {rows} rows, chains sound"

    def _anchor(self) -> str:
        anchor = Anchor.open(self.service.origin.directory)
        if self.home.state_db.exists():
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
        for folder in (path for path in visible(self.home.weights) if len(path.name) == 64):
            try:
                require(folder, folder.name)
            except UserError:
                mend(self.home, folder.name, self.service.origin)

    def _serving(self) -> str:
        if not self.home.serving_json.exists():
            self._need(self.home.serving_json)
            return "no version was chosen yet"
        served = read_served(self.home)
        for slot in SLOTS:
            if self.home.slot_json(slot).exists():
                read_slot(self.home, slot)
        require(Path(served.directory), served.digest)
        self._need(self.home.state_db)
        champion = self.service.champion()
        if served.digest != champion and Leases(self.home).current() is None:
            raise RuntimeError(f"names {short(served.digest)}, the champion is {short(champion)}")
        return short(served.digest)

    def _choose(self) -> None:
        champion = self.service.champion()
        write_served(self.home, Served(champion, str(self.service.directory(champion))))

    def _lease(self) -> str:
        lease = Leases(self.home).current()
        if lease is None:
            return "nobody swaps"
        if lease.expired(time.time()):
            raise RuntimeError(f"the swap to {short(lease.target.digest)} is overdue")
        return f"a swap to {short(lease.target.digest)} is under way"

    def _end_lease(self) -> None:
        if survivors(self.home):
            raise UserError("the service runs: its watchdog ends an overdue swap")
        settle_offline(self.home, time.time())

    def _documents(self) -> str:
        home = self.home
        named = [home.stack_json, home.reviews_json, home.aliases_json]
        found = [path for path in named if path.exists()]
        found += sorted(home.runs.glob("*/*.json")) if home.runs.is_dir() else []
        for path in found:
            if isinstance(json.loads(path.read_bytes()), dict):
                read_sealed(path)
        return f"{len(found)} documents"

    def _probe(self, path: Path) -> None:
        read_probes(self.home, path.stem)

    def _snapshot(self, path: Path) -> None:
        self._need(self.home.state_db)  # it says what the champion is tied to
        if not is_sound(self.service.anchor, path, path.stem):
            raise RuntimeError(f"{path.name}: its delta has another hash")

    # -- what runs ------------------------------------------------------------------------------

    def _wanted(self) -> bool:
        return self.home.stack_json.exists() or bool(survivors(self.home))

    def _processes(self) -> str:
        if not self._wanted():
            return "the service is down"
        if supervisor_of(self.home) is None:
            count = len(survivors(self.home))
            raise RuntimeError(f"supervisord is dead, {count} processes run without it")
        ended = [
            f"{each.name} is {each.state}"
            for each in states(self.home)
            if each.state not in ("running", "starting") and each.name not in SLOTS[1:]
        ]
        if ended:
            raise RuntimeError(", ".join(ended))
        return f"{len(states(self.home))} services under their supervisord"

    def _revive(self) -> None:
        if not revive(self.home):
            raise UserError("a service ended; its log says why")

    def _sockets(self) -> str:
        if not self._wanted():
            return "the service is down"
        slot = read_served(self.home).slot
        home = self.home
        wanted = (home.engine_socket(slot), home.admin_socket, home.supervisor_socket)
        silent = [path.name for path in wanted if listener_of(path) is None]
        if silent:
            raise RuntimeError(f"nobody listens on {', '.join(silent)}")
        return f"{len(wanted)} listen"

    def _ports(self) -> str:
        if not self._wanted():
            return "the service is down"
        record = stack.status(self.home)
        paths = {"endpoint": "/healthz", "mlflow": "/health", "prefect": "/api/health"}
        silent = [
            f"{name} at {record[name]}"
            for name, path in paths.items()
            if not record[name] or not answers(Probe(f"{record[name]}{path}"), 10.0)
        ]
        if silent:
            raise RuntimeError(f"no answer: {', '.join(silent)}")
        return ", ".join(str(record[name]) for name in paths)

    def _agree(self) -> str:
        if not self._wanted():
            return "the service is down"
        self._need(self.home.state_db)
        champion = self.service.champion()
        try:
            others = observe(self.home).others(champion)
        except ControlError as error:
            raise RuntimeError(str(error)) from None
        if others and Leases(self.home).current() is None:
            raise RuntimeError(f"{', '.join(others)}: the champion is {short(champion)}")
        return f"{short(champion)}, as the ledger says"
