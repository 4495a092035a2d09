"""The home of a service: the one folder it owns, the name of everything in it, and how files there
are written and locked.

Files beside a single round (``runs/<run>/...``) are named by ``flows``, which alone reads them.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from agent.errors import UserError

LOCK_POLL_S = 0.01  # filelock polls; its default of 0.05 s would show in a swap
FOREVER_S = -1.0


class _In:
    """A path below the folder of a home."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __get__(self, home: "Home", _kind: type) -> Path:
        return home.root / self._path


@dataclass(frozen=True)
class Home:
    """The one folder a service owns, and the name of everything in it."""

    root: Path

    @classmethod
    def at(cls, root: Path | None = None) -> "Home":
        """The given folder, else ``ANCHORAGE_HOME``, else ``.anchorage`` here; made private.

        Raises:
            UserError: The path is a file, or somebody else put it into a folder that all may write.
        """
        chosen = root or Path(os.environ.get("ANCHORAGE_HOME", ".anchorage"))
        home = cls(chosen.expanduser().resolve())
        try:
            home.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"home {str(home.root)!r} is a file; give a folder") from None
        # Its settings name files that are run. In a folder such as /tmp anybody could make one.
        owner, everybody = home.root.stat().st_uid, home.root.parent.stat().st_mode & 0o002
        if everybody and owner not in (0, os.getuid()):
            allowed = "allowed: one of your own, or a folder that only you may write in"
            raise UserError(f"home {str(home.root)!r} was made by user {owner}; {allowed}")
        return home

    # -- databases and settings ---------------------------------------------------------------

    state_db = _In("state.db")  # SQLite: journal and ledger
    # SQLite: interactions, rewards, feedback, keys (unless the settings give a URL)
    experience_db = _In("experience.db")
    settings_json = _In("settings.json")  # the settings the running service was started with
    started_json = _In("started.json")  # the settings file and options that `up` was given
    salt = _In("salt")  # this installation's secret, which decides the sealed draws; mode 0600
    first_key = _In("first.key")  # of a gateway on a cluster, made before it starts; mode 0600
    password = _In("password")  # the password of MLflow's and Prefect's servers; mode 0600

    # -- learning and evaluation --------------------------------------------------------------

    models = _In("models")  # models read from GGUF files, one Hugging Face directory each
    weights = _In("weights")  # one Hugging Face directory per kept digest
    # what lay beside the weights of an original model when this home first opened it
    originals = _In("original")
    snapshots = _In("snapshots")  # caches of delta; deleting them changes nothing
    # weights of penalties, by sha256: what a replay of the rounds that used them needs
    importance = _In("importance")
    evaluations = _In("evaluations")  # per-sample tables, one folder per digest
    runs = _In("runs")  # one folder per round
    round_lock = _In("round.lock")  # held by the process that runs a round: one at a time
    # held by a loop from before its verdict until the promotion that follows has ended
    verdict_lock = _In("verdict.lock")

    # -- serving ------------------------------------------------------------------------------

    serving_json = _In("serving.json")  # the champion: what every engine that starts has to load
    chat_template = _In("chat_template.jinja")  # the one that is set, for engines that want a file
    probes = _In("probes")  # what a cold engine answered to fixed prompts, one file per digest
    # weights of single members while an engine is started on each; and of certification
    members = _In("members")
    swap_json = _In("swap.json")  # the lease of the swap under way; absent when there is none
    swap_lock = _In("swap.lock")  # held while swap.json is read and replaced
    sockets = _In("sockets")  # Unix sockets, mode 0700
    admin_socket = _In("sockets/gateway-admin.sock")  # where the gateway takes hold, release, flip
    supervisor_socket = _In("sockets/super.sock")  # where supervisord takes its XML-RPC

    # -- the stack of processes ---------------------------------------------------------------

    # supervisord's configuration; its command line names it, which is how it is known
    supervisor_config = _In("supervisord.conf")
    supervisor_pid = _In("supervisord.pid")  # where supervisord writes its process id
    stack_json = _In("stack.json")  # addresses of the running stack, its clients' environment
    ports_json = _In("ports.json")  # the ports of the last `up`, which the next one takes again
    stack_lock = _In("stack.lock")  # held by `up` and `down`
    logs = _In("logs")  # one log per process
    vllm_cache = _In("cache/vllm")  # vLLM's compiled kernels and the like
    prefect = _In("prefect")  # Prefect's home

    # -- MLflow -------------------------------------------------------------------------------

    mlflow = _In("mlflow")  # MLflow's database and artifacts
    mlflow_db = _In("mlflow/mlflow.db")  # SQLite: MLflow's runs and registered versions
    mlflow_artifacts = _In("mlflow/artifacts")  # plots, tables and models of MLflow
    mlflow_users = _In("mlflow/users.db")  # SQLite: who may sign in to MLflow
    reviews_json = _In("reviews.json")  # which user of MLflow set which review tag or alias
    # which digests the champion alias in MLflow was last set to by this service
    aliases_json = _In("aliases.json")
    aliases_lock = _In("aliases.lock")  # held while aliases are set, or compared with aliases.json
    shown_json = _In("shown.json")  # how much of the ledger MLflow has been given
    announced_json = _In("announced.json")  # how much of the ledger Prefect has as events
    shown_lock = _In("shown.lock")  # held by the process that writes to MLflow

    demo = _In("demo")  # the demo's own home, inside this one

    # -- names made of another name -----------------------------------------------------------

    def run(self, run_id: str) -> Path:
        """The folder of one round: its rows, curve and report."""
        return self.runs / run_id

    def original(self, directory: Path) -> Path:
        """The copies of an original model's files, by where the model lies."""
        return self.originals / hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]

    def slot_json(self, slot: str) -> Path:
        """What the engine of a slot beside the active one has to load."""
        return self.root / f"{slot}.json"

    def starts_json(self, slot: str) -> Path:
        """How often the engine of a slot was started since it last answered."""
        return self.root / f"{slot}-starts.json"

    def probes_json(self, digest: str) -> Path:
        """What a cold engine with this digest answered."""
        return self.probes / f"{digest}.json"

    def certificate_json(self, key: str) -> Path:
        """How weights may be put into engines of one model configuration and vLLM version."""
        return self.root / "certificates" / f"{key[:32]}.json"

    def engine_socket(self, slot: str) -> Path:
        """Where the engine of a slot listens."""
        return self.sockets / f"{slot}.sock"

    def log(self, name: str) -> Path:
        """The log of one process."""
        return self.logs / f"{name}.log"

    def picture(self, name: str) -> Path:
        """A plot made for a person."""
        return self.root / f"{name}.png"


# -- locks ------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, *, taken: str, wait_s: float = FOREVER_S) -> Iterator[None]:
    """Hold a lock file, against other processes and against other calls of this one.

    The system frees it when its holder dies. The file stays: removing it would let a process that
    waits on the old file and one that makes a new file both hold the lock.

    Args:
        path: The lock file, one of those that ``Home`` names.
        taken: The message when it stays taken: what is locked, and what is allowed.
        wait_s: Longest wait for another holder; 0: none, below 0: forever.

    Raises:
        UserError: Another holder kept it for ``wait_s``.
    """
    lock = FileLock(path, timeout=wait_s, poll_interval=LOCK_POLL_S)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(taken) from None
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether somebody alive holds a lock file now."""
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


# -- files ------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str, *, durably: bool = True) -> None:
    """Replace a file's content; a reader finds the old text or the new one, never a part.

    Written beside it, flushed, renamed, then the folder is flushed: in this order a power cut
    leaves the name on one of the two whole files. Without ``durably`` nothing is flushed: processes
    that die change nothing, a power cut may.
    """
    beside = _write_beside(path, text, durably, 0o666)
    beside.replace(path)
    if durably:
        flush_folder(path.parent)


SEAL = "sha256"  # the key of a sealed document under which its own hash lies


def write_sealed(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object with the sha256 of its content inside: one file, so one rename."""
    write_atomically(path, json.dumps(sealed(document), indent=1))


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with the sha256 of its content inside."""
    plain = json.loads(json.dumps(document))  # as it is read again: keys are strings, no tuples
    return {**plain, SEAL: _hash_of(plain)}


def read_sealed(path: Path) -> dict[str, Any]:
    """The JSON object in a file that ``write_sealed`` wrote; one without a seal is taken as it is.

    Raises:
        FileNotFoundError: It is not there.
        UserError: It is no JSON object, or its content is not what was written.
    """
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is damaged: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds a JSON {type(document).__name__}, allowed: an object")
    said = document.pop(SEAL, None)
    if said is not None and said != (found := _hash_of(document)):
        raise UserError(f"{path}: is damaged: its content has sha256 {found}, it says {said}")
    return document


def _hash_of(document: Mapping[str, Any]) -> str:
    """sha256 of a document's canonical JSON."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sign_file(path: Path) -> None:
    """Write ``<file>.sha256`` beside a file that is finished, as sha256sum writes it."""
    write_atomically(_signature(path), f"{_sha256(path)}  {path.name}\n")


def is_as_signed(path: Path) -> bool:
    """Whether a file is what was signed; one that was never signed is taken as it is."""
    beside = _signature(path)
    return not beside.exists() or beside.read_text("utf-8").split()[:1] == [_sha256(path)]


def _signature(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def create_once(path: Path, text: str) -> None:
    """Make a file of mode 0600 with this content, whole from the start, unless it is there.

    A link, not a rename: of two processes that make it at the same time, the second one changes
    nothing, and both read the same content afterwards.
    """
    beside = _write_beside(path, text, True, 0o600)
    try:
        with suppress(FileExistsError):
            os.link(beside, path)
    finally:
        beside.unlink()
    flush_folder(path.parent)


def secret(path: Path) -> str:
    """The random secret kept in a file, made on first use with mode 0600.

    Raises:
        UserError: It is not what was written.
    """
    if not path.exists():
        create_once(path, secrets.token_hex(32))
        sign_file(path)
    if not is_as_signed(path):
        raise UserError(f"{path}: is damaged; `anchorage doctor` says what to do")
    return path.read_text(encoding="ascii").strip()


def _write_beside(path: Path, text: str, durably: bool, mode: int) -> Path:
    """A new file in the folder of ``path``, with a name no other writer has."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if durably:
            os.fsync(file.fileno())
    return beside


def remove_tree(folder: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder and all below it, kept weights too, whose folders nobody may write in."""
    for place, _, _ in os.walk(folder):
        with suppress(OSError):
            Path(place).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=ignore_errors)


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
