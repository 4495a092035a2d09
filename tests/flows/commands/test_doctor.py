"""For each check one thing that breaks it: the command's words and exit code, and its repair."""

import hashlib
import json
import os
import resource
import shutil
import socket
import sqlite3
import stat
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from agent.config import Settings, keep, kept, load
from agent.errors import UserError
from agent.gateway.keys import KeyStore
from agent.home import Home, remove_tree, secret, sign_file, write_sealed
from agent.learner import es
from agent.learner.penalty import Penalty
from agent.population.process import _opened
from agent.store.companions import companions
from agent.store.experience import Interaction
from agent.store.replay import snapshot_path
from agent.store.weights import Parameters, export
from deploy.embedded import MODEL
from deploy.serving.intact import Probes, intact, write_probes
from deploy.serving.lease import Leases
from deploy.serving.served import Served, write_served
from evaluators.sandbox import protections
from flows.cli import app
from flows.commands import checks, doctor
from flows.commands.checks import MachineNeeds
from flows.round_files import RoundFiles
from flows.service import Service


@dataclass
class Patient:
    """A home that was in use and is down: every kind of file is there, and whole."""

    home: Home
    champion: str
    candidate: str


def learnt(service: Service) -> Parameters:
    """A round of one generation in the journal; its weights, exported."""
    anchor, journal = service.origin, service.journal
    journal.open_run(
        "0001-t", anchor_digest=anchor.digest, parent_digest=anchor.digest, target="t",
        run_seed=1, plan={}, now=0.0,
    )  # fmt: skip
    parameters = Parameters.zeros(anchor)
    rewards = np.random.default_rng(0).random((4, 5))
    step = es.step(
        rewards.mean(axis=1), es.members(4, False), run_seed=1, sigma=0.1, generation=0,
        alpha=0.1, penalty=Penalty("l2", 1.0),
    )  # fmt: skip
    moved = parameters.apply(step)
    journal.commit("0001-t", step, rewards, moved.delta_hash, {"norm": moved.norm})
    journal.finish("0001-t", export(parameters, service.home.weights).name, "a test", now=2.0)
    service.home.snapshots.mkdir()
    parameters.save(snapshot_path(service.home.snapshots, parameters.delta_hash()))
    return parameters


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One such home, copied for each test."""
    from anchors import tiny_anchor

    root = tmp_path_factory.mktemp("doctor")
    anchor = tiny_anchor(root / "anchor")
    home = Home.at(root / "home")
    keep(home, Settings.model_validate({"model": {"path": str(anchor.directory)}}))
    service = Service.at(home.root)
    champion = service.champion()
    candidate = learnt(service).digest()
    write_served(home, Served(champion, str(anchor.directory)))
    write_probes(home, champion, Probes.of([({"role": "user"},)], [[{1: -1.0}]]))
    service.experience.close()
    for name in ("gateway", "mlflow", "prefect"):
        home.logs.mkdir(mode=0o700, exist_ok=True)
        home.log(name).write_text("")
    for folder in (home.mlflow, home.prefect, home.sockets, home.importance):
        folder.mkdir(mode=0o700)
    for path in (home.mlflow_db, home.mlflow_users, home.prefect / "prefect.db"):
        with closing(sqlite3.connect(path)) as made:
            made.execute("CREATE TABLE t (a)")
    weights = b"weights of a penalty"
    name = hashlib.sha256(weights).hexdigest()
    (home.importance / f"{name}.safetensors").write_bytes(weights)
    table = home.evaluations / candidate / "first-abc.parquet"
    table.parent.mkdir(parents=True)
    pq.write_table(pa.table({"reward": [1.0] * 50}), table)
    sign_file(table)
    run = home.run("0001-t")
    run.mkdir(parents=True)
    (run / "curve.json").write_text("[]")
    RoundFiles(home, "0001-t").add_to_selection(0, [0.5, 1.0])
    for path in (home.announced_json, home.shown_json, table.with_name("cold-a.json")):
        write_sealed(path, {"ledger": 1})
    for path in (home.password, home.salt, home.mlflow / "pages"):
        secret(path)
    service.ledger.close()
    service.journal.close()
    home.root.chmod(0o700)
    return home.root


@pytest.fixture
def patient(whole: Path, tmp_path: Path) -> Patient:
    home = Home(tmp_path / "home")
    shutil.copytree(whole, home.root)
    service = Service.at(home.root)
    return Patient(home, service.champion(), next(iter(set(service.kept()) - {service.champion()})))


ASKED = Interaction(
    "i", 1.0, "chat.completions", "tiny", "a" * 64, "ann", "ok", 0.1, 3, 5, example="{}"
)
MACHINE = {"memory", "disk", "vLLM", "descriptors"}  # of whoever runs the tests


def wrong(patient: Patient) -> dict[str, dict[str, Any]]:
    """The failed checks as the command prints them, and that its exit code says so."""
    told = CliRunner().invoke(app, ["doctor", "--json", "--home", str(patient.home.root)])
    checks = json.loads(told.stdout)["checks"]
    failed = {each["check"]: each for each in checks if not each["ok"]}
    assert told.exit_code == (1 if failed else 0)
    assert all(bool(each["repair"]) is not each["ok"] for each in checks)
    return {name: each for name, each in failed.items() if name not in MACHINE}


def flip(path: Path, place: float = 0.6) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x40
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o600)


def one(folder: Path, pattern: str = "*") -> Path:
    return next(each for each in sorted(folder.rglob(pattern)) if each.is_file())


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def first_bytes(path: Path) -> None:
    """What a damaged header is: another program's file type."""
    with path.open("r+b") as file:
        file.write(b"not a database!!")


def changed_row(table: str, field: str, value: str = "") -> Callable[[Patient], None]:
    def act(patient: Patient) -> None:
        with closing(sqlite3.connect(patient.home.state_db)) as state:
            sql = state.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
            triggers = sql.fetchall()
            for name, _ in triggers:
                state.execute(f"DROP TRIGGER {name}")
            changed = value or f"'x' || {field}"
            state.execute(f"UPDATE {table} SET {field} = {changed}")
            for _, statement in triggers:
                state.execute(statement)
            state.commit()

    return act


def dropped(database: str, what: str) -> Callable[[Patient], None]:
    def act(patient: Patient) -> None:
        with closing(sqlite3.connect(getattr(patient.home, database))) as opened:
            opened.execute(f"DROP {what}")

    return act


def changed_traffic(patient: Patient) -> None:
    """A row that may be learnt from, and a key that may do more."""
    store = Service.at(patient.home.root).experience
    KeyStore(store).create_key("ann", ["infer"])
    store.record([ASKED])
    with closing(sqlite3.connect(patient.home.experience_db)) as experience:
        experience.execute("UPDATE keys SET scopes = 'admin'")
        experience.execute("UPDATE interactions SET example = '{ }'")
        experience.commit()


def ahead(patient: Patient) -> None:
    """A row of a day ahead: the clock was set back since."""
    ledger = Service.at(patient.home.root).ledger
    later = time.time() + 86_400
    ledger.append(
        patient.candidate, "PROPOSED", epoch=ledger.epoch(), actor="a test", why="", now=later
    )


def overdue(patient: Patient) -> None:
    served = Served(patient.champion, "/")
    Leases(patient.home).begin(served, served, lease_s=1.0, now=1.0)


def stalled(patient: Patient) -> None:
    """Four starts, none of which answered."""
    count = {"begun": 4, "since": 1.0, "pid": 1, "next_at": 9.0, "wrote": "no memory"}
    write_sealed(patient.home.starts_json("engine"), count)


def lost(path: str) -> Callable[[Patient], None]:
    return lambda patient: (patient.home.root / path).unlink()


BREAKS: list[tuple[str, Callable[[Patient], object], str, str]] = [
    ("clock", ahead, "behind the newest row", "no"),
    ("permissions", lambda p: p.home.password.chmod(0o644), "password 644", "yes"),
    ("permissions", lambda p: p.home.root.chmod(0o755), "home 755", "yes"),
    ("settings.json", lambda p: flip(p.home.settings_json), "damaged", "no"),
    ("settings.json", lost("settings.json"), "is not there", "no"),
    ("state.db", lost("state.db"), "is not there", "yes"),
    ("state.db", lambda p: first_bytes(p.home.state_db), "not a database", "yes"),
    ("experience.db", lost("experience.db"), "is not there", "yes"),
    ("experience.db", lambda p: first_bytes(p.home.experience_db), "not a database", "yes"),
    ("mlflow.db", lambda p: first_bytes(p.home.mlflow_db), "not a database", "yes"),
    ("users.db", lambda p: first_bytes(p.home.mlflow_users), "not a database", "yes"),
    ("prefect.db", lambda p: first_bytes(p.home.prefect / "prefect.db"), "not a database", "yes"),
    ("prefect.db", lost("prefect/prefect.db"), "is not there", "yes"),
    ("traffic", changed_traffic, "2 rows are not what was written: interactions 1, keys", "yes"),
    ("schema", dropped("state_db", "TRIGGER ledger_UPDATE"), "lacks trigger ledger_UPDATE", "yes"),
    ("schema", dropped("experience_db", "INDEX ix_interactions_created"), "lacks index", "yes"),
    ("ledger", changed_row("ledger", "why"), "why is damaged", "no"),
    ("ledger", changed_row("epochs", "epoch", "epoch + 4"), "its epochs are not 1 to", "no"),
    ("journal", changed_row("generations", "delta_hash"), "delta_hash", "no"),
    (
        "kept weights",
        lambda p: flip(p.home.weights / p.candidate / "model.safetensors", 0.9),
        "the weights are",
        "yes",
    ),
    ("kept weights", lambda p: one(p.home.weights, "config.json").unlink(), "config.json", "yes"),
    ("serving.json", lost("serving.json"), "is not there", "yes"),
    (
        "serving.json",
        lambda p: p.home.serving_json.write_text(
            p.home.serving_json.read_text().replace(p.champion, "0" * 64)
        ),
        "damaged",
        "yes",
    ),
    (
        "serving.json",
        lambda p: write_served(p.home, Served(p.candidate, str(p.home.weights / p.candidate))),
        "the champion is",
        "yes",
    ),
    ("kept weights", lambda p: flip(one(p.home.weights, "manifest.json"), 0.2), "manifest", "yes"),
    ("kept weights", lambda p: flip(one(p.home.weights, "config.json"), 0.5), "config.json", "yes"),
    ("secret password", lambda p: flip(p.home.password), "is not what was written", "yes"),
    ("secret salt", lambda p: flip(p.home.salt), "is not what was written", "no"),
    ("secret pages", lambda p: flip(p.home.mlflow / "pages"), "is not what was written", "yes"),
    ("swap.json", overdue, "overdue", "yes"),
    ("documents", lambda p: one(p.home.runs).write_text("[{"), "Expecting", "no"),
    ("documents", lambda p: edit(p.home.announced_json, ": 1", ": 2"), "damaged", "no"),
    (
        "documents",
        lambda p: edit(one(p.home.runs, "selection.json"), "0.5", "0.7"),
        "damaged",
        "no",
    ),
    ("probes", lambda p: flip(one(p.home.probes)), "", "yes"),
    ("snapshots", lambda p: flip(one(p.home.snapshots), 0.95), "another hash", "yes"),
    ("evaluations", lambda p: flip(one(p.home.evaluations, "*.parquet")), "not what", "yes"),
    (
        "evaluations",
        lambda p: edit(one(p.home.evaluations, "cold*"), ": 1", ": 2"),
        "damaged",
        "yes",
    ),
    ("importance", lambda p: flip(one(p.home.importance)), "another sha256", "no"),
    ("engine starts", stalled, "3 starts ended before it answered", "yes"),
    ("processes", lambda p: p.home.stack_json.write_text("{}"), "supervisord is dead", "no"),
    ("sockets", lambda p: p.home.stack_json.write_text("{}"), "nobody listens", "no"),
    ("ports", lambda p: p.home.stack_json.write_text("{}"), "no answer", "no"),
]


def test_a_whole_home_is_well(patient: Patient) -> None:
    assert wrong(patient) == {}
    assert doctor.repair(patient.home.root) == [
        each for each in doctor.repair(patient.home.root) if each["check"] in MACHINE
    ]


@pytest.mark.parametrize(
    ("check", "act", "text", "mends"), BREAKS, ids=[f"{b[0]}-{i}" for i, b in enumerate(BREAKS)]
)
def test_each_fault_is_named_with_its_repair(
    patient: Patient, check: str, act: Callable[[Patient], object], text: str, mends: str
) -> None:
    act(patient)
    failed = wrong(patient)
    assert check in failed, failed
    assert text in failed[check]["found"]
    before = set(failed)
    told = CliRunner().invoke(app, ["repair", "--json", "--home", str(patient.home.root)])
    repairs = {each["check"]: each for each in json.loads(told.stdout)["repairs"]}
    assert repairs[check]["ok"] is (mends == "yes"), repairs[check]
    after = wrong(patient)
    assert (check in after) is (mends == "no")
    assert set(after) <= before  # a repair breaks nothing else


def test_a_lost_ledger_begins_again_with_the_original_model(patient: Patient) -> None:
    """What the lost file said cannot be known; the weights it learnt stay on the disk."""
    patient.home.state_db.unlink()
    doctor.repair(patient.home.root)
    service = Service.at(patient.home.root)
    assert service.champion() == service.origin.digest
    assert [row.state for row in service.ledger.history()] == ["ANCHOR"]
    assert patient.candidate in service.kept()


def test_a_header_is_mended_with_all_that_the_file_holds(patient: Patient) -> None:
    first_bytes(patient.home.state_db)
    doctor.repair(patient.home.root)
    service = Service.at(patient.home.root)
    assert [run.run_id for run in service.journal.runs()] == ["0001-t"]
    assert service.ledger.verify() == 1


def test_a_changed_anchor_is_a_fault(patient: Patient) -> None:
    directory = Service.at(patient.home.root).origin.directory
    here = Path(shutil.copytree(directory, patient.home.root.parent / "anchor"))
    settings = Settings.model_validate({"model": {"path": str(here)}})
    keep(patient.home, settings)
    write_served(patient.home, Served(patient.champion, str(here)))
    assert wrong(patient) == {}
    flip(here / "model.safetensors", 0.9)
    failed = wrong(patient)
    assert "the ledger says" in failed["anchor"]["found"]
    assert "original model" in failed["anchor"]["repair"]


def test_files_beside_the_anchor_are_recorded_and_put_back(patient: Patient) -> None:
    """Changed, missing, and a new one, which a person takes away; the copies mend themselves."""
    directory = Service.at(patient.home.root).origin.directory
    here = Path(shutil.copytree(directory, patient.home.root.parent / "anchor"))
    keep(patient.home, Settings.model_validate({"model": {"path": str(here)}}))
    write_served(patient.home, Served(patient.champion, str(here)))
    assert wrong(patient) == {}
    whole = {path.name: path.read_bytes() for path in here.iterdir()}
    config = here / "config.json"
    for name in (*companions(here), "generation_config.json"):
        new = name not in whole
        (here / name).write_text("{}") if new else flip(here / name)
        failed = wrong(patient)
        assert name in failed["anchor files"]["found"]
        assert "anchorage repair" in failed["anchor files"]["repair"]
        assert name in failed["serving.json"]["found"]  # no engine starts on them
        doctor.repair(patient.home.root)
        assert (set(wrong(patient)) == set()) is not new
        (here / "generation_config.json").unlink(missing_ok=True)
        assert {path.name: path.read_bytes() for path in here.iterdir()} == whole
    config.unlink()
    record = patient.home.original(here)
    for copy in sorted(record.iterdir()):
        config.write_bytes(whole["config.json"])
        before = copy.read_bytes()
        flip(copy, 0.1)
        assert wrong(patient) == {}
        assert copy.read_bytes() == before


def serve_state(path: Path, version: str) -> HTTPServer:
    """A gateway's admin side that says which version it stamps."""

    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"version": version, "held": None}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "a unix socket"

        def log_message(self, *_: object) -> None: ...

    class OnSocket(HTTPServer):
        address_family = socket.AF_UNIX

        def server_bind(self) -> None:
            self.socket.bind(str(path))

    server = OnSocket(("", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_another_version_than_the_ledgers_is_a_fault(patient: Patient) -> None:
    patient.home.stack_json.write_text("{}")  # as if it ran
    server = serve_state(patient.home.admin_socket, patient.candidate)
    try:
        told = wrong(patient)["served version"]
        assert f"gateway {patient.candidate[:12]}" in told["found"]
        assert "anchorage promote" in told["repair"]
    finally:
        server.shutdown()
        server.server_close()
    assert "served version" not in wrong(patient)


def test_own_tasks_need_the_sandboxs_protections(patient: Patient) -> None:
    """What is active is told in any case; what is missing is a fault where own code would run."""
    needs = MachineNeeds(confinement=frozenset({"no such means"}))
    told = {each["check"]: each for each in doctor.examine(patient.home.root, needs)}["sandbox"]
    assert told["ok"]
    assert all(line in told["found"] for line in protections().lines())
    settings = kept(patient.home).model_dump()
    settings["tasks"]["files"] = ["mine.py:TASK"]
    keep(patient.home, Settings.model_validate(settings))
    told = {each["check"]: each for each in doctor.examine(patient.home.root, needs)}["sandbox"]
    assert not told["ok"]
    assert "no such means" in told["found"]
    assert "trust" in told["repair"]


# Written anew by whatever starts, or only of use to a process that runs.
PASSING = ("*.lock", "*.log", "*.sha256", "*-shm", "supervisord.*", "auth.ini")


def test_every_kept_file_belongs_to_a_check(patient: Patient) -> None:
    """A new kind of file needs one: the long test flips a bit in each file that a check names."""
    found = doctor.kept_files(patient.home.root)
    files = {path for path in patient.home.root.rglob("*") if path.is_file()}
    passing = {path for path in files if any(path.match(pattern) for pattern in PASSING)}
    assert files - passing - set(found) == set()
    assert {path for path in found if patient.home.root not in path.parents} == set(
        Service.at(patient.home.root).origin.directory.iterdir()
    )


# SQLite checks the structure of its pages (ledger and journal their own rows, wherever in the
# file a bit may be free), and these documents are read as they are.
UNHASHED = (".db", "-wal", "curve.json")
# What only a copy of a person's can bring back, or is a person's to delete.
LEFT = {"secret salt", "ledger", "journal", "anchor", "engines", "documents", "importance"}


@pytest.mark.proof
def test_one_flipped_bit_in_any_kept_file_reaches_no_engine(patient: Patient) -> None:
    """What an engine would load is the version, whole, or nothing; doctor names what was damaged.

    The long test does the same to a running service.
    """
    home, anchor = patient.home, patient.home.root.parent / "anchor"
    shutil.copytree(Service.at(home.root).origin.directory, anchor)
    keep(home, Settings.model_validate({"model": {"path": str(anchor)}}))
    for state in ("PROPOSED", "EVALUATED", "PASSED", "SWAP_INTENT", "SWAPPED", "CHAMPION"):
        Service.at(home.root).record(patient.candidate, state, "a test")
    served = Served(patient.candidate, str(home.weights / patient.candidate))
    write_served(home, served)
    assert wrong(patient) == {}
    kept_as = {path.name: path.read_bytes() for path in Path(served.directory).iterdir()}
    for path, check in doctor.kept_files(home.root).items():
        before, saved = path.read_bytes(), patient.home.root.parent / "saved"
        if not before:  # a log of SQLite's that was merged
            continue
        shutil.copytree(home.root, saved, symlinks=True)
        flip(path)
        with suppress(UserError):
            assert intact(home, "engine") == served, path
            loaded = {each.name: each.read_bytes() for each in Path(served.directory).iterdir()}
            assert loaded == kept_as, path
        failed = wrong(patient)
        if path.read_bytes() != before and not path.name.endswith(UNHASHED):
            assert check in failed, (path, failed)
        doctor.repair(home.root)
        if path != home.settings_json:  # without it hardly anything can be looked at
            assert set(wrong(patient)) <= LEFT, path
        remove_tree(home.root)
        saved.rename(home.root)
        if anchor in path.parents:
            path.write_bytes(before)
        assert wrong(patient) == {}, path


@pytest.mark.parametrize("name", ["memory", "disk", "vLLM", "descriptors"])
def test_what_the_machine_lacks_is_said(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """MachineNeeds that no machine meets."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    limits = MachineNeeds(1 << 62, 1 << 62, 1 << 62, ("no-such-package",))
    told = {each["check"]: each for each in doctor.examine(patient.home.root, limits)}[name]
    assert not told["ok"]
    assert told["repair"]
    assert any(word in told["found"] for word in ("wanted", "installed"))


def test_a_new_home_has_nothing_wrong(tmp_path: Path) -> None:
    found = doctor.examine(tmp_path / "fresh")
    assert [each for each in found if not each["ok"] and each["check"] not in MACHINE] == []
    made = {path.name for path in (tmp_path / "fresh").iterdir()}
    assert made == set()  # looking makes nothing
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o700


def test_engines_that_do_not_fit_are_a_fault(tmp_path: Path) -> None:
    home, many = Home.at(tmp_path / "home"), load(engines={"population": 100_000})
    assert "on the CPU" in checks.engines(home, load(), MODEL)
    with pytest.raises(UserError, match=r"engines.population: 100000: needs .*, allowed here: "):
        checks.engines(home, many, MODEL)


# Checks whose fault needs more than one act on a home, with the tests that break what they look at.
BROKEN_ELSEWHERE: dict[str, Callable[..., None]] = {
    **dict.fromkeys(MACHINE, test_what_the_machine_lacks_is_said),
    "engines": test_engines_that_do_not_fit_are_a_fault,
    "sandbox": test_own_tasks_need_the_sandboxs_protections,
    "anchor": test_a_changed_anchor_is_a_fault,
    "anchor files": test_files_beside_the_anchor_are_recorded_and_put_back,
    "served version": test_another_version_than_the_ledgers_is_a_fault,
}


def test_every_check_has_a_test_that_breaks_what_it_looks_at(patient: Patient) -> None:
    checked = [each.name for each in doctor.HomeChecks(patient.home).checks()]
    assert len(set(checked)) == len(checked)
    assert set(checked) == {each[0] for each in BREAKS} | set(BROKEN_ELSEWHERE)


def test_what_a_round_makes_before_the_first_up_is_private(tmp_path: Path) -> None:
    service = Service(Home.at(tmp_path / "home"), load())
    assert service.registry.name == "anchorage"
    os.close(_opened(service.home.log("launcher")))
    assert {service.home.mlflow, service.home.logs} <= set(checks.private(service.home))
    assert checks.permissions(service.home)


def test_key_list_says_when_there_is_none(tmp_path: Path) -> None:
    arguments = ["key", "list", "--home", str(Home.at(tmp_path / "home").root)]
    shown = CliRunner().invoke(app, arguments)
    assert "no keys: the endpoint answers this machine only" in shown.output
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout) == []
